"""Selective scan, forward: one launch over the sequence, or segments in parallel when rows and channels are few.

Letters as in ``ops.selective_scan``; A2 is A * log2(e), transposed to (n, d), since the hardware has exp2 only. B and
C come transposed to (b, n, lpad) float32, so that a thread reads its T steps of one state as whole vectors.

Time is cut twice: into chunks of T steps, which a thread holds in registers one state n at a time, and into segments
of ``chunk`` steps, at whose starts the state is saved for backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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

LOG2E = 1.4426950408889634
T_FWD = 16
BD_FWD = 4 if INTERPRETED else 32
V = 1
NO_SPECIALIZE = ["sx", "sdt", "sz", "sy", "so"]


@triton.jit
def _prepare_kernel(A, B, C, lengths, A2, Bt, Ct, sb, sbl, sc, scl, l, d, lpad, N: tl.constexpr, NP: tl.constexpr,
                    L: tl.constexpr, HAS_LEN: tl.constexpr):  # fmt: skip
    """Rows 0..b-1 of the grid transpose B and C (zero past the end); the row after them does A."""
    pid = tl.program_id(0)
    r = tl.program_id(1)
    n = tl.arange(0, NP)
    i = pid * L + tl.arange(0, L)
    if r == tl.num_programs(1) - 1:
        m = (i < d)[:, None] & (n < N)[None, :]
        v = tl.load(A + i[:, None] * N + n[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(A2 + n[None, :] * d + i[:, None], v * 1.4426950408889634, mask=m)
    else:
        rr = r.to(tl.int64)
        end = l
        if HAS_LEN:
            end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
        m = (i < end)[:, None] & (n < N)[None, :]
        out = rr * N * lpad + n[None, :] * lpad + i[:, None]
        mo = (i < lpad)[:, None] & (n < N)[None, :]
        vb = tl.load(B + rr * sb + i[:, None] * sbl + n[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(Bt + out, vb, mask=mo)
        vc = tl.load(C + rr * sc + i[:, None] * scl + n[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(Ct + out, vc, mask=mo)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _forward_kernel(
    x, dt, z, Bt, Ct, A2, D, bias, h0, lengths, seq, hbuf, states, y, final,
    sx, sdt, sz, sy, s0, l, lpad, per_program, per_segment,
    SXL: tl.constexpr, SDTL: tl.constexpr, SZL: tl.constexpr, SYL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, SAVE: tl.constexpr,
    PARALLEL: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row, part): per_program chunks in order. hbuf (parts, b, n, d) carries the state.

    With PARALLEL a part is one segment and starts from states; else it is everything and starts from h0.
    """
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = (ch < d) | EVEN
    t = tl.arange(0, T)
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    plane = r * N * d + ch
    carry = hbuf + part.to(tl.int64) * b * N * d + plane
    for n in range(N):
        if PARALLEL:
            h = tl.load(states + part.to(tl.int64) * b * N * d + plane + n * d, mask=cm, other=0.0)
        elif HAS_H0:
            h = tl.load(h0 + r * s0 + n * d + ch, mask=cm, other=0.0)
        else:
            h = tl.zeros([BD], tl.float32)
        tl.store(carry + n * d, h, mask=cm)
    xb = x + r * (sx * V) + (t[:, None] * SXL + ch[None, :])
    db = dt + r * (sdt * V) + (t[:, None] * SDTL + ch[None, :])
    zb = z + r * (sz * V) + (t[:, None] * SZL + ch[None, :])
    yb = y + r * (sy * V) + (t[:, None] * SYL + ch[None, :])
    Bb = Bt + r * N * lpad + t
    Cb = Ct + r * N * lpad + t
    for c in range(per_program):
        chunk = part * per_program + c
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
            acc = tl.zeros([T, BD], tl.float32)
            if HAS_D:
                acc += xv * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            starts = t
            if HAS_SEQ:
                starts = document_start(seq + r * l, t0 + t, end)
            save = states + (chunk // per_segment).to(tl.int64) * b * N * d + plane
            # Stores to the carry must be seen by whichever thread loads it next.
            tl.debug_barrier()
            a2 = tl.load(A2 + ch, mask=cm, other=0.0)
            bn = tl.load(Bb + t0)
            cn = tl.load(Cb + t0)
            h = tl.load(carry, mask=cm, other=0.0)
            for n in tl.range(N, loop_unroll_factor=2):
                # The next state's values are on their way while this one's are worked on (one row too far at last).
                a2_next = tl.load(A2 + (n + 1) * d + ch, mask=cm, other=0.0)
                bn_next = tl.load(Bb + (n + 1) * lpad + t0)
                cn_next = tl.load(Cb + (n + 1) * lpad + t0)
                h_next = tl.load(carry + (n + 1) * d, mask=cm, other=0.0)
                if SAVE and chunk % per_segment == 0:
                    tl.store(save + n * d, h, mask=cm)
                if HAS_SEQ:
                    if HAS_H0:
                        h_init = tl.load(h0 + r * s0 + n * d + ch, mask=cm, other=0.0)
                    else:
                        h_init = tl.zeros([BD], tl.float32)
                decay = tl.exp2(dtv * a2[None, :])
                drive = dtx * bn[:, None]
                hs = drive
                for k in tl.static_range(T):
                    if HAS_SEQ:
                        h = tl.where(element(starts, t, k) != 0, h_init, h)
                    h = row(decay, t, k) * h + row(drive, t, k)
                    hs = tl.where((t == k)[:, None], h[None, :], hs)
                acc += hs * cn[:, None]
                tl.store(carry + n * d, h, mask=cm)
                a2, bn, cn, h = a2_next, bn_next, cn_next, h_next
            if HAS_Z:
                zv = tl.load(zb + o * SZL, mask=m, other=0.0).to(tl.float32)
                acc *= zv * sigmoid(zv)
            acc = tl.where(m, acc, 0.0)
            tl.store(yb + o * SYL, acc.to(y.dtype.element_ty), mask=(t0 + t < l)[:, None] & cm[None, :])
    if part == tl.num_programs(2) - 1:
        tl.debug_barrier()
        for n in range(N):
            h = tl.load(carry + n * d, mask=cm, other=0.0)
            tl.store(final + r * d * N + ch * N + n, h, mask=cm)


@triton.jit(do_not_specialize=["sx", "sdt"])
def _segment_kernel(
    x, dt, Bt, A2, bias, h0, lengths, seq, local, total, alive, sx, sdt, s0, l, lpad, per_segment,
    SXL: tl.constexpr, SDTL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr,
    HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state from a zero start (local), and what it leaves of the state before it.

    That is exp2(A2 * total) times alive: total is the sum of dt, alive is 0 when a document starts inside.
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
    mine = local + (seg * b + r) * N * d + ch
    xb = x + r * (sx * V) + (t[:, None] * SXL + ch[None, :])
    db = dt + r * (sdt * V) + (t[:, None] * SDTL + ch[None, :])
    Bb = Bt + r * N * lpad + t
    sum_dt = tl.zeros([BD], tl.float32)
    kept = 1
    for c in range(per_segment):
        t0 = (seg * per_segment + c) * T
        if t0 < end:
            m = (t0 + t < end)[:, None] & cm[None, :]
            o = t0.to(tl.int64)
            raw = tl.load(db + o * SDTL, mask=m, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(bias + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            dtv = tl.where(m, softplus(raw), 0.0)
            xv = tl.load(xb + o * SXL, mask=m, other=0.0).to(tl.float32)
            dtx = dtv * xv
            sum_dt += tl.sum(dtv, 0)
            starts = t
            if HAS_SEQ:
                starts = document_start(seq + r * l, t0 + t, end)
                kept = tl.where(tl.sum(starts, 0) > 0, 0, kept)
            tl.debug_barrier()
            a2 = tl.load(A2 + ch, mask=cm, other=0.0)
            bn = tl.load(Bb + t0)
            h = tl.load(mine, mask=cm & (c > 0), other=0.0)
            for n in tl.range(N, loop_unroll_factor=2):
                a2_next = tl.load(A2 + (n + 1) * d + ch, mask=cm, other=0.0)
                bn_next = tl.load(Bb + (n + 1) * lpad + t0)
                h_next = tl.load(mine + (n + 1) * d, mask=cm & (c > 0), other=0.0)
                if HAS_SEQ:
                    if HAS_H0:
                        h_init = tl.load(h0 + r * s0 + n * d + ch, mask=cm, other=0.0)
                    else:
                        h_init = tl.zeros([BD], tl.float32)
                decay = tl.exp2(dtv * a2[None, :])
                drive = dtx * bn[:, None]
                for k in tl.static_range(T):
                    if HAS_SEQ:
                        h = tl.where(element(starts, t, k) != 0, h_init, h)
                    h = row(decay, t, k) * h + row(drive, t, k)
                tl.store(mine + n * d, h, mask=cm)
                a2, bn, h = a2_next, bn_next, h_next
        elif c == 0:
            for n in range(N):
                tl.store(mine + n * d, tl.zeros([BD], tl.float32), mask=cm)
    tl.store(total + (seg * b + r) * d + ch, sum_dt, mask=cm)
    if tl.program_id(0) == 0:
        tl.store(alive + seg * b + r, kept)


@triton.jit
def combine_kernel(
    local, total, alive, A2, start, first, s0, d, nseg, N: tl.constexpr, BD: tl.constexpr, HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """local (nseg, b, n, d) in place: from what each segment adds to what each segment receives.

    Runs over the segments in order (REVERSE: from the last), from start; what leaves the last one goes to first.
    """
    n = tl.program_id(2)
    r = tl.program_id(1)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = ch < d
    a2 = tl.load(A2 + n * d + ch, mask=cm, other=0.0)
    h = tl.zeros([BD], tl.float32)
    if HAS_START:
        h += tl.load(start + r * s0 + n * d + ch, mask=cm, other=0.0)
    for i in range(nseg):
        s = i
        if REVERSE:
            s = nseg - 1 - i
        at = local + ((s * b + r).to(tl.int64) * N + n) * d + ch
        add = tl.load(at, mask=cm, other=0.0)
        left = tl.exp2(a2 * tl.load(total + (s * b + r) * d + ch, mask=cm, other=0.0))
        left *= tl.load(alive + s * b + r).to(tl.float32)
        tl.store(at, h, mask=cm)
        h = add + left * h
    tl.store(first + (r * N + n) * d + ch, h, mask=cm)


class Prepared(NamedTuple):
    """The inputs as the kernels want them."""

    i: ScanInputs
    A2: Tensor
    Bt: Tensor
    Ct: Tensor
    h0: Tensor | None
    lpad: int
    flags: dict[str, Any]


def padded(*shape: Any) -> Tensor:
    """float32 (*shape) with one more row behind it: the kernels read one row ahead. The device comes last."""
    *size, device = shape
    count = math.prod(size)
    return torch.empty(count + size[-1], dtype=torch.float32, device=device)[:count].view(size)


def prepare(i: ScanInputs) -> Prepared:
    """Transposes and flags, once for forward and once for backward."""
    b, l, d = i.x.shape
    n = i.A.shape[1]
    lpad = -(-max(l, 1) // T_FWD) * T_FWD
    A, B, C = i.A.contiguous(), i.B, i.C
    B = B if B.stride(2) == 1 else B.contiguous()
    C = C if C.stride(2) == 1 else C.contiguous()
    A2 = padded(n, d, i.x.device)
    Bt, Ct = (padded(b, n, lpad, i.x.device) for _ in range(2))
    block = 64
    _prepare_kernel[(triton.cdiv(max(lpad, d), block), b + 1)](
        A, B, C, or_dummy(i.lengths, A), A2, Bt, Ct, B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        l, d, lpad, N=n, NP=triton.next_power_of_2(n), L=block, HAS_LEN=i.lengths is not None,
    )  # fmt: skip
    h0, s0 = None, 0
    if i.initial_state is not None:
        h0 = i.initial_state.float().transpose(1, 2).contiguous()
        s0 = 0 if h0.shape[0] == 1 else n * d
    flags = {
        "N": n, "HAS_BIAS": i.dt_bias is not None, "HAS_H0": h0 is not None, "HAS_LEN": i.lengths is not None,
        "HAS_SEQ": i.seq_idx is not None, "s0": s0, "l": l, "d": d, "lpad": lpad,
    }  # fmt: skip
    return Prepared(i, A2, Bt, Ct, h0, lpad, flags)


def forward(i: ScanInputs, chunk: int, save: bool, *, parallel: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, d, n) and the states at segment starts (k, b, n, d), empty unless save.

    parallel: cut time into segments that run side by side; by default when there are too few rows and channels.
    """
    b, l, d = i.x.shape
    n = i.A.shape[1]
    nseg, per_segment = -(-l // chunk), chunk // T_FWD
    with on_device(i.x):
        i = i._replace(
            x=channels_last(i.x, V), dt=channels_last(i.dt, V), z=None if i.z is None else channels_last(i.z, V),
            seq_idx=None if i.seq_idx is None else i.seq_idx.contiguous(),
        )  # fmt: skip
        p = prepare(i)
        new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
        blocks = triton.cdiv(d, BD_FWD)
        if parallel is None:
            parallel = nseg > 1 and i.x.is_cuda and b * blocks < 3 * _multiprocessors(i.x.device)
        y = torch.empty_like(i.x, memory_format=torch.contiguous_format)
        final = torch.empty(b, d, n, **new)
        states = padded(nseg if save or parallel else 0, b, n, d, i.x.device)
        hbuf = padded(nseg if parallel else 1, b, n, d, i.x.device)
        common = dict(p.flags, T=T_FWD, BD=BD_FWD, V=V, EVEN=d % BD_FWD == 0, num_warps=1)
        bias, h0 = or_dummy(i.dt_bias, i.x), or_dummy(p.h0, i.x)
        lengths, seq = or_dummy(i.lengths, i.x), or_dummy(i.seq_idx, i.x)
        if parallel:
            total = torch.empty(nseg, b, d, **new)
            alive = torch.empty(nseg, b, dtype=torch.int32, device=i.x.device)
            _segment_kernel[(blocks, b, nseg)](
                i.x, i.dt, p.Bt, p.A2, bias, h0, lengths, seq, states, total, alive, per_segment=per_segment,
                **strides(V, x=i.x, dt=i.dt), **common,
            )  # fmt: skip
            combine_kernel[(triton.cdiv(d, 128), b, n)](
                states, total, alive, p.A2, h0, hbuf, p.flags["s0"], d, nseg, N=n, BD=128, HAS_START=p.h0 is not None,
                REVERSE=False,
            )  # fmt: skip
        zz = i.x if i.z is None else i.z
        _forward_kernel[(blocks, b, nseg if parallel else 1)](
            i.x, i.dt, zz, p.Bt, p.Ct, p.A2, or_dummy(i.D, i.x), bias, h0, lengths, seq, hbuf, states, y, final,
            per_program=per_segment if parallel else -(-l // T_FWD), per_segment=per_segment, HAS_D=i.D is not None,
            HAS_Z=i.z is not None, SAVE=save and not parallel, PARALLEL=parallel,
            **strides(V, x=i.x, dt=i.dt, z=zz, y=y), **common,
        )  # fmt: skip
    return y, final, states if save else states[:0].clone()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
