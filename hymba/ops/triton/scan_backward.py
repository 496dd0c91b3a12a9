"""Selective scan, backward: three launches over segments that run side by side.

1. ``_states_kernel`` runs each segment forward again from its saved state. It stores the state at every chunk start,
   the gradient of z, and what the segment alone sends back through its start state.
2. ``combine_kernel`` turns these into the gradient that each segment receives at its end.
3. ``_gradient_kernel`` goes through the segment's chunks from the last: states again, gradients of the states, and
   from both all others. dB and dC are sums over channels: every channel block leaves its part, ``_reduce_kernel`` adds.

With s_t the state after step t and g_t its gradient: g_t = C_t dy_t + decay_{t+1} g_{t+1}, and the gradient of
dt_t A is g_t * decay_t * s_{t-1} = g_t * (s_t - dt_t B_t x_t), so nothing is shifted in time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scan_inputs import ScanInputs
from ._common import (
    INTERPRETED,
    channels_last,
    document_start,
    element,
    on_device,
    or_dummy,
    row,
    sigmoid,
    softplus,
    strides,
)
from .scan import NO_SPECIALIZE, combine_kernel, padded, prepare

T = 8
BD = 4 if INTERPRETED else 64
# Three warps on each of an SM's four schedulers instead of two, to cover the loads; nothing spills inside the loops.
MAX_REGISTERS = 168


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _states_kernel(
    x, dt, z, dy, Bt, Ct, A2, D, bias, h0, lengths, seq, states, chunk_states, dz, local, total, alive,
    sx, sdt, sz, sy, so, s0, l, lpad, per_segment, SXL: tl.constexpr, SDTL: tl.constexpr, SZL: tl.constexpr,
    SYL: tl.constexpr, SOL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, V: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row, segment). chunk_states (chunks, b, n, d) also carries the state along."""
    r = tl.program_id(1).to(tl.int64)
    seg = tl.program_id(2)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, T)
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    plane = r * N * d + ch
    step = b.to(tl.int64) * N * d
    mine = local + seg * step + plane
    for n in range(N):
        h = tl.load(states + seg * step + plane + n * d, mask=cm, other=0.0)
        tl.store(chunk_states + seg * per_segment * step + plane + n * d, h, mask=cm)
        tl.store(mine + n * d, tl.zeros([BD], tl.float32), mask=cm)
    xb = x + r * (sx * V) + (t[:, None] * SXL + ch[None, :])
    db = dt + r * (sdt * V) + (t[:, None] * SDTL + ch[None, :])
    zb = z + r * (sz * V) + (t[:, None] * SZL + ch[None, :])
    yb = dy + r * (sy * V) + (t[:, None] * SYL + ch[None, :])
    ob = dz + r * (so * V) + (t[:, None] * SOL + ch[None, :])
    Bb = Bt + r * N * lpad + t
    Cb = Ct + r * N * lpad + t
    sum_dt = tl.zeros([BD], tl.float32)
    kept = 1
    for c in range(per_segment):
        chunk = seg * per_segment + c
        t0 = chunk * T
        if t0 < l:
            m = (t0 + t < end)[:, None] & cm[None, :]
            o = t0.to(tl.int64)
            raw = tl.load(db + o * SDTL, mask=m, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            dtv = tl.where(m, softplus(raw), 0.0)
            xv = tl.load(xb + o * SXL, mask=m, other=0.0).to(tl.float32)
            dtx = dtv * xv
            gy = tl.load(yb + o * SYL, mask=m, other=0.0).to(tl.float32)
            if HAS_Z:
                zv = tl.load(zb + o * SZL, mask=m, other=0.0).to(tl.float32)
                gy *= zv * sigmoid(zv)
                acc = tl.zeros([T, BD], tl.float32)
                if HAS_D:
                    acc += xv * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            starts = t
            if HAS_SEQ:
                starts = document_start(seq + r * l, t0 + t, end)
            carry = chunk_states + chunk * step + plane
            more = (c + 1 < per_segment) & (t0 + T < l)
            tl.debug_barrier()
            a2 = tl.load(A2 + ch, mask=cm, other=0.0)
            bn = tl.load(Bb + t0)
            cn = tl.load(Cb + t0)
            h = tl.load(carry, mask=cm, other=0.0)
            back = tl.load(mine, mask=cm, other=0.0)
            for n in tl.range(N, loop_unroll_factor=2):
                # The next state's values are on their way while this one's are worked on (one row too far at last).
                a2_next = tl.load(A2 + (n + 1) * d + ch, mask=cm, other=0.0)
                bn_next = tl.load(Bb + (n + 1) * lpad + t0)
                cn_next = tl.load(Cb + (n + 1) * lpad + t0)
                h_next = tl.load(carry + (n + 1) * d, mask=cm, other=0.0)
                back_next = tl.load(mine + (n + 1) * d, mask=cm, other=0.0)
                left = tl.exp2(sum_dt * a2)
                if HAS_SEQ:
                    left = tl.where(kept > 0, left, 0.0)
                    if HAS_H0:
                        h_init = tl.load(h0 + r * s0 + n * d + ch, mask=cm, other=0.0)
                    else:
                        h_init = tl.zeros([BD], tl.float32)
                decay = tl.exp2(dtv * a2[None, :])
                drive = dtx * bn[:, None]
                ask = gy * cn[:, None]
                hs = drive
                for k in tl.static_range(T):
                    a = row(decay, t, k)
                    left = left * a
                    if HAS_SEQ:
                        new_document = element(starts, t, k) != 0
                        h = tl.where(new_document, h_init, h)
                        left = tl.where(new_document, 0.0, left)
                    h = a * h + row(drive, t, k)
                    back = left * row(ask, t, k) + back
                    if HAS_Z:
                        hs = tl.where((t == k)[:, None], h[None, :], hs)
                if HAS_Z:
                    acc += hs * cn[:, None]
                tl.store(carry + step + n * d, h, mask=cm & more)
                tl.store(mine + n * d, back, mask=cm)
                a2, bn, cn, h, back = a2_next, bn_next, cn_next, h_next, back_next
            sum_dt += tl.sum(dtv, 0)
            if HAS_SEQ:
                kept = tl.where(tl.sum(starts, 0) > 0, 0, kept)
            if HAS_Z:
                zv = tl.load(zb + o * SZL, mask=m, other=0.0).to(tl.float32)
                sig = sigmoid(zv)
                gy = tl.load(yb + o * SYL, mask=m, other=0.0).to(tl.float32)
                dzv = tl.where(m, gy * acc * sig * (1.0 + zv * (1.0 - sig)), 0.0)
                inside = (t0 + t < l)[:, None] & cm[None, :]
                tl.store(ob + o * SOL, dzv.to(dz.dtype.element_ty), mask=inside)
    tl.store(total + (seg * b + r) * d + ch, sum_dt, mask=cm)
    if tl.program_id(0) == 0:
        tl.store(alive + seg * b + r, kept)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _gradient_kernel(
    x, dt, z, dy, Bt, Ct, A2, D, bias, h0, lengths, seq, chunk_states, grads, dx, ddt, dB_part, dC_part, dA_part,
    dh0_part, dD_part, dbias_part, sx, sdt, sz, sy, so, s0, l, lpad, per_segment, SXL: tl.constexpr,
    SDTL: tl.constexpr, SZL: tl.constexpr, SYL: tl.constexpr, SOL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row, segment), chunks in reverse. grads (segments, b, n, d): decay * g on its way back.

    dB_part and dC_part (blocks, b, n, lpad); dA_part and, when packed, dh0_part (segments, b, n, d);
    dD_part, dbias_part (segments, b, d).
    """
    r = tl.program_id(1).to(tl.int64)
    seg = tl.program_id(2)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, T)
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    plane = r * N * d + ch
    step = b.to(tl.int64) * N * d
    mine = seg * step + plane
    xb = x + r * (sx * V) + (t[:, None] * SXL + ch[None, :])
    db = dt + r * (sdt * V) + (t[:, None] * SDTL + ch[None, :])
    zb = z + r * (sz * V) + (t[:, None] * SZL + ch[None, :])
    yb = dy + r * (sy * V) + (t[:, None] * SYL + ch[None, :])
    ob = r * (so * V) + (t[:, None] * SOL + ch[None, :])
    Bb = Bt + r * N * lpad + t
    Cb = Ct + r * N * lpad + t
    part = (tl.program_id(0) * b + r) * N * lpad + t
    sum_D = tl.zeros([BD], tl.float32)
    sum_bias = tl.zeros([BD], tl.float32)
    for j in range(per_segment):
        chunk = seg * per_segment + per_segment - 1 - j
        t0 = chunk * T
        if t0 < l:
            m = (t0 + t < end)[:, None] & cm[None, :]
            o = t0.to(tl.int64)
            raw = tl.load(db + o * SDTL, mask=m, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            dtv = tl.where(m, softplus(raw), 0.0)
            dtx = dtv * tl.load(xb + o * SXL, mask=m, other=0.0).to(tl.float32)
            gy = tl.load(yb + o * SYL, mask=m, other=0.0).to(tl.float32)
            if HAS_Z:
                zv = tl.load(zb + o * SZL, mask=m, other=0.0).to(tl.float32)
                gy *= zv * sigmoid(zv)
            to_dt = tl.zeros([T, BD], tl.float32)
            to_dtx = tl.zeros([T, BD], tl.float32)
            starts = t
            if HAS_SEQ:
                starts = document_start(seq + r * l, t0 + t, end)
            started = chunk_states + chunk * step + plane
            tl.debug_barrier()
            h = tl.load(started, mask=cm, other=0.0)
            for n in range(N):
                # The one load here that comes from far: under way one state early (one row too far at last).
                h_next = tl.load(started + (n + 1) * d, mask=cm, other=0.0)
                a2 = tl.load(A2 + n * d + ch, mask=cm, other=0.0)
                bn = tl.load(Bb + n * lpad + t0)
                cn = tl.load(Cb + n * lpad + t0)
                back = tl.load(grads + mine + n * d, mask=cm, other=0.0)
                dA = tl.load(dA_part + mine + n * d, mask=cm & (j > 0), other=0.0)
                decay = tl.exp2(dtv * a2[None, :])
                drive = dtx * bn[:, None]
                ask = gy * cn[:, None]
                if HAS_SEQ:
                    dh0 = tl.zeros([BD], tl.float32)
                    if HAS_H0:
                        dh0 = tl.load(dh0_part + mine + n * d, mask=cm & (j > 0), other=0.0)
                        h_init = tl.load(h0 + r * s0 + n * d + ch, mask=cm, other=0.0)
                    else:
                        h_init = tl.zeros([BD], tl.float32)
                hs = drive
                for k in tl.static_range(T):
                    if HAS_SEQ:
                        h = tl.where(element(starts, t, k) != 0, h_init, h)
                    h = row(decay, t, k) * h + row(drive, t, k)
                    hs = tl.where((t == k)[:, None], h[None, :], hs)
                gs = ask
                for k in tl.static_range(T):
                    g = row(ask, t, T - 1 - k) + back
                    gs = tl.where((t == T - 1 - k)[:, None], g[None, :], gs)
                    back = row(decay, t, T - 1 - k) * g
                    if HAS_SEQ:
                        new_document = element(starts, t, T - 1 - k) != 0
                        dh0 += tl.where(new_document, back, 0.0)
                        back = tl.where(new_document, 0.0, back)
                tl.store(grads + mine + n * d, back, mask=cm)
                tl.store(dC_part + part + n * lpad + t0, tl.sum(hs * gy, 1))
                tl.store(dB_part + part + n * lpad + t0, tl.sum(gs * dtx, 1))
                to_dtx += gs * bn[:, None]
                w = gs * (hs - drive)
                to_dt += w * a2[None, :]
                tl.store(dA_part + mine + n * d, dA + tl.sum(w * dtv, 0), mask=cm)
                if HAS_SEQ and HAS_H0:
                    tl.store(dh0_part + mine + n * d, dh0, mask=cm)
                h = h_next
            # Loaded again rather than kept: registers are what the loop above is short of.
            xv = tl.load(xb + o * SXL, mask=m, other=0.0).to(tl.float32)
            raw = tl.load(db + o * SDTL, mask=m, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            ddtv = tl.where(m, (to_dt * 0.6931471805599453 + to_dtx * xv) * sigmoid(raw), 0.0)
            dxv = to_dtx * dtv
            if HAS_D:
                dxv += gy * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
                sum_D += tl.sum(gy * xv, 0)
            sum_bias += tl.sum(ddtv, 0)
            inside = (t0 + t < l)[:, None] & cm[None, :]
            tl.store(dx + ob + o * SOL, dxv.to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + ob + o * SOL, ddtv.to(ddt.dtype.element_ty), mask=inside)
        elif j == 0:
            # Nothing of this chunk exists; the sums that start at j = 0 must still start from zero.
            for n in range(N):
                tl.store(dA_part + mine + n * d, tl.zeros([BD], tl.float32), mask=cm)
                if HAS_SEQ and HAS_H0:
                    tl.store(dh0_part + mine + n * d, tl.zeros([BD], tl.float32), mask=cm)
    tl.store(dD_part + (seg * b + r) * d + ch, sum_D, mask=cm)
    tl.store(dbias_part + (seg * b + r) * d + ch, sum_bias, mask=cm)


@triton.jit
def _reduce_kernel(
    dB_part, dC_part, dB, dC, blocks, l, lpad, N: tl.constexpr, NP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(blocks, b, n, lpad) summed over blocks and transposed to (b, l, n)."""
    r = tl.program_id(1).to(tl.int64)
    b = tl.num_programs(1)
    i = tl.program_id(0) * L + tl.arange(0, L)
    n = tl.arange(0, NP)
    m = (n < N)[:, None] & (i < l)[None, :]
    at = r * N * lpad + n[:, None] * lpad + i[None, :]
    sum_B = tl.zeros([NP, L], tl.float32)
    sum_C = tl.zeros([NP, L], tl.float32)
    step = b.to(tl.int64) * N * lpad
    for _ in range(blocks):
        sum_B += tl.load(dB_part + at, mask=m, other=0.0)
        sum_C += tl.load(dC_part + at, mask=m, other=0.0)
        at += step
    out = r * l * N + i[None, :] * N + n[:, None]
    mo = (n < N)[:, None] & (i < l)[None, :]
    tl.store(dB + out, sum_B.to(dB.dtype.element_ty), mask=mo)
    tl.store(dC + out, sum_C.to(dC.dtype.element_ty), mask=mo)


def backward(dy: Tensor | None, dfinal: Tensor | None, i: ScanInputs, states: Tensor, chunk: int) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state in that order; empty where the input is None."""
    b, l, d = i.x.shape
    n = i.A.shape[1]
    none = i.x.new_empty(0)
    if l == 0 or dy is None:
        dy = torch.zeros_like(i.x)
    V = 2 if d % 2 == 0 and not INTERPRETED else 1
    nseg, per_segment = states.shape[0], chunk // T
    with on_device(i.x):
        i = i._replace(
            x=channels_last(i.x, V), dt=channels_last(i.dt, V), z=None if i.z is None else channels_last(i.z, V),
            seq_idx=None if i.seq_idx is None else i.seq_idx.contiguous(),
        )  # fmt: skip
        dy = channels_last(dy, V)
        p = prepare(i)
        new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
        blocks = triton.cdiv(d, BD)
        dx, ddt = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (i.x, i.dt))
        dz = none if i.z is None else torch.empty_like(i.z, memory_format=torch.contiguous_format)
        dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (i.B, i.C))
        grads, dA_part = padded(nseg, b, n, d, i.x.device), torch.empty(nseg, b, n, d, **new)
        packed = i.seq_idx is not None and i.initial_state is not None
        dh0_part = torch.empty(nseg if packed else 0, b, n, d, **new)
        total = torch.empty(nseg, b, d, **new)
        dD_part, dbias_part = torch.empty_like(total), torch.empty_like(total)
        alive = torch.empty(nseg, b, dtype=torch.int32, device=i.x.device)
        dh0 = torch.empty(b, n, d, **new)
        chunk_states = padded(-(-l // T), b, n, d, i.x.device)
        zz = i.x if i.z is None else i.z
        pointers = (i.x, i.dt, zz, dy, p.Bt, p.Ct, p.A2, or_dummy(i.D, i.x), or_dummy(i.dt_bias, i.x),
                    or_dummy(p.h0, i.x), or_dummy(i.lengths, i.x), or_dummy(i.seq_idx, i.x))  # fmt: skip
        common = dict(
            p.flags, T=T, BD=BD, V=V, EVEN=d % BD == 0, HAS_D=i.D is not None, HAS_Z=i.z is not None,
            per_segment=per_segment, num_warps=1, maxnreg=MAX_REGISTERS, **strides(V, x=i.x, dt=i.dt, z=zz, y=dy, o=dx),
        )  # fmt: skip
        _states_kernel[(blocks, b, nseg)](
            *pointers, states, chunk_states, i.x if i.z is None else dz, grads, total, alive, **common,
        )  # fmt: skip
        last = None if dfinal is None else dfinal.float().transpose(1, 2).contiguous()
        combine_kernel[(triton.cdiv(d, 128), b, n)](
            grads, total, alive, p.A2, or_dummy(last, i.x), dh0, n * d, d, nseg, N=n, BD=128,
            HAS_START=last is not None, REVERSE=True,
        )  # fmt: skip
        dB_part, dC_part = (torch.empty(blocks, b, n, p.lpad, **new) for _ in range(2))
        _gradient_kernel[(blocks, b, nseg)](
            *pointers, chunk_states, grads, dx, ddt, dB_part, dC_part, dA_part, dh0_part if packed else dA_part,
            dD_part, dbias_part, **common,
        )  # fmt: skip
        _reduce_kernel[(triton.cdiv(p.lpad, 64), b)](
            dB_part, dC_part, dB, dC, blocks, l, p.lpad, N=n, NP=triton.next_power_of_2(n), L=64
        )
        if i.initial_state is not None:
            if packed:
                dh0 = dh0 + dh0_part.sum(0)
            d_initial = dh0.sum_to_size(i.initial_state.shape[0], n, d).transpose(1, 2)
            d_initial = d_initial.to(i.initial_state.dtype).contiguous()
        return [
            dx, ddt, dA_part.sum((0, 1)).t().to(i.A.dtype).contiguous(), dB, dC,
            none.clone() if i.D is None else dD_part.sum((0, 1)).to(i.D.dtype), dz,
            none.clone() if i.dt_bias is None else dbias_part.sum((0, 1)).to(i.dt_bias.dtype),
            none.clone() if i.initial_state is None else d_initial,
        ]  # fmt: skip
