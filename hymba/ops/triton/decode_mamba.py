"""One decode step of the Mamba heads after `x_proj`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import overlaps, release_next, wait_for_previous

MANY = (8, 32, 4)
"""Rows and channels of one program, and its warps, when there is more than one row."""


@triton.jit
def _one_row_kernel(
    x_ptr, z_ptr, low_ptr, window_ptr, conv_w_ptr, conv_b_ptr, dt_w_ptr, dt_b_ptr, a_log_ptr, d_ptr,
    dt_norm_ptr, b_norm_ptr, c_norm_ptr, state_ptr, real_ptr, out_ptr, width, rank, eps,
    N: tl.constexpr, RANK: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of the only row, the convolution included."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, RANK)
    n = tl.arange(0, N)
    here = c < width
    weight = tl.load(dt_w_ptr + c[:, None] * rank + i[None, :], mask=here[:, None] & (i < rank)[None, :], other=0.0)
    a_log = tl.load(a_log_ptr + c[:, None] * N + n[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    dt_norm = tl.load(dt_norm_ptr + i, mask=i < rank, other=0.0).to(tl.float32)
    b_norm = tl.load(b_norm_ptr + n).to(tl.float32)
    c_norm = tl.load(c_norm_ptr + n).to(tl.float32)
    dt_bias = tl.load(dt_b_ptr + c, mask=here, other=0.0).to(tl.float32)
    skip = tl.load(d_ptr + c, mask=here, other=0.0).to(tl.float32)
    u = tl.load(conv_b_ptr + c, mask=here, other=0.0).to(tl.float32)
    a = -tl.exp(a_log) * 1.4426950408889634
    # States were written a step ago, x and z by the projection two kernels ago: only `low` is waited for.
    at = state_ptr + c[:, None] * N + n[None, :]
    h = tl.load(at, mask=here[:, None], other=0.0)
    x = tl.load(x_ptr + c, mask=here, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + c, mask=here, other=0.0).to(tl.float32)
    u += x * tl.load(conv_w_ptr + c * TAPS + (TAPS - 1), mask=here, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(window_ptr + tap * width + c, mask=here, other=0.0)
        u += before.to(tl.float32) * tl.load(conv_w_ptr + c * TAPS + tap, mask=here, other=0.0).to(tl.float32)
    if OVERLAPS:
        wait_for_previous()
        release_next()
    raw = tl.load(low_ptr + i, mask=i < rank, other=0.0).to(tl.float32)
    b = tl.load(low_ptr + rank + n).to(tl.float32)
    e = tl.load(low_ptr + rank + N + n).to(tl.float32)
    real = True
    if MASKED:
        real = tl.load(real_ptr) != 0
    # The window moves on by one.
    for tap in tl.static_range(1, TAPS - 1):
        before = tl.load(window_ptr + tap * width + c, mask=here, other=0.0)
        tl.store(window_ptr + (tap - 1) * width + c, before, mask=here & real)
    tl.store(window_ptr + (TAPS - 2) * width + c, x.to(window_ptr.dtype.element_ty), mask=here & real)
    u = u / (1.0 + tl.exp(-u))
    # Step size, B and C, each normed.
    low = raw * tl.rsqrt(tl.sum(raw * raw, axis=0) / rank + eps) * dt_norm
    b = b * tl.rsqrt(tl.sum(b * b, axis=0) / N + eps) * b_norm
    e = e * tl.rsqrt(tl.sum(e * e, axis=0) / N + eps) * c_norm
    dt = tl.sum(weight.to(tl.float32) * low[None, :], axis=1) + dt_bias
    dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(dt)))
    # State: h = exp(dt A) h + dt B u.
    h = h * tl.exp2(dt[:, None] * a) + (dt * u)[:, None] * b[None, :]
    tl.store(at, h, mask=here[:, None] & real)
    y = tl.sum(h * e[None, :], axis=1) + u * skip
    y = y * z / (1.0 + tl.exp(-z))
    tl.store(out_ptr + c, y.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _many_rows_kernel(
    u_ptr, z_ptr, low_ptr, dt_w_ptr, dt_b_ptr, a_log_ptr, d_ptr, dt_norm_ptr, b_norm_ptr, c_norm_ptr,
    state_ptr, real_ptr, out_ptr, u_row, z_row, low_row, rows, width, rank, eps,
    R: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of R rows; u is the activated convolution."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    i = tl.arange(0, RANK)
    n = tl.arange(0, N)
    here = c < width
    row = r < rows
    tile = row[:, None] & here[None, :]
    weight = tl.load(dt_w_ptr + c[None, :] * rank + i[:, None], mask=here[None, :] & (i < rank)[:, None], other=0.0)
    a_log = tl.load(a_log_ptr + c[:, None] * N + n[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    dt_norm = tl.load(dt_norm_ptr + i, mask=i < rank, other=0.0).to(tl.float32)
    b_norm = tl.load(b_norm_ptr + n).to(tl.float32)
    c_norm = tl.load(c_norm_ptr + n).to(tl.float32)
    dt_bias = tl.load(dt_b_ptr + c, mask=here, other=0.0).to(tl.float32)
    skip = tl.load(d_ptr + c, mask=here, other=0.0).to(tl.float32)
    a = -tl.exp(a_log) * 1.4426950408889634
    if OVERLAPS:
        wait_for_previous()
        release_next()
    at = state_ptr + (r[:, None, None] * width + c[None, :, None]) * N + n[None, None, :]
    h = tl.load(at, mask=tile[:, :, None], other=0.0)
    low = low_ptr + r[:, None] * low_row
    raw = tl.load(low + i[None, :], mask=row[:, None] & (i < rank)[None, :], other=0.0).to(tl.float32)
    b = tl.load(low + rank + n[None, :], mask=row[:, None], other=0.0).to(tl.float32)
    e = tl.load(low + rank + N + n[None, :], mask=row[:, None], other=0.0).to(tl.float32)
    u = tl.load(u_ptr + r[:, None] * u_row + c[None, :], mask=tile, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + r[:, None] * z_row + c[None, :], mask=tile, other=0.0).to(tl.float32)
    stored = tile
    if MASKED:
        stored = tile & (tl.load(real_ptr + r, mask=row, other=0) != 0)[:, None]
    raw = raw * tl.rsqrt(tl.sum(raw * raw, axis=1) / rank + eps)[:, None] * dt_norm[None, :]
    b = b * tl.rsqrt(tl.sum(b * b, axis=1) / N + eps)[:, None] * b_norm[None, :]
    e = e * tl.rsqrt(tl.sum(e * e, axis=1) / N + eps)[:, None] * c_norm[None, :]
    dt = tl.dot(raw.to(weight.dtype), weight, out_dtype=tl.float32, input_precision="ieee") + dt_bias[None, :]
    dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(dt)))
    h = h * tl.exp2(dt[:, :, None] * a[None, :, :]) + (dt * u)[:, :, None] * b[:, None, :]
    tl.store(at, h, mask=stored[:, :, None])
    y = tl.sum(h * e[:, None, :], axis=2) + u * skip[None, :]
    y = y * z / (1.0 + tl.exp(-z))
    tl.store(out_ptr + r[:, None] * width + c[None, :], y.to(out_ptr.dtype.element_ty), mask=tile)


def mamba_step(
    x: Tensor,
    z: Tensor,
    low: Tensor,
    *,
    conv: tuple[Tensor, Tensor, Tensor] | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_norm: Tensor,
    b_norm: Tensor,
    c_norm: Tensor,
    ssm_state: Tensor,
    eps: float,
    out: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Norms, `dt_proj`, softplus, state update, skip and gate in one launch; for one row the convolution step too.

    Args:
        x: (b, d) SSM input for one row, the activated convolution of it for more (rows may be strided).
        z: (b, d) gate. low: (b, rank + 2n) output of `x_proj`.
        conv: for one row, and only then: depthwise weight (d, taps), bias (d,) and window (1, taps - 1, d), moved on.
        dt_weight: (d, rank). A_log: (d, n). dt_bias, D: (d,). dt_norm: (rank,). b_norm, c_norm: (n,).
        ssm_state: (b, d, n) float32, updated in place. eps: of the norms.
        out: (b, d), written. valid: (b,) bool; false rows keep their states.
    """
    rows, width = x.shape
    states, rank = A_log.shape[1], dt_weight.shape[1]
    if (conv is not None) != (rows == 1):
        raise ValueError(f"x has {rows} rows and conv is {'given' if conv else 'None'}; conv goes with a single row")
    real = x if valid is None else valid
    flags = overlaps(x)
    shape = {"N": states, "RANK": max(16, triton.next_power_of_2(rank)), "MASKED": valid is not None}
    if conv is not None:
        weight, bias, window = conv
        block = 32
        _one_row_kernel[(triton.cdiv(width, block),)](
            x, z, low, window, weight, bias, dt_weight, dt_bias, A_log, D, dt_norm, b_norm, c_norm, ssm_state, real,
            out, width, rank, eps, TAPS=weight.shape[1], BLOCK=block, num_warps=4, **shape, **flags,
        )  # fmt: skip
    else:
        many, block, warps = MANY
        _many_rows_kernel[(triton.cdiv(width, block), triton.cdiv(rows, many))](
            x, z, low, dt_weight, dt_bias, A_log, D, dt_norm, b_norm, c_norm, ssm_state, real, out,
            x.stride(0), z.stride(0), low.stride(0), rows, width, rank, eps,
            R=many, BLOCK=block, num_warps=warps, **shape, **flags,
        )  # fmt: skip
    return out
