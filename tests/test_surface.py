"""What researchers assume of a transformers model, beyond `generate` and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, alone, build, largest, padded_ids, randomise, some_ids
from tolerances import FLOAT32, FLOAT64, FLOAT64_LOGITS
from torch import Tensor
from transformers import AutoModel

from hymba import HymbaForCausalLM, HymbaModel


@pytest.fixture
def model() -> Any:
    return build()


# Inputs and outputs.


def test_logits_are_float32_whatever_the_weights_are() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = build(dtype=dtype)(some_ids(1, 4))
        assert out.logits.dtype == torch.float32
        assert out.logits.shape == (1, 4, VOCAB)


def test_inputs_embeds_equal_ids(model: Any) -> None:
    ids, mask = padded_ids()
    embeds = model.get_input_embeddings()(ids)
    for extra in ({}, {"attention_mask": mask}, {"use_cache": False}):
        assert torch.equal(model(inputs_embeds=embeds, **extra).logits, model(ids, **extra).logits)
    wanted = embeds.detach().requires_grad_()
    model(inputs_embeds=wanted, labels=ids).loss.backward()
    assert wanted.grad.abs().sum(dim=(1, 2)).all()


def test_logits_to_keep(model: Any) -> None:
    ids, mask = padded_ids()
    want = model(ids, attention_mask=mask).logits
    for kept, expected in ((0, want), (1, want[:, -1:]), (4, want[:, -4:]), (99, want)):
        assert largest(model(ids, attention_mask=mask, logits_to_keep=kept).logits, expected) <= FLOAT64_LOGITS
    index = torch.tensor([0, 12, 3])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=index).logits, want[:, index])
    with pytest.raises(ValueError, match="logits_to_keep=-1"):
        model(ids, logits_to_keep=-1)


@pytest.mark.parametrize("cached", [False, True])
def test_hidden_states(model: Any, cached: bool) -> None:
    """One row per text token: the embedding, then after each layer, the last one behind the final norm."""
    ids, mask = padded_ids()
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=cached)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    embedded = model.model.embed_tokens(ids) * mask[..., None]
    assert torch.equal(out.hidden_states[0], embedded)
    inner = model.model(ids, attention_mask=mask, use_cache=False)
    assert largest(out.hidden_states[-1], inner.last_hidden_state) <= FLOAT64
    assert inner.hidden_states is None
    for row in range(len(ids)):
        single = model(ids[row][mask[row] == 1][None], output_hidden_states=True, use_cache=False).hidden_states
        for a, b in zip(out.hidden_states, single, strict=True):
            assert largest(a[row, mask[row] == 1], b[0]) <= FLOAT64
    model.config.output_hidden_states = True
    assert model(ids).hidden_states is not None


def test_tuples(model: Any) -> None:
    ids = some_ids(1, 4)
    out = model(ids, labels=ids, return_dict=False)
    assert isinstance(out, tuple) and out[0].dim() == 0 and out[1].shape == (1, 4, VOCAB)
    assert isinstance(model.model(ids, return_dict=False), tuple)


# Loss.


def test_labels_and_items_in_batch(model: Any) -> None:
    ids, mask = padded_ids()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    shifted = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), shifted, reduction="none")
    count = int((shifted != -100).sum())
    assert out.loss.item() == pytest.approx(losses.sum().item() / count, rel=1e-6)
    for items in (7, torch.tensor(7)):
        scaled = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
        assert scaled.item() == pytest.approx(losses.sum().item() / 7, rel=1e-6)
    shift = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    again = model(ids, attention_mask=mask, labels=labels, shift_labels=shift).loss
    assert float(again) == pytest.approx(float(out.loss), rel=1e-6)


# Size of the vocabulary.


def test_resize_token_embeddings(model: Any, tmp_path: Path) -> None:
    for tied in (True, False):
        model = build(tie_word_embeddings=tied, dtype=torch.float32)
        ids = some_ids(1, 6)
        want = model(ids).logits
        model.resize_token_embeddings(VOCAB + 7)
        assert model.config.vocab_size == VOCAB + 7
        # A product of another width may add in another order.
        assert largest(model(ids).logits[..., :VOCAB], want) <= FLOAT32
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model(torch.tensor([[VOCAB + 6]]), labels=torch.tensor([[VOCAB + 6]]))
        with pytest.raises(ValueError, match=f"allowed: 0 to {VOCAB + 6}"):
            model(torch.tensor([[VOCAB + 7]]))
        model.save_pretrained(tmp_path / str(tied))
        loaded = HymbaForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        model.resize_token_embeddings(VOCAB)
        assert torch.equal(model(ids).logits, want)


# Blocks and hooks.


def test_each_branch_is_a_modules_output(model: Any) -> None:
    """Forward hooks see both branches before fusion, and changing them changes the model."""
    ids = some_ids(2, 8)
    want = model(ids, use_cache=False).logits
    seen: dict[str, Tensor] = {}
    mixer = model.model.layers[1].mixer
    hooks = [
        branch.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name, branch in (("attention", mixer.attention), ("mamba", mixer.mamba))
    ]
    model(ids, use_cache=False)
    assert seen["attention"].shape == seen["mamba"].shape == (2, 8, model.config.d_inner)
    for hook in hooks:
        hook.remove()
    for branch in (mixer.attention, mixer.mamba):
        with branch.register_forward_hook(lambda m, a, out: torch.zeros_like(out)):
            assert largest(model(ids, use_cache=False).logits, want) > 1e-3


def test_every_tensor_matters() -> None:
    """The test models notice a change in any parameter: otherwise a fault could hide in one."""
    for fields in (
        {"mamba_proj_bias": True, "kq_norm": "rms", "tie_word_embeddings": False},
        {"kq_norm": "perhead-rms", "mlp_hidden_act": "relu2"},
    ):
        model = build(**fields)
        ids = some_ids(2, 15)
        want = model(ids).logits
        for name, parameter in model.named_parameters():
            if name.endswith("layers.2.mixer.attention.k_norm.weight"):
                continue  # a borrowing layer's, as in the release's layout
            with torch.no_grad():
                # One element, a small step.
                index = tuple(size // 2 for size in parameter.shape)
                parameter[index] += 0.1
                if name.endswith("embed_tokens.weight"):
                    parameter[ids[0, 3]] += 0.1
                assert largest(model(ids).logits, want) > 1e-5, name
                if name.endswith("embed_tokens.weight"):
                    parameter[ids[0, 3]] -= 0.1
                parameter[index] -= 0.1


def test_auto_model(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    inner = AutoModel.from_pretrained(tmp_path)
    assert type(inner) is HymbaModel
    ids = some_ids(1, 5)
    assert torch.equal(inner(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hymba"
    randomise(inner, seed=3)
    assert largest(alone(build(dtype=torch.float32), ids)[0], model(ids).logits[0]) == 0
