"""Causal depthwise convolution: every input read once, every output written once, the taps kept in registers.

A program takes BD channels of one row over STEPS steps and walks them in order, U at a time: first the U loads, then
the arithmetic. Up to four taps: w0 belongs to x_t, w1 to x_{t-1} and so on; p1, p2, p3 are the inputs before x_t and
i1, i2, i3 those before a document. The weight comes transposed, (k, d). ``offset`` (b, l) says how many steps of the
same document lie before a step; only packed rows need it, elsewhere it is t.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, channels_last, element, on_device, or_dummy, row, sigmoid, strides

MAX_TAPS = 4
U = 4 if INTERPRETED else 8
BD = 8 if INTERPRETED else 128
STEPS = 8 if INTERPRETED else 128
# Three warps on each of an SM's four schedulers in backward, without spills.
MAX_REGISTERS = 168
NO_SPECIALIZE = ["sx", "sy", "so"]


@triton.jit
def _tap(weight, ch, cm, i, d: tl.constexpr, K: tl.constexpr):
    """The tap for x_{t-i}, zero when there are not so many."""
    return tl.load(weight + (K - 1 - i) * d + ch, mask=cm & (i < K), other=0.0).to(tl.float32)


@triton.jit
def _before(init, ch, cm, i, d: tl.constexpr, K: tl.constexpr, HAS_INIT: tl.constexpr, BD: tl.constexpr):
    """The input i steps before a document's first."""
    if HAS_INIT:
        return tl.load(init + (K - 1 - i) * d + ch, mask=cm & (i < K), other=0.0).to(tl.float32)
    else:
        return tl.zeros([BD], tl.float32)


