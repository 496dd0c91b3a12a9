"""The reference implementation's numbers (golden/README.md), met on every way through the model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cut, largest, relative, through_cache
from safetensors.torch import load_file
from tolerances import GRADIENT, LOGITS, LOSS
from torch import Tensor

from hymba import HymbaCache, HymbaForCausalLM
from hymba.hub import our_name
from hymba.nn import run_prefix

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@cache
def _loaded(case: str) -> tuple[Any, dict[str, Tensor]]:
    model = HymbaForCausalLM.from_pretrained(GOLDEN / case, dtype=torch.float32).eval()
    return model, load_file(GOLDEN / case / "expected.safetensors")


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    return _loaded(request.param)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_forward(golden: Any, attention: str) -> None:
    model, want = golden
    model.set_attn_implementation(attention)
    out = model(want["input_ids"], labels=want["input_ids"], use_cache=False)
    model.set_attn_implementation("sdpa")
    assert largest(out.logits, want["logits"]) <= LOGITS
    assert abs(float(out.loss) / float(want["loss"]) - 1) <= LOSS


@torch.no_grad()
def test_hidden_states(golden: Any) -> None:
    model, want = golden
    meta = model.config.num_memory_tokens
    inner = model.model
    text = inner(want["input_ids"][:1], output_hidden_states=True, use_cache=False).hidden_states
    prefix = run_prefix(inner.layers, inner.meta_tokens(), lenders=inner.lenders)[1]
    prefix[-1] = inner.final_norm(prefix[-1])
    assert len(text) == len(prefix) == model.config.num_hidden_layers + 1
    for i, (before, after) in enumerate(zip(prefix, text, strict=True)):
        expected = want[f"hidden_states.{i}"]
        assert largest(after, expected[:, meta:]) <= LOGITS, f"text, layer {i}"
        assert largest(before, expected[:, :meta]) <= LOGITS, f"meta tokens, layer {i}"


def test_gradients(golden: Any) -> None:
    model, want = golden
    model.zero_grad()
    model(want["input_ids"], labels=want["input_ids"], use_cache=False).loss.backward()
    parameters = dict(model.named_parameters())
    checked = [name.removeprefix("grad.") for name in want if name.startswith("grad.")]
    assert len(checked) >= 20
    for name in checked:
        error = relative(parameters[our_name(name)].grad, want[f"grad.{name}"])
        assert error <= GRADIENT, f"{name}: {error:.2e}"


def test_gradients_in_evaluation_with_a_cache(golden: Any) -> None:
    """The default outside training keeps a cache; the gradient is the same all the same."""
    model, want = golden
    model.zero_grad()
    model.eval()(want["input_ids"], labels=want["input_ids"], use_cache=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert name.endswith("k_norm.weight") or parameter.grad is not None, name
    grad = dict(model.named_parameters())["model.meta_tokens.weight"].grad
    assert relative(grad, want["grad.model.memory_tokens"]) <= GRADIENT


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", ["one", "tokens", "random", "random-2"])
def test_through_the_cache(golden: Any, static: bool, chunks: str) -> None:
    model, want = golden
    ids = want["input_ids"]
    length = ids.shape[1]
    sizes = {"one": [length], "tokens": [1] * length}.get(chunks) or cut(length, random.Random(chunks), most=9)
    cache = HymbaCache(model.config, max_length=length if static else None)
    assert largest(through_cache(model, ids, sizes, cache=cache), want["logits"]) <= LOGITS


def _padded(ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Row 0 with padding of a kind among its tokens, row 1 with none at first; pads carry a real token's id."""
    rows, length = ids.shape
    extra = {"left": 7, "right": 7, "holes": 9}[kind]
    wide = torch.full((rows, length + extra), 5)
    mask = torch.zeros(rows, length + extra, dtype=torch.long)
    for row in range(rows):
        if kind == "holes":
            where = torch.randperm(length + extra, generator=torch.Generator().manual_seed(row))[:length].sort().values
        else:
            # The two rows are padded by different amounts.
            first = extra - row * 4 if kind == "left" else row * 2
            where = torch.arange(length) + first
        wide[row, where], mask[row, where] = ids[row], 1
    return wide, mask


@pytest.mark.parametrize("static", [None, False, True], ids=["no-cache", "dynamic", "static"])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@torch.no_grad()
def test_in_a_padded_batch(golden: Any, kind: str, static: bool | None) -> None:
    model, want = golden
    ids, mask = _padded(want["input_ids"], kind)
    if static is None:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    else:
        cache = HymbaCache(model.config, max_length=ids.shape[1] if static else None)
        sizes = cut(ids.shape[1], random.Random(kind), most=11)
        logits = through_cache(model, ids, sizes, mask=mask, cache=cache)
    for row in range(len(ids)):
        assert largest(logits[row, mask[row] == 1], want["logits"][row]) <= LOGITS


@pytest.mark.parametrize("cache", ["dynamic", "static", "off", "chunked prefill"])
def test_greedy_generation(golden: Any, cache: str) -> None:
    model, want = golden
    options: dict[str, Any] = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "off": {"use_cache": False},
        "chunked prefill": {"prefill_chunk_size": 6},
    }[cache]
    for name, expected in want.items():
        if name.startswith("greedy."):
            prompt = int(name.removeprefix("greedy."))
            new = expected.shape[1] - prompt
            out = model.generate(
                expected[:, :prompt], do_sample=False, min_new_tokens=new, max_new_tokens=new, eos_token_id=None,
                **options,
            )  # fmt: skip
            assert out.tolist() == expected.tolist(), name


def test_greedy_generation_of_a_left_padded_batch(golden: Any) -> None:
    model, want = golden
    greedy = {int(k.removeprefix("greedy.")): v[0] for k, v in want.items() if k.startswith("greedy.")}
    longest, new = max(greedy), min(len(v) - p for p, v in greedy.items())
    ids = torch.full((len(greedy), longest), 9)
    mask = torch.zeros_like(ids)
    for row, (prompt, tokens) in enumerate(greedy.items()):
        ids[row, longest - prompt :], mask[row, longest - prompt :] = tokens[:prompt], 1
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None)
    for row, (prompt, tokens) in enumerate(greedy.items()):
        assert out[row, longest:].tolist() == tokens[prompt : prompt + new].tolist()
