"""The scan of Mamba-2, backward. Time goes in slabs from the last to the first, so that what is made stays small:

1. ``states_kernel`` makes the state H before every chunk of the slab again, from the states kept at segment starts.
2. ``_back_states_kernel`` goes through the slab from its end and makes G, what is asked of the state after every chunk.
3. ``_group_kernel``, twice, and ``_gradient_kernel`` have both and no order in time: a program owns a chunk and goes
   through the heads of a group, so that dB and dC, which are sums over heads, add up in registers. What S = C B^T is
   asked for adds up too, and is multiplied with B and C once.

``_finish_kernel`` then takes the gradient of the step sizes through the softplus, to the layout of dt.

With the letters of ``ops.triton.ssd``, W_ij = exp(L_i - L_j) dt_j for j <= i, dM = dy x^T, and w the weights
exp(L_end - L) dt:

    dx = (S W)^T dy + w (B G) + D dy        dS = sum over heads of dM * W
    dC = dS B + sum of exp(L) dy H^T        dB = dS^T C + sum of w x G^T

The gradient of the log decay of step t takes what passes over it: pairs dM * S * W with i >= t > j, outputs from t on
that come from H, inputs before t that go to G, and H to G.

Floors at the shape of ``ops.triton.ssd``. With the states of every 64 steps in bfloat16, twice x each: the first reads
0.45 GB and writes 0.84, the second 1.3 and 0.84, the next two read 1.3 each, the last reads 1.7 and writes 0.45: 8.2
GB, 1.7 ms. Operations per step and head: 4 Q p + 2 Q^2 in the chunk, 12 n p with states, 123e3, 0.4e12 in all: 0.4 ms.
Predicted 2.5 to 4 ms: the last kernel spills, and its products wait for what comes before them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ssd_inputs import SsdInputs
from ._common import on_device, or_dummy, processors, sigmoid
from .attention import product
from .ssd import HEADS, STATES, Tile, operand_bytes, places, power, prepare, state_blocks, states_kernel, unit_last

# By bytes per element of the operands, as in `ops.triton.ssd`.
GRADIENT = {2: Tile(64, 64, 4, 2), 4: Tile(16, 64, 8, 1)}
GROUPS = {2: Tile(64, 64, 4, 2), 4: Tile(16, 64, 8, 1)}
_SLAB_BYTES = 1 << 29
"""What H and G of one slab may take up together."""


@triton.jit
def _back_states_kernel(
    dy, C, h0, high, other, document, lengths, kept, carry, dh0, grads, passed,
    syb, syh, scb, scg, s0, l, lpad, first, chunks, SXL: tl.constexpr, SBL: tl.constexpr, SYL: tl.constexpr,
    SCL: tl.constexpr, h: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
    BP: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Program (head and block of states and channels, row): G of the slab's chunks, from the last.

    carry (b, h, p, n): what is asked of the state behind the slab, then of the one before it. dh0 (b, h, p, n) is added
    to: what packed documents ask of the initial state. grads (chunks, b, h, n, p). passed (chunks, b, h, blocks): what
    of the gradient of every log decay of a chunk's last document comes from the state that passes through all of it.
    """
    NB: tl.constexpr = (N + BN - 1) // BN
    PB: tl.constexpr = (P + BP - 1) // BP
    hd = tl.program_id(0) // (NB * PB)
    block = tl.program_id(0) % (NB * PB)
    r = tl.program_id(1).to(tl.int64)
    b = tl.num_programs(1)
    n = block // PB * BN + tl.arange(0, BN)
    p = block % PB * BP + tl.arange(0, BP)
    q = tl.arange(0, Q)
    sm = (n < N)[:, None] & (p < P)[None, :]
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    plane = (r * h + hd) * N * P + p[None, :] * N + n[:, None]
    G = tl.load(carry + plane, mask=sm, other=0.0)
    if HAS_H0 and HAS_SEQ:
        start_gradient = tl.load(dh0 + plane, mask=sm, other=0.0)
    at_chunk = ((chunks - 1) * b + r) * h + hd
    yb, Cb = dy + r * syb + hd * syh, C + r * scb + hd // R * scg
    row = (r * h + hd) * lpad
    for j in range(chunks):
        t0 = (first + chunks - 1 - j) * Q
        m = (t0 + q < end)[:, None]
        o = t0.to(tl.int64)
        gy = tl.load(yb + o * SYL + (q[:, None] * SYL + p[None, :]), mask=m & (p < P)[None, :], other=0.0)
        cv = tl.load(Cb + o * SCL + (q[:, None] * SCL + n[None, :]), mask=m & (n < N)[None, :], other=0.0)
        at = row + t0
        start, through = tl.exp2(tl.load(high + at + q)), tl.exp2(tl.load(high + at + Q - 1))
        if HAS_SEQ:
            doc_end = tl.load(document + r * lpad + t0 + Q - 1)
            start = tl.where(tl.load(document + r * lpad + t0 + q) == 0, start, 0.0)
            through = tl.where(doc_end == 0, through, 0.0)
        at_state = at_chunk * (N * P) + (n[:, None] * P + p[None, :])
        tl.store(grads + at_state, G.to(T), mask=sm)
        H = tl.load(kept + at_state, mask=sm, other=0.0).to(tl.float32)
        across = tl.sum(tl.sum(G * H, 1), 0) * through
        gf, ct = gy.to(tl.float32), tl.trans(cv.to(T))
        if HAS_H0 and HAS_SEQ:
            if doc_end > 0:
                left = tl.load(other + at + Q - 1)
                h_init = tl.load(h0 + r * s0 + hd * N * P + (p[None, :] * N + n[:, None]), mask=sm, other=0.0)
                across += tl.sum(tl.sum(G * h_init.to(tl.float32), 1), 0) * left
                start_gradient += left * G
                again = (gf * tl.load(other + at + q)[:, None]).to(T)
                start_gradient = product(ct, again, start_gradient, PRECISION)
        tl.store(passed + at_chunk * (NB * PB) + block, across)
        at_chunk -= b.to(tl.int64) * h
        G = product(ct, (gf * start[:, None]).to(T), G * through, PRECISION)
    tl.store(carry + plane, G, mask=sm)
    if HAS_H0 and HAS_SEQ:
        tl.store(dh0 + plane, start_gradient, mask=sm)


