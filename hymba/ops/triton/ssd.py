"""The scan of Mamba-2, forward: one program per row and head (and block of its channels) goes through time.

Time is cut into chunks of Q steps. Inside a chunk the scan is a masked product, `(decay * C B^T) dt x`; the state
(n, p) stays in registers from chunk to chunk, as the sum that the products of the matrix units add to. Letters as in
``ops.ssd``; r = h / g heads per group. With L the sum of the log decays of the chunk up to a step, S = C B^T, and H the
state before the chunk:

    y = (S * exp(L_i - L_j) * dt_j) x + exp(L) C H + D x        H <- exp(L_end) H + B^T (exp(L_end - L) dt x)

Where rows and heads are too few to fill the device, segments of ``stride`` steps run side by side: their states from
zero first, then a recurrence over segments, then the outputs. The states at segment starts are what backward keeps.

L comes from ``_prepare_kernel`` as the sum of two float32 numbers, so that differences keep their digits however long
the sums are. A packed row needs no reset of L: decays across documents are masked, and what the initial state gives to
a later document has its own factor, ``other``.

Floors at 8 rows, 8192 steps, 50 heads of 64 channels, one group of 128 states, bfloat16, on an H200 (4.8 TB/s and
989e12 operations per second, dense). Bytes: x 0.42 GB, y 0.42 GB, B and C 0.03 GB, states kept 0.10 GB: 0.20 ms.
Operations per step and head with Q = 64: 2 Q (n + p) in the chunk, 4 n p with the state, 57e3, 0.19e12 in all:
0.19 ms. B and C are read again by every head, 1.7 GB from the second cache, 0.3 ms. They overlap in part only, and 400
programs on 264 places are two waves for one and a half: predicted 0.5 to 0.8 ms. ``benchmarks/ops.py`` measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ssd_inputs import SsdInputs
from ._common import INTERPRETED, document_start, on_device, or_dummy, processors, softplus
from .attention import product


class Tile(NamedTuple):
    """Steps of a chunk, most channels of a block, and how a program runs it."""

    steps: int
    channels: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# By bytes per element of the operands. Chosen by what the compiler says of registers and shared memory, not yet by
# measurements; `python -m benchmarks.ops --sweep` times others. float32 has no matrix units and spills with more steps.
FORWARD = {2: Tile(64, 64, 4, 2), 4: Tile(16, 32, 8, 1)}
STATES = {2: Tile(64, 64, 4, 3), 4: Tile(16, 32, 4, 2)}
HEADS = 4 if INTERPRETED else 16
"""Heads that one program prepares."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _prepare_kernel(
    dt, A, bias, lengths, seq, step, high, low, other, document, sb, sl, sh, l, h, lpad,
    Q: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """Program (chunk, block of heads, row): step sizes and summed log decays (base 2) as rows of time, (b, h, lpad).

    document (b, lpad): how many documents start in the chunk up to a step. other: the decay from where the step's
    document started, in documents that start in the chunk, else 0.
    """
    r = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * Q + tl.arange(0, Q)
    hd = tl.program_id(1) * BH + tl.arange(0, BH)
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    m = (t < end)[:, None] & (hd < h)[None, :]
    raw = tl.load(dt + r * sb + t[:, None].to(tl.int64) * sl + hd[None, :] * sh, mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + hd, mask=hd < h, other=0.0).to(tl.float32)[None, :]
    s = tl.where(m, softplus(raw), 0.0)
    rate = tl.load(A + hd, mask=hd < h, other=0.0).to(tl.float32) * 1.4426950408889634
    rate = (s * rate[None, :]).to(tl.float64)
    log = tl.cumsum(rate, 0)
    upper = log.to(tl.float32)
    at = (r * h + hd[None, :]) * lpad + t[:, None]
    inside = (hd < h)[None, :] & (t < lpad)[:, None]
    tl.store(step + at, s, mask=inside)
    tl.store(high + at, upper, mask=inside)
    tl.store(low + at, (log - upper.to(tl.float64)).to(tl.float32), mask=inside)
    if HAS_SEQ:
        starts = document_start(seq + r * l, t, end)
        count = tl.cumsum(starts, 0)
        if tl.program_id(1) == 0:
            tl.store(document + r * lpad + t, count)
        if HAS_OTHER:
            # The sums before the starts only grow (in size), so the last start's is the largest so far.
            before = tl.associative_scan(tl.where((starts != 0)[:, None], rate - log, 0.0), 0, _larger)
            decay = tl.where((count > 0)[:, None], tl.exp2((log + before).to(tl.float32)), 0.0)
            tl.store(other + at, decay, mask=inside)


