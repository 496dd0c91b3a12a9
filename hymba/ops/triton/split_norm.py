"""RMS norms of three slices of a row: some rows a program, the slices one after the other."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, on_device, processors, rows_of

_TILE = 64 if INTERPRETED else 4096
_PROGRAMS = 2 if INTERPRETED else 4
"""Of backward, on each multiprocessor."""


@triton.jit
def _forward_part(
    x, weight, y, row, rows, sx, eps, AT: tl.constexpr, W: tl.constexpr, WY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + row * sx + AT + col, mask=(row < rows) & (col < W), other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 1) / W + eps)[:, None]
    n = (v * scale).to(x.dtype.element_ty).to(tl.float32)
    n *= tl.load(weight + col, mask=col < W, other=0.0).to(tl.float32)
    tl.store(y + row * WY + col, n.to(y.dtype.element_ty), mask=(row < rows) & (col < WY))


@triton.jit
def _forward_kernel(
    x, wa, wb, wc, a, b, c, rows, sx, eps, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    _forward_part(x, wa, a, row, rows, sx, eps, 0, A, WIDTH, BLOCK_A)
    _forward_part(x, wb, b, row, rows, sx, eps, A, B, B, BLOCK_B)
    _forward_part(x, wc, c, row, rows, sx, eps, A + B, C, C, BLOCK_C)


@triton.jit
def _backward_part(
    x, dy, weight, dx, row, rows, sx, sy, so, eps, AT: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    m = (row < rows) & (col < W)
    v = tl.load(x + row * sx + AT + col, mask=m, other=0.0).to(tl.float32)
    g = tl.load(dy + row * sy + col, mask=m, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 1) / W + eps)[:, None]
    n = v * scale
    gw = g * tl.load(weight + col, mask=col < W, other=0.0).to(tl.float32)
    d = (gw - n * (tl.sum(gw * n, 1) / W)[:, None]) * scale
    tl.store(dx + row * so + AT + col, d.to(dx.dtype.element_ty), mask=m)
    return tl.sum(g * n, 0)


@triton.jit
def _backward_kernel(
    da, db, dc, x, wa, wb, wc, dx, dw, rows, ya, yb, yc, sx, so, eps, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    REST: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """REST columns behind the slices get zeros."""
    pid = tl.program_id(0)
    sum_a = tl.zeros([BLOCK_A], tl.float32)
    sum_b = tl.zeros([BLOCK_B], tl.float32)
    sum_c = tl.zeros([BLOCK_C], tl.float32)
    for first in range(pid * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        sum_a += _backward_part(x, da, wa, dx, row, rows, sx, ya, so, eps, 0, A, BLOCK_A)
        sum_b += _backward_part(x, db, wb, dx, row, rows, sx, yb, so, eps, A, B, BLOCK_B)
        sum_c += _backward_part(x, dc, wc, dx, row, rows, sx, yc, so, eps, A + B, C, BLOCK_C)
        if REST > 0:
            rest = tl.arange(0, BLOCK_REST)[None, :]
            zero = tl.zeros([ROWS, BLOCK_REST], dx.dtype.element_ty)
            tl.store(dx + row * so + A + B + C + rest, zero, mask=(row < rows) & (rest < REST))
    at = dw + pid * (A + B + C)
    col = tl.arange(0, BLOCK_A)
    tl.store(at + col, sum_a, mask=col < A)
    col = tl.arange(0, BLOCK_B)
    tl.store(at + A + col, sum_b, mask=col < B)
    col = tl.arange(0, BLOCK_C)
    tl.store(at + A + B + col, sum_c, mask=col < C)


@functools.cache
def _shape(a: int, b: int, c: int, width: int) -> dict[str, int]:
    blocks = [triton.next_power_of_2(n) for n in (width, b, c)]
    names = dict(zip(("BLOCK_A", "BLOCK_B", "BLOCK_C"), blocks, strict=True))
    return {"A": a, "B": b, "C": c, "ROWS": max(1, triton.next_power_of_2(_TILE // sum(blocks)) // 2)} | names


def forward(
    x: Tensor, a_weight: Tensor, b_weight: Tensor, c_weight: Tensor, eps: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three norms, the first `width` wide."""
    v, sx = rows_of(x)
    shape = _shape(len(a_weight), len(b_weight), len(c_weight), width)
    rows = x.numel() // x.shape[-1]
    with on_device(x):
        outputs = [
            torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device) for n in (width, shape["B"], shape["C"])
        ]
        weights = a_weight.contiguous(), b_weight.contiguous(), c_weight.contiguous()
        _forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](v, *weights, *outputs, rows, sx, eps, WIDTH=width, **shape)
    a, b, c = outputs
    return a, b, c


def backward(
    da: Tensor, db: Tensor, dc: Tensor, x: Tensor, a_weight: Tensor, b_weight: Tensor, c_weight: Tensor, eps: float
) -> list[Tensor]:
    """Gradients of x, zero behind the slices, and of the weights."""
    v, sx = rows_of(x)
    (ga, ya), (gb, yb), (gc, yc) = rows_of(da), rows_of(db), rows_of(dc)
    sizes = len(a_weight), len(b_weight), len(c_weight)
    shape = _shape(*sizes, sizes[0])
    width = x.shape[-1]
    rows, rest = x.numel() // width, width - sum(sizes)
    with on_device(x):
        programs = min(triton.cdiv(rows, shape["ROWS"]), _PROGRAMS * processors(x.device))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = torch.empty(programs, sum(sizes), dtype=torch.float32, device=x.device)
        weights = a_weight.contiguous(), b_weight.contiguous(), c_weight.contiguous()
        _backward_kernel[(programs,)](
            ga, gb, gc, v, *weights, dx, dw, rows, ya, yb, yc, sx, width, eps, REST=rest,
            BLOCK_REST=triton.next_power_of_2(max(1, rest)), **shape,
        )  # fmt: skip
        parts = dw.sum(0).split(sizes)
        if a_weight.dtype == dw.dtype:
            # Outputs of an op must not share memory.
            return [dx, *(part.clone() for part in parts)]
        return [dx, *(part.to(w.dtype) for part, w in zip(parts, (a_weight, b_weight, c_weight), strict=True))]
