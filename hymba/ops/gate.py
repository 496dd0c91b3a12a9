"""The products inside an MLP: `silu(gate) * up`, and `relu(up)^2`. Their kernels keep nothing but their inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_shape
from ._register import differentiable, opaque
from .recompute import note

OP = "gate"


def gate_ref(gate: Tensor | None, up: Tensor) -> Tensor:
    """`silu(gate) * up`, or `relu(up)^2` without a gate, in plain PyTorch operations."""
    return F.relu(up).square() if gate is None else F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate, up: of one shape and dtype.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Raises:
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    check_shape("up", up, tuple(gate.shape))
    choice = _backend.resolve(OP, backend, _backend.Call(up, up))
    if choice.name == "torch" or gate.dtype != up.dtype:
        return note(note(F.silu(gate), F.silu, gate) * up, gate_ref, gate, up)
    return _gate(gate, up, choice.name, choice.forced)


def relu2(up: Tensor, *, backend: str = "auto") -> Tensor:
    """`relu(up)^2`; `backend` as for `swiglu`."""
    choice = _backend.resolve(OP, backend, _backend.Call(up, up))
    if choice.name == "torch":
        return note(note(F.relu(up), F.relu, up).square(), gate_ref, None, up)
    return _gate(None, up, choice.name, choice.forced)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@opaque("gate_backward", lambda dy, gate, up, *_: [up.new_empty(0) if gate is None else _like(gate), _like(up)])
def _gate_backward(dy: Tensor, gate: Tensor | None, up: Tensor, kernel: str, forced: bool) -> list[Tensor]:
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import gate as kernels

            return kernels.backward(dy, gate, up)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    if gate is None:
        return [up.new_empty(0), dy * (2 * F.relu(up))]
    return [torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, *ctx.rest = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = _gate_backward(dy, gate, up, *ctx.rest)
    return (None if gate is None else dgate), dup, None, None


@differentiable("gate", lambda gate, up, *_: _like(up), _setup, _gradients, again=True)
def _gate(gate: Tensor | None, up: Tensor, kernel: str, forced: bool) -> Tensor:
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import gate as kernels

            return kernels.forward(gate, up)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return gate_ref(gate, up)
