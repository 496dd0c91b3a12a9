"""Linear layers for a handful of rows: what one decode step of a small batch spends its time on.

A product of few rows reads each weight once, so its floor is the weight's bytes over the memory bandwidth. What
stands before and after the product (norm, merge of two branches, convolution step, gate, residual) rides along, so
that a decode step is few launches. One program takes some output features of all rows and the whole depth.

Up to 16 rows. A single row is multiplied and summed in float32; more rows stand as the narrow side of a matrix
product. Norms scale after the product: rmsnorm(x) w = (x w) / rms(x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN, NORM, MERGE, CONV = 0, 1, 2, 3
MAX_ROWS = 16


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _inputs(
    x_ptr, x_row, w_ptr, state_ptr, bias_ptr, r, k, here, K,
    KIND: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A tile of inputs in float32 and, for a norm, the tile times the norm's weight. r and k broadcast."""
    x = tl.load(x_ptr + r * x_row + k, mask=here, other=0.0).to(tl.float32)
    scaled = x
    if KIND == 1 or KIND == 2:
        scaled = x * tl.load(w_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if KIND == 3:
        # The convolution of the token with the window before it.
        total = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * tl.load(w_ptr + k * TAPS + (TAPS - 1), mask=k < K, other=0.0).to(tl.float32)
        for tap in tl.static_range(TAPS - 1):
            before = tl.load(state_ptr + (r * (TAPS - 1) + tap) * K + k, mask=here, other=0.0).to(tl.float32)
            total += before * tl.load(w_ptr + k * TAPS + tap, mask=k < K, other=0.0).to(tl.float32)
        scaled = _silu(total)
        scaled = tl.where(here, scaled, 0.0)
    return x, scaled


@triton.jit
def _small_linear_kernel(
    x_ptr, x2_ptr, norm_ptr, norm2_ptr, state_ptr, conv_bias_ptr, weight_ptr, weight2_ptr, bias_ptr, out_ptr,
    rows, N, K, x_row, x2_row, out_row, eps,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KIND: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr, RELU2: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, M)
    inside = n < N
    rows_of_weight = weight_ptr + n.to(tl.int64)[:, None] * K
    rows_of_weight2 = weight2_ptr + n.to(tl.int64)[:, None] * K
    if M == 1:
        acc = tl.zeros((BN, BK), tl.float32)
        acc2 = tl.zeros((BN, BK), tl.float32)
        square = tl.zeros((BK,), tl.float32)
        square2 = tl.zeros((BK,), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            here = k < K
            weight = tl.load(rows_of_weight + k[None, :], mask=inside[:, None] & here[None, :], other=0.0)
            x, scaled = _inputs(x_ptr, x_row, norm_ptr, state_ptr, conv_bias_ptr, 0, k, here, K, KIND, TAPS)
            square += x * x
            acc += weight.to(tl.float32) * scaled[None, :]
            if GATED:
                other = tl.load(rows_of_weight2 + k[None, :], mask=inside[:, None] & here[None, :], other=0.0)
                acc2 += other.to(tl.float32) * scaled[None, :]
            if KIND == 2:
                x, scaled = _inputs(x2_ptr, x2_row, norm2_ptr, state_ptr, conv_bias_ptr, 0, k, here, K, KIND, TAPS)
                square2 += x * x
                acc2 += weight.to(tl.float32) * scaled[None, :]
        y = tl.sum(acc, axis=1)[:, None]
        y2 = tl.sum(acc2, axis=1)[:, None]
        mean = (tl.sum(square, axis=0) / K + r)[None, :]
        mean2 = (tl.sum(square2, axis=0) / K + r)[None, :]
    else:
        y = tl.zeros((BN, M), tl.float32)
        y2 = tl.zeros((BN, M), tl.float32)
        mean = tl.zeros((1, M), tl.float32)
        mean2 = tl.zeros((1, M), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            here = (k < K)[:, None] & (r < rows)[None, :]
            weight = tl.load(rows_of_weight + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
            x, scaled = _inputs(
                x_ptr, x_row, norm_ptr, state_ptr, conv_bias_ptr, r[None, :], k[:, None], here, K, KIND, TAPS
            )
            mean += tl.sum(x * x, axis=0)[None, :] / K
            y += tl.dot(weight, scaled.to(weight.dtype), out_dtype=tl.float32, input_precision="ieee")
            if GATED:
                other = tl.load(rows_of_weight2 + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
                y2 += tl.dot(other, scaled.to(other.dtype), out_dtype=tl.float32, input_precision="ieee")
            if KIND == 2:
                x, scaled = _inputs(
                    x2_ptr, x2_row, norm2_ptr, state_ptr, conv_bias_ptr, r[None, :], k[:, None], here, K, KIND, TAPS
                )
                mean2 += tl.sum(x * x, axis=0)[None, :] / K
                y2 += tl.dot(weight, scaled.to(weight.dtype), out_dtype=tl.float32, input_precision="ieee")
    if KIND == 1 or KIND == 2:
        scale = 1.0 / tl.sqrt(mean + eps)
        y *= scale
        if GATED:
            y2 *= scale
    if KIND == 2:
        y = (y + y2 / tl.sqrt(mean2 + eps)) * 0.5
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = _silu(y) * y2
    if RELU2:
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    at = out_ptr + r[None, :] * out_row + n[:, None]
    here = inside[:, None] & (r < rows)[None, :]
    if ADD:
        y += tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=here)


def _blocks(rows: int, features: int, wide: bool) -> tuple[int, int, int]:
    """Output features per program, depth per step, warps."""
    if rows == 1:
        if features <= 256:
            return 1, 1024, 4
        return (4, 1024, 4) if features <= 4096 else (8, 1024, 8)
    return (16, 256, 4) if features <= 4096 else (32, 256, 4)


def small_linear(
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
    out_dtype: torch.dtype | None = None,
    blocks: tuple[int, int, int] | None = None,
) -> Tensor:
    """`f(x) W^T` for up to 16 rows, with what surrounds it in the block.

    Args:
        x: (b, k), last dimension contiguous. weight: (n, k) contiguous.
        bias: (n,).
        norm: (k,) weight of an RMS norm on x.
        merge: second branch (b, k) and its norm weight (k,): the input is the mean of both normed branches.
        conv: depthwise weight (k, taps), bias (k,) and window (b, taps - 1, k): the input is the activated convolution
            step of x; the window is only read.
        gate: (n, k): the output is `silu(x gate^T) * (x W^T)`.
        relu2: the output is `relu(x W^T)^2`.
        add_to: (b, n): the result is added to it in place.
        blocks: output features per program, depth per step, warps.

    Returns:
        (b, n), `add_to` itself when given.
    """
    rows, depth = x.shape
    features = weight.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"x has {rows} rows; allowed: up to {MAX_ROWS}")
    kind = CONV if conv is not None else MERGE if merge is not None else NORM if norm is not None else PLAIN
    out = add_to
    if out is None:
        out = torch.empty(rows, features, dtype=out_dtype or x.dtype, device=x.device)
    x2, norm2 = merge if merge is not None else (x, norm)
    window = conv_bias = x
    if conv is not None:
        norm, conv_bias, window = conv
    first, second = (weight, weight) if gate is None else (gate, weight)
    bn, bk, warps = blocks or _blocks(rows, features, gate is not None)
    _small_linear_kernel[(triton.cdiv(features, bn),)](
        x, x2, norm if norm is not None else x, norm2 if norm2 is not None else x, window, conv_bias,
        first, second, bias if bias is not None else x, out,
        rows, features, depth, x.stride(0), x2.stride(0), out.stride(0), eps,
        M=1 if rows == 1 else 16, BN=bn, BK=bk, KIND=kind, TAPS=0 if conv is None else conv[0].shape[1],
        GATED=gate is not None, RELU2=relu2, ADD=add_to is not None, BIAS=bias is not None,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out
