"""RMS norms: alone, behind a residual addition, and the average of two (section 2.2 and 2.3 of the specification).

    norm(x) = cast(x / sqrt(mean(x^2) + eps)) * weight          over the last dimension, float32 inside

The kernels read every input once and write every output once, and keep nothing for backward but their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_shape
from ._register import differentiable, opaque
from .recompute import note

OP = "rms_norm"


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """`rms_norm` in plain PyTorch operations."""
    # PyTorch computes it in float32 for narrower inputs; its own weight would be applied before the cast.
    return (F.rms_norm(x, (x.shape[-1],), None, eps) * weight).to(x.dtype if dtype is None else dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: float32 inside, cast back, then the weight.

    Args:
        x: (..., w). weight: broadcastable to x; the kernel takes (w,).
        dtype: of the result; by default that of x, also when a file holds the weight in a wider one.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Raises:
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    choice = _backend.resolve(OP, backend, _backend.Call(x, weight))
    if choice.name == "torch":
        return _plain_norm(x, weight, eps, dtype)
    return _norm(x, weight, eps, dtype or x.dtype, choice.name, choice.forced)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch operations."""
    total = x + residual
    return total, rms_norm_ref(total, weight, eps, dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`x + residual`, and its `rms_norm`.

    Args:
        x, residual: (..., w). The sum has the wider of their dtypes.
        weight, eps, dtype, backend: of `rms_norm`.

    Returns:
        the sum, and its norm in `dtype` (by default the sum's).
    """
    check_shape("residual", residual, tuple(x.shape))
    choice = _backend.resolve(OP, backend, _backend.Call(x, weight))
    if choice.name == "torch":
        total = x + residual
        return total, _plain_norm(total, weight, eps, dtype)
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    total, y = _add_norm(x, residual, weight, eps, dtype, choice.name, choice.forced)
    return total, note(y, _norm, total, weight, eps, dtype, choice.name, choice.forced)


def mean_rms_norm_ref(a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """`mean_rms_norm` in plain PyTorch operations."""
    return (rms_norm_ref(a, a_weight, eps) + rms_norm_ref(b, b_weight, eps)) / 2


def mean_rms_norm(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """The mean of the norms of two branches, `(rms_norm(a) + rms_norm(b)) / 2`.

    Args:
        a, b: (..., w) of one shape. a_weight, b_weight: (w,).
        eps, backend: of `rms_norm`.

    Returns:
        (..., w) in the wider dtype of a and b.
    """
    check_shape("b", b, tuple(a.shape))
    choice = _backend.resolve(OP, backend, _backend.Call(a, a_weight))
    if choice.name == "torch":
        mean = (_plain_norm(a, a_weight, eps, None) + _plain_norm(b, b_weight, eps, None)) / 2
        return note(mean, mean_rms_norm_ref, a, b, a_weight, b_weight, eps)
    return _mean_norm(a, b, a_weight, b_weight, eps, choice.name, choice.forced)


def _plain_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """`rms_norm_ref` with autograd's own derivative, to the bit, that may make again what it saves."""
    shape = (x.shape[-1],)
    normed = note(F.rms_norm(x, shape, None, eps), F.rms_norm, x, shape, None, eps)
    return note((normed * weight).to(x.dtype if dtype is None else dtype), rms_norm_ref, x, weight, eps, dtype)


def _kernels(kernel: str, forced: bool, method: str, *args: Any) -> Any:
    """The result of a kernel, or None when it is not to be used."""
    if not _backend.wants_kernel(OP, kernel, forced):
        return None
    try:
        from .triton import norm

        return getattr(norm, method)(*args)
    except Exception as error:
        _backend.kernel_failed(OP, kernel, error, was_forced=forced)
        return None


def norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight in plain PyTorch operations."""
    compute = torch.promote_types(x.dtype, torch.float32)
    dy, wide = dy.to(compute), x.to(compute)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    weighted = dy * weight.to(compute)
    dx = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale
    dw = (dy * normed).flatten(0, -2).sum(0) if x.dim() > 1 else dy * normed
    return dx.to(x.dtype), dw.to(weight.dtype)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


# One norm.


@opaque("rms_norm_backward", lambda dy, x, weight, *_: [_like(x), _like(weight)])
def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kernel: str, forced: bool
) -> list[Tensor]:
    found = _kernels(kernel, forced, "backward", dy, x, weight, None, eps)
    return found or list(norm_gradients(dy, x, weight, eps))


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = _norm_backward(dy, *ctx.saved_tensors, *ctx.rest)
    return dx, dw, None, None, None, None


@differentiable("rms_norm", lambda x, w, eps, dtype, *_: _like(x, dtype), _norm_setup, _norm_gradients, again=True)
def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kernel: str, forced: bool) -> Tensor:
    found = _kernels(kernel, forced, "forward", x, None, weight, eps, dtype)
    return rms_norm_ref(x, weight, eps, dtype) if found is None else found[1]


# Behind an addition.


@opaque("add_rms_norm_backward", lambda dtotal, dy, total, weight, *_: [_like(total), _like(weight)])
def _add_norm_backward(
    dtotal: Tensor | None,
    dy: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    kernel: str,
    forced: bool,
) -> list[Tensor]:
    """Gradients of the sum, with what comes through the norm, and of the weight."""
    if dy is None:
        dy = torch.zeros_like(total, dtype=dtype)
    found = _kernels(kernel, forced, "backward", dy, total, weight, dtotal, eps)
    if found:
        return found
    dx, dw = norm_gradients(dy, total, weight, eps)
    return [dx if dtotal is None else dx + dtotal, dw]


def _add_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, *ctx.rest = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw = _add_norm_backward(dtotal, dy, *ctx.saved_tensors, *ctx.rest)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, None, None, None, None


def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *_: Any) -> Any:
    return _like(x, torch.promote_types(x.dtype, residual.dtype)), _like(x, dtype)


@differentiable("add_rms_norm", _add_norm_fake, _add_norm_setup, _add_norm_gradients)
def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kernel: str, forced: bool
) -> tuple[Tensor, Tensor]:
    found = _kernels(kernel, forced, "forward", x, residual, weight, eps, dtype)
    return found or add_rms_norm_ref(x, residual, weight, eps, dtype)


# The mean of two.


@opaque("mean_rms_norm_backward", lambda dy, a, b, wa, wb, *_: [_like(a), _like(b), _like(wa), _like(wb)])
def _mean_norm_backward(
    dy: Tensor, a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float, kernel: str, forced: bool
) -> list[Tensor]:
    found = _kernels(kernel, forced, "mean_backward", dy, a, b, a_weight, b_weight, eps)
    if found:
        return found
    (da, dwa), (db, dwb) = norm_gradients(dy / 2, a, a_weight, eps), norm_gradients(dy / 2, b, b_weight, eps)
    return [da, db, dwa, dwb]


def _mean_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.kernel, ctx.forced = inputs
    ctx.save_for_backward(*tensors)


def _mean_norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_mean_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.kernel, ctx.forced), None, None, None)


@differentiable(
    "mean_rms_norm",
    lambda a, b, *_: _like(a, torch.promote_types(a.dtype, b.dtype)),
    _mean_norm_setup,
    _mean_norm_gradients,
    again=True,
)
def _mean_norm(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float, kernel: str, forced: bool
) -> Tensor:
    found = _kernels(kernel, forced, "mean", a, b, a_weight, b_weight, eps)
    return mean_rms_norm_ref(a, b, a_weight, b_weight, eps) if found is None else found
