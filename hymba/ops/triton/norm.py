"""RMS norms: a program keeps whole rows in registers, so that each is read once and written once.

Backward runs a fixed number of programs that walk over the rows and add up the weight's gradient on the way; the sums
of the programs are added in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, on_device, or_dummy, processors, rows_of

_TILE = 32 if INTERPRETED else 2048
_PROGRAMS = 2 if INTERPRETED else 8
"""Of backward, on each multiprocessor."""


@triton.jit
def _scale(v, W: tl.constexpr, eps):
    return tl.rsqrt(tl.sum(v * v, 1) / W + eps)[:, None]


@triton.jit
def _forward_kernel(
    x, r, weight, total, y, rows, sx, sr, eps, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    m = (row < rows) & (col < W)
    v = tl.load(x + row * sx + col, mask=m, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(r + row * sr + col, mask=m, other=0.0).to(tl.float32)
        v = v.to(total.dtype.element_ty)
        tl.store(total + row * W + col, v, mask=m)
        v = v.to(tl.float32)
    w = tl.load(weight + col, mask=col < W, other=0.0).to(tl.float32)
    # `total` has the dtype that the norm is cast to before the weight.
    n = (v * _scale(v, W, eps)).to(total.dtype.element_ty).to(tl.float32)
    tl.store(y + row * W + col, (n * w).to(total.dtype.element_ty).to(y.dtype.element_ty), mask=m)


@triton.jit
def _row_gradient(v, g, w, W: tl.constexpr, eps):
    """The gradient of v, and what adds to that of w."""
    scale = _scale(v, W, eps)
    n = v * scale
    gw = g * w
    c = (tl.sum(gw * n, 1) / W)[:, None]
    return (gw - n * c) * scale, g * n


@triton.jit
def _backward_kernel(
    dy, x, weight, dtotal, dx, dw, rows, sy, sx, st, eps, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    col = tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(pid * ROWS, rows, step):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (row < rows) & (col < W)
        v = tl.load(x + row * sx + col, mask=m, other=0.0)
        g = tl.load(dy + row * sy + col, mask=m, other=0.0)
        # All loads before the sums over the row, which wait for them.
        more = tl.load(dtotal + row * st + col, mask=m & ADD, other=0.0)
        # From the cache at every row: kept, they would cost programs on a multiprocessor their registers.
        w = tl.load(weight + col, mask=m, other=0.0).to(tl.float32)
        d, to_weight = _row_gradient(v.to(tl.float32), g.to(tl.float32), w, W, eps)
        if ADD:
            d += more.to(tl.float32)
        acc += to_weight
        tl.store(dx + row * W + col, d.to(dx.dtype.element_ty), mask=m)
    col = tl.arange(0, BLOCK)
    tl.store(dw + pid * W + col, tl.sum(acc, 0), mask=col < W)


@triton.jit
def _mean_kernel(
    a, b, wa, wb, y, rows, sa, sb, eps, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    m = (row < rows) & (col < W)
    va = tl.load(a + row * sa + col, mask=m, other=0.0).to(tl.float32)
    vb = tl.load(b + row * sb + col, mask=m, other=0.0).to(tl.float32)
    na = (va * _scale(va, W, eps)).to(a.dtype.element_ty).to(tl.float32)
    nb = (vb * _scale(vb, W, eps)).to(b.dtype.element_ty).to(tl.float32)
    na *= tl.load(wa + col, mask=col < W, other=0.0).to(tl.float32)
    nb *= tl.load(wb + col, mask=col < W, other=0.0).to(tl.float32)
    n = na.to(a.dtype.element_ty).to(tl.float32) + nb.to(b.dtype.element_ty).to(tl.float32)
    n = n.to(y.dtype.element_ty).to(tl.float32) * 0.5
    tl.store(y + row * W + col, n.to(y.dtype.element_ty), mask=m)


@triton.jit
def _mean_backward_kernel(
    dy, a, b, wa, wb, da, db, dw, rows, sy, sa, sb, eps, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    col = tl.arange(0, BLOCK)[None, :]
    acc_a = tl.zeros([ROWS, BLOCK], tl.float32)
    acc_b = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(pid * ROWS, rows, step):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (row < rows) & (col < W)
        g = tl.load(dy + row * sy + col, mask=m, other=0.0).to(tl.float32) * 0.5
        va = tl.load(a + row * sa + col, mask=m, other=0.0)
        vb = tl.load(b + row * sb + col, mask=m, other=0.0)
        # Weights from the cache, as above.
        xa = tl.load(wa + col, mask=m, other=0.0).to(tl.float32)
        d, to_weight = _row_gradient(va.to(tl.float32), g, xa, W, eps)
        acc_a += to_weight
        tl.store(da + row * W + col, d.to(da.dtype.element_ty), mask=m)
        xb = tl.load(wb + col, mask=m, other=0.0).to(tl.float32)
        d, to_weight = _row_gradient(vb.to(tl.float32), g, xb, W, eps)
        acc_b += to_weight
        tl.store(db + row * W + col, d.to(db.dtype.element_ty), mask=m)
    col = tl.arange(0, BLOCK)
    tl.store(dw + pid * W + col, tl.sum(acc_a, 0), mask=col < W)
    tl.store(dw + (tl.num_programs(0) + pid) * W + col, tl.sum(acc_b, 0), mask=col < W)


@functools.cache
def _shape(width: int) -> dict[str, int]:
    """Tile and warps: about 16 numbers of a row per thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"W": width, "BLOCK": block, "ROWS": rows, "num_warps": min(16, max(1, block * rows // 512))}


def _check(weight: Tensor, width: int) -> Tensor:
    if weight.shape != (width,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the kernel takes ({width},)")
    return weight.contiguous()


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum (x itself without a residual) and its norm in `dtype`."""
    v, sx = rows_of(x)
    r, sr = (v, 0) if residual is None else rows_of(residual)
    width, shape = x.shape[-1], _shape(x.shape[-1])
    rows = x.numel() // width
    with on_device(x):
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = v
        if residual is not None:
            total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, r.dtype), device=x.device)
        _forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            v, r, _check(weight, width), total, y, rows, sx, sr, eps, ADD=residual is not None, **shape
        )
    return (x if residual is None else total), y


def _programs(x: Tensor, rows: int, shape: dict[str, int]) -> int:
    return min(triton.cdiv(rows, shape["ROWS"]), _PROGRAMS * processors(x.device) * 4 // max(4, shape["num_warps"]))


def backward(dy: Tensor, x: Tensor, weight: Tensor, dtotal: Tensor | None, eps: float) -> list[Tensor]:
    """Gradients of x (with `dtotal` added) and of the weight."""
    v, sx = rows_of(x)
    g, sy = rows_of(dy)
    t, st = (v, 0) if dtotal is None else rows_of(dtotal)
    width, shape = x.shape[-1], _shape(x.shape[-1])
    rows = x.numel() // width
    with on_device(x):
        programs = _programs(x, rows, shape)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward_kernel[(programs,)](
            g, v, _check(weight, width), or_dummy(t, v), dx, dw, rows, sy, sx, st, eps, ADD=dtotal is not None, **shape
        )
        return [dx, dw.sum(0).to(weight.dtype)]


def mean(a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """`(norm(a) + norm(b)) / 2`."""
    va, sa = rows_of(a)
    vb, sb = rows_of(b)
    width, shape = a.shape[-1], _shape(a.shape[-1])
    rows = a.numel() // width
    with on_device(a):
        y = torch.empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
        weights = _check(a_weight, width), _check(b_weight, width)
        _mean_kernel[(triton.cdiv(rows, shape["ROWS"]),)](va, vb, *weights, y, rows, sa, sb, eps, **shape)
    return y


def mean_backward(dy: Tensor, a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float) -> list[Tensor]:
    """Gradients of both branches and both weights."""
    va, sa = rows_of(a)
    vb, sb = rows_of(b)
    g, sy = rows_of(dy)
    width, shape = a.shape[-1], _shape(a.shape[-1])
    rows = a.numel() // width
    with on_device(a):
        programs = _programs(a, rows, shape)
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        db = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        dw = torch.empty(2, programs, width, dtype=torch.float32, device=a.device)
        weights = _check(a_weight, width), _check(b_weight, width)
        named: dict[str, Any] = shape
        _mean_backward_kernel[(programs,)](g, va, vb, *weights, da, db, dw, rows, sy, sa, sb, eps, **named)
        return [da, db, dw[0].sum(0).to(a_weight.dtype), dw[1].sum(0).to(b_weight.dtype)]
