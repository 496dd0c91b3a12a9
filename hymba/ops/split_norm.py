"""The norms of the SSM's step sizes, B and C: three slices of one product, normed in one pass each way.

The first slice comes out padded with zeros, and the product may be wider than the slices: matrix products want widths
that are multiples of eight, which the released 100 | 16 | 16 are not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._register import differentiable, opaque
from .norm import OP, norm_gradients, rms_norm_ref

MULTIPLE = 8


def split_rms_norm_ref(
    x: Tensor, a_weight: Tensor, b_weight: Tensor, c_weight: Tensor, eps: float, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_rms_norm` in plain PyTorch operations."""
    sizes = [len(a_weight), len(b_weight), len(c_weight)]
    a, b, c = x[..., : sum(sizes)].split(sizes, dim=-1)
    a = rms_norm_ref(a, a_weight, eps)
    if width is not None and width > sizes[0]:
        a = F.pad(a, (0, width - sizes[0]))
    return a, rms_norm_ref(b, b_weight, eps), rms_norm_ref(c, c_weight, eps)


def split_rms_norm(
    x: Tensor,
    a_weight: Tensor,
    b_weight: Tensor,
    c_weight: Tensor,
    eps: float,
    *,
    width: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm` of three neighbouring slices of the last dimension, each with a weight of its width.

    Args:
        x: (..., w), w at least the three widths together; what stands behind them is ignored.
        a_weight, b_weight, c_weight: one-dimensional.
        width: of the first output, zeros behind its slice; by default the slice's.
        eps, backend: of `rms_norm`.

    Returns:
        the three norms in `x.dtype`.
    """
    sizes = len(a_weight), len(b_weight), len(c_weight)
    if x.shape[-1] < sum(sizes):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a last dimension of at least {sum(sizes)}")
    choice = _backend.resolve(OP, backend, _backend.Call(x, a_weight))
    if choice.name == "torch":
        return split_rms_norm_ref(x, a_weight, b_weight, c_weight, eps, width)
    return _split(x, a_weight, b_weight, c_weight, eps, max(width or 0, sizes[0]), choice.name, choice.forced)


def takes_kernel(x: Tensor) -> bool:
    """Whether `split_rms_norm` of x is one launch."""
    return _backend.resolve(OP, "auto", _backend.Call(x, x)).name == "triton"


def _like(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _backward_fake(da: Any, db: Any, dc: Any, x: Tensor, *weights: Any) -> list[Tensor]:
    return [_like(x, x.shape[-1]), *(torch.empty_like(w) for w in weights[:3])]


@opaque("split_rms_norm_backward", _backward_fake)
def _split_backward(
    da: Tensor, db: Tensor, dc: Tensor, x: Tensor, a_weight: Tensor, b_weight: Tensor, c_weight: Tensor, eps: float,
    width: int, kernel: str, forced: bool,
) -> list[Tensor]:  # fmt: skip
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import split_norm

            return split_norm.backward(da, db, dc, x, a_weight, b_weight, c_weight, eps)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    weights = (a_weight, b_weight, c_weight)
    sizes = [len(w) for w in weights]
    parts = x[..., : sum(sizes)].split(sizes, dim=-1)
    pairs = [norm_gradients(d[..., : len(w)], p, w, eps) for d, p, w in zip((da, db, dc), parts, weights, strict=True)]
    dx = F.pad(torch.cat([d for d, _ in pairs], dim=-1), (0, x.shape[-1] - sum(sizes)))
    return [dx, *(d for _, d in pairs)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return (*_split_backward(*gradients, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


@differentiable(
    "split_rms_norm",
    lambda x, a, b, c, eps, width, *_: (_like(x, width), _like(x, b.shape[0]), _like(x, c.shape[0])),
    _setup,
    _gradients,
)
def _split(
    x: Tensor, a_weight: Tensor, b_weight: Tensor, c_weight: Tensor, eps: float, width: int, kernel: str, forced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import split_norm

            return split_norm.forward(x, a_weight, b_weight, c_weight, eps, width)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return split_rms_norm_ref(x, a_weight, b_weight, c_weight, eps, width)
