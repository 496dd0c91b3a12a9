"""Linear layers of a single row: what one decode step of a batch of one spends its time on.

A matrix-vector product reads each weight once, so its floor is the weight's bytes over the memory bandwidth. What
stands before and after the product (norm, merge of two branches, convolution step, gate, residual) rides along, so
that a decode step is few launches. One program takes some output features and the whole depth; its weights are on
their way before the kernel in front has finished (programmatic dependent launch, see `overlaps`).

Multiplied and summed in float32. Norms scale after the product: rmsnorm(x) w = (x w) / rms(x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import overlaps, release_next, wait_for_previous

PLAIN, NORM, MERGE, CONV = 0, 1, 2, 3


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gemv_kernel(
    x_ptr, x2_ptr, norm_ptr, norm2_ptr, window_ptr, conv_bias_ptr, weight_ptr, weight2_ptr, bias_ptr, out_ptr,
    N, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr,
    RELU2: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BN output features; BK is at least K."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = n < N
    here = k < K
    tile = n.to(tl.int64)[:, None] * K + k[None, :]
    mask = inside[:, None] & here[None, :]
    weight = tl.load(weight_ptr + tile, mask=mask, other=0.0)
    if GATED:
        weight2 = tl.load(weight2_ptr + tile, mask=mask, other=0.0)
    if KIND == 1 or KIND == 2:
        norm = tl.load(norm_ptr + k, mask=here, other=0.0).to(tl.float32)
    if KIND == 2:
        norm2 = tl.load(norm2_ptr + k, mask=here, other=0.0).to(tl.float32)
    if KIND == 3:
        # The window was written a step ago.
        total = tl.load(conv_bias_ptr + k, mask=here, other=0.0).to(tl.float32)
        for tap in tl.static_range(TAPS - 1):
            before = tl.load(window_ptr + tap * K + k, mask=here, other=0.0).to(tl.float32)
            total += before * tl.load(norm_ptr + k * TAPS + tap, mask=here, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + k * TAPS + (TAPS - 1), mask=here, other=0.0).to(tl.float32)
    if OVERLAPS and not EARLY:
        wait_for_previous()
        release_next()
    x = tl.load(x_ptr + k, mask=here, other=0.0).to(tl.float32)
    if KIND == 1 or KIND == 2:
        square = tl.sum(x * x, axis=0)
        x = x * norm
    if KIND == 2:
        x = x * (0.5 * tl.rsqrt(square / K + eps))
    if OVERLAPS and EARLY and KIND == 2:
        wait_for_previous()
        release_next()
    if KIND == 2:
        other = tl.load(x2_ptr + k, mask=here, other=0.0).to(tl.float32)
        square = tl.sum(other * other, axis=0)
        other = other * norm2
    if KIND == 3:
        x = tl.where(here, _silu(total + x * norm), 0.0)
    y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
    if KIND == 1:
        y = y * tl.rsqrt(square / K + eps)
    if KIND == 2:
        y += tl.sum(weight.to(tl.float32) * other[None, :], axis=1) * (0.5 * tl.rsqrt(square / K + eps))
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(weight2.to(tl.float32) * x[None, :], axis=1)
        if KIND == 1:
            up = up * tl.rsqrt(square / K + eps)
        y = _silu(y) * up
    if RELU2:
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    if OVERLAPS and EARLY and KIND != 2:
        # Not before this: the memory of the output may still be in use.
        wait_for_previous()
        release_next()
    if ADD:
        y += tl.load(out_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=inside)


def _blocks(features: int, depth: int, gated: bool) -> tuple[int, int]:
    """Output features per program, and warps: about 16 KB of weights a program."""
    if features <= 256:
        return 1, 8
    wide = triton.next_power_of_2(depth)
    if wide >= 4096:
        return (2, 8) if wide >= 8192 else (4, 8)
    return (2 if gated else 4), 4


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    merge: tuple[Tensor, Tensor] | None = None,
    conv: tuple[Tensor, Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    relu2: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    early: bool = False,
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """`f(x) W^T` for one row, with what surrounds it in the block.

    Args:
        x: (1, k), last dimension contiguous. weight: (n, k) contiguous.
        bias: (n,).
        norm: (k,) weight of an RMS norm on x.
        merge: second branch (1, k) and its norm weight (k,): the input is the mean of both normed branches.
        conv: depthwise weight (k, taps), bias (k,) and window (1, taps - 1, k): the input is the activated convolution
            step of x; the window is only read.
        gate: (n, k): the output is `silu(x gate^T) * (x W^T)`.
        relu2: the output is `relu(x W^T)^2`.
        add_to: (1, n): the result is added to it in place.
        out: (1, n) to write to, of any dtype; by default new, in `x.dtype`.
        early: x (the first branch of a merge) was not written by the kernel launched just before this one.
        blocks: output features per program, and warps.

    Returns:
        (1, n): `add_to` or `out` when given.
    """
    features, depth = weight.shape
    if x.shape != (1, depth):
        raise ValueError(f"x is {tuple(x.shape)}; expected (1, {depth})")
    kind = CONV if conv is not None else MERGE if merge is not None else NORM if norm is not None else PLAIN
    if add_to is not None:
        out = add_to
    elif out is None:
        out = torch.empty(1, features, dtype=x.dtype, device=x.device)
    x2, norm2 = merge if merge is not None else (x, x)
    window = conv_bias = x
    if conv is not None:
        norm, conv_bias, window = conv
    first, second = (weight, weight) if gate is None else (gate, weight)
    bn, warps = blocks or _blocks(features, depth, gate is not None)
    programs = triton.cdiv(features, bn)
    flags = overlaps(x)
    _gemv_kernel[(programs,)](
        x, x2, x if norm is None else norm, norm2, window, conv_bias, first, second, x if bias is None else bias, out,
        features, depth, eps, BN=bn, BK=triton.next_power_of_2(depth), KIND=kind,
        TAPS=0 if conv is None else conv[0].shape[1], GATED=gate is not None, RELU2=relu2, ADD=add_to is not None,
        BIAS=bias is not None, EARLY=early, num_warps=warps, **flags,
    )  # fmt: skip
    return out
