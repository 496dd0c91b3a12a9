"""Cross-entropy of rows of logits and its gradient in their place; a row is read twice and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, on_device

_BLOCK = 16 if INTERPRETED else 4096


@triton.jit
def _rows_kernel(
    logits, targets, losses, v, stride, ignore, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + r).to(tl.int64)
    row = logits + r * stride
    real = target != ignore
    if real:
        col = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, v, BLOCK):
            x = tl.load(row + first + col, mask=first + col < v, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, x)
            # A lane that has seen no column yet has nothing to rescale.
            total = tl.where(new == float("-inf"), 0.0, total * tl.exp(top - new) + tl.exp(x - new))
            top = new
        highest = tl.max(top, 0)
        total = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - highest)), 0)
        lse = highest + tl.log(total)
        inside = (target >= 0) & (target < v)
        at = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(losses + r, lse - at)
        if GRADIENT:
            for first in range(0, v, BLOCK):
                m = first + col < v
                x = tl.load(row + first + col, mask=m, other=0.0).to(tl.float32)
                p = tl.exp(x - lse) - tl.where(first + col == target, 1.0, 0.0)
                tl.store(row + first + col, p.to(logits.dtype.element_ty), mask=m)
    else:
        tl.store(losses + r, 0.0)
        if GRADIENT:
            col = tl.arange(0, BLOCK)
            for first in range(0, v, BLOCK):
                zero = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(row + first + col, zero, mask=first + col < v)


def rows(logits: Tensor, targets: Tensor, ignore_index: int, need: bool) -> Tensor:
    """Losses (n,) float32 of logits (n, v), which become their gradients when these are needed.

    A target outside the vocabulary gives NaN.
    """
    n, v = logits.shape
    with on_device(logits):
        losses = torch.empty(n, dtype=torch.float32, device=logits.device)
        _rows_kernel[(n,)](
            logits, targets, losses, v, logits.stride(0), ignore_index, BLOCK=_BLOCK, GRADIENT=need, num_warps=8
        )
    return losses
