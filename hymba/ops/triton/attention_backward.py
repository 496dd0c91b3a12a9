"""Attention of many queries: the backward pass, in two kernels, deterministic.

The first has the forward's tiles and loop and gives the queries' gradients, and on its way the row sums of
out * dout. The second owns a block of keys, visits the rows that see one of them and gives the keys' and values'
gradients, summed over the g query heads of the key head. A block of the prefix is seen by every row: its rows are
split over programs, whose partial sums are added up afterwards.

Floor: 2 (3 d + 2 e) operations per visible pair; computing scores and value products twice makes it 2 (4 d + 3 e).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_op import Sources
from ._common import on_device
from .attention import (
    LOG2_E,
    PLAIN,
    Tile,
    batch_stride,
    constants,
    heads_contiguous,
    key_row,
    prefix_of,
    product,
    strides,
    tile_for,
    visible_keys,
)

# As in the forward pass.
QUERY_TILES: dict[tuple[int, int], Tile] = {
    (2, 64): Tile(128, 64, 4, 2),
    (2, 128): Tile(128, 64, 8, 2, 128),
    (2, 256): Tile(64, 32, 4, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
}
KEY_TILES: dict[tuple[int, int], Tile] = {
    (2, 64): Tile(64, 128, 8, 2),
    (2, 128): Tile(64, 128, 8, 3),
    (2, 256): Tile(32, 64, 8, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
}
PREFIX_ROWS = 6144
"""Rows that one program visits for a block of the prefix: about what a block inside a window of 1024 has."""


@triton.jit(do_not_specialize=PLAIN)
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, start_ptr, low_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    length, prefix, window, slots, stats, scale, dq_scale,
    q_b, q_l, q_h, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, start_b, low_b,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr,
    PREFIX: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    n = tl.arange(0, N)
    rows = tile * M + tl.arange(0, M)
    here = rows < length * G
    start = 0
    if KEYS != 0:
        start = tl.load(start_ptr + b * start_b).to(tl.int32)
    query, low, first, last, begin, common = visible_keys(
        rows, tile, start, low_ptr + b * low_b, length, window, slots, G, M, KEYS, WINDOWED, BOUNDED
    )
    heads = head * G + rows % G
    q_at = q_ptr + b * q_b + (query.to(tl.int64) * q_l + heads * q_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=here[:, None], other=0.0)
    width = tl.num_programs(1) * G
    out_row = (b * length + query) * width + heads
    dout = tl.load(dout_ptr + (out_row * E)[:, None] + e[None, :], mask=here[:, None], other=0.0)
    out = tl.load(out_ptr + (out_row * E)[:, None] + e[None, :], mask=here[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse_at = (b * tl.num_programs(1) + head) * stats + rows
    # Rows past the end get zero: the other kernel reads them.
    tl.store(delta_ptr + lse_at, delta)
    lse = tl.load(lse_ptr + lse_at, mask=here, other=0.0)
    k_base, v_base = k_ptr + b * k_b + head * k_h, v_ptr + b * v_b + head * v_h
    pk_base, pv_base = pk_ptr + b * pk_b + head * pk_h, pv_ptr + b * pv_b + head * pv_h

    acc = tl.zeros((M, D), tl.float32)
    ahead = tl.cdiv(prefix, N) if PREFIX else 0
    for step in tl.range(0, ahead + tl.cdiv(last + 1 - begin, N)):
        at = begin + (step - ahead) * N
        row = key_row(at + n, start, length, slots, KEYS)
        whole = (at >= common) & (at + N - 1 <= first)
        if PREFIX:
            meta = step < ahead
            at = tl.where(meta, step * N, at)
            row = tl.where(meta, tl.minimum(at + n, prefix - 1), row)
            whole = tl.where(meta, at + N <= prefix, whole)
            k_at = tl.where(meta, pk_base, k_base) + row.to(tl.int64)[:, None] * tl.where(meta, pk_s, k_s)
            v_at = tl.where(meta, pv_base, v_base) + row.to(tl.int64)[:, None] * tl.where(meta, pv_s, v_s)
        else:
            k_at = k_base + row.to(tl.int64)[:, None] * k_s
            v_at = v_base + row.to(tl.int64)[:, None] * v_s
        k = tl.load(k_at + d[None, :])
        v = tl.load(v_at + e[None, :])
        scores = product(q, tl.trans(k), None, PRECISION)
        change = product(dout, tl.trans(v), None, PRECISION)
        weights = tl.exp2(scores * scale - lse[:, None])
        if not whole:
            key = at + n
            newest, oldest = query, low
            if PREFIX:
                newest = tl.where(meta, prefix - 1, newest)
                oldest = tl.where(meta, 0, oldest)
            seen = (key[None, :] <= newest[:, None]) & (key[None, :] >= oldest[:, None])
            weights = tl.where(seen, weights, 0.0)
        change = weights * (change - delta[:, None])
        acc = product(change.to(k.dtype), k, acc, PRECISION)

    dq_at = dq_ptr + (out_row * D)[:, None] + d[None, :]
    tl.store(dq_at, (acc * dq_scale).to(dq_ptr.dtype.element_ty), mask=here[:, None])


@triton.jit(do_not_specialize=[*PLAIN[:-1], "high_b", "keys", "splits", "split_blocks"])
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, start_ptr, high_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpk_ptr, dpv_ptr,
    length, keys, prefix, window, slots, stats, scale, dk_scale, splits, split_blocks,
    q_b, q_l, q_h, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, start_b, high_b,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr,
    PREFIX: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    program = tl.program_id(0)
    ahead = tl.cdiv(prefix, N) * splits if PREFIX else 0
    meta = program < ahead
    tile = tl.where(meta, program // splits, program - ahead) if PREFIX else program
    j = tile * N + n

    # Key j is seen by the queries newest <= i <= oldest of this call.
    if KEYS == 0:
        newest = j
    elif KEYS == 2:
        newest = j - tl.load(start_ptr + b * start_b).to(tl.int32)
    else:
        start = tl.load(start_ptr + b * start_b).to(tl.int32)
        written = start + (length if KEYS == 3 else 0)
        back = (written - 1 - j) % slots
        back = tl.where(back < 0, back + slots, back)
        newest = tl.where(back < written, written - 1 - back - start, length)
        if KEYS == 1:
            newest = tl.where(j >= slots, j - slots, newest)
    if BOUNDED:
        oldest = tl.load(high_ptr + b * high_b + tl.minimum(j, length - 1)) - 1
    elif WINDOWED:
        oldest = tl.minimum(newest + window, length - 1)
    else:
        oldest = newest * 0 + length - 1
    end = keys
    if PREFIX:
        end = tl.where(meta, prefix, keys)
        newest = tl.where(meta, -1, newest)
        oldest = tl.where(meta, length - 1, oldest)
    newest = tl.where(j < end, newest, length)
    first = tl.maximum(tl.min(newest, 0), 0) * G // M * M
    last = tl.minimum(tl.max(oldest, 0) + 1, length) * G
    all_from = tl.max(newest, 0)
    all_to = tl.min(oldest, 0)
    if PREFIX:
        # In whole blocks, so that the compiler knows how row numbers are aligned.
        part = program - tile * splits
        first = tl.where(meta, part * split_blocks * M, first)
        last = tl.where(meta, tl.minimum((part + 1) * split_blocks * M, length * G), last)

    row = tl.minimum(j, end - 1).to(tl.int64)[:, None]
    k_at, v_at = k_ptr + b * k_b + head * k_h + row * k_s, v_ptr + b * v_b + head * v_h + row * v_s
    if PREFIX:
        k_at = tl.where(meta, pk_ptr + b * pk_b + head * pk_h + row * pk_s, k_at)
        v_at = tl.where(meta, pv_ptr + b * pv_b + head * pv_h + row * pv_s, v_at)
    k = tl.load(k_at + d[None, :])
    v = tl.load(v_at + e[None, :])
    dk = tl.zeros((N, D), tl.float32)
    dv = tl.zeros((N, E), tl.float32)
    q_base = q_ptr + b * q_b + head * G * q_h
    dout_base = dout_ptr + (b * length * heads + head) * G * E
    lse_base = lse_ptr + (b * heads + head) * stats
    delta_base = delta_ptr + (b * heads + head) * stats
    for at in tl.range(first, last, M):
        at = tl.multiple_of(at, M)
        r = tl.minimum(at + m, length * G - 1)
        token = (r // G).to(tl.int64)
        q = tl.load(q_base + (token * q_l + (r % G) * q_h)[:, None] + d[None, :])
        dout = tl.load(dout_base + (token * (heads * G * E) + (r % G) * E)[:, None] + e[None, :])
        lse = tl.load(lse_base + at + m)
        delta = tl.load(delta_base + at + m)
        scores = product(k, tl.trans(q), None, PRECISION)
        change = product(v, tl.trans(dout), None, PRECISION)
        weights = tl.exp2(scores * scale - lse[None, :])
        if (at // G < all_from) | (at + M > (all_to + 1) * G):
            query = (at + m) // G
            seen = (query[None, :] >= newest[:, None]) & (query[None, :] <= oldest[:, None])
            weights = tl.where(seen, weights, 0.0)
        dv = product(weights.to(dout.dtype), dout, dv, PRECISION)
        change = weights * (change - delta[None, :])
        dk = product(change.to(q.dtype), q, dk, PRECISION)

    dk *= dk_scale
    here = (j < end)[:, None]
    to = (b * keys + j) * heads + head
    if PREFIX:
        if meta:
            to = ((b * splits + program - tile * splits) * prefix + j) * heads + head
            tl.store(dpk_ptr + (to * D)[:, None] + d[None, :], dk, mask=here)
            tl.store(dpv_ptr + (to * E)[:, None] + e[None, :], dv, mask=here)
        else:
            tl.store(dk_ptr + (to * D)[:, None] + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=here)
            tl.store(dv_ptr + (to * E)[:, None] + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=here)
    else:
        tl.store(dk_ptr + (to * D)[:, None] + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=here)
        tl.store(dv_ptr + (to * E)[:, None] + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count"])
def _prefix_gradient_kernel(
    dpk_ptr, dpv_ptr, k_ptr, v_ptr, k_size, v_size, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row of the prefix gradients is the sum of its `count` parts, in order; keys first, then values."""
    row = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    if program < tl.cdiv(k_size, BLOCK):
        at = program * BLOCK + tl.arange(0, BLOCK)
        for part in tl.range(0, count):
            total += tl.load(dpk_ptr + (row * count + part) * k_size + at, mask=at < k_size, other=0.0)
        tl.store(k_ptr + row * k_size + at, total.to(k_ptr.dtype.element_ty), mask=at < k_size)
    else:
        at = (program - tl.cdiv(k_size, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
        for part in tl.range(0, count):
            total += tl.load(dpv_ptr + (row * count + part) * v_size + at, mask=at < v_size, other=0.0)
        tl.store(v_ptr + row * v_size + at, total.to(v_ptr.dtype.element_ty), mask=at < v_size)


def backward(
    s: Sources, out: Tensor, lse: Tensor, dout: Tensor, tiles: tuple[Tile | None, Tile | None] = (None, None)
) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v, contiguous, in their dtypes; empty for a prefix that is `None`.

    Args:
        s: what the forward pass had. out, lse: what it gave.
        dout: (b, l, h * e), the output's gradient.
        tiles: block shapes of the two kernels; by default from the tables.
    """
    s = heads_contiguous(s)
    (b, l, h, d), (keys, heads), e = s.q.shape, s.k.shape[1:3], s.v.shape[3]
    dout = dout.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (s.q, s.k, s.v))
    pk, pv, prefix = prefix_of(s)
    start, low, high = (lse if x is None else x for x in (s.start, s.low, s.high))
    constexprs, scale = constants(s), d**-0.5
    rows = l * (h // heads)
    with on_device(s.q):
        tile = tiles[0] or tile_for(QUERY_TILES, s, rows_stay=True)
        _query_gradient_kernel[(triton.cdiv(lse.shape[2], tile.rows), heads, b)](
            s.q, s.k, s.v, pk, pv, start, low, out, dout, lse, delta, dq,
            l, prefix, s.window or 0, s.slots, lse.shape[2], scale * LOG2_E, scale,
            *strides(s), batch_stride(s.start), batch_stride(s.low),
            M=tile.rows, N=tile.keys, **constexprs, **tile.options(),
        )  # fmt: skip
        tile = tiles[1] or tile_for(KEY_TILES, s, rows_stay=False)
        splits = triton.cdiv(rows, PREFIX_ROWS)
        split_blocks = triton.cdiv(triton.cdiv(rows, splits), tile.rows)
        splits = triton.cdiv(rows, split_blocks * tile.rows)
        parts = b * splits if prefix else 0
        dpk = torch.empty(parts, prefix, heads, d, dtype=torch.float32, device=lse.device)
        dpv = torch.empty(parts, prefix, heads, e, dtype=torch.float32, device=lse.device)
        programs = triton.cdiv(prefix, tile.keys) * splits + triton.cdiv(keys, tile.keys)
        _key_gradient_kernel[(programs, heads, b)](
            s.q, s.k, s.v, pk, pv, start, high, dout, lse, delta, dk, dv, dpk, dpv,
            l, keys, prefix, s.window or 0, s.slots, lse.shape[2], scale * LOG2_E, scale, splits, split_blocks,
            *strides(s), batch_stride(s.start), batch_stride(s.high),
            M=tile.rows, N=tile.keys, **constexprs, **tile.options(),
        )  # fmt: skip
    if s.prefix_k is None or s.prefix_v is None:
        return [dq, dk, dv, dpk.new_empty(0), dpv.new_empty(0)]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (s.prefix_k, s.prefix_v)]
    own_rows, sizes = s.prefix_k.shape[0], [grad[0].numel() for grad in grads]
    with on_device(s.q):
        _prefix_gradient_kernel[(sum(triton.cdiv(size, 256) for size in sizes), own_rows)](
            dpk, dpv, *grads, *sizes, parts // own_rows, BLOCK=256, num_warps=1
        )
    return [dq, dk, dv, *grads]
