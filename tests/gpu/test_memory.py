"""The estimates of `hymba.memory` against what PyTorch's allocator gives out, at the released shape."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from gpu.on_gpu import ids_on_gpu, model_on_gpu, needs_gpu, released

from hymba import HymbaCache
from hymba.memory import check_fits, free_bytes, generation_bytes, training_bytes

pytestmark = needs_gpu

WITHIN = 0.15
"""Largest relative difference of an estimate from the measured growth."""
LAYERS = 8


def growth(run: Callable[[], None]) -> int:
    """Bytes that a second call of `run` adds at its peak to what is allocated."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture(autouse=True)
def _nothing_else() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_generation(static: bool) -> None:
    model = model_on_gpu(LAYERS, dtype=torch.bfloat16)
    ids = ids_on_gpu(4, 8192)

    @torch.no_grad()
    def run() -> None:
        model(ids, past_key_values=HymbaCache(model.config, max_length=8200 if static else None), logits_to_keep=1)

    need = generation_bytes(model.config, batch=4, prompt=8192, length=8200, static=static)
    measured, estimate = growth(run), need.total - need.weights
    print(f"generation {static=}: measured {measured / 2**30:.3f} GiB, estimate {estimate / 2**30:.3f}, {need}")
    assert abs(estimate / measured - 1) < WITHIN


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("way", ["backward", "step"])
def test_training(way: str, policy: str) -> None:
    dtype = torch.bfloat16 if way == "backward" else torch.float32
    model = model_on_gpu(LAYERS, dtype=dtype).train()
    model.set_activation_checkpointing(policy)
    model.use_fused_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = ids_on_gpu(1, 8192)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=way == "step"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if way == "step":
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    need = training_bytes(
        model.config, batch=1, length=8192, parameter_dtype=dtype, optimizer=way == "step", checkpointing=policy,
        fused_loss=True,
    )  # fmt: skip
    # Parameters and, from the first step on, their moments are there before the second.
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + need.optimizer
    measured, estimate = growth(run), need.total - held
    print(f"{way} {policy}: measured {measured / 2**30:.3f} GiB, estimate {estimate / 2**30:.3f}, {need}")
    assert abs(estimate / measured - 1) < WITHIN


def test_what_is_free() -> None:
    free = free_bytes("cuda")
    assert free is not None and 0 < free <= torch.cuda.get_device_properties(0).total_memory
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    less = free_bytes("cuda")
    assert less is not None and abs(free - less - held.numel()) < 1 << 26

    def need(batch: int, length: int) -> object:
        return generation_bytes(released(), batch=batch, prompt=length, length=length)

    with pytest.raises(ValueError, match=r"would fit: .* of 100000 rows"):
        check_fits("generation", need, batch=100_000, length=8192, device="cuda")
