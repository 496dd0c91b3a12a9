"""Cross-entropy of a linear head, some rows at a time: the logits of all rows never exist together.

    total = sum over rows with a target of  logsumexp(h W^T) - (h W^T)[target]

The gradients are made in the same pass, while a block's logits are there: the op keeps them, in the size of h and W,
and backward only multiplies them by the incoming scalar.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_shape, no_autocast
from ._register import differentiable

OP = "linear_cross_entropy"
# Logits that exist together: what keeps an accelerator's matrix products busy, and what a CPU's cache likes better.
_AT_ONCE = {"cuda": 1 << 27}
_AT_ONCE_ELSEWHERE = 1 << 23


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """`linear_cross_entropy` with all logits at once, differentiated by autograd."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T`, without the logits of all rows.

    Products are in the inputs' dtype (or autocast's), everything behind them in float32 (float64 from float64), the
    weight's gradient is added up in float32.

    Args:
        hidden: (n, d). weight: (v, d). targets: (n,) integers from 0 to v - 1, or `ignore_index`.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Returns:
        scalar in float32 (float64 from float64), with gradients to `hidden` and `weight`; no second derivative.

    Raises:
        ValueError: a shape that does not fit.
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected two matrices")
    check_shape("weight", weight, (weight.shape[0], hidden.shape[1]))
    check_shape("targets", targets, (hidden.shape[0],))
    kind = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not hidden.is_meta and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    choice = _backend.resolve(OP, backend, _backend.Call(hidden, weight))
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _loss(hidden, weight, targets, ignore_index, dtype, *wanted, choice.name, choice.forced)[0]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.wanted = inputs[5], inputs[6]


def _gradients(ctx: Any, dtotal: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = [
        (g * dtotal).to(g.dtype) if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*found, None, None, None, None, None, None, None)


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, dtype: torch.dtype, h: bool, w: bool,
          *_: Any) -> Any:  # fmt: skip
    total = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return total, hidden.new_empty(hidden.shape if h else 0), weight.new_empty(weight.shape if w else 0)


@differentiable("linear_cross_entropy", _fake, _setup, _gradients)
def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_gradient: bool,
    weight_gradient: bool,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and, where wanted, its gradients (else empty)."""
    (n, d), v = hidden.shape, weight.shape[0]
    compute = torch.promote_types(dtype, torch.float32)
    # Products over an odd vocabulary take a third of the time when it is padded; logits of zero rows are zero.
    padded = -(-v // 8) * 8 if hidden.is_cuda else v
    h, w = hidden.to(dtype), weight.to(dtype)
    if padded > v:
        w = F.pad(w, (0, 0, 0, padded - v))
    total = hidden.new_zeros((), dtype=compute)
    dhidden = hidden.new_empty((n, d) if hidden_gradient else 0)
    dweight = hidden.new_zeros((padded, d), dtype=compute) if weight_gradient else None
    need = hidden_gradient or weight_gradient
    rows = max(1, min(n, _AT_ONCE.get(hidden.device.type, _AT_ONCE_ELSEWHERE) // v))
    # Rows that start at whole vectors: v itself may be odd.
    buffer = hidden.new_empty(rows, -(-v // 64) * 64, dtype=dtype)
    with no_autocast(hidden):
        for first in range(0, n, rows):
            block = slice(first, min(first + rows, n))
            logits = buffer[: block.stop - first, :padded]
            torch.mm(h[block], w.t(), out=logits)
            # In place: the logits become their gradients.
            losses = _rows(logits[:, :v], targets[block], ignore_index, need, kernel, forced)
            total += losses.sum()
            if hidden_gradient:
                dhidden[block] = logits @ w
            if dweight is not None:
                _add_product(dweight, logits, h[block])
    return total, dhidden, hidden.new_empty(0) if dweight is None else dweight[:v].to(weight.dtype)


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """`total += dlogits.T @ hidden`, added up in the dtype of `total`."""
    if total.dtype == hidden.dtype:
        total.addmm_(dlogits.t(), hidden)
    else:
        total += dlogits.t() @ hidden


def _rows(logits: Tensor, targets: Tensor, ignore_index: int, need: bool, kernel: str, forced: bool) -> Tensor:
    """Losses (n,) of a block of rows, whose logits become their gradients where these are needed."""
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import loss

            return loss.rows(logits, targets, ignore_index, need)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.log_softmax(dim=-1)
    losses = F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none")
    if need:
        real = (targets != ignore_index)[:, None]
        gradient = log_p.exp_().scatter_add_(
            1, torch.where(real, targets[:, None], 0), -torch.ones_like(targets, dtype=log_p.dtype)[:, None]
        )
        logits.copy_(gradient * real)
    return losses
