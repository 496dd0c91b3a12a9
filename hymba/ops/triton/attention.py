"""Attention of many queries over [meta keys | cached keys | own keys]: the forward pass.

A program owns one key head and a tile of rows; the g = h / k queries of a token that share the key head are
neighbouring rows, so a tile of 128 rows spans 26 tokens and the window's ragged ends cost little. It visits the
prefix, then only the text keys that some row of the tile sees, block by block with an online softmax; where all rows
see all keys of a block no mask is computed. Sources are read where they lie, through strides.

Keys have relative positions r: query i of this call stands at i, its own key too, earlier text is negative. KEYS says
where the key of r lies:

    OWN           row r; there is no earlier text
    RING_AND_OWN  own keys in rows slots + r, behind a ring of `slots` rows where position p has row p % slots
    BUFFER        row start + r: a buffer in order of position that holds the own keys already
    RING          row (start + r) % slots: a ring that holds the own keys already

Floor: 2 (d + e) operations per visible pair on the matrix units, and one exponential.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_op import Sources, padded_rows
from ._common import INTERPRETED, on_device

OWN, RING_AND_OWN, BUFFER, RING = 0, 1, 2, 3
LOG2_E = 1.4426950408889634
HIDDEN = tl.constexpr(-1.0e30)
"""A score that no visible key has."""


class Tile(NamedTuple):
    """Rows (queries times heads) and keys of one block, and how a program runs it."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# By bytes per element and the wider head; measured on an H200 with `python -m benchmarks.attention --sweep`. Two
# programs of 128 registers beat one of 255: the exponentials of one hide behind the products of the other.
TILES: dict[tuple[int, int], Tile] = {
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 8, 2, 128),
    (2, 256): Tile(64, 64, 4, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 4, 2),
    (4, 256): Tile(16, 32, 4, 2),
}
# Without a window, programs are long and their boundary blocks few.
GLOBAL_TILES = TILES | {(2, 128): Tile(128, 64, 4, 3)}


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 30
    index = torch.cuda.current_device() if device.index is None else device.index  # pragma: gpu
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]  # pragma: gpu


