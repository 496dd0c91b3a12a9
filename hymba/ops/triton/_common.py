"""Device functions and launch helpers shared by the kernels.

Tiles are (T steps, BD channels). One warp owns a tile: its lanes lie along the channels and every thread holds all T
steps of its channels, so a recurrence over time is plain register code and needs no exchange between threads. Nothing
says this to the compiler outright. It follows from the loads: channels are contiguous and V of them are provably
aligned (batch strides come in units of V and are not specialised), so the compiler gives each thread V neighbouring
channels and no more. Time strides and d are compile-time constants: rows then differ by immediate offsets.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents as release_next
from triton.language.extra.cuda import gdc_wait as wait_for_previous

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def row(tile, t, k):
    """Row k of a (T, BD) tile. Through integers: adding 0 to an integer is free, the compiler keeps a float's + 0."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((t == k)[:, None], bits, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def element(values, t, k):
    """Element k of a (T,) integer vector."""
    return tl.sum(tl.where(t == k, values, 0), 0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to 2e-7 of its value, also where that is small.

    max(x, 0) + log1p(w) with w = exp(-|x|) in (0, 1]; log1p(w) / w is a Chebyshev fit of degree 8. The compiler's own
    logarithm takes 20 instructions and loses small values in 1 + w.
    """
    w = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    p = 0.005253457795
    p = p * w - 0.02958850739
    p = p * w + 0.07836166801
    p = p * w - 0.136747697
    p = p * w + 0.1911143108
    p = p * w - 0.2484436989
    p = p * w + 0.3331927134
    p = p * w - 0.4999950152
    p = p * w + 0.9999999705
    return tl.maximum(x, 0.0) + p * w


@triton.jit
def sigmoid(x):
    """Through rsqrt, one instruction, where a division is eight."""
    r = tl.rsqrt(1.0 + tl.exp2(-x * 1.4426950408889634))
    return r * r


@triton.jit
def fetch_lines(pointers, LEVEL: tl.constexpr):
    """Asks for the cache lines at pointers without waiting for them. Level 0 does nothing, as does the interpreter."""
    if LEVEL == 1:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
    elif LEVEL == 2:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def document_start(seq_row, t, end):
    """1 where a later document starts at step t (a vector), else 0."""
    here = tl.load(seq_row + t, mask=t < end, other=0)
    before = tl.load(seq_row + t - 1, mask=(t > 0) & (t < end), other=0)
    return ((t > 0) & (t < end) & (here != before)).to(tl.int32)


def channels_last(v: Tensor, vector: int) -> Tensor:
    """v itself when its channels are contiguous and its strides whole multiples of vector, else a copy that is."""
    if v.stride(2) == 1 and v.stride(0) % vector == 0 and v.stride(1) % vector == 0 and v.data_ptr() % 16 == 0:
        return v
    return v.contiguous()


def strides(vector: int, **tensors: Tensor) -> dict[str, int]:
    """Kernel arguments for each x=...: sx, the batch stride in units of vector, and SXL, the time stride."""
    out = {f"s{name}": v.stride(0) // vector for name, v in tensors.items()}
    return out | {f"S{name.upper()}L": v.stride(1) for name, v in tensors.items()}


def or_dummy(v: Tensor | None, like: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read."""
    return like if v is None else v


_HERE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Launches go to x's device, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def overlaps(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that may start before the one in front of it has finished.

    Such a kernel calls `release_next()` after `wait_for_previous()`, so that no more than two kernels are under way:
    before it waits it may read weights and what the kernel before the previous one wrote, and write nothing.
    """
    if INTERPRETED or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x (..., w) and the stride of its rows: itself when rows are dense and equally far apart, else a copy that is."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return x.contiguous(), x.shape[-1]
    far = expected = 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if far and stride != expected:
            return x.contiguous(), x.shape[-1]
        far = far or stride
        expected = stride * size
    return x, far or x.shape[-1]


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


__all__ = [
    "INTERPRETED", "channels_last", "document_start", "element", "on_device", "or_dummy", "overlaps", "processors",
    "release_next", "row", "rows_of", "sigmoid", "softplus", "strides", "wait_for_previous",
]  # fmt: skip