@triton.jit
def _gradient_kernel(
    x, dy, B, C, A, D, step, high, low, document, lengths, grads, given, passed, dx, dstep, dB, dC, dA_part, dD_part,
    sxb, sxh, syb, syh, sbb, sbg, scb, scg, l, lpad, first, per_split, SXL: tl.constexpr, SBL: tl.constexpr,
    SYL: tl.constexpr, SCL: tl.constexpr, h: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_D: tl.constexpr, HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row and group, split): per_split heads of the group, one after the other.

    given, dstep (b, h, lpad): what the output of a step got from H, times its gradient; the gradient of the step sizes.
    dB, dC (splits, b, l, g, n) have what states gave. dA_part, dD_part (chunks, b, h).
    """
    c = first + tl.program_id(0)
    g = h // R
    r = (tl.program_id(1) // g).to(tl.int64)
    group = tl.program_id(1) % g
    split = tl.program_id(2)
    b = tl.num_programs(1) // g
    n = tl.arange(0, NP)
    p = tl.arange(0, PP)
    q = tl.arange(0, Q)
    nm, pm = (n < N)[None, :], (p < P)[None, :]
    sm = (n < N)[:, None] & pm
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    t0 = c * Q
    o = t0.to(tl.int64)
    m = (t0 + q < end)[:, None]
    Bb, Cb = B + r * sbb + group * sbg + o * SBL, C + r * scb + group * scg + o * SCL
    bv = tl.load(Bb + (q[:, None] * SBL + n[None, :]), mask=m & nm, other=0.0).to(T)
    cv = tl.load(Cb + (q[:, None] * SCL + n[None, :]), mask=m & nm, other=0.0).to(T)
    scores = product(cv, tl.trans(bv), None, PRECISION)
    reach = q[:, None] >= q[None, :]
    if HAS_SEQ:
        doc, doc_end = tl.load(document + r * lpad + t0 + q), tl.load(document + r * lpad + t0 + Q - 1)
        reach = reach & (doc[:, None] == doc[None, :])
    before = tl.where(q[:, None] < q[None, :], 1.0, 0.0).to(T)
    to_scores = tl.zeros([Q, Q], tl.float32)
    xb, yb = x + r * sxb + o * SXL, dy + r * syb + o * SYL
    for head in range(split * per_split, tl.minimum(split * per_split + per_split, R)):
        hd = group * R + head
        xv = tl.load(xb + hd * sxh + (q[:, None] * SXL + p[None, :]), mask=m & pm, other=0.0)
        gy = tl.load(yb + hd * syh + (q[:, None] * SYL + p[None, :]), mask=m & pm, other=0.0)
        at_state = ((tl.program_id(0) * b + r) * h + hd) * N * P
        G = tl.load(grads + at_state + (n[:, None] * P + p[None, :]), mask=sm, other=0.0)
        at = (r * h + hd) * lpad + t0
        hi, lo, dtv = tl.load(high + at + q), tl.load(low + at + q), tl.load(step + at + q)
        hi_end, lo_end = tl.load(high + at + Q - 1), tl.load(low + at + Q - 1)
        to_end = tl.exp2((hi_end - hi) + (lo_end - lo))
        if HAS_SEQ:
            to_end = tl.where(doc == doc_end, to_end, 0.0)

        # Between the chunks.
        asked = product(bv, G, None, PRECISION)
        direct = tl.sum(asked * xv.to(tl.float32), 1) * to_end
        entered = direct * dtv
        gx = asked * (to_end * dtv)[:, None]

        # Inside the chunk.
        between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
        decay = tl.exp2(tl.where(reach, between, float("-inf")))
        gx = product(tl.trans((scores * decay * dtv[None, :]).to(T)), gy.to(T), gx, PRECISION)
        change = product(gy.to(T), tl.trans(xv.to(T)), None, PRECISION) * decay
        to_scores += change * dtv[None, :]
        pairs = change * scores
        direct += tl.sum(pairs, 0)
        # Over the decay of step t passes what steps i >= t have from steps j < t. As a product: sums of all pairs of i
        # and of all pairs of j would cancel, with an error that a large A multiplies.
        passing = product((pairs * dtv[None, :]).to(T), before, None, PRECISION) + tl.load(given + at + q)[:, None]
        passing = tl.where(q[:, None] >= q[None, :], passing, entered[:, None])
        blocks = ((tl.program_id(0) * b + r) * h + hd) * BLOCKS + tl.arange(0, BLOCKS)
        across = tl.sum(tl.load(passed + blocks), 0)
        if HAS_SEQ:
            passing = tl.where(doc[:, None] == doc[None, :], passing, 0.0)
            across = tl.where(doc == doc_end, across, 0.0)
        rate = tl.sum(passing, 0) + across
        tl.store(dstep + at + q, direct + rate * tl.load(A + hd).to(tl.float32))
        at_part = (c * b + r) * h + hd
        tl.store(dA_part + at_part, tl.sum(rate * dtv, 0))
        if HAS_D:
            gx += tl.load(D + hd).to(tl.float32) * gy.to(tl.float32)
            tl.store(dD_part + at_part, tl.sum(tl.sum(gy.to(tl.float32) * xv.to(tl.float32), 1), 0))
        at_x = dx + ((r * l + o) * h + hd) * P + (q[:, None] * (h * P) + p[None, :])
        tl.store(at_x, gx.to(dx.dtype.element_ty), mask=(t0 + q < l)[:, None] & pm)
    at_group = (((split * b + r) * l + o) * g + group) * N + (q[:, None] * (g * N) + n[None, :])
    gm = (t0 + q < l)[:, None] & nm
    to_scores = to_scores.to(T)
    tl.store(dC + at_group, product(to_scores, bv, tl.load(dC + at_group, mask=gm, other=0.0), PRECISION), mask=gm)
    to_scores = tl.trans(to_scores)
    tl.store(dB + at_group, product(to_scores, cv, tl.load(dB + at_group, mask=gm, other=0.0), PRECISION), mask=gm)


@triton.jit
def _group_kernel(
    v, C, state, h0, step, high, low, other, document, lengths, given, out,
    svb, svh, scb, scg, s0, l, lpad, first, per_split, SVL: tl.constexpr, SCL: tl.constexpr, SXL: tl.constexpr,
    SBL: tl.constexpr, h: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    PP: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_SEQ: tl.constexpr, TO_C: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row and group, split): what states give to the gradient of C, from dy and H, or of B, from x, G.

    out (splits, b, l, g, n). TO_C: also given (b, h, lpad), what the output of a step got from H, times its gradient.
    """
    c = first + tl.program_id(0)
    g = h // R
    r = (tl.program_id(1) // g).to(tl.int64)
    group = tl.program_id(1) % g
    split = tl.program_id(2)
    b = tl.num_programs(1) // g
    n = tl.arange(0, NP)
    p = tl.arange(0, PP)
    q = tl.arange(0, Q)
    nm, pm = (n < N)[None, :], (p < P)[None, :]
    sm = (n < N)[:, None] & pm
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    t0 = c * Q
    o = t0.to(tl.int64)
    m = (t0 + q < end)[:, None]
    if HAS_SEQ:
        doc, doc_end = tl.load(document + r * lpad + t0 + q), tl.load(document + r * lpad + t0 + Q - 1)
    if TO_C:
        Cb = C + r * scb + group * scg + o * SCL
        cv = tl.load(Cb + (q[:, None] * SCL + n[None, :]), mask=m & nm, other=0.0).to(T)
    acc = tl.zeros([Q, NP], tl.float32)
    vb = v + r * svb + o * SVL
    for head in range(split * per_split, tl.minimum(split * per_split + per_split, R)):
        hd = group * R + head
        at = (r * h + hd) * lpad + t0
        vv = tl.load(vb + hd * svh + (q[:, None] * SVL + p[None, :]), mask=m & pm, other=0.0).to(tl.float32)
        at_state = ((tl.program_id(0) * b + r) * h + hd) * N * P
        S = tl.load(state + at_state + (n[:, None] * P + p[None, :]), mask=sm, other=0.0)
        hi = tl.load(high + at + q)
        if TO_C:
            weight = tl.exp2(hi)
            if HAS_SEQ:
                weight = tl.where(doc == 0, weight, 0.0)
            from_state = tl.sum(product(cv, S, None, PRECISION) * vv, 1) * weight
        else:
            lo, hi_end, lo_end = tl.load(low + at + q), tl.load(high + at + Q - 1), tl.load(low + at + Q - 1)
            weight = tl.exp2((hi_end - hi) + (lo_end - lo)) * tl.load(step + at + q)
            if HAS_SEQ:
                weight = tl.where(doc == doc_end, weight, 0.0)
        acc = product((vv * weight[:, None]).to(T), tl.trans(S), acc, PRECISION)
        if TO_C and HAS_H0 and HAS_SEQ:
            if doc_end > 0:
                h_init = tl.load(h0 + r * s0 + hd * N * P + (p[None, :] * N + n[:, None]), mask=sm, other=0.0).to(T)
                again = tl.load(other + at + q)
                from_state += tl.sum(product(cv, h_init, None, PRECISION) * vv, 1) * again
                acc = product((vv * again[:, None]).to(T), tl.trans(h_init), acc, PRECISION)
        if TO_C:
            tl.store(given + at + q, from_state)
    at_out = out + (((split * b + r) * l + o) * g + group) * N + (q[:, None] * (g * N) + n[None, :])
    tl.store(at_out, acc, mask=(t0 + q < l)[:, None] & nm)


@triton.jit
def _finish_kernel(
    dt, bias, lengths, dstep, ddt, dbias_part, sb, sl, sh, l, h, lpad,
    Q: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LEN: tl.constexpr,
):  # fmt: skip
    """Program (chunk, block of heads, row); dbias_part (chunks, b, h)."""
    r = tl.program_id(2).to(tl.int64)
    b = tl.num_programs(2)
    t = tl.program_id(0) * Q + tl.arange(0, Q)
    hd = tl.program_id(1) * BH + tl.arange(0, BH)
    end = l
    if HAS_LEN:
        end = tl.minimum(tl.load(lengths + r).to(tl.int32), l)
    hm = hd < h
    m = (t < end)[:, None] & hm[None, :]
    raw = tl.load(dt + r * sb + t[:, None].to(tl.int64) * sl + hd[None, :] * sh, mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + hd, mask=hm, other=0.0).to(tl.float32)[None, :]
    out = tl.load(dstep + (r * h + hd[None, :]) * lpad + t[:, None], mask=m, other=0.0) * sigmoid(raw)
    tl.store(
        ddt + (r * l + t[:, None]) * h + hd[None, :], out.to(ddt.dtype.element_ty), mask=(t < l)[:, None] & hm[None, :]
    )
    if HAS_BIAS:
        tl.store(dbias_part + (tl.program_id(0) * b + r) * h + hd, tl.sum(out, 0), mask=hm)


def _slab(b: int, h: int, n: int, p: int, size: int, stride: int, chunk: int, segments: int) -> int:
    """Segments whose H and G may be there at the same time."""
    return max(1, min(segments, _SLAB_BYTES // (2 * b * h * n * p * size * (stride // chunk))))


def splits_of(programs: int, device: torch.device) -> int:
    """Parts of the heads that fill the device with so many programs for each."""
    return triton.cdiv(2 * processors(device), programs)


def backward(dy: Tensor | None, dfinal: Tensor | None, i: SsdInputs, states: Tensor, stride: int) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias, initial_state in that order; empty where the input is None."""
    b, l, h, p = i.x.shape
    g, n = i.B.shape[2:]
    size = operand_bytes(i.x)
    tile, light, of_groups = GRADIENT[size], STATES[size], GROUPS[size]
    chunk, blocks = tile.steps, state_blocks(n, p, light)
    chunks, segments = triton.cdiv(l, chunk), states.shape[0]
    new: dict[str, Any] = {"dtype": torch.float32, "device": i.x.device}
    low: dict[str, Any] = new | ({"dtype": torch.bfloat16} if size == 2 else {})
    with on_device(i.x):
        k = prepare(i, chunk)
        gy = torch.zeros_like(i.x) if dy is None else unit_last(dy)
        dx, ddt = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (i.x, i.dt))
        dstep, given = torch.empty(2, b, h, k.common["lpad"], **new)
        dA_part, dD_part, dbias_part = torch.empty(3, chunks, b, h, **new)
        carry = torch.zeros(b, h, p, n, **new)
        if dfinal is not None:
            carry.copy_(dfinal)
        dh0 = torch.zeros_like(carry) if k.common["HAS_H0"] and k.common["HAS_SEQ"] else carry[:0]
        slab = _slab(b, h, n, p, size, stride, chunk, segments) * (stride // chunk)
        kept, grads = torch.empty(2, min(slab, chunks), b, h, n, p, **low)
        # Few chunks, rows and groups: heads are split among programs, and dB and dC are added up afterwards.
        per_split = triton.cdiv(h // g, min(h // g, splits_of(min(slab, chunks) * b * g, i.x.device)))
        splits = triton.cdiv(h // g, per_split)
        dB, dC = torch.empty(2, splits, b, l, g, n, **new)
        parts = triton.cdiv(n, blocks["BN"]) * triton.cdiv(p, blocks["BP"])
        passed = torch.empty(min(slab, chunks), b, h, parts, **new)
        lengths, h0 = or_dummy(i.lengths, i.x), or_dummy(k.h0, i.x)
        flags = dict(k.common, SYL=gy.stride(1), SCL=k.C.stride(1))
        no_start = {name: value for name, value in flags.items() if name not in ("HAS_H0", "s0")}
        for first in range((chunks - 1) // slab * slab, -1, -slab):
            here = min(slab, chunks - first)
            states_kernel[(h * parts, b, triton.cdiv(here, stride // chunk))](
                k.x, k.B, h0, k.step, k.high, k.low, k.other, k.document, lengths, states, states, kept,
                *places(k.x, k.B), first=first, chunks_in_all=chunks, per_segment=stride // chunk, LOCAL=False,
                **blocks, **k.common, **light.options(),
            )  # fmt: skip
            _back_states_kernel[(h * parts, b)](
                gy, k.C, h0, k.high, k.other, k.document, lengths, kept, carry, dh0, grads, passed, *places(gy, k.C),
                first=first, chunks=here, **blocks, **flags, **light.options(),
            )  # fmt: skip
            of_group = dict(first=first, per_split=per_split, NP=power(n), PP=power(p))
            for v, state, out in ((gy, kept, dC), (k.x, grads, dB)):
                _group_kernel[(here, b * g, splits)](
                    v, k.C, state, h0, k.step, k.high, k.low, k.other, k.document, lengths, given, out,
                    *places(v, k.C), SVL=v.stride(1), SCL=k.C.stride(1), TO_C=out is dC, **of_group, **k.common,
                    **of_groups.options(),
                )  # fmt: skip
            _gradient_kernel[(here, b * g, splits)](
                k.x, gy, k.B, k.C, i.A.contiguous(), or_dummy(i.D, i.x), k.step, k.high, k.low, k.document, lengths,
                grads, given, passed, dx, dstep, dB, dC, dA_part, dD_part, *places(k.x, gy, k.B, k.C),
                BLOCKS=parts, HAS_D=i.D is not None, **of_group, **no_start, **tile.options(),
            )  # fmt: skip
        _finish_kernel[(chunks, triton.cdiv(h, HEADS), b)](
            i.dt, or_dummy(i.dt_bias, i.x), lengths, dstep, ddt, dbias_part, *i.dt.stride(), l, h, k.common["lpad"],
            Q=chunk, BH=HEADS, HAS_BIAS=i.dt_bias is not None, HAS_LEN=i.lengths is not None,
        )  # fmt: skip
        none = i.x.new_empty(0)
        d_initial = none
        if i.initial_state is not None:
            if dh0.shape[0]:
                carry += dh0
            d_initial = carry.sum_to_size(i.initial_state.shape).to(i.initial_state.dtype)
        dA, dD, dbias = (part.sum((0, 1)) for part in (dA_part, dD_part, dbias_part))
        to_B, to_C = ((v[0] if splits == 1 else v.sum(0)).to(w.dtype) for v, w in ((dB, i.B), (dC, i.C)))
    return [
        dx,
        ddt,
        dA.to(i.A.dtype),
        to_B,
        to_C,
        none.clone() if i.D is None else dD.to(i.D.dtype),
        none.clone() if i.dt_bias is None else dbias.to(i.dt_bias.dtype),
        d_initial,
    ]