def tile_for(table: dict[tuple[int, int], Tile], s: Sources, *, rows_stay: bool) -> Tile:
    """The table's tile, made smaller where the device has less shared memory than the one it was measured on.

    rows_stay: a program keeps its rows and visits blocks of keys; otherwise the other way round.
    """
    size, d, e = s.v.element_size(), s.q.shape[3], s.v.shape[3]
    tile, room = table[size, max(64, d, e)], _shared_memory(s.q.device)
    while True:
        held, visited = (tile.rows, tile.keys) if rows_stay else (tile.keys, tile.rows)
        if (held + tile.stages * visited) * (d + e) * size <= room or max(held, visited) == 16:
            return tile
        if tile.stages > 2:
            tile = tile._replace(stages=2)
        elif tile.rows > tile.keys:
            tile = tile._replace(rows=tile.rows // 2)
        else:
            tile = tile._replace(keys=tile.keys // 2)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, or a b without acc. The interpreter cannot multiply bfloat16 numbers."""
    if PRECISION == "interpreted":
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        out = tl.dot(a, b, acc, input_precision=PRECISION)
    return out


@triton.jit
def key_row(r, start, length, slots, KEYS: tl.constexpr):
    """The row of the key at relative position r (a vector); one past the last own key gets the last one's row."""
    r = tl.minimum(r, length - 1)
    if KEYS == 0:
        row = r
    elif KEYS == 2:
        row = start + r
    else:
        turned = start % slots + r
        turned = tl.where(turned < 0, turned + slots, turned)
        if KEYS == 1:
            row = tl.where(r < 0, turned, slots + r)
        else:
            row = tl.where(turned >= slots, turned - slots, turned)
    return row


@triton.jit
def visible_keys(
    rows, tile, start, low_row, length, window, slots,
    G: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Relative positions that the rows of a tile see.

    Returns each row's query and lowest key, the tile's first and last query, the first key that any row sees and the
    first that all rows see.
    """
    query = rows // G
    first = tl.minimum(tile * M // G, length - 1)
    last = tl.minimum((tile * M + M - 1) // G, length - 1)
    oldest = 0
    if KEYS == 1:
        oldest = -tl.minimum(start, slots)
    elif KEYS != 0:
        oldest = -start
    if BOUNDED:
        low = tl.load(low_row + tl.minimum(query, length - 1))
        begin = tl.load(low_row + first)
        common = tl.load(low_row + last)
    elif WINDOWED:
        low = query - window
        begin = tl.maximum(first - window, oldest)
        common = last - window
    else:
        low = query * 0 + oldest
        begin = oldest
        common = oldest
    return query, low, first, last, begin, common


# One compiled variant serves all lengths: what is not named here says something about alignment.
PLAIN = ["length", "prefix", "window", "slots", "start_b", "low_b"]


@triton.jit(do_not_specialize=PLAIN)
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, start_ptr, low_ptr, out_ptr, lse_ptr,
    length, prefix, window, slots, stats, scale,
    q_b, q_l, q_h, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, start_b, low_b,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr,
    PREFIX: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Later tiles see more keys; the long ones go first.
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
    k_base, v_base = k_ptr + b * k_b + head * k_h, v_ptr + b * v_b + head * v_h
    pk_base, pv_base = pk_ptr + b * pk_b + head * pk_h, pv_ptr + b * pv_b + head * pv_h

    top = tl.full((M,), HIDDEN, tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, E), tl.float32)
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
        scores = product(q, tl.trans(k), None, PRECISION)
        if not whole:
            key = at + n
            newest, oldest = query, low
            if PREFIX:
                newest = tl.where(meta, prefix - 1, newest)
                oldest = tl.where(meta, 0, oldest)
            seen = (key[None, :] <= newest[:, None]) & (key[None, :] >= oldest[:, None])
            scores = tl.where(seen, scores, HIDDEN)
        above = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - above[:, None])
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_at + e[None, :])
        acc = product(weights.to(v.dtype), v, acc, PRECISION)
        top = above

    out = acc / total[:, None]
    width = tl.num_programs(1) * G * E
    out_at = out_ptr + (b * length + query) * width + heads * E
    tl.store(out_at[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty), mask=here[:, None])
    lse_at = lse_ptr + (b * tl.num_programs(1) + head) * stats + rows
    tl.store(lse_at, top + tl.log2(total), mask=here)


def constants(s: Sources) -> dict[str, int | bool | str]:
    """Compile-time arguments that both passes share."""
    if s.own_keys is None:
        keys = BUFFER if s.window is None else RING
    else:
        keys = RING_AND_OWN if s.own_keys else OWN
    tf32 = s.q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "G": s.q.shape[2] // s.k.shape[2],
        "D": s.q.shape[3],
        "E": s.v.shape[3],
        "KEYS": keys,
        "PREFIX": s.prefix_k is not None,
        "WINDOWED": s.window is not None and s.low is None,
        "BOUNDED": s.low is not None,
        "PRECISION": "interpreted" if INTERPRETED else "tf32" if tf32 else "ieee",
    }


def prefix_of(s: Sources) -> tuple[Tensor, Tensor, int]:
    """Prefix keys and values (any tensors when there are none) and their number."""
    if s.prefix_k is None or s.prefix_v is None:
        return s.k, s.v, 0
    return s.prefix_k, s.prefix_v, s.prefix_k.shape[1]


def strides(s: Sources) -> list[int]:
    """Of q, k, v, prefix_k, prefix_v: batch, token, head; a batch of one is shared by all rows."""
    pk, pv, _ = prefix_of(s)
    out: list[int] = []
    for x in (s.q, s.k, s.v, pk, pv):
        out += [batch_stride(x), x.stride(1), x.stride(2)]
    return out


def batch_stride(x: Tensor | None) -> int:
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0


def heads_contiguous(s: Sources) -> Sources:
    """The same, with copies of tensors whose heads are not contiguous."""
    five = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in s[:5]]
    return Sources(*five, *s[5:])  # type: ignore[call-arg, arg-type]


def forward(s: Sources, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        s: what to read; d and e are powers of two from 16 to 256, the five tensors have one dtype.
        tile: block shape; by default from the table.

    Returns:
        output (b, l, h * e) in `v.dtype`; log2 of the sum of exponentials (b, k, padded_rows(l * g)) float32, row
        i * g + head for query i.
    """
    s = heads_contiguous(s)
    (b, l, h, d), heads, e = s.q.shape, s.k.shape[2], s.v.shape[3]
    table = GLOBAL_TILES if s.window is None and s.low is None else TILES
    tile = tile or tile_for(table, s, rows_stay=True)
    out = torch.empty(b, l, h * e, dtype=s.v.dtype, device=s.q.device)
    lse = torch.empty(b, heads, padded_rows(l * (h // heads)), dtype=torch.float32, device=s.q.device)
    pk, pv, prefix = prefix_of(s)
    grid = (triton.cdiv(l * (h // heads), tile.rows), heads, b)
    with on_device(s.q):
        _attention_kernel[grid](
            s.q, s.k, s.v, pk, pv, lse if s.start is None else s.start, lse if s.low is None else s.low, out, lse,
            l, prefix, s.window or 0, s.slots, lse.shape[2], d**-0.5 * LOG2_E,
            *strides(s), batch_stride(s.start), batch_stride(s.low),
            M=tile.rows, N=tile.keys, **constants(s), **tile.options(),
        )  # fmt: skip
    return out, lse
