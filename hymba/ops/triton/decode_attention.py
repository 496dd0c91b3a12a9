"""Attention of one new token per row over [meta keys | cache slots], split over the keys.

One program takes the query heads of one key head and one stretch of keys; the stretches' partial results are joined
by their log-sum-exp. The g = h / k queries of a key head stand as rows of one product, so keys are read once.
Floor: the bytes of keys and values over the memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Stretches are multiples of this many keys.
BLOCK = 64


@triton.jit
def _stretch(
    q, k_ptr, v_ptr, k_stride, v_stride, first, last, slots, position, window, m, l, acc,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first..last; returns the running maximum, sum and weighted values.

    SLOTS: the keys are cache slots; slot s holds the largest position p <= position with p % slots == s.
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
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, position_ptr, out_ptr, part_ptr, lse_ptr,
    slots, prefix, stretch, window, scale,
    q_b, k_b, k_s, k_h, v_b, v_s, v_h, pk_b, pk_s, pk_h, pv_b, pv_s, pv_h, position_b,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    queries = q_ptr + b * q_b + (h * G + g[:, None]) * D + d[None, :]
    q = tl.load(queries, mask=g[:, None] < G, other=0.0)
    q = (q * scale).to(q.dtype)
    position = tl.load(position_ptr + b * position_b).to(tl.int32)
    m = tl.full((ROWS,), -1.0e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    # The stretches cover the meta keys, then the slots.
    begin = split * stretch
    # Slots behind the token's own were never written.
    end = tl.minimum(begin + stretch, prefix + tl.minimum(slots, position + 1))
    m, l, acc = _stretch(
        q, pk_ptr + b * pk_b + h * pk_h, pv_ptr + b * pv_b + h * pv_h, pk_s, pv_s,
        tl.minimum(begin, prefix), tl.minimum(end, prefix), slots, position, window, m, l, acc,
        D, E, BLOCK, False, False,
    )  # fmt: skip
    m, l, acc = _stretch(
        q, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, k_s, v_s,
        tl.maximum(begin, prefix) - prefix, tl.maximum(end, prefix) - prefix,
        slots, position, window, m, l, acc, D, E, BLOCK, True, WINDOWED,
    )  # fmt: skip
    row = (b * heads + h) * G + g
    if SPLITS == 1:
        out = acc / tl.maximum(l, 1.0e-30)[:, None]
        tl.store(out_ptr + row[:, None] * E + e[None, :], out.to(out_ptr.dtype.element_ty), mask=g[:, None] < G)
    else:
        at = row * SPLITS + split
        tl.store(part_ptr + at[:, None] * E + e[None, :], acc, mask=g[:, None] < G)
        tl.store(lse_ptr + at * 2, m, mask=g < G)
        tl.store(lse_ptr + at * 2 + 1, l, mask=g < G)


@triton.jit
def _join_kernel(part_ptr, lse_ptr, out_ptr, SPLITS: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr):
    """One query head: join its stretches."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, PADDED)
    e = tl.arange(0, E)
    here = s < SPLITS
    m = tl.load(lse_ptr + (row * SPLITS + s) * 2, mask=here, other=-1.0e30)
    l = tl.load(lse_ptr + (row * SPLITS + s) * 2 + 1, mask=here, other=0.0)
    share = tl.exp2(m - tl.max(m, axis=0))
    part = tl.load(part_ptr + (row * SPLITS + s[:, None]) * E + e[None, :], mask=here[:, None], other=0.0)
    out = tl.sum(part * share[:, None], axis=0) / tl.maximum(tl.sum(l * share, axis=0), 1.0e-30)
    tl.store(out_ptr + row * E + e, out.to(out_ptr.dtype.element_ty))


def splits_for(rows: int, heads: int, keys: int, programs: int) -> int:
    """Stretches per row and key head, so that at least about `programs` programs run."""
    wanted = -(-programs // (rows * heads))
    return max(1, min(wanted, -(-keys // BLOCK), 64))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    *,
    window: int | None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of a single token per row.

    Args:
        q: (b, 1, h, d), rotated. k: (b, s, k, d), rotated. v: (b, s, k, e). d and e are powers of two from 16.
        position: (b or 1,) text position of the token, whose key stands in slot `position % s` already.
        window: past positions visible; `None` for all.
        prefix_k, prefix_v: (b or 1, m, k, d) and (b or 1, m, k, e), keys that every query sees.
        splits: stretches per row and key head; by default enough to fill the device.

    Returns:
        (b, 1, h * e) in `v.dtype`.
    """
    b, _, h, d = q.shape
    slots, heads, e = k.shape[1], k.shape[2], v.shape[3]
    prefix = 0 if prefix_k is None else prefix_k.shape[1]
    if prefix_k is None or prefix_v is None:
        prefix_k, prefix_v = k[:, :0], v[:, :0]
    if splits is None:
        programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = splits_for(b, heads, prefix + slots, programs)
    stretch = -(-(prefix + slots) // (splits * BLOCK)) * BLOCK
    splits = -(-(prefix + slots) // stretch)
    q = q.contiguous()
    out = torch.empty(b, 1, h * e, dtype=v.dtype, device=q.device)
    part = lse = out
    if splits > 1:
        part = torch.empty(b * h * splits * e, dtype=torch.float32, device=q.device)
        lse = torch.empty(b * h * splits * 2, dtype=torch.float32, device=q.device)

    def row_stride(tensor: Tensor) -> int:
        return tensor.stride(0) if tensor.shape[0] > 1 else 0

    _decode_kernel[(b, heads, splits)](
        q, k, v, prefix_k, prefix_v, position, out, part, lse,
        slots, prefix, stretch, window or 0, d**-0.5 * 1.4426950408889634,
        q.stride(0), row_stride(k), k.stride(1), k.stride(2), row_stride(v), v.stride(1), v.stride(2),
        row_stride(prefix_k), prefix_k.stride(1), prefix_k.stride(2),
        row_stride(prefix_v), prefix_v.stride(1), prefix_v.stride(2),
        row_stride(position),
        G=h // heads, ROWS=max(16, triton.next_power_of_2(h // heads)), D=d, E=e, BLOCK=BLOCK, SPLITS=splits,
        WINDOWED=window is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(b * h,)](part, lse, out, SPLITS=splits, PADDED=triton.next_power_of_2(splits), E=e, num_warps=4)
    return out
