"""The reference implementation's numbers, met on a GPU by every way through the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.on_gpu import needs_gpu
from helpers import cut, largest, relative, through_cache
from safetensors.torch import load_file
from tolerances import GPU_BFLOAT16, GPU_LOGITS, GRADIENT, LOSS
from torch import Tensor

from hymba import HymbaCache, HymbaForCausalLM
from hymba.decoding import DecodeStep, why_not_fused
from hymba.hub import our_name

pytestmark = needs_gpu

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
LAYOUT = "released-layout"
"""The case of the ways that every case would take alike; most of the time here goes into compiling kernels."""


@cache
def _loaded(case: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    model = HymbaForCausalLM.from_pretrained(GOLDEN / case, dtype=dtype).to("cuda").eval()
    want = load_file(GOLDEN / case / "expected.safetensors", device="cuda")
    return model, want


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@torch.no_grad()
def test_forward(case: str) -> None:
    model, want = _loaded(case, torch.float32)
    out = model(want["input_ids"], labels=want["input_ids"], use_cache=False, output_hidden_states=True)
    assert largest(out.logits, want["logits"]) <= GPU_LOGITS
    assert abs(float(out.loss) / float(want["loss"]) - 1) <= LOSS
    meta = model.config.num_memory_tokens
    for i, hidden in enumerate(out.hidden_states):
        assert largest(hidden[:1], want[f"hidden_states.{i}"][:, meta:]) <= GPU_LOGITS, f"layer {i}"


@torch.no_grad()
def test_forward_in_bfloat16(case: str) -> None:
    model, want = _loaded(case, torch.bfloat16)
    logits = model(want["input_ids"], use_cache=False).logits
    assert relative(logits, want["logits"]) <= GPU_BFLOAT16


def test_gradients(case: str) -> None:
    model, want = _loaded(case, torch.float32)
    model.train()
    model(want["input_ids"], labels=want["input_ids"], use_cache=False).loss.backward()
    model.eval()
    parameters = dict(model.named_parameters())
    checked = [name.removeprefix("grad.") for name in want if name.startswith("grad.")]
    assert len(checked) >= 20
    for name in checked:
        error = relative(parameters[our_name(name)].grad, want[f"grad.{name}"])
        assert error <= GRADIENT, f"{name}: {error:.2e}"
    model.zero_grad()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_in_chunks(static: bool) -> None:
    model, want = _loaded(LAYOUT, torch.float32)
    ids = want["input_ids"]
    held = HymbaCache(model.config, max_length=ids.shape[1] if static else None)
    logits = through_cache(model, ids, cut(ids.shape[1], random.Random(0), most=9), cache=held)
    assert largest(logits, want["logits"]) <= GPU_LOGITS


@torch.no_grad()
def test_steps_in_bfloat16() -> None:
    """By modules: the fused step refuses heads as narrow as these, and is tested at the released shape."""
    model, want = _loaded(LAYOUT, torch.bfloat16)
    assert why_not_fused(model) is not None
    ids = want["input_ids"]
    held = HymbaCache(model.config, max_length=ids.shape[1])
    parts = [model(ids[:, :2], past_key_values=held).logits]
    step = DecodeStep(model, held, fused=False)
    for t in range(2, ids.shape[1]):
        step.tokens.copy_(ids[:, t])
        step.run()
        parts.append(step.logits[:, None].clone())
    assert relative(torch.cat(parts, dim=1), want["logits"]) <= GPU_BFLOAT16


@pytest.mark.parametrize("kind", ["left", "right"])
@torch.no_grad()
def test_in_a_padded_batch(kind: str) -> None:
    model, want = _loaded(LAYOUT, torch.float32)
    rows, length = want["input_ids"].shape
    ids = torch.full((rows, length + 7), 5, device="cuda")
    mask = torch.zeros_like(ids)
    for row in range(rows):
        first = (7 if kind == "left" else 0) if row == 0 else 3
        ids[row, first : first + length], mask[row, first : first + length] = want["input_ids"][row], 1
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row in range(rows):
        assert largest(logits[row, mask[row] == 1], want["logits"][row]) <= GPU_LOGITS


@pytest.mark.parametrize(
    ("case", "kind"), [*((name, "static") for name in CASES), (LAYOUT, "dynamic")], ids=lambda value: value
)
def test_greedy_generation(case: str, kind: str) -> None:
    model, want = _loaded(case, torch.float32)
    for name, expected in want.items():
        if name.startswith("greedy."):
            prompt = int(name.removeprefix("greedy."))
            new = expected.shape[1] - prompt
            out = model.generate(
                expected[:, :prompt], do_sample=False, min_new_tokens=new, max_new_tokens=new, eos_token_id=None,
                cache_implementation=kind,
            )  # fmt: skip
            assert out.tolist() == expected.tolist(), name
