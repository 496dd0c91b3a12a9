"""What stands between the matrix products of a decode step of several rows: norms, the merge of branches, the gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import overlaps, release_next, wait_for_previous


@triton.jit
def _norm_kernel(
    x_ptr, norm_ptr, x2_ptr, norm2_ptr, out_ptr, x_row, x2_row, width, eps,
    BLOCK: tl.constexpr, MERGE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    here = c < width
    norm = tl.load(norm_ptr + c, mask=here, other=0.0).to(tl.float32)
    if OVERLAPS:
        wait_for_previous()
        release_next()
    x = tl.load(x_ptr + r * x_row + c, mask=here, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * norm
    if MERGE:
        x = tl.load(x2_ptr + r * x2_row + c, mask=here, other=0.0).to(tl.float32)
        norm2 = tl.load(norm2_ptr + c, mask=here, other=0.0).to(tl.float32)
        y = (y + x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * norm2) * 0.5
    tl.store(out_ptr + r * width + c, y.to(out_ptr.dtype.element_ty), mask=here)


def norm_rows(x: Tensor, norm: Tensor, *, eps: float, merge: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """RMS norm of each row of x (b, k), or the mean of it and of a second normed branch, in `x.dtype`.

    Args:
        norm: (k,) weight. merge: second branch (b, k) and its norm's weight (k,).
    """
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    x2, norm2 = merge or (x, norm)
    flags = overlaps(x)
    _norm_kernel[(rows,)](
        x, norm, x2, norm2, out, x.stride(0), x2.stride(0), width, eps,
        BLOCK=triton.next_power_of_2(width), MERGE=merge is not None, num_warps=8 if width > 2048 else 4, **flags,
    )  # fmt: skip
    return out


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, count, BLOCK: tl.constexpr, RELU2: tl.constexpr, OVERLAPS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    if OVERLAPS:
        wait_for_previous()
        release_next()
    up = tl.load(up_ptr + i, mask=here, other=0.0).to(tl.float32)
    if RELU2:
        y = tl.maximum(up, 0.0) * tl.maximum(up, 0.0)
    else:
        gate = tl.load(gate_ptr + i, mask=here, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(up_ptr + i, y.to(up_ptr.dtype.element_ty), mask=here)


def gate_rows(up: Tensor, gate: Tensor | None) -> Tensor:
    """`silu(gate) * up`, or `relu(up)^2` without a gate, in place of up. Both (b, k) contiguous."""
    flags = overlaps(up)
    _gate_kernel[(triton.cdiv(up.numel(), 1024),)](
        up if gate is None else gate, up, up.numel(), BLOCK=1024, RELU2=gate is None, num_warps=4, **flags
    )
    return up
