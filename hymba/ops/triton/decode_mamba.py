"""One decode step of the Mamba heads after `x_proj`, and of the rotation and cache write of the attention heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mean_square(x, size):
    return tl.sum(x * x, axis=0) / size


@triton.jit
def _mamba_step_kernel(
    x_ptr, z_ptr, low_ptr, conv_state_ptr, conv_w_ptr, conv_b_ptr, dt_w_ptr, dt_b_ptr, a_log_ptr, d_ptr,
    dt_norm_ptr, b_norm_ptr, c_norm_ptr, state_ptr, real_ptr, out_ptr,
    x_row, z_row, low_row, width, rank, eps,
    N: tl.constexpr, RANK: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < width
    # Convolution of this token with the window before it; the window moves on by one.
    x = tl.load(x_ptr + row * x_row + c, mask=here, other=0.0).to(tl.float32)
    u = tl.load(conv_b_ptr + c, mask=here, other=0.0).to(tl.float32)
    u += x * tl.load(conv_w_ptr + c * TAPS + (TAPS - 1), mask=here, other=0.0).to(tl.float32)
    real = True
    if MASKED:
        real = tl.load(real_ptr + row) != 0
    window = conv_state_ptr + row * (TAPS - 1) * width + c
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(window + tap * width, mask=here, other=0.0)
        u += before.to(tl.float32) * tl.load(conv_w_ptr + c * TAPS + tap, mask=here, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(window + (tap - 1) * width, before, mask=here & real)
    tl.store(window + (TAPS - 2) * width, x.to(conv_state_ptr.dtype.element_ty), mask=here & real)
    u = u / (1.0 + tl.exp(-u))
    # Step size, B and C, each normed.
    i = tl.arange(0, RANK)
    n = tl.arange(0, N)
    low = low_ptr + row * low_row
    step = tl.load(low + i, mask=i < rank, other=0.0).to(tl.float32)
    step *= tl.load(dt_norm_ptr + i, mask=i < rank, other=0.0).to(tl.float32)
    raw = tl.load(low + i, mask=i < rank, other=0.0).to(tl.float32)
    step *= 1.0 / tl.sqrt(_mean_square(raw, rank) + eps)
    b = tl.load(low + rank + n).to(tl.float32)
    b = b / tl.sqrt(_mean_square(b, N) + eps) * tl.load(b_norm_ptr + n).to(tl.float32)
    e = tl.load(low + rank + N + n).to(tl.float32)
    e = e / tl.sqrt(_mean_square(e, N) + eps) * tl.load(c_norm_ptr + n).to(tl.float32)
    weight = tl.load(dt_w_ptr + c[:, None] * rank + i[None, :], mask=here[:, None] & (i < rank)[None, :], other=0.0).to(
        tl.float32
    )
    dt = tl.sum(weight * step[None, :], axis=1) + tl.load(dt_b_ptr + c, mask=here, other=0.0).to(tl.float32)
    dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(dt)))
    # State: h = exp(dt A) h + dt B u.
    at = state_ptr + (row * width + c[:, None]) * N + n[None, :]
    h = tl.load(at, mask=here[:, None], other=0.0)
    a = -tl.exp(tl.load(a_log_ptr + c[:, None] * N + n[None, :], mask=here[:, None], other=0.0).to(tl.float32))
    h = h * tl.exp(dt[:, None] * a) + (dt * u)[:, None] * b[None, :]
    tl.store(at, h, mask=here[:, None] & real)
    y = tl.sum(h * e[None, :], axis=1) + u * tl.load(d_ptr + c, mask=here, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_row + c, mask=here, other=0.0).to(tl.float32)
    y = y * z / (1.0 + tl.exp(-z))
    tl.store(out_ptr + row * width + c, y.to(out_ptr.dtype.element_ty), mask=here)


def mamba_step(
    x: Tensor,
    z: Tensor,
    low: Tensor,
    *,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
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
    """Convolution step, norms, `dt_proj`, softplus, state update, skip and gate in one launch.

    Args:
        x, z: (b, d) SSM input and gate (rows may be strided). low: (b, rank + 2n) output of `x_proj`.
        conv_state: (b, taps - 1, d) and ssm_state: (b, d, n) float32, both updated in place.
        conv_weight: (d, taps). dt_weight: (d, rank). A_log: (d, n). conv_bias, dt_bias, D: (d,).
        dt_norm: (rank,). b_norm, c_norm: (n,). eps: of the norms.
        out: (b, d), written. valid: (b,) bool; false rows keep their states.
    """
    rows, width = x.shape
    states, rank = A_log.shape[1], dt_weight.shape[1]
    block = 32
    _mamba_step_kernel[(triton.cdiv(width, block), rows)](
        x, z, low, conv_state, conv_weight, conv_bias, dt_weight, dt_bias, A_log, D,
        dt_norm, b_norm, c_norm, ssm_state, x if valid is None else valid, out,
        x.stride(0), z.stride(0), low.stride(0), width, rank, eps,
        N=states, RANK=triton.next_power_of_2(rank), TAPS=conv_weight.shape[1], BLOCK=block,
        MASKED=valid is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, keys_ptr, values_ptr, position_ptr, real_ptr,
    q_row, k_row, v_row, keys_b, keys_s, values_b, values_s, rope_row, position_row, slots,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = D // 2
    i = tl.arange(0, half)
    cos = tl.load(cos_ptr + row * rope_row + i)
    sin = tl.load(sin_ptr + row * rope_row + i)
    if head < HEADS:
        at = q_ptr + row * q_row + head * D
        first = tl.load(at + i).to(tl.float32)
        second = tl.load(at + half + i).to(tl.float32)
        to = q_out_ptr + (row * HEADS + head) * D
        tl.store(to + i, (first * cos - second * sin).to(q_out_ptr.dtype.element_ty))
        tl.store(to + half + i, (second * cos + first * sin).to(q_out_ptr.dtype.element_ty))
    else:
        h = head - HEADS
        real = True
        if MASKED:
            real = tl.load(real_ptr + row) != 0
        if real:
            slot = tl.load(position_ptr + row * position_row) % slots
            at = k_ptr + row * k_row + h * D
            first = tl.load(at + i).to(tl.float32)
            second = tl.load(at + half + i).to(tl.float32)
            to = keys_ptr + row * keys_b + slot * keys_s + h * D
            tl.store(to + i, (first * cos - second * sin).to(keys_ptr.dtype.element_ty))
            tl.store(to + half + i, (second * cos + first * sin).to(keys_ptr.dtype.element_ty))
            e = tl.arange(0, E)
            value = tl.load(v_ptr + row * v_row + h * E + e)
            tl.store(values_ptr + row * values_b + slot * values_s + h * E + e, value)


def rotate_and_write(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    q_out: Tensor,
    valid: Tensor | None = None,
) -> None:
    """Rotate one token's queries and keys, and write its key and value to their cache slot.

    Args:
        q: (b, h * d), k: (b, kv * d), v: (b, kv * e), rows may be strided; k and v `None` on a borrowing layer.
        cos, sin: (b or 1, d / 2) float32. position: (b or 1,) text position of the token.
        keys: (b, s, kv, d), values: (b, s, kv, e), written in place. q_out: (b, h, d), written.
        valid: (b,) bool; false rows write nothing.
    """
    rows, heads, d = q_out.shape
    kv = 0 if k is None else keys.shape[2]
    k = q if k is None else k
    v = q if v is None else v
    _rotate_write_kernel[(rows, heads + kv)](
        q, k, v, cos, sin, q_out, keys, values, position, q if valid is None else valid,
        q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0, position.stride(0) if position.shape[0] > 1 else 0, keys.shape[1],
        HEADS=heads, KV=kv, D=d, E=values.shape[3], MASKED=valid is not None, num_warps=1,
    )  # fmt: skip