@triton.jit
def states_kernel(
    x, B, h0, step, high, low, other, document, lengths, states, left, kept,
    sxb, sxh, sbb, sbg, s0, l, lpad, first, chunks_in_all, per_segment,
    SXL: tl.constexpr, SBL: tl.constexpr, h: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Program (head and block of states and channels, row, segment): the states of one segment, without outputs.

    LOCAL: from zero; leaves what the segment adds in states, and in left (segments, b, h) the factor of what comes in.
    Otherwise: from states; leaves the state before each chunk in kept (chunks, b, h, n, p), whose first one is `first`.
    """
    NB: tl.constexpr = (N + BN - 1) // BN
    PB: tl.constexpr = (P + BP - 1) // BP
    hd = tl.program_id(0) // (NB * PB)
    block = tl.program_id(0) % (NB * PB)
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    b = tl.num_programs(1)
    n = block // PB * BN + tl.arange(0, BN)
    p = block % PB * BP + tl.arange(0, BP)
    q = tl.arange(0, Q)
    group = hd // R
    sm = (n < N)[:, None] & (p < P)[None, :]
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    # Segments are those of the whole row; `first` is where one starts.
    segment = first // per_segment + part
    here = states + ((segment.to(tl.int64) * b + r) * h + group * R) * N * P + (hd % R) * P
    here += n[:, None] * (R * P) + p[None, :]
    xb, Bb = x + r * sxb + hd * sxh, B + r * sbb + group * sbg
    if LOCAL:
        H = tl.zeros([BN, BP], tl.float32)
    else:
        H = tl.load(here, mask=sm, other=0.0)
    factor = 1.0
    row = (r * h + hd) * lpad
    out = kept + ((part * per_segment * b + r) * h + hd) * N * P
    begin = segment * per_segment
    for c in range(begin, tl.minimum(begin + per_segment, chunks_in_all)):
        t0 = c * Q
        m = (t0 + q < end)[:, None]
        o = t0.to(tl.int64)
        xv = tl.load(xb + o * SXL + (q[:, None] * SXL + p[None, :]), mask=m & (p < P)[None, :], other=0.0)
        bv = tl.load(Bb + o * SBL + (q[:, None] * SBL + n[None, :]), mask=m & (n < N)[None, :], other=0.0)
        at = row + t0
        hi_end = tl.load(high + at + Q - 1)
        to_end = (hi_end - tl.load(high + at + q)) + (tl.load(low + at + Q - 1) - tl.load(low + at + q))
        weight = tl.exp2(to_end) * tl.load(step + at + q)
        through = tl.exp2(hi_end)
        if HAS_SEQ:
            doc_end = tl.load(document + r * lpad + t0 + Q - 1)
            weight = tl.where(tl.load(document + r * lpad + t0 + q) == doc_end, weight, 0.0)
            through = tl.where(doc_end == 0, through, 0.0)
        if LOCAL:
            factor *= through
        else:
            tl.store(out + (n[:, None] * P + p[None, :]), H.to(T), mask=sm)
            out += b.to(tl.int64) * h * N * P
        H *= through
        if HAS_H0 and HAS_SEQ:
            if doc_end > 0:
                h_init = tl.load(h0 + r * s0 + hd * N * P + (p[None, :] * N + n[:, None]), mask=sm, other=0.0)
                H += tl.load(other + at + Q - 1) * h_init.to(tl.float32)
        H = product(tl.trans(bv.to(T)), (xv.to(tl.float32) * weight[:, None]).to(T), H, PRECISION)
    if LOCAL:
        tl.store(here, H, mask=sm)
        if block == 0:
            tl.store(left + (segment * b + r) * h + hd, factor)


@triton.jit
def _combine_kernel(
    states, left, h0, s0, segments, h, R, N: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, HAS_H0: tl.constexpr
):  # fmt: skip
    """Program (block, head, row): states in place, from what each segment adds to what each segment starts from."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hd = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    b = tl.num_programs(2)
    n, p = e // P, e % P
    m = e < N * P
    H = tl.zeros([BLOCK], tl.float32)
    if HAS_H0:
        H += tl.load(h0 + r * s0 + hd * N * P + p * N + n, mask=m, other=0.0).to(tl.float32)
    at = states + r * h * N * P + (hd // R) * R * N * P + n * (R * P) + (hd % R) * P + p
    for s in range(segments):
        add = tl.load(at, mask=m, other=0.0)
        tl.store(at, H, mask=m)
        H = add + tl.load(left + (s * b + r) * h + hd) * H
        at += b.to(tl.int64) * h * N * P


@triton.jit
def _forward_kernel(
    x, B, C, D, h0, step, high, low, other, document, lengths, states, y, final,
    sxb, sxh, sbb, sbg, scb, scg, s0, l, lpad, per_program, per_segment, SXL: tl.constexpr, SBL: tl.constexpr,
    SCL: tl.constexpr, h: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    BP: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, SAVE: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """Program (head and block of channels, row, part): per_program chunks in order. SAVE: every per_segment of them.

    PARALLEL: a part is one segment and starts from states; else it is everything and starts from h0.
    """
    PB: tl.constexpr = (P + BP - 1) // BP
    hd = tl.program_id(0) // PB
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    b = tl.num_programs(1)
    n = tl.arange(0, NP)
    p = tl.program_id(0) % PB * BP + tl.arange(0, BP)
    q = tl.arange(0, Q)
    group = hd // R
    nm, pm = (n < N)[None, :], (p < P)[None, :]
    sm = (n < N)[:, None] & pm
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    H = tl.zeros([NP, BP], tl.float32)
    hb = h0 + r * s0 + hd * N * P
    if HAS_H0 and not PARALLEL:
        H += tl.load(hb + (p[None, :] * N + n[:, None]), mask=sm, other=0.0).to(tl.float32)
    here = states + ((part.to(tl.int64) * b + r) * h + group * R) * N * P + (hd % R) * P
    if PARALLEL:
        H = tl.load(here + (n[:, None] * (R * P) + p[None, :]), mask=sm, other=0.0)
    xb, Bb, Cb = x + r * sxb + hd * sxh, B + r * sbb + group * sbg, C + r * scb + group * scg
    yb = y + (r * l * h + hd) * P
    row = (r * h + hd) * lpad
    begin = part * per_program
    causal = q[:, None] >= q[None, :]
    until_save = 0
    for c in range(begin, tl.minimum(begin + per_program, (l + Q - 1) // Q)):
        t0 = c * Q
        m = (t0 + q < end)[:, None]
        o = t0.to(tl.int64)
        xv = tl.load(xb + o * SXL + (q[:, None] * SXL + p[None, :]), mask=m & pm, other=0.0)
        bv = tl.load(Bb + o * SBL + (q[:, None] * SBL + n[None, :]), mask=m & nm, other=0.0).to(T)
        cv = tl.load(Cb + o * SCL + (q[:, None] * SCL + n[None, :]), mask=m & nm, other=0.0).to(T)
        if SAVE:
            if until_save == 0:
                until_save = per_segment
                tl.store(here + (n[:, None] * (R * P) + p[None, :]), H, mask=sm)
                here += b.to(tl.int64) * h * N * P
            until_save -= 1
        at = row + t0
        hi, lo, dtv = tl.load(high + at + q), tl.load(low + at + q), tl.load(step + at + q)
        hi_end, lo_end = tl.load(high + at + Q - 1), tl.load(low + at + Q - 1)
        start, weight, through = tl.exp2(hi), tl.exp2((hi_end - hi) + (lo_end - lo)) * dtv, tl.exp2(hi_end)
        reach = causal
        if HAS_SEQ:
            doc, doc_end = tl.load(document + r * lpad + t0 + q), tl.load(document + r * lpad + t0 + Q - 1)
            reach = causal & (doc[:, None] == doc[None, :])
            start, weight = tl.where(doc == 0, start, 0.0), tl.where(doc == doc_end, weight, 0.0)
            through = tl.where(doc_end == 0, through, 0.0)
        mixing = product(cv, tl.trans(bv), None, PRECISION)
        between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
        mixing = (mixing * tl.exp2(tl.where(reach, between, float("-inf"))) * dtv[None, :]).to(T)
        acc = product(cv, H.to(T), None, PRECISION) * start[:, None]
        if HAS_H0 and HAS_SEQ:
            if doc_end > 0:
                h_init = tl.load(hb + (p[None, :] * N + n[:, None]), mask=sm, other=0.0).to(T)
                acc += product(cv, h_init, None, PRECISION) * tl.load(other + at + q)[:, None]
        acc = product(mixing, xv.to(T), acc, PRECISION)
        xf = xv.to(tl.float32)
        if HAS_D:
            acc += tl.load(D + hd).to(tl.float32) * xf
        inside = (t0 + q < l)[:, None] & pm
        tl.store(yb + o * (h * P) + (q[:, None] * (h * P) + p[None, :]), acc.to(y.dtype.element_ty), mask=inside)
        H *= through
        if HAS_H0 and HAS_SEQ:
            if doc_end > 0:
                h_init = tl.load(hb + (p[None, :] * N + n[:, None]), mask=sm, other=0.0)
                H += tl.load(other + at + Q - 1) * h_init.to(tl.float32)
        H = product(tl.trans(bv), (xf * weight[:, None]).to(T), H, PRECISION)
    if part == tl.num_programs(2) - 1:
        tl.store(final + (r * h + hd) * N * P + p[None, :] * N + n[:, None], H, mask=sm)


class Prepared(NamedTuple):
    """The inputs as the kernels want them.

    Attributes:
        x, B, C: unit strides along channels and states. h0: contiguous, or None.
        step, high, low, other: (b, h, lpad) float32. document: (b, lpad) int32. Empty where there is nothing to say.
        common: arguments that the kernels share.
    """

    x: Tensor
    B: Tensor
    C: Tensor
    h0: Tensor | None
    step: Tensor
    high: Tensor
    low: Tensor
    other: Tensor
    document: Tensor
    steps: int
    common: dict[str, Any]


def operand_bytes(x: Tensor) -> int:
    """Bytes of what the products multiply. float16 inputs go as TF32: the state may leave float16's range."""
    return 2 if x.dtype == torch.bfloat16 else 4


def precision(x: Tensor) -> str:
    """How float32 numbers are multiplied; TF32 has all digits of float16."""
    if INTERPRETED:
        return "interpreted"
    fast = x.dtype == torch.float16 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if fast or x.dtype == torch.bfloat16 else "ieee"


def power(size: int) -> int:
    """The next power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(size))


def unit_last(v: Tensor) -> Tensor:
    """v, or a copy with a unit stride along the last dimension."""
    return v if v.stride(-1) == 1 else v.contiguous()


def places(*tensors: Tensor) -> list[int]:
    """Strides of rows and of heads or groups; those of steps are compile-time constants."""
    return [s for v in tensors for s in (v.stride(0), v.stride(2))]


def prepare(i: SsdInputs, steps: int) -> Prepared:
    """Steps per chunk: `steps`."""
    b, l, h, p = i.x.shape
    g, n = i.B.shape[2:]
    lpad = -(-l // steps) * steps
    new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
    restarts = i.seq_idx is not None and i.initial_state is not None
    step, high, low = torch.empty(3, b, h, lpad, **new)
    other = torch.empty(b, h, lpad if restarts else 0, **new)
    document = torch.empty(b, lpad if i.seq_idx is not None else 0, dtype=torch.int32, device=i.x.device)
    seq_idx = None if i.seq_idx is None else i.seq_idx.contiguous()
    flags = {"HAS_LEN": i.lengths is not None, "HAS_SEQ": i.seq_idx is not None}
    _prepare_kernel[(lpad // steps, triton.cdiv(h, HEADS), b)](
        i.dt, i.A.contiguous(), or_dummy(i.dt_bias, i.x), or_dummy(i.lengths, i.x), or_dummy(seq_idx, i.x), step, high,
        low, other, document, *i.dt.stride(), l, h, lpad, Q=steps, BH=HEADS, HAS_BIAS=i.dt_bias is not None,
        HAS_OTHER=restarts, **flags,
    )  # fmt: skip
    h0 = None if i.initial_state is None else i.initial_state.contiguous()
    common = flags | {
        "HAS_H0": h0 is not None, "s0": 0 if h0 is None or h0.shape[0] == 1 else h * n * p, "l": l, "h": h,
        "lpad": lpad, "R": h // g, "N": n, "P": p, "Q": steps, "PRECISION": precision(i.x),
        "T": tl.bfloat16 if operand_bytes(i.x) == 2 else tl.float32,
    }  # fmt: skip
    x, B, C = unit_last(i.x), unit_last(i.B), unit_last(i.C)
    common |= {"SXL": x.stride(1), "SBL": B.stride(1)}
    return Prepared(x, B, C, h0, step, high, low, other, document, steps, common)


def state_blocks(n: int, p: int, tile: Tile) -> dict[str, int]:
    """Blocks of states and channels in which programs share the state of one head."""
    return {"BN": min(64, power(n)), "BP": min(tile.channels, power(p))}


def forward(i: SsdInputs, stride: int, save: bool, *, parallel: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, h, p, n) and the states at segment starts (k, b, g, n, r, p), empty unless save.

    parallel: cut time into segments that run side by side; by default when there are too few rows and heads.
    """
    b, l, h, p = i.x.shape
    g, n = i.B.shape[2:]
    tile, light = FORWARD[operand_bytes(i.x)], STATES[operand_bytes(i.x)]
    segments = -(-l // stride)
    block = min(tile.channels, power(p))
    with on_device(i.x):
        k = prepare(i, tile.steps)
        programs = b * h * triton.cdiv(p, block)
        if parallel is None:
            # Segments compute the states twice, a third of the work.
            parallel = segments > 1 and i.x.is_cuda and programs < processors(i.x.device)
        new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
        y = torch.empty_like(i.x, memory_format=torch.contiguous_format)
        final = torch.empty(b, h, p, n, **new)
        states = torch.empty(segments if save or parallel else 0, b, g, n, h // g, p, **new)
        lengths, h0 = or_dummy(i.lengths, i.x), or_dummy(k.h0, i.x)
        if parallel:
            left = torch.empty(segments, b, h, **new)
            blocks = state_blocks(n, p, light)
            states_kernel[(h * triton.cdiv(n, blocks["BN"]) * triton.cdiv(p, blocks["BP"]), b, segments)](
                k.x, k.B, h0, k.step, k.high, k.low, k.other, k.document, lengths, states, left, states,
                *places(k.x, k.B), first=0, chunks_in_all=triton.cdiv(l, tile.steps),
                per_segment=stride // tile.steps, LOCAL=True, **blocks, **k.common, **light.options(),
            )  # fmt: skip
            size = min(1024, power(n * p))
            _combine_kernel[(triton.cdiv(n * p, size), h, b)](
                states, left, h0, k.common["s0"], segments, h, h // g, N=n, P=p, BLOCK=size, HAS_H0=k.h0 is not None
            )
        _forward_kernel[(h * triton.cdiv(p, block), b, segments if parallel else 1)](
            k.x, k.B, k.C, or_dummy(i.D, i.x), h0, k.step, k.high, k.low, k.other, k.document, lengths, states, y,
            final, *places(k.x, k.B, k.C), SCL=k.C.stride(1),
            per_program=stride // tile.steps if parallel else triton.cdiv(l, tile.steps),
            per_segment=stride // tile.steps, NP=power(n), BP=block, HAS_D=i.D is not None,
            SAVE=save and not parallel, PARALLEL=parallel, **k.common, **tile.options(),
        )  # fmt: skip
    return y, final, states if save else states[:0].clone()


__all__ = [
    "FORWARD", "STATES", "Prepared", "Tile", "forward", "operand_bytes", "places", "power", "precision", "prepare",
    "state_blocks", "states_kernel", "unit_last",
]  # fmt: skip
