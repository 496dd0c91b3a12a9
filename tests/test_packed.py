"""Packed rows: several documents in one row, each as if it stood alone behind the meta tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build, gradients, largest, relative, some_ids
from safetensors.torch import load_file
from tolerances import FLOAT64, FLOAT64_GRADIENT, GRADIENT, LOGITS, LOSS
from torch import Tensor

from hymba import HymbaForCausalLM
from hymba.inputs import InputError

GOLDEN = sorted(path for path in (Path(__file__).parent / "parity" / "golden").iterdir() if path.is_dir())


def _described(lengths: list[int]) -> dict[str, dict[str, Tensor]]:
    """One row of documents of these lengths, in every way that collators describe it."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    longest = max(lengths)
    flash = {"cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": numbers},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds},
        "all": {"position_ids": positions, "seq_idx": numbers, "cu_seq_lens_q": bounds, **flash},
        # Document numbers need not count up, and positions may stand without a batch dimension.
        "other numbers": {"seq_idx": (7 - 3 * numbers), "position_ids": positions[0]},
    }


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_golden_rows_in_one(folder: Path) -> None:
    """Both rows of a golden case as documents of one: the reference's logits, loss and gradients."""
    model = HymbaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = load_file(folder / "expected.safetensors")
    ids = want["input_ids"]
    rows, length = ids.shape
    for described in _described([length] * rows).values():
        labels = ids.clone()
        # What follows a document's last token is no target.
        labels[:, 0] = -100
        out = model(ids.view(1, -1), labels=labels.view(1, -1), use_cache=False, **described)
        assert largest(out.logits.view_as(want["logits"]), want["logits"]) <= LOGITS
        assert abs(out.loss.item() / want["loss"].item() - 1) <= LOSS
    model.zero_grad()
    out.loss.backward()
    assert relative(model.model.meta_tokens.weight.grad, want["grad.model.memory_tokens"]) <= GRADIENT


@pytest.mark.parametrize("way", list(_described([1])))
@pytest.mark.parametrize("lengths", [[9, 14, 1, 6], [1, 1, 1], [30], [2, 27]], ids=str)
def test_documents_equal_apart(way: str, lengths: list[int]) -> None:
    model = build()
    documents = [some_ids(1, n, seed=n + i) for i, n in enumerate(lengths)]
    weight = torch.linspace(-1, 1, model.config.hidden_size, dtype=torch.float64)
    described = {k: v for k, v in _described(lengths)[way].items() if k in ("position_ids", "seq_idx", "cu_seq_lens_q")}
    packed = model.model(torch.cat(documents, dim=1), use_cache=False, **described).last_hidden_state
    (packed @ weight).pow(2).sum().backward()
    found = gradients(model)
    apart = [model.model(document, use_cache=False).last_hidden_state for document in documents]
    assert largest(packed, torch.cat(apart, dim=1)) <= FLOAT64
    sum((out @ weight).pow(2).sum() for out in apart).backward()
    assert_same_gradients(found, gradients(model), FLOAT64_GRADIENT)


def test_rows_packed_in_different_places() -> None:
    model = build()
    lengths = [[5, 9, 2], [12, 4], [16]]
    ids = some_ids(3, 16)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model.model(ids, position_ids=positions).last_hidden_state
        for i, row in enumerate(lengths):
            at = 0
            for n in row:
                alone = model.model(ids[i : i + 1, at : at + n]).last_hidden_state
                assert largest(packed[i : i + 1, at : at + n], alone) <= FLOAT64
                at += n


def test_one_document_is_a_plain_row() -> None:
    model = build()
    ids = some_ids(2, 13)
    with torch.no_grad():
        want = model.model(ids, use_cache=False).last_hidden_state
        for described in (
            {"position_ids": torch.arange(13)[None]},
            {"position_ids": torch.arange(13).expand(2, -1)},
            {"seq_idx": torch.zeros(1, 13, dtype=torch.int32)},
        ):
            assert largest(model.model(ids, use_cache=False, **described).last_hidden_state, want) <= FLOAT64


def test_a_neighbour_changes_nothing() -> None:
    """Bit for bit: whatever stands before or behind a document, its outputs and gradients are the same."""
    model = build()
    document = some_ids(1, 8)
    outputs, grads = [], []
    for seed in (1, 2):
        ids = torch.cat([some_ids(1, 6, seed=seed), document, some_ids(1, 5, seed=seed + 7)], dim=1)
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        positions = torch.cat([torch.arange(n) for n in (6, 8, 5)])[None]
        out = model.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[:, 6:14]
        out.pow(2).sum().backward()
        outputs.append(out.detach())
        grads.append(embeds.grad)
    assert torch.equal(*outputs)
    assert not grads[0][:, :6].any() and not grads[0][:, 14:].any()
    assert torch.equal(grads[0][:, 6:14], grads[1][:, 6:14])


def test_positions_that_start_elsewhere() -> None:
    """A document cut in two goes on counting where the caller says: rotary positions follow."""
    model = build(num_memory_tokens=0, sliding_window=None, kv_reuse_group=None)
    ids = some_ids(1, 10)
    with torch.no_grad():
        plain = model.model(ids, use_cache=False).last_hidden_state
        shifted = model.model(ids, position_ids=torch.arange(40, 50)[None]).last_hidden_state
    # Without meta tokens only distances count; float32 angles leave a difference.
    assert largest(plain, shifted) <= 1e-3


def test_packed_rows_have_no_cache() -> None:
    model = build()
    for name, described in _described([3, 4]).items():
        kept = {k: v for k, v in described.items() if k in ("position_ids", "seq_idx", "cu_seq_lens_q")}
        assert model(some_ids(1, 7), **kept).past_key_values is None, name
        with pytest.raises(InputError, match="use_cache=False"):
            model(some_ids(1, 7), use_cache=True, **kept)


def test_padding_behind_packed_documents_is_a_document_of_its_own() -> None:
    """As collators pad to a multiple: the tail has positions of its own and no targets, with and without a mask."""
    model = build()
    lengths = [6, 3]
    documents = [some_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([*documents, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    tail: Any
    for tail in (torch.arange(4), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        positions = torch.cat([*(torch.arange(n) for n in lengths), tail])[None]
        mask = torch.tensor([[1] * 9 + [0] * 4])
        for extra in ({}, {"attention_mask": mask}):
            with torch.no_grad():
                out = model.model(ids, position_ids=positions, use_cache=False, **extra).last_hidden_state
                apart = torch.cat([model.model(d, use_cache=False).last_hidden_state for d in documents], dim=1)
            assert largest(out[:, :9], apart) <= FLOAT64
