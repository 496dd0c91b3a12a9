"""Selective scan, backward: three launches over segments that run side by side.

1. ``_states_kernel`` runs each segment forward again from its saved state, as the forward kernel does. It stores the
   state at every chunk start, the gradient of z, and what the segment alone sends back through its start state.
2. ``combine_kernel`` turns these into the gradient that each segment receives at its end.
3. ``_gradient_kernel`` goes through the segment's chunks from the last, a state at a time: states again, gradients of
   the states, and from both all others. dB and dC are sums over channels: every channel block leaves its part,
   ``_reduce_kernel`` adds.

In the third, tiles are (T steps, BD channels) as in ``_common``: the states of a chunk, their gradients and what is
summed over states would not fit into registers for all states at once.

With s_t the state after step t and g_t its gradient: g_t = C_t dy_t + decay_{t+1} g_{t+1}, and the gradient of
dt_t A is g_t times decay_t * s_{t-1}, the part of s_t that was carried over, so nothing is shifted in time.
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
    fetch_lines,
    on_device,
    or_dummy,
    row,
    sigmoid,
    softplus,
    strides,
)
from ._lanes import sum_lanes
from .scan import NO_SPECIALIZE, combine_kernel, padded, prepare

T = 8
BD = 4 if INTERPRETED else 64
T_STATES = 8
BD_STATES = 4 if INTERPRETED else 32
STATES_MAX_REGISTERS: int | None = None
# Fewer registers fit more warps, whose spills and rows then drive each other out of the first cache.
MAX_REGISTERS: int | None = None
UNROLL = 2
LANES = not INTERPRETED
PREFETCH = 0 if INTERPRETED else 1


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _states_kernel(
    x, dt, z, dy, rows, A2, D, bias, h0, lengths, seq, states, chunk_states, dz, local, total, alive,
    sx, sdt, sz, sy, so, s0, l, lpad, per_segment, SXL: tl.constexpr, SDTL: tl.constexpr, SZL: tl.constexpr,
    SYL: tl.constexpr, SOL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
    ALIGNED: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row, segment); its states stay in registers as in the forward kernel.

    The state goes to chunk_states (chunks, b, n, d) every EVERY * T steps, per_segment times.
    """
    r = tl.program_id(1).to(tl.int64)
    seg = tl.program_id(2)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, T)
    n = tl.arange(0, NP)
    sm = cm[None, :] & ((n < N) | (N == NP))[:, None]
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    a2 = tl.load(A2 + n[:, None] * d + ch[None, :], mask=sm, other=0.0)
    plane = (n * d)[:, None] + ch[None, :]
    h_init = tl.zeros([NP, BD], tl.float32)
    if HAS_H0 and HAS_SEQ:
        h_init = tl.load(h0 + r * s0 + plane, mask=sm, other=0.0)
    here = (seg.to(tl.int64) * b + r) * N * d
    h = tl.load(states + here + plane, mask=sm, other=0.0)
    back = tl.zeros([NP, BD], tl.float32)
    left = tl.full([NP, BD], 1.0, tl.float32)
    first = seg * per_segment * (EVERY * T)
    m = (first + t < end)[:, None] & cm[None, :] | ALIGNED
    xb = x + r * sx + first.to(tl.int64) * SXL
    db = dt + r * sdt + first.to(tl.int64) * SDTL
    zb = z + r * sz + first.to(tl.int64) * SZL
    yb = dy + r * sy + first.to(tl.int64) * SYL
    ob = dz + r * so + first.to(tl.int64) * SOL
    bc = rows + (r * lpad + first) * (2 * NP)
    # What comes from memory is on its way one chunk (B and C: one step) before it is used.
    dt_next = tl.load(db + (t[:, None] * SDTL + ch[None, :]), mask=m, other=0.0)
    x_next = tl.load(xb + (t[:, None] * SXL + ch[None, :]), mask=m, other=0.0)
    y_next = tl.load(yb + (t[:, None] * SYL + ch[None, :]), mask=m, other=0.0)
    if HAS_Z:
        z_next = tl.load(zb + (t[:, None] * SZL + ch[None, :]), mask=m, other=0.0)
    bn = tl.load(bc + n)
    cn = tl.load(bc + NP + n)
    sum_dt = tl.zeros([BD], tl.float32)
    kept = 1
    chunks = tl.minimum(per_segment * EVERY, (l - first + T - 1) // T)
    ahead = bc + T * 2 * NP + tl.arange(0, T * NP // 4) * 8
    to_save = chunk_states + (seg.to(tl.int64) * per_segment * b + r) * N * d
    for c in range(chunks):
        t0 = first + c * T
        fetch_lines(ahead, PREFETCH)
        ahead += T * 2 * NP
        raw = dt_next.to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
        dtv = tl.where(m, softplus(raw), 0.0)
        xv = x_next.to(tl.float32)
        dtx = dtv * xv
        sum_dt += tl.sum(dtv, 0)
        gy = y_next.to(tl.float32)
        if HAS_Z:
            zv = z_next.to(tl.float32)
            sig = sigmoid(zv)
            to_z = gy * sig * (1.0 + zv * (1.0 - sig))
            gy *= zv * sig
            acc = tl.zeros([T, BD], tl.float32)
            if HAS_D:
                acc += xv * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
        starts = t
        if HAS_SEQ:
            starts = document_start(seq + r * l, t0 + t, end)
            kept = tl.where(tl.sum(starts, 0) > 0, 0, kept)
        # The minimum changes nothing that is used; without it the compiler keeps a pointer for every row of a tile.
        o = tl.minimum(c + 1, chunks - 1).to(tl.int64) * T
        m_next = (t0 + T + t < end)[:, None] & cm[None, :] | ALIGNED
        dt_next = tl.load(db + o * SDTL + (t[:, None] * SDTL + ch[None, :]), mask=m_next, other=0.0)
        x_next = tl.load(xb + o * SXL + (t[:, None] * SXL + ch[None, :]), mask=m_next, other=0.0)
        y_next = tl.load(yb + o * SYL + (t[:, None] * SYL + ch[None, :]), mask=m_next, other=0.0)
        if HAS_Z:
            z_next = tl.load(zb + o * SZL + (t[:, None] * SZL + ch[None, :]), mask=m_next, other=0.0)
        if c % EVERY == 0:
            tl.store(to_save + plane, h, mask=sm)
            to_save += b.to(tl.int64) * N * d
        for k in tl.static_range(T):
            bk = bn
            ck = cn
            bn = tl.load(bc + (k + 1) * 2 * NP + n)
            cn = tl.load(bc + (k + 1) * 2 * NP + NP + n)
            a = tl.exp2(row(dtv, t, k)[None, :] * a2)
            left *= a
            if HAS_SEQ:
                new_document = element(starts, t, k) != 0
                h = tl.where(new_document, h_init, h)
                left = tl.where(new_document, 0.0, left)
            h = a * h + row(dtx, t, k)[None, :] * bk[:, None]
            back += left * (row(gy, t, k)[None, :] * ck[:, None])
            if HAS_Z:
                yk = tl.sum(h * ck[:, None], 0)
                acc = tl.where((t == k)[:, None], acc + yk[None, :], acc)
        bc += T * 2 * NP
        if HAS_Z:
            inside = (t0 + t < l)[:, None] & cm[None, :] | ALIGNED
            dzv = tl.where(m, to_z * acc, 0.0)
            tl.store(ob + (t[:, None] * SOL + ch[None, :]), dzv.to(dz.dtype.element_ty), mask=inside)
            ob += T * SOL
        m = m_next
    tl.store(local + here + plane, back, mask=sm)
    tl.store(total + (seg * b + r) * d + ch, sum_dt, mask=cm)
    if tl.program_id(0) == 0:
        tl.store(alive + seg * b + r, kept)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _gradient_kernel(
    x, dt, z, dy, Bt, Ct, A2, D, bias, h0, lengths, seq, chunk_states, grads, dx, ddt, dB_part, dC_part, dA_part,
    dh0_part, dD_part, dbias_part, sx, sdt, sz, sy, so, s0, l, lpad, per_segment, SXL: tl.constexpr,
    SDTL: tl.constexpr, SZL: tl.constexpr, SYL: tl.constexpr, SOL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr, PREFETCH: tl.constexpr, NP: tl.constexpr, UNROLL: tl.constexpr,
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
    if LANES:
        i = tl.arange(0, 32)
        array = tl.num_programs(0) * b * N * lpad
        lane_at = (tl.program_id(0) * b + r) * N * lpad + (i >> 4) * array + ((i >> 1) & 7)
        lane_writes = (i & 1) == 0
    sum_D = tl.zeros([BD], tl.float32)
    sum_bias = tl.zeros([BD], tl.float32)
    first = seg * per_segment * T
    chunks = tl.minimum(per_segment, (l - first + T - 1) // T)
    t0 = first + (chunks - 1) * T
    for j in range(chunks):
        # Not through j: then the compiler would keep a pointer for every row of a tile.
        before = tl.maximum(t0 - T, first)
        m = (t0 + t < end)[:, None] & cm[None, :] | ALIGNED
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
        started = chunk_states + t0 // T * step + plane
        if PREFETCH > 0:
            # A sector is 32 bytes: what the cache fetches.
            SECTOR: tl.constexpr = 256 // x.dtype.element_ty.primitive_bitwidth
            sectors = tl.minimum(tl.program_id(0) * BD + tl.arange(0, BD // SECTOR) * SECTOR, d - 1)
            to = before.to(tl.int64)
            fetch_lines(x + r * (sx * V) + to * SXL + (t[:, None] * SXL + sectors[None, :]), PREFETCH)
            fetch_lines(dt + r * (sdt * V) + to * SDTL + (t[:, None] * SDTL + sectors[None, :]), PREFETCH)
            fetch_lines(dy + r * (sy * V) + to * SYL + (t[:, None] * SYL + sectors[None, :]), PREFETCH)
            if HAS_Z:
                fetch_lines(z + r * (sz * V) + to * SZL + (t[:, None] * SZL + sectors[None, :]), PREFETCH)
            ns = tl.minimum(tl.arange(0, NP), N - 1)
            fetch_lines(Bt + (r * N + ns) * lpad + before, PREFETCH)
            fetch_lines(Ct + (r * N + ns) * lpad + before, PREFETCH)
            sectors = tl.minimum(tl.program_id(0) * BD + tl.arange(0, BD // 8) * 8, d - 1)
            fetch_lines(chunk_states + before // T * step + r * N * d + (ns[:, None] * d + sectors[None, :]), PREFETCH)
        tl.debug_barrier()
        h = tl.load(started, mask=cm, other=0.0)
        back = tl.load(grads + mine, mask=cm, other=0.0)
        dA = tl.load(dA_part + mine, mask=cm & (j > 0), other=0.0)
        for n in tl.range(N, loop_unroll_factor=UNROLL):
            # What comes from far is under way one state early (one row too far at last).
            h_next = tl.load(started + (n + 1) * d, mask=cm, other=0.0)
            back_next = tl.load(grads + mine + (n + 1) * d, mask=cm, other=0.0)
            dA_next = tl.load(dA_part + mine + (n + 1) * d, mask=cm & (j > 0), other=0.0)
            a2 = tl.load(A2 + n * d + ch, mask=cm, other=0.0)
            bn = tl.load(Bb + n * lpad + t0)
            cn = tl.load(Cb + n * lpad + t0)
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
            carried = drive
            for k in tl.static_range(T):
                if HAS_SEQ:
                    h = tl.where(element(starts, t, k) != 0, h_init, h)
                u = row(decay, t, k) * h
                h = u + row(drive, t, k)
                hs = tl.where((t == k)[:, None], h[None, :], hs)
                carried = tl.where((t == k)[:, None], u[None, :], carried)
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
            if LANES:
                sums = sum_lanes(gs * dtx, hs * gy, t, BD, V)
                tl.store(dB_part + lane_at + n * lpad + t0, sums, mask=lane_writes)
            else:
                tl.store(dC_part + part + n * lpad + t0, tl.sum(hs * gy, 1))
                tl.store(dB_part + part + n * lpad + t0, tl.sum(gs * dtx, 1))
            to_dtx += gs * bn[:, None]
            w = gs * carried
            to_dt += w * a2[None, :]
            tl.store(dA_part + mine + n * d, dA + tl.sum(w * dtv, 0), mask=cm)
            if HAS_SEQ and HAS_H0:
                tl.store(dh0_part + mine + n * d, dh0, mask=cm)
            h, back, dA = h_next, back_next, dA_next
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
        inside = (t0 + t < l)[:, None] & cm[None, :] | ALIGNED
        tl.store(dx + ob + o * SOL, dxv.to(dx.dtype.element_ty), mask=inside)
        tl.store(ddt + ob + o * SOL, ddtv.to(ddt.dtype.element_ty), mask=inside)
        t0 = before
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


@triton.jit
def _finish_kernel(
    dA_part, dD_part, dbias_part, dh0, dh0_part, dA, dD, dbias, d_initial, nseg, b, d, N: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr,
    SHARED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sums over segments and rows. Program (channel block, n): dA and d_initial of state n; program N: dD and dbias.

    d_initial (b, d, n), or (1, d, n) when SHARED.
    """
    n = tl.program_id(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = ch < d
    rows = nseg * b
    if n == N:
        sum_D = tl.zeros([BD], tl.float32)
        sum_bias = tl.zeros([BD], tl.float32)
        for i in range(0, rows, R):
            row = i + tl.arange(0, R)
            at = row.to(tl.int64)[:, None] * d + ch[None, :]
            m = (row < rows)[:, None] & cm[None, :]
            sum_D += tl.sum(tl.load(dD_part + at, mask=m, other=0.0), 0)
            sum_bias += tl.sum(tl.load(dbias_part + at, mask=m, other=0.0), 0)
        if HAS_D:
            tl.store(dD + ch, sum_D.to(dD.dtype.element_ty), mask=cm)
        if HAS_BIAS:
            tl.store(dbias + ch, sum_bias.to(dbias.dtype.element_ty), mask=cm)
    else:
        plane = n * d + ch
        size = N * d
        acc = tl.zeros([BD], tl.float32)
        for i in range(0, rows, R):
            row = i + tl.arange(0, R)
            at = row.to(tl.int64)[:, None] * size + plane[None, :]
            acc += tl.sum(tl.load(dA_part + at, mask=(row < rows)[:, None] & cm[None, :], other=0.0), 0)
        tl.store(dA + ch * N + n, acc.to(dA.dtype.element_ty), mask=cm)
        if HAS_H0:
            shared = tl.zeros([BD], tl.float32)
            source = dh0 + plane
            parts = dh0_part + plane
            target = d_initial + ch * N + n
            for _ in range(b):
                v = tl.load(source, mask=cm, other=0.0)
                if PACKED:
                    part = parts
                    for _ in range(nseg):
                        v += tl.load(part, mask=cm, other=0.0)
                        part += b * size
                if SHARED:
                    shared += v
                else:
                    tl.store(target, v.to(d_initial.dtype.element_ty), mask=cm)
                source += size
                parts += size
                target += size
            if SHARED:
                tl.store(d_initial + ch * N + n, shared.to(d_initial.dtype.element_ty), mask=cm)


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
        p = prepare(i, transposed=True)
        new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
        blocks = triton.cdiv(d, BD)
        dx, ddt = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (i.x, i.dt))
        dz = none if i.z is None else torch.empty_like(i.z, memory_format=torch.contiguous_format)
        dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (i.B, i.C))
        grads, dA_part = (padded(nseg, b, n, d, i.x.device) for _ in range(2))
        packed = i.seq_idx is not None and i.initial_state is not None
        dh0_part = torch.empty(nseg if packed else 0, b, n, d, **new)
        total = torch.empty(nseg, b, d, **new)
        dD_part, dbias_part = torch.empty_like(total), torch.empty_like(total)
        alive = torch.empty(nseg, b, dtype=torch.int32, device=i.x.device)
        dh0 = torch.empty(b, n, d, **new)
        chunk_states = padded(-(-l // T), b, n, d, i.x.device)
        zz = i.x if i.z is None else i.z
        optional = (p.A2, or_dummy(i.D, i.x), or_dummy(i.dt_bias, i.x), or_dummy(p.h0, i.x),
                    or_dummy(i.lengths, i.x), or_dummy(i.seq_idx, i.x))  # fmt: skip
        common = dict(
            p.flags, HAS_D=i.D is not None, HAS_Z=i.z is not None, per_segment=per_segment, num_warps=1,
        )  # fmt: skip
        tensors = {"x": i.x, "dt": i.dt, "z": zz, "y": dy, "o": dx}
        _states_kernel[(triton.cdiv(d, BD_STATES), b, nseg)](
            i.x, i.dt, zz, dy, p.rows, *optional, states, chunk_states, i.x if i.z is None else dz, grads, total, alive,
            NP=triton.next_power_of_2(n), T=T_STATES, BD=BD_STATES, EVERY=T // T_STATES, EVEN=d % BD_STATES == 0,
            maxnreg=STATES_MAX_REGISTERS, PREFETCH=PREFETCH,
            ALIGNED=i.lengths is None and l % T_STATES == 0 and d % BD_STATES == 0, **common, **strides(1, **tensors),
        )  # fmt: skip
        last = None if dfinal is None else dfinal.float().transpose(1, 2).contiguous()
        combine_kernel[(triton.cdiv(d, BD_STATES), b, n)](
            grads, total, alive, p.A2, or_dummy(last, i.x), dh0, n * d, d, nseg, N=n, S=8, BD=BD_STATES,
            num_warps=1,
            HAS_START=last is not None, WRITE_LAST=True, REVERSE=True,
        )  # fmt: skip
        dB_part, dC_part = torch.empty(2, blocks, b, n, p.lpad, **new)
        _gradient_kernel[(blocks, b, nseg)](
            i.x, i.dt, zz, dy, p.Bt, p.Ct, *optional, chunk_states, grads, dx, ddt, dB_part, dC_part, dA_part,
            dh0_part if packed else dA_part, dD_part, dbias_part, NP=triton.next_power_of_2(n), T=T, BD=BD, V=V,
            EVEN=d % BD == 0, LANES=LANES, ALIGNED=i.lengths is None and l % T == 0 and d % BD == 0,
            PREFETCH=PREFETCH, UNROLL=UNROLL, maxnreg=MAX_REGISTERS, **common, **strides(V, **tensors),
        )  # fmt: skip
        _reduce_kernel[(triton.cdiv(p.lpad, 64), b)](
            dB_part, dC_part, dB, dC, blocks, l, p.lpad, N=n, NP=triton.next_power_of_2(n), L=64
        )
        dA, dD, dbias, d_initial = (
            none.clone() if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
            for v in (i.A, i.D, i.dt_bias, i.initial_state)
        )
        _finish_kernel[(triton.cdiv(d, 64), n + 1)](
            dA_part, dD_part, dbias_part, dh0, dh0_part if packed else dA_part, dA, dD if i.D is not None else dA,
            dbias if i.dt_bias is not None else dA, d_initial if i.initial_state is not None else dA, nseg, b, d, N=n,
            R=16, BD=64, HAS_D=i.D is not None, HAS_BIAS=i.dt_bias is not None, PACKED=packed,
            HAS_H0=i.initial_state is not None, SHARED=d_initial.shape[0] == 1,
        )  # fmt: skip
        return [dx, ddt, dA, dB, dC, dD, dz, dbias, d_initial]
