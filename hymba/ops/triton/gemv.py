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

from ._common import multiprocessors, overlaps, release_next, wait_for_previous

PLAIN, NORM, MERGE, CONV = 0, 1, 2, 3


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _weights(weight_ptr, block, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """(BN, BK): the weights of one block of output features, zeros outside."""
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _gemv_kernel(
    x_ptr, x2_ptr, norm_ptr, norm2_ptr, window_ptr, conv_bias_ptr, weight_ptr, weight2_ptr, bias_ptr, out_ptr,
    N, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr,
    RELU2: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, STREAM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Every program takes one block of BN output features after the other; BK is at least K."""
    block = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, BK)
    here = k < K
    weight = _weights(weight_ptr, block, N, K, BN, BK)
    if GATED:
        weight2 = _weights(weight2_ptr, block, N, K, BN, BK)
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
    scale = 1.0
    if KIND == 1:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
        x = x * norm
    if KIND == 2:
        x = x * norm * (0.5 * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps))
        if OVERLAPS and EARLY:
            wait_for_previous()
            release_next()
        other = tl.load(x2_ptr + k, mask=here, other=0.0).to(tl.float32)
        x += other * norm2 * (0.5 * tl.rsqrt(tl.sum(other * other, axis=0) / K + eps))
    if KIND == 3:
        x = tl.where(here, _silu(total + x * norm), 0.0)
    waits = OVERLAPS and EARLY and KIND != 2
    for start in range(block, tl.cdiv(N, BN), programs):
        # The next block's weights are on their way while this one is worked on.
        if STREAM:
            weight_next = _weights(weight_ptr, start + programs, N, K, BN, BK)
            if GATED:
                weight2_next = _weights(weight2_ptr, start + programs, N, K, BN, BK)
        n = start * BN + tl.arange(0, BN)
        inside = n < N
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1) * scale
        if BIAS:
            y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            y = _silu(y) * tl.sum(weight2.to(tl.float32) * x[None, :], axis=1) * scale
        if RELU2:
            y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
        if waits:
            # Not before this: the memory of the output may still be in use.
            wait_for_previous()
            release_next()
        if ADD:
            y += tl.load(out_ptr + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=inside)
        if STREAM:
            weight = weight_next
            if GATED:
                weight2 = weight2_next


def _blocks(features: int, depth: int, gated: bool) -> tuple[int, int, int]:
    """Output features of a block, warps, and programs per multiprocessor (0: one block each)."""
    if features <= 256:
        return 1, 8, 0
    wide = triton.next_power_of_2(depth)
    if wide >= 4096:
        return (2, 8, 2) if wide >= 8192 else (2, 8, 3)
    return (2, 4, 4) if gated else (4, 4, 5)


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
    blocks: tuple[int, int, int] | None = None,
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
        blocks: output features of a block, warps, and programs per multiprocessor (0: a program for each block).

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
    bn, warps, resident = blocks or _blocks(features, depth, gate is not None)
    programs = triton.cdiv(features, bn)
    if resident:
        programs = min(programs, resident * (multiprocessors(x.device) if x.is_cuda else 1))
    flags = overlaps(x)
    _gemv_kernel[(programs,)](
        x, x2, x if norm is None else norm, norm2, window, conv_bias, first, second, x if bias is None else bias, out,
        features, depth, eps, BN=bn, BK=triton.next_power_of_2(depth), KIND=kind,
        TAPS=0 if conv is None else conv[0].shape[1], GATED=gate is not None, RELU2=relu2, ADD=add_to is not None,
        BIAS=bias is not None, EARLY=early, STREAM=resident > 0, num_warps=warps, **flags,
    )  # fmt: skip
    return out
