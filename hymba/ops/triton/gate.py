"""The products inside an MLP, over flat memory; float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, on_device, or_dummy, sigmoid

_BLOCK = 32 if INTERPRETED else 1024


@triton.jit
def _forward_kernel(gate, up, y, count, BLOCK: tl.constexpr, GATED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < count
    u = tl.load(up + at, mask=m, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + at, mask=m, other=0.0).to(tl.float32)
        out = g * sigmoid(g) * u
    else:
        u = tl.maximum(u, 0.0)
        out = u * u
    tl.store(y + at, out.to(y.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr, GATED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < count
    d = tl.load(dy + at, mask=m, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=m, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + at, mask=m, other=0.0).to(tl.float32)
        s = sigmoid(g)
        dg = d * u * s * (1.0 + g * (1.0 - s))
        tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=m)
        du = d * g * s
    else:
        du = 2.0 * d * tl.maximum(u, 0.0)
    tl.store(dup + at, du.to(dup.dtype.element_ty), mask=m)


def forward(gate: Tensor | None, up: Tensor) -> Tensor:
    """`silu(gate) * up`, or `relu(up)^2` without a gate."""
    with on_device(up):
        up = up.contiguous()
        gate_ = or_dummy(gate, up).contiguous()
        y, count = torch.empty_like(up), up.numel()
        _forward_kernel[(triton.cdiv(count, _BLOCK),)](gate_, up, y, count, BLOCK=_BLOCK, GATED=gate is not None)
    return y


def backward(dy: Tensor, gate: Tensor | None, up: Tensor) -> list[Tensor]:
    """Gradients of the gate (empty without one) and of `up`."""
    with on_device(up):
        up, dy = up.contiguous(), dy.contiguous()
        gate_ = or_dummy(gate, up).contiguous()
        dup, count = torch.empty_like(up), up.numel()
        dgate = up.new_empty(0) if gate is None else torch.empty_like(gate_)
        _backward_kernel[(triton.cdiv(count, _BLOCK),)](
            dy, gate_, up, or_dummy(None, dup) if gate is None else dgate, dup, count, BLOCK=_BLOCK,
            GATED=gate is not None,
        )  # fmt: skip
    return [dgate, dup]
