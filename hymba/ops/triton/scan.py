"""Selective scan, forward: one launch over the sequence, or segments in parallel when rows and channels are few.

Letters as in ``ops.selective_scan``; A2 is A * log2(e), transposed to (n, d), since the hardware has exp2 only. B and
C come as rows of float32, so that a thread reads one step's as whole vectors.

A thread owns one channel and keeps all its states in registers: n independent recurrences, enough to fill the pipes
with one warp on a scheduler. What bounds it is the unit for exponentials, eight cycles for a warp's; all else that one
takes is less. Time is cut twice: into chunks of T steps, loaded and gated together, and into segments of ``chunk``
steps, at whose starts the state is saved for backward.
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
    fetch_lines,
    on_device,
    or_dummy,
    row,
    sigmoid,
    softplus,
    strides,
)

LOG2E = 1.4426950408889634
T_FWD = 8
BD_FWD = 4 if INTERPRETED else 32
MAX_REGISTERS: int | None = None
PREFETCH = 0 if INTERPRETED else 1
NO_SPECIALIZE = ["sx", "sdt", "sz", "sy", "so"]


@triton.jit
def _prepare_kernel(A, B, C, lengths, A2, rows, Bt, Ct, sb, sbl, sc, scl, l, d, lpad, N: tl.constexpr,
                    NP: tl.constexpr, L: tl.constexpr, HAS_LEN: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Rows 0..b-1 of the grid lay out B and C (zero past the end); the row after them does A."""
    pid = tl.program_id(0)
    r = tl.program_id(1)
    n = tl.arange(0, NP)
    i = pid * L + tl.arange(0, L)
    if r == tl.num_programs(1) - 1:
        m = (i < d)[:, None] & (n < N)[None, :]
        v = tl.load(A + i[:, None] * N + n[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(A2 + n[None, :] * d + i[:, None], v * 1.4426950408889634, mask=(i < d)[:, None] & (n < NP)[None, :])
    else:
        rr = r.to(tl.int64)
        end = l
        if HAS_LEN:
            end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
        m = (i < end)[:, None] & (n < N)[None, :]
        vb = tl.load(B + rr * sb + i[:, None] * sbl + n[None, :], mask=m, other=0.0).to(tl.float32)
        vc = tl.load(C + rr * sc + i[:, None] * scl + n[None, :], mask=m, other=0.0).to(tl.float32)
        at = rows + (rr * lpad + i[:, None]) * (2 * NP) + n[None, :]
        inside = (i < lpad)[:, None] & (n < NP)[None, :]
        tl.store(at, vb, mask=inside)
        tl.store(at + NP, vc, mask=inside)
        if TRANSPOSED:
            out = rr * N * lpad + n[None, :] * lpad + i[:, None]
            mo = (i < lpad)[:, None] & (n < N)[None, :]
            tl.store(Bt + out, vb, mask=mo)
            tl.store(Ct + out, vc, mask=mo)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def _forward_kernel(
    x, dt, z, rows, A2, D, bias, h0, lengths, seq, states, y, final, total, alive,
    sx, sdt, sz, sy, s0, l, lpad, per_program, per_segment,
    SXL: tl.constexpr, SDTL: tl.constexpr, SZL: tl.constexpr, SYL: tl.constexpr, d: tl.constexpr, EVEN: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, SAVE: tl.constexpr,
    PARALLEL: tl.constexpr, LOCAL: tl.constexpr, ALIGNED: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Program (channel block, row, part): per_program chunks in order, all states of its channels in registers.

    With PARALLEL a part is one segment and starts from states; else it is everything and starts from h0. With LOCAL
    it starts from zero and writes no y, but what the segment adds to the state (to states) and what it leaves of the
    state before it: exp2(A2 * total) times alive; total is the sum of dt, alive 0 when a document starts inside.
    """
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
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
    if HAS_H0 and (HAS_SEQ or not (PARALLEL or LOCAL)):
        h_init = tl.load(h0 + r * s0 + plane, mask=sm, other=0.0)
    here = states + (part.to(tl.int64) * b + r) * N * d
    if LOCAL:
        h = tl.zeros([NP, BD], tl.float32)
    elif PARALLEL:
        h = tl.load(here + plane, mask=sm, other=0.0)
    else:
        h = h_init
    first = part * per_program * T
    m = (first + t < end)[:, None] & cm[None, :] | ALIGNED
    xb = x + r * sx + first.to(tl.int64) * SXL
    db = dt + r * sdt + first.to(tl.int64) * SDTL
    zb = z + r * sz + first.to(tl.int64) * SZL
    yb = y + r * sy + first.to(tl.int64) * SYL
    bc = rows + (r * lpad + first) * (2 * NP)
    # What comes from memory is on its way one chunk (B and C: one step) before it is used.
    dt_next = tl.load(db + (t[:, None] * SDTL + ch[None, :]), mask=m, other=0.0)
    x_next = tl.load(xb + (t[:, None] * SXL + ch[None, :]), mask=m, other=0.0)
    bn = tl.load(bc + n)
    if not LOCAL:
        cn = tl.load(bc + NP + n)
        if HAS_Z:
            z_next = tl.load(zb + (t[:, None] * SZL + ch[None, :]), mask=m, other=0.0)
    sum_dt = tl.zeros([BD], tl.float32)
    kept = 1
    chunks = tl.minimum(per_program, (l - first + T - 1) // T)
    ahead = bc + T * 2 * NP + tl.arange(0, T * NP // 4) * 8
    until_save = 0
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
        if LOCAL:
            sum_dt += tl.sum(dtv, 0)
        else:
            acc = tl.zeros([T, BD], tl.float32)
            if HAS_D:
                acc += xv * tl.load(D + ch, mask=cm, other=0.0).to(tl.float32)[None, :]
            if HAS_Z:
                zv = z_next.to(tl.float32)
        starts = t
        if HAS_SEQ:
            starts = document_start(seq + r * l, t0 + t, end)
            if LOCAL:
                kept = tl.where(tl.sum(starts, 0) > 0, 0, kept)
        m_next = (t0 + T + t < end)[:, None] & cm[None, :] | ALIGNED
        # The minimum changes nothing that is used; without it the compiler keeps a pointer for every row of a tile.
        o = tl.minimum(c + 1, chunks - 1).to(tl.int64) * T
        dt_next = tl.load(db + o * SDTL + (t[:, None] * SDTL + ch[None, :]), mask=m_next, other=0.0)
        x_next = tl.load(xb + o * SXL + (t[:, None] * SXL + ch[None, :]), mask=m_next, other=0.0)
        if HAS_Z and not LOCAL:
            z_next = tl.load(zb + o * SZL + (t[:, None] * SZL + ch[None, :]), mask=m_next, other=0.0)
        if SAVE:
            if until_save == 0:
                until_save = per_segment
                tl.store(here + plane, h, mask=sm)
                here += b.to(tl.int64) * N * d
            until_save -= 1
        for k in tl.static_range(T):
            bk = bn
            bn = tl.load(bc + (k + 1) * 2 * NP + n)
            if HAS_SEQ:
                h = tl.where(element(starts, t, k) != 0, h_init, h)
            h = tl.exp2(row(dtv, t, k)[None, :] * a2) * h + row(dtx, t, k)[None, :] * bk[:, None]
            if not LOCAL:
                yk = tl.sum(h * cn[:, None], 0)
                acc = tl.where((t == k)[:, None], acc + yk[None, :], acc)
                cn = tl.load(bc + (k + 1) * 2 * NP + NP + n)
        bc += T * 2 * NP
        if not LOCAL:
            if HAS_Z:
                acc *= zv * sigmoid(zv)
            acc = tl.where(m, acc, 0.0)
            inside = (t0 + t < l)[:, None] & cm[None, :] | ALIGNED
            tl.store(yb + (t[:, None] * SYL + ch[None, :]), acc.to(y.dtype.element_ty), mask=inside)
            yb += T * SYL
        m = m_next
    if LOCAL:
        tl.store(here + plane, h, mask=sm)
        tl.store(total + (part * b + r) * d + ch, sum_dt, mask=cm)
        if tl.program_id(0) == 0:
            tl.store(alive + part * b + r, kept)
    elif part == tl.num_programs(2) - 1:
        tl.store(final + r * d * N + ch[None, :] * N + n[:, None], h, mask=sm)


@triton.jit
def combine_kernel(
    local, total, alive, A2, start, first, s0, d, nseg, N: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
    HAS_START: tl.constexpr, WRITE_LAST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """local (nseg, b, n, d) in place: from what each segment adds to what each segment receives.

    Runs over the segments in order (REVERSE: from the last), from start; what leaves the last one goes to first.
    S segments are loaded at a time, since a load that waits for the one before is all this would do.
    """
    n = tl.program_id(2)
    r = tl.program_id(1).to(tl.int64)
    b = tl.num_programs(1)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    cm = ch < d
    t = tl.arange(0, S)
    a2 = tl.load(A2 + n * d + ch, mask=cm, other=0.0)
    h = tl.zeros([BD], tl.float32)
    if HAS_START:
        h += tl.load(start + r * s0 + n * d + ch, mask=cm, other=0.0)
    for i in range(0, nseg, S):
        s = i + t
        if REVERSE:
            s = nseg - 1 - i - t
        inside = (s >= 0) & (s < nseg)
        m = inside[:, None] & cm[None, :]
        at = local + ((s * b + r) * N + n)[:, None] * d + ch[None, :]
        add = tl.load(at, mask=m, other=0.0)
        left = tl.exp2(a2[None, :] * tl.load(total + (s * b + r)[:, None] * d + ch[None, :], mask=m, other=0.0))
        left *= tl.load(alive + s * b + r, mask=inside, other=1).to(tl.float32)[:, None]
        given = add
        for k in tl.static_range(S):
            given = tl.where((t == k)[:, None], h[None, :], given)
            h = row(add, t, k) + row(left, t, k) * h
        tl.store(at, given, mask=m)
    if WRITE_LAST:
        tl.store(first + (r * N + n) * d + ch, h, mask=cm)


class Prepared(NamedTuple):
    """The inputs as the kernels want them."""

    A2: Tensor
    rows: Tensor
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


def prepare(i: ScanInputs, transposed: bool) -> Prepared:
    """float32 copies: rows (b * lpad + 16, 2 np) of B and C, np the power of two; Bt, Ct (b, n, lpad) if transposed."""
    b, l, d = i.x.shape
    n = i.A.shape[1]
    size = triton.next_power_of_2(n)
    lpad = -(-max(l, 1) // 16) * 16
    A, B, C = i.A.contiguous(), i.B, i.C
    B = B if B.stride(2) == 1 else B.contiguous()
    C = C if C.stride(2) == 1 else C.contiguous()
    A2 = padded(size, d, i.x.device)
    # The rows of the last chunk are followed by as many that are only asked for ahead of time.
    rows = torch.empty(b * lpad + 16, 2 * size, dtype=torch.float32, device=i.x.device)
    Bt, Ct = (padded(b if transposed else 0, n, lpad, i.x.device) for _ in range(2))
    block = 64
    _prepare_kernel[(triton.cdiv(max(lpad, d), block), b + 1)](
        A, B, C, or_dummy(i.lengths, A), A2, rows, Bt, Ct, B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        l, d, lpad, N=n, NP=size, L=block, HAS_LEN=i.lengths is not None, TRANSPOSED=transposed,
    )  # fmt: skip
    h0, s0 = None, 0
    if i.initial_state is not None:
        h0 = i.initial_state.float().transpose(1, 2).contiguous()
        s0 = 0 if h0.shape[0] == 1 else n * d
    flags = {
        "N": n, "HAS_BIAS": i.dt_bias is not None, "HAS_H0": h0 is not None, "HAS_LEN": i.lengths is not None,
        "HAS_SEQ": i.seq_idx is not None, "s0": s0, "l": l, "d": d, "lpad": lpad,
    }  # fmt: skip
    return Prepared(A2, rows, Bt, Ct, h0, lpad, flags)


def forward(i: ScanInputs, chunk: int, save: bool, *, parallel: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, d, n) and the states at segment starts (k, b, n, d), empty unless save.

    parallel: cut time into segments that run side by side; by default when there are too few rows and channels.
    """
    b, l, d = i.x.shape
    n = i.A.shape[1]
    nseg, per_segment = -(-l // chunk), chunk // T_FWD
    with on_device(i.x):
        i = i._replace(
            x=channels_last(i.x, 1), dt=channels_last(i.dt, 1), z=None if i.z is None else channels_last(i.z, 1),
            seq_idx=None if i.seq_idx is None else i.seq_idx.contiguous(),
        )  # fmt: skip
        p = prepare(i, transposed=False)
        new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
        blocks = triton.cdiv(d, BD_FWD)
        if parallel is None:
            # A warp alone on its scheduler takes 0.7 of the time of two; segments compute the exponentials twice.
            parallel = nseg > 1 and i.x.is_cuda and b * blocks < 3 * _multiprocessors(i.x.device)
        y = torch.empty_like(i.x, memory_format=torch.contiguous_format)
        final = torch.empty(b, d, n, **new)
        # Kept whether they are asked for or not: the compiled kernel that writes them is the faster one.
        states = torch.empty(nseg, b, n, d, **new)
        total = torch.empty(nseg if parallel else 0, b, d, **new)
        alive = torch.empty(nseg if parallel else 0, b, dtype=torch.int32, device=i.x.device)
        zz = i.x if i.z is None else i.z
        pointers = (i.x, i.dt, zz, p.rows, p.A2, or_dummy(i.D, i.x), or_dummy(i.dt_bias, i.x), or_dummy(p.h0, i.x),
                    or_dummy(i.lengths, i.x), or_dummy(i.seq_idx, i.x), states, y, final, total, alive)  # fmt: skip
        common = dict(
            p.flags, NP=triton.next_power_of_2(n), T=T_FWD, BD=BD_FWD, EVEN=d % BD_FWD == 0, num_warps=1,
            per_program=per_segment if parallel else -(-l // T_FWD), per_segment=per_segment, HAS_D=i.D is not None,
            HAS_Z=i.z is not None, PARALLEL=parallel, maxnreg=MAX_REGISTERS, PREFETCH=PREFETCH,
            ALIGNED=i.lengths is None and l % T_FWD == 0 and d % BD_FWD == 0, **strides(1, x=i.x, dt=i.dt, z=zz, y=y),
        )  # fmt: skip
        grid = (blocks, b, nseg if parallel else 1)
        if parallel:
            _forward_kernel[grid](*pointers, LOCAL=True, SAVE=False, **common)
            combine_kernel[(triton.cdiv(d, BD_FWD), b, n)](
                states, total, alive, p.A2, or_dummy(p.h0, i.x), final, p.flags["s0"], d, nseg, N=n, S=8, BD=BD_FWD,
                num_warps=1,
                HAS_START=p.h0 is not None, WRITE_LAST=False, REVERSE=False,
            )  # fmt: skip
        _forward_kernel[grid](*pointers, LOCAL=False, SAVE=not parallel, **common)
    return y, final, states if save else states[:0].clone()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
