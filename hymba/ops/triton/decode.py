"""One decode step of both scans and of the causal convolution; the state is updated in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device, or_dummy, sigmoid, softplus


@triton.jit
def _state_kernel(
    state, x, dt, A, B, C, D, z, bias, valid, y, st, sx, sdt, sb, sc, sz, d,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row): a tile (BD channels, N states), as the state lies in memory."""
    r = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    cm = ch < d
    m = cm[:, None] & (n < N)[None, :]
    at = state + r * st + ch[:, None] * N + n[None, :]
    h = tl.load(at, mask=m, other=0.0)
    a = tl.load(A + ch[:, None] * N + n[None, :], mask=m, other=0.0).to(tl.float32)
    bn = tl.load(B + r * sb + n, mask=n < N, other=0.0).to(tl.float32)
    cn = tl.load(C + r * sc + n, mask=n < N, other=0.0).to(tl.float32)
    xv = tl.load(x + r * sx + ch, mask=cm, other=0.0).to(tl.float32)
    raw = tl.load(dt + r * sdt + ch, mask=cm, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)
    step = softplus(raw)
    new = tl.exp2(step[:, None] * (a * 1.4426950408889634)) * h + (step * xv)[:, None] * bn[None, :]
    out = tl.sum(new * cn[None, :], 1)
    if HAS_D:
        out += xv * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)
    if HAS_Z:
        zv = tl.load(z + r * sz + ch, mask=cm, other=0.0).to(tl.float32)
        out *= zv * sigmoid(zv)
    real = True
    if HAS_VALID:
        real = tl.load(valid + r) != 0
        out = tl.where(real, out, 0.0)
    tl.store(at, new, mask=m & real)
    tl.store(y + r * d + ch, out.to(y.dtype.element_ty), mask=cm)


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``selective_state_update`` as one launch; state (b, d, n) float32, each row contiguous."""
    b, d, n = state.shape
    if state.dtype != torch.float32 or state.stride(1) != n or state.stride(2) != 1:
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; expected float32, rows contiguous")
    x, dt, B, C = (v if v.stride(1) == 1 else v.contiguous() for v in (x, dt, B, C))
    z = z if z is None or z.stride(1) == 1 else z.contiguous()
    y = torch.empty(b, d, dtype=x.dtype, device=x.device)
    block = 64
    with on_device(x):
        _state_kernel[(triton.cdiv(d, block), b)](
            state, x, dt, A.contiguous(), B, C, or_dummy(D, x), or_dummy(z, x), or_dummy(dt_bias, x),
            or_dummy(valid, x), y, state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
            0 if z is None else z.stride(0), d, N=n, NP=triton.next_power_of_2(n), BD=block, HAS_D=D is not None,
            HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, HAS_VALID=valid is not None, num_warps=2,
        )  # fmt: skip
    return y


@triton.jit
def _head_state_kernel(
    state, x, dt, A, B, C, D, bias, valid, y, st, sx, sxh, sdt, sb, sbg, sc, scg, h, R,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Program (block of channels, head, row): a tile (BP channels, N states), as the state lies in memory."""
    r = tl.program_id(2).to(tl.int64)
    hd = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, NP)
    pm, nm = p < P, n < N
    m = pm[:, None] & nm[None, :]
    at = state + r * st + (hd * P + p[:, None]) * N + n[None, :]
    old = tl.load(at, mask=m, other=0.0)
    bn = tl.load(B + r * sb + hd // R * sbg + n, mask=nm, other=0.0).to(tl.float32)
    cn = tl.load(C + r * sc + hd // R * scg + n, mask=nm, other=0.0).to(tl.float32)
    xv = tl.load(x + r * sx + hd * sxh + p, mask=pm, other=0.0).to(tl.float32)
    raw = tl.load(dt + r * sdt + hd).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + hd).to(tl.float32)
    step = softplus(raw)
    decay = tl.exp2(step * (tl.load(A + hd).to(tl.float32) * 1.4426950408889634))
    new = decay * old + (step * xv)[:, None] * bn[None, :]
    out = tl.sum(new * cn[None, :], 1)
    if HAS_D:
        out += xv * tl.load(D + hd).to(tl.float32)
    real = True
    if HAS_VALID:
        real = tl.load(valid + r) != 0
        out = tl.where(real, out, 0.0)
    tl.store(at, new, mask=m & real)
    tl.store(y + (r * h + hd) * P + p, out.to(y.dtype.element_ty), mask=pm)


def head_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``ssd_state_update`` as one launch; state (b, h, p, n) float32, each row contiguous."""
    b, h, p, n = state.shape
    if not takes_state(state):
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; expected float32, rows contiguous")
    x, B, C = (v if v.stride(2) == 1 else v.contiguous() for v in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    y = torch.empty(b, h, p, dtype=x.dtype, device=x.device)
    size = triton.next_power_of_2(n)
    # Tiles of 16 KiB: a single row of 50 heads still fills the device.
    block = min(triton.next_power_of_2(p), max(4, 4096 // size))
    with on_device(x):
        _head_state_kernel[(triton.cdiv(p, block), h, b)](
            state, x, dt, A.contiguous(), B, C, or_dummy(D, x), or_dummy(dt_bias, x), or_dummy(valid, x), y,
            state.stride(0), *x.stride()[:2], dt.stride(0), *B.stride()[:2], *C.stride()[:2], h, h // B.shape[1], N=n,
            NP=size, P=p, BP=block, HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_VALID=valid is not None,
            num_warps=4,
        )  # fmt: skip
    return y


def takes_state(state: Tensor) -> bool:
    """Whether ``head_state_update`` can write to it where it lies."""
    _, _, p, n = state.shape
    return state.dtype == torch.float32 and state.stride()[1:] == (p * n, n, 1)


@triton.jit
def _window_kernel(
    state, x, weight, bias, valid, y, st, sx, d, K: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row)."""
    r = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = ch < d
    real = True
    if HAS_VALID:
        real = tl.load(valid + r) != 0
    at = state + r * st + ch
    xv = tl.load(x + r * sx + ch, mask=cm, other=0.0)
    out = xv.to(tl.float32) * tl.load(weight + ch * K + K - 1, mask=cm, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        tap = tl.load(at + k * d, mask=cm, other=0.0).to(x.dtype.element_ty)
        out += tap.to(tl.float32) * tl.load(weight + ch * K + k, mask=cm, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(at + (k - 1) * d, tap.to(state.dtype.element_ty), mask=cm & real)
    if K > 1:
        tl.store(at + (K - 2) * d, xv.to(state.dtype.element_ty), mask=cm & real)
    if HAS_BIAS:
        out += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)
    if SILU:
        out *= sigmoid(out)
    if HAS_VALID:
        out = tl.where(real, out, 0.0)
    tl.store(y + r * d + ch, out.to(y.dtype.element_ty), mask=cm)


def conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, silu: bool
) -> Tensor:
    """``causal_conv1d_update`` as one launch; state (b, k-1, d), each row contiguous."""
    b, d = x.shape
    if state.stride(1) != d or state.stride(2) != 1:
        raise ValueError(f"state has strides {state.stride()}; expected contiguous rows")
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(b, d, dtype=x.dtype, device=x.device)
    block = 256
    with on_device(x):
        _window_kernel[(triton.cdiv(d, block), b)](
            state, x, weight.contiguous(), or_dummy(bias, x), or_dummy(valid, x), y, state.stride(0), x.stride(0), d,
            K=weight.shape[1], BD=block, SILU=silu, HAS_BIAS=bias is not None, HAS_VALID=valid is not None,
        )  # fmt: skip
    return y
