"""An op in three forms: a custom op for what traces or intercepts, an autograd function, and the plain call.

A custom op costs the host about as much as several launches, so eager mode goes past it. Compilers, fake tensors and
selective checkpointing look at dispatched ops and get the custom op; so do tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recompute import note

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _look(args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether something must see an op where eager code runs a kernel, and whether a gradient is wanted."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True, False
    wanted = False
    for a in args:
        if isinstance(a, Tensor):
            if type(a) not in _PLAIN:
                return True, False
            wanted = wanted or a.requires_grad
    return False, wanted and torch.is_grad_enabled()


def opaque(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function without a derivative: the backward of an op. `fake` gives shapes and dtypes."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"hymba::{name}", function, mutates_args=())
        op.register_fake(fake)

        def call(*args: Any) -> Any:
            return op(*args) if _look(args)[0] else function(*args)

        return call

    return wrap


def differentiable(
    name: str,
    fake: Callable[..., Any],
    setup: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    again: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of tensors and constants that returns new tensors.

    Args:
        name: of the custom op, behind `hymba::`.
        fake: outputs' shapes and dtypes. setup, backward: as `torch.library.register_autograd` takes them; there is no
            second derivative, and asking for one raises.
        again: backward may make the output again rather than keep it (`hymba.ops.recompute`).
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"hymba::{name}", function, mutates_args=())
        op.register_fake(fake)
        op.register_autograd(backward, setup_context=setup)

        def forward(ctx: Any, *args: Any) -> Any:
            # With a separate setup_context, autograd would bind the arguments by name at every call.
            output = function(*args)
            setup(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        direct: Any = type(name, (torch.autograd.Function,), methods)

        def call(*args: Any) -> Any:
            seen, wanted = _look(args)
            if seen:
                return op(*args)
            if wanted:
                output = direct.apply(*args)
                return note(output, function, *args) if again else output
            return function(*args)

        return call

    return wrap
