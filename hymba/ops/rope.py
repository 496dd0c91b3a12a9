"""Rotary position embedding, half-split form, on the full head width (section 2.6 of the specification)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from ._register import differentiable, opaque

OP = "rope"


def apply_rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` in plain PyTorch operations."""
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, :, None].to(compute), sin[:, :, None].to(compute)
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of every head.

    Args:
        x: (b, l, heads, head_dim). cos, sin: (b or 1, l, head_dim / 2), without gradients.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Returns:
        the rotated heads in `x.dtype`; float32 inside.

    Raises:
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    choice = _backend.resolve(OP, backend, _backend.Call(x, cos))
    if choice.name == "torch":
        return apply_rope_ref(x, cos, sin)
    return _rope(x, cos, sin, False, choice.name, choice.forced)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool, kernel: str, forced: bool) -> Tensor:
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import rope

            return rope.rotate(x, cos, sin, back)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return apply_rope_ref(x, cos, -sin if back else sin).contiguous()


@opaque("rope_backward", lambda x, *_: _like(x))
def _rope_backward(x: Tensor, cos: Tensor, sin: Tensor, back: bool, kernel: str, forced: bool) -> Tensor:
    return _rotate(x, cos, sin, back, kernel, forced)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, cos, sin, ctx.back, *ctx.rest = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # The way back is the rotation by the opposite angle.
    return _rope_backward(dy, *ctx.saved_tensors, not ctx.back, *ctx.rest), None, None, None, None, None


@differentiable("rope", lambda x, *_: _like(x), _setup, _gradients)
def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool, kernel: str, forced: bool) -> Tensor:
    return _rotate(x, cos, sin, back, kernel, forced)
