"""Attention of one new token per row over [meta keys | cache slots | itself], split over the keys, in one launch.

One program takes the query heads of one key head and one stretch of keys; the program that finishes last joins the
stretches by their log-sum-exp. The g = h / k queries of a key head stand as rows of one product, so keys are read once.
The rotation of query and key and the write of key and value to their cache slot ride along.
Floor: the bytes of keys and values over the memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import or_dummy, overlaps, release_next, wait_for_previous

TILES = (128, 4, 2, 16)
"""Keys at a time, warps, pipeline stages and the most stretches of a row (twice as many from 32,768 keys on)."""


@triton.jit
def _stretch(
    q, k_ptr, v_ptr, k_stride, v_stride, first, last, slots, position, window, m, l, acc,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, WINDOWED: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first..last; returns the running maximum, sum and weighted values.

    SLOTS: the keys are cache slots; slot s holds the largest position p <= position with p % slots == s. OWN: the
    token's own slot is not read, it may be written at this moment.
    """
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for start in range(first, last, BLOCK):
        s = start + tl.arange(0, BLOCK)
        here = s < last
        k = tl.load(k_ptr + s[:, None] * k_stride + d[None, :], mask=here[:, None], other=0.0)
        v = tl.load(v_ptr + s[:, None] * v_stride + e[None, :], mask=here[:, None], other=0.0)
        if SLOTS:
            back = (position - s) % slots
            back = tl.where(back < 0, back + slots, back)
            here = here & (back <= position)
            if OWN:
                here = here & (back > 0)
            if WINDOWED:
                here = here & (back <= window)
        scores = tl.dot(q, tl.trans(k), out_dtype=tl.float32, input_precision="ieee")
        scores = tl.where(here[None, :], scores, -1.0e30)
        top = tl.maximum(m, tl.max(scores, axis=1))
        weights = tl.where(here[None, :], tl.exp2(scores - top[:, None]), 0.0)
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, out_dtype=tl.float32, input_precision="ieee")
        m = top
    return m, l, acc