@triton.jit
def _past(x_row, init, ch, cm, s0, seen, i, SXL: tl.constexpr, d: tl.constexpr, K: tl.constexpr,
          HAS_INIT: tl.constexpr):  # fmt: skip
    """The input i steps before step s0, of which seen steps of the same document lie before."""
    v = tl.load(x_row + (s0 - i).to(tl.int64) * SXL + ch, mask=cm & (seen >= i), other=0.0).to(tl.float32)
    if HAS_INIT:
        at = K - 1 - i + seen
        v += tl.load(init + at * d + ch, mask=cm & (seen < i) & (at >= 0), other=0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _forward_kernel(
    x, weight, bias, init, lengths, offset, y, sx, sy, si, l, SXL: tl.constexpr, SYL: tl.constexpr, d: tl.constexpr,
    EVEN: tl.constexpr, K: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, V: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_LEN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program (channel block, part of the row, row)."""
    r = tl.program_id(2).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, U)
    s0 = tl.program_id(1) * STEPS
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    w0, w1 = _tap(weight, ch, cm, 0, d, K), _tap(weight, ch, cm, 1, d, K)
    w2, w3 = _tap(weight, ch, cm, 2, d, K), _tap(weight, ch, cm, 3, d, K)
    constant = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        constant += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)
    x_row = x + r * (sx * V)
    init_row = init + r * si
    seen = s0
    if PACKED:
        seen = tl.load(offset + r * l + s0)
        i1 = _before(init_row, ch, cm, 1, d, K, HAS_INIT, BD)
        i2 = _before(init_row, ch, cm, 2, d, K, HAS_INIT, BD)
        i3 = _before(init_row, ch, cm, 3, d, K, HAS_INIT, BD)
    p1 = _past(x_row, init_row, ch, cm, s0, seen, 1, SXL, d, K, HAS_INIT)
    p2 = _past(x_row, init_row, ch, cm, s0, seen, 2, SXL, d, K, HAS_INIT)
    p3 = _past(x_row, init_row, ch, cm, s0, seen, 3, SXL, d, K, HAS_INIT)
    for c in range(STEPS // U):
        t0 = s0 + c * U
        if t0 < l:
            m = (t0 + t < end)[:, None] & cm[None, :]
            o = t0.to(tl.int64)
            xs = tl.load(x_row + o * SXL + (t[:, None] * SXL + ch[None, :]), mask=m, other=0.0).to(tl.float32)
            offsets = t
            if PACKED:
                offsets = tl.load(offset + r * l + t0 + t, mask=t0 + t < l, other=1)
            out = xs
            for k in tl.static_range(U):
                xk = row(xs, t, k)
                if PACKED:
                    first = element(offsets, t, k) == 0
                    p1 = tl.where(first, i1, p1)
                    p2 = tl.where(first, i2, p2)
                    p3 = tl.where(first, i3, p3)
                v = constant + w0 * xk + w1 * p1 + w2 * p2 + w3 * p3
                p3 = p2
                p2 = p1
                p1 = xk
                out = tl.where((t == k)[:, None], v[None, :], out)
            if SILU:
                out *= sigmoid(out)
            out = tl.where(m, out, 0.0)
            inside = (t0 + t < l)[:, None] & cm[None, :]
            at = y + r * (sy * V) + o * SYL + (t[:, None] * SYL + ch[None, :])
            tl.store(at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _window_kernel(
    x, init, lengths, offset, final, sx, si, l, SXL: tl.constexpr, d: tl.constexpr, K: tl.constexpr,
    BD: tl.constexpr, V: tl.constexpr, HAS_INIT: tl.constexpr, HAS_LEN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last k - 1 real inputs, oldest first, reaching back into the initial ones."""
    r = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = ch < d
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    seen = end
    if PACKED:
        seen = tl.load(offset + r * l + end - 1, mask=end > 0, other=-1) + 1
    for i in tl.static_range(1, K):
        v = _past(x + r * (sx * V), init + r * si, ch, cm, end, seen, i, SXL, d, K, HAS_INIT)
        tl.store(final + (r * (K - 1) + K - 1 - i) * d + ch, v.to(final.dtype.element_ty), mask=cm)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _backward_kernel(
    x, dy, weight, bias, init, lengths, offset, dx, dw_part, db_part, di_part, sx, sy, so, si, l,
    SXL: tl.constexpr, SYL: tl.constexpr, SOL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr,
    U: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, V: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_LEN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program (channel block, part of the row, row). dx of a step is complete three steps later: d1, d2, d3 wait.

    The part's last three need the three steps after it, so one more block of U steps runs for them alone.
    dw_part (parts, b, k, d); db_part (parts, b, d); di_part (parts, or 1 unless packed, b, k-1, d).
    """
    r = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    b = tl.num_programs(2)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, U)
    s0 = part * STEPS
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    w0, w1 = _tap(weight, ch, cm, 0, d, K), _tap(weight, ch, cm, 1, d, K)
    w2, w3 = _tap(weight, ch, cm, 2, d, K), _tap(weight, ch, cm, 3, d, K)
    constant = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        constant += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)
    x_row = x + r * (sx * V)
    init_row = init + r * si
    seen = s0
    if PACKED:
        seen = tl.load(offset + r * l + s0)
        i1 = _before(init_row, ch, cm, 1, d, K, HAS_INIT, BD)
        i2 = _before(init_row, ch, cm, 2, d, K, HAS_INIT, BD)
        i3 = _before(init_row, ch, cm, 3, d, K, HAS_INIT, BD)
    p1 = _past(x_row, init_row, ch, cm, s0, seen, 1, SXL, d, K, HAS_INIT)
    p2 = _past(x_row, init_row, ch, cm, s0, seen, 2, SXL, d, K, HAS_INIT)
    p3 = _past(x_row, init_row, ch, cm, s0, seen, 3, SXL, d, K, HAS_INIT)
    zero = tl.zeros([BD], tl.float32)
    d1, d2, d3, db = zero, zero, zero, zero
    dw0, dw1, dw2, dw3 = zero, zero, zero, zero
    q1, q2, q3 = zero, zero, zero
    for c in range(STEPS // U + 1):
        t0 = s0 + c * U
        if t0 - 3 < l:
            own = c < STEPS // U
            m = (t0 + t < tl.where(own, end, tl.minimum(end, t0 + 3)))[:, None] & cm[None, :]
            o = t0.to(tl.int64)
            xs = tl.load(x_row + o * SXL + (t[:, None] * SXL + ch[None, :]), mask=m, other=0.0).to(tl.float32)
            gs = tl.load(dy + r * (sy * V) + o * SYL + (t[:, None] * SYL + ch[None, :]), mask=m, other=0.0)
            gs = gs.to(tl.float32)
            offsets = t
            if PACKED:
                offsets = tl.load(offset + r * l + t0 + t, mask=t0 + t < l, other=3)
            out = xs
            for k in tl.static_range(U):
                xk = row(xs, t, k)
                g = row(gs, t, k)
                if PACKED:
                    back = element(offsets, t, k)
                    p1 = tl.where(back == 0, i1, p1)
                    p2 = tl.where(back == 0, i2, p2)
                    p3 = tl.where(back == 0, i3, p3)
                else:
                    back = t0 + k
                if SILU:
                    v = constant + w0 * xk + w1 * p1 + w2 * p2 + w3 * p3
                    s = sigmoid(v)
                    g *= s * (1.0 + v * (1.0 - s))
                gw = tl.where(own, g, 0.0)
                db += gw
                dw0 += gw * xk
                dw1 += gw * p1
                dw2 += gw * p2
                dw3 += gw * p3
                g1, g2, g3 = w1 * g, w2 * g, w3 * g
                if PACKED:
                    d1 += tl.where(back >= 1, g1, 0.0)
                    d2 += tl.where(back >= 2, g2, 0.0)
                    d3 += tl.where(back >= 3, g3, 0.0)
                else:
                    d1 += g1
                    d2 += g2
                    d3 += g3
                if HAS_INIT and (PACKED or k < 3):
                    # A gradient through a tap that reaches before the document belongs to the initial inputs.
                    b0, b1, b2 = own & (back == 0), own & (back == 1), own & (back == 2)
                    q1 += tl.where(b0, g1, tl.where(b1, g2, tl.where(b2, g3, 0.0)))
                    q2 += tl.where(b0, g2, tl.where(b1, g3, 0.0))
                    q3 += tl.where(b0, g3, 0.0)
                out = tl.where((t == k)[:, None], d3[None, :], out)
                d3 = d2
                d2 = d1
                d1 = w0 * g
                p3 = p2
                p2 = p1
                p1 = xk
            to = t0 - 3 + t
            inside = ((to >= s0) & (to < s0 + STEPS) & (to < l))[:, None] & cm[None, :]
            at = dx + r * (so * V) + (o - 3) * SOL + (t[:, None] * SOL + ch[None, :])
            tl.store(at, out.to(dx.dtype.element_ty), mask=inside)
    rows = part * b + r
    tl.store(db_part + rows * d + ch, db, mask=cm)
    tl.store(dw_part + (rows * K + K - 1) * d + ch, dw0, mask=cm)
    if K > 1:
        tl.store(dw_part + (rows * K + K - 2) * d + ch, dw1, mask=cm)
    if K > 2:
        tl.store(dw_part + (rows * K + K - 3) * d + ch, dw2, mask=cm)
    if K > 3:
        tl.store(dw_part + (rows * K + K - 4) * d + ch, dw3, mask=cm)
    if HAS_INIT and (PACKED or part == 0):
        if K > 1:
            tl.store(di_part + (rows * (K - 1) + K - 2) * d + ch, q1, mask=cm)
        if K > 2:
            tl.store(di_part + (rows * (K - 1) + K - 3) * d + ch, q2, mask=cm)
        if K > 3:
            tl.store(di_part + (rows * (K - 1) + K - 4) * d + ch, q3, mask=cm)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None,
    offset: Tensor | None, silu: bool,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """The vector width, and what both directions pass by name."""
    (_, l, d), k = x.shape, weight.shape[1]
    init = None if initial_state is None else initial_state.contiguous()
    vector = 4 if d % 4 == 0 and not INTERPRETED else 1
    named: dict[str, Any] = dict(
        weight=weight.t().contiguous(), bias=or_dummy(bias, x), init=or_dummy(init, x), lengths=or_dummy(lengths, x),
        offset=or_dummy(offset, x), si=0 if init is None or init.shape[0] == 1 else (k - 1) * d, l=l, d=d,
        EVEN=d % BD == 0, K=k, U=U, BD=BD, STEPS=STEPS, V=vector, SILU=silu, HAS_BIAS=bias is not None,
        HAS_INIT=init is not None, HAS_LEN=lengths is not None, PACKED=offset is not None, num_warps=1,
    )  # fmt: skip
    return vector, named


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None,
    offset: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, d) and the final state (b, k-1, d). offset: (b, l) int32, or None when no row is packed."""
    (b, l, d), k = x.shape, weight.shape[1]
    with on_device(x):
        vector, named = _arguments(x, weight, bias, initial_state, lengths, offset, silu)
        x = channels_last(x, vector)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        final = torch.empty(b, k - 1, d, dtype=x.dtype, device=x.device)
        blocks = triton.cdiv(d, BD)
        _forward_kernel[(blocks, triton.cdiv(l, STEPS), b)](x=x, y=y, **strides(vector, x=x, y=y), **named)
        if k > 1:
            keys = ("init", "lengths", "offset", "si", "l", "d", "K", "BD", "V", "HAS_INIT", "HAS_LEN", "PACKED")
            _window_kernel[(blocks, b)](
                x=x, final=final, **strides(vector, x=x), **{key: named[key] for key in keys}, num_warps=1
            )
    return y, final


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    lengths: Tensor | None, offset: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (its dtype), weight (d, k), bias (d,) and the initial state (b, k-1, d), float32, through y."""
    (b, l, d), k = x.shape, weight.shape[1]
    with on_device(x):
        vector, named = _arguments(x, weight, bias, initial_state, lengths, offset, silu)
        x, dy = channels_last(x, vector), channels_last(dy, vector)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = triton.cdiv(l, STEPS)
        new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        dw_part, db_part = torch.empty(parts, b, k, d, **new), torch.empty(parts, b, d, **new)
        di_part = torch.empty(parts if offset is not None else 1, b, k - 1, d, **new)
        _backward_kernel[(triton.cdiv(d, BD), parts, b)](
            x=x, dy=dy, dx=dx, dw_part=dw_part, db_part=db_part, di_part=di_part,
            **strides(vector, x=x, y=dy, o=dx), maxnreg=MAX_REGISTERS, **named,
        )  # fmt: skip
        return dx, dw_part.sum((0, 1)).t(), db_part.sum((0, 1)), di_part.sum(0)