@triton.jit
def attend(
    b, h, split, q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, cos_ptr, sin_ptr, position_ptr, real_ptr,
    out_ptr, part_ptr, lse_ptr, count_ptr, heads, splits, slots, prefix, stretch, window, scale,
    q_b, new_k_b, new_v_b, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, position_b,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, WINDOWED: tl.constexpr, OWN: tl.constexpr, MASKED: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: row b, key head h, one stretch of the keys."""
    half: tl.constexpr = D // 2
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    turned = (d + half) % D
    position = tl.load(position_ptr + b * position_b).to(tl.int32)
    queries = q_ptr + b * q_b + (h * G + g[:, None]) * D
    mask = g[:, None] < G
    straight = tl.load(queries + d[None, :], mask=mask, other=0.0)
    q = straight.to(tl.float32)
    if ROTATE:
        cos = tl.load(cos_ptr + position.to(tl.int64) * half + d % half)
        sin = tl.load(sin_ptr + position.to(tl.int64) * half + d % half)
        sin = tl.where(d < half, -sin, sin)
        q = q * cos[None, :]
        q += tl.load(queries + turned[None, :], mask=mask, other=0.0).to(tl.float32) * sin[None, :]
        # Rounded as the modules do it, before the scale.
        q = q.to(straight.dtype).to(tl.float32)
    q = (q * scale).to(straight.dtype)
    m = tl.full((ROWS,), -1.0e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    if OWN:
        if split == 0:
            # The token sees itself; its key and value go to their slot unless the row is at rest.
            key = tl.load(new_k_ptr + b * new_k_b + h * D + d).to(tl.float32) * cos
            key += tl.load(new_k_ptr + b * new_k_b + h * D + turned).to(tl.float32) * sin
            key = key.to(k_ptr.dtype.element_ty)
            value = tl.load(new_v_ptr + b * new_v_b + h * E + e).to(v_ptr.dtype.element_ty)
            real = True
            if MASKED:
                real = tl.load(real_ptr + b) != 0
            slot = position % slots
            tl.store(k_ptr + b * k_b + slot * k_s + h * k_h + d, key, mask=(d < D) & real)
            tl.store(v_ptr + b * v_b + slot * v_s + h * v_h + e, value, mask=(e < E) & real)
            m = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1)
            l += 1.0
            acc += value.to(tl.float32)[None, :]
    # The stretches cover the meta keys, then the slots.
    begin = split * stretch
    # Slots behind the token's own were never written.
    end = tl.minimum(begin + stretch, prefix + tl.minimum(slots, position + 1))
    m, l, acc = _stretch(
        q, pk_ptr + b * pk_b + h * pk_h, pv_ptr + b * pv_b + h * pv_h, pk_s, pv_s,
        tl.minimum(begin, prefix), tl.minimum(end, prefix), slots, position, window, m, l, acc,
        D, E, BLOCK, False, False, False,
    )  # fmt: skip
    m, l, acc = _stretch(
        q, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, k_s, v_s,
        tl.maximum(begin, prefix) - prefix, tl.maximum(end, prefix) - prefix,
        slots, position, window, m, l, acc, D, E, BLOCK, True, WINDOWED, OWN,
    )  # fmt: skip
    row = (b * heads + h) * G + g
    if PADDED == 1:
        out = acc / tl.maximum(l, 1.0e-30)[:, None]
        tl.store(out_ptr + row[:, None] * E + e[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        at = row * splits + split
        tl.store(part_ptr + at[:, None] * E + e[None, :], acc, mask=mask)
        tl.store(lse_ptr + at * 2, m, mask=g < G)
        tl.store(lse_ptr + at * 2 + 1, l, mask=g < G)
        # All threads' stores stand before the count, and the count before what is read of other programs.
        tl.debug_barrier()
        done = tl.atomic_add(count_ptr + b * heads + h, 1, sem="acq_rel", scope="gpu")
        if done == splits - 1:
            tl.debug_barrier()
            tl.store(count_ptr + b * heads + h, 0)
            s = tl.arange(0, PADDED)
            here = s < splits
            if PADDED <= 16:
                i = tl.arange(0, GROUP)
                joined_row = (b * heads + h) * G + i
                places = joined_row[:, None] * splits + s[None, :]
                both = (i < G)[:, None] & here[None, :]
                tops = tl.load(lse_ptr + places * 2, mask=both, other=-1.0e30, cache_modifier=".cg")
                totals = tl.load(lse_ptr + places * 2 + 1, mask=both, other=0.0, cache_modifier=".cg")
                shares = tl.exp2(tops - tl.max(tops, axis=1)[:, None])
                parts = tl.load(
                    part_ptr + places[:, :, None] * E + e[None, None, :], mask=both[:, :, None], other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                sums = tl.maximum(tl.sum(totals * shares, axis=1), 1.0e-30)
                joined = tl.sum(parts * shares[:, :, None], axis=1) / sums[:, None]
                tl.store(
                    out_ptr + joined_row[:, None] * E + e[None, :], joined.to(out_ptr.dtype.element_ty),
                    mask=(i < G)[:, None],
                )  # fmt: skip
            else:
                for j in tl.static_range(G):
                    first = ((b * heads + h) * G + j) * splits
                    top = tl.load(lse_ptr + (first + s) * 2, mask=here, other=-1.0e30, cache_modifier=".cg")
                    total = tl.load(lse_ptr + (first + s) * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
                    share = tl.exp2(top - tl.max(top, axis=0))
                    part = tl.load(
                        part_ptr + (first + s[:, None]) * E + e[None, :], mask=here[:, None], other=0.0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    joined = tl.sum(part * share[:, None], axis=0) / tl.maximum(tl.sum(total * share, axis=0), 1.0e-30)
                    tl.store(out_ptr + ((b * heads + h) * G + j) * E + e, joined.to(out_ptr.dtype.element_ty))


@triton.jit
def _decode_kernel(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, cos_ptr, sin_ptr, position_ptr, real_ptr,
    out_ptr, part_ptr, lse_ptr, count_ptr, slots, prefix, stretch, window, scale,
    q_b, new_k_b, new_v_b, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, position_b,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, WINDOWED: tl.constexpr, OWN: tl.constexpr, MASKED: tl.constexpr, ROTATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        wait_for_previous()
        release_next()
    attend(
        tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2),
        q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, cos_ptr, sin_ptr, position_ptr, real_ptr,
        out_ptr, part_ptr, lse_ptr, count_ptr, tl.num_programs(1), tl.num_programs(2),
        slots, prefix, stretch, window, scale,
        q_b, new_k_b, new_v_b, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, position_b,
        G, GROUP, ROWS, D, E, BLOCK, PADDED, WINDOWED, OWN, MASKED, ROTATE,
    )  # fmt: skip


def splits_for(rows: int, heads: int, keys: int, programs: int, block: int, most: int) -> int:
    """Stretches per row and key head, so that at least about `programs` programs run."""
    wanted = -(-programs // (rows * heads))
    return max(1, min(wanted, -(-keys // block), most if keys < 32768 else 2 * most))


def decode_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    window: int | None,
    count: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    valid: Tensor | None = None,
    splits: int | None = None,
    tiles: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Attention of a single token per row, which writes its own key and value to the cache.

    Args:
        q: (b, h * d), not rotated; k: (b, kv * d) and v: (b, kv * e), not rotated, or `None` on a layer that borrows
            (the token's key then stands in its slot already). Rows may be strided. d and e are powers of two from 16.
        keys: (b, s, kv, d), rotated, and values: (b, s, kv, e), written in place.
        position: (b or 1,) text position of the token; its slot is `position % s`.
        cos, sin: (positions, d / 2) float32 tables by text position; `None` when q is rotated already.
        window: past positions visible; `None` for all.
        count: (b * kv,) int32 zeros, zero again afterwards.
        prefix_k, prefix_v: (b or 1, m, kv, d) and (b or 1, m, kv, e), keys that every query sees.
        valid: (b,) bool; rows at rest write nothing.
        splits: stretches per row and key head; by default enough to fill the device. tiles: as in `TILES`.

    Returns:
        (b, h * e) in `values.dtype`.
    """
    rows, slots, heads, d = keys.shape
    e = values.shape[3]
    h = q.shape[1] // d
    prefix = 0 if prefix_k is None else prefix_k.shape[1]
    if prefix_k is None or prefix_v is None:
        prefix_k, prefix_v = keys[:, :0], values[:, :0]
    block, warps, stages, most = tiles or TILES
    if splits is None:
        programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = splits_for(rows, heads, prefix + slots, programs, block, most)
    stretch = -(-(prefix + slots) // (splits * block)) * block
    splits = -(-(prefix + slots) // stretch)
    out = torch.empty(rows, h * e, dtype=values.dtype, device=q.device)
    part = lse = out
    if splits > 1:
        part = torch.empty(rows * h * splits * e, dtype=torch.float32, device=q.device)
        lse = torch.empty(rows * h * splits * 2, dtype=torch.float32, device=q.device)
    new_k, new_v = (q, q) if k is None or v is None else (k, v)

    def row_stride(tensor: Tensor) -> int:
        return tensor.stride(0) if tensor.shape[0] > 1 else 0

    flags = overlaps(q)
    _decode_kernel[(rows, heads, splits)](
        q, new_k, new_v, keys, values, prefix_k, prefix_v,
        or_dummy(cos, q), or_dummy(sin, q), position, or_dummy(valid, q),
        out, part, lse, count, slots, prefix, stretch, window or 0, d**-0.5 * 1.4426950408889634,
        row_stride(q), row_stride(new_k), row_stride(new_v), row_stride(keys), keys.stride(1), keys.stride(2),
        row_stride(values), values.stride(1), values.stride(2),
        row_stride(prefix_k), prefix_k.stride(1), prefix_k.stride(2),
        row_stride(prefix_v), prefix_v.stride(1), prefix_v.stride(2), row_stride(position),
        G=h // heads, GROUP=triton.next_power_of_2(h // heads), ROWS=max(16, triton.next_power_of_2(h // heads)),
        D=d, E=e, BLOCK=block,
        PADDED=triton.next_power_of_2(splits), WINDOWED=window is not None, OWN=k is not None,
        MASKED=valid is not None, ROTATE=cos is not None, num_warps=warps, num_stages=stages, **flags,
    )  # fmt: skip
    return out
