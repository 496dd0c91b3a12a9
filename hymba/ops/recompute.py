"""Activations that backward makes again instead of keeping them: outputs of ops that cost one pass over memory.

Inside `recomputed()`, an op notes how its output was made. When autograd then saves that output for somebody's
backward (a product's, the scan's), a recipe is saved in its place. Nothing is run twice but what is asked for, each
once, and everything that looks at modules (adapters, hooks, quantisation) works as it does without.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_LOCAL = threading.local()
_NARROW = 256
"""Outputs narrower than this are kept: making them again costs a launch and saves next to nothing."""


class _Recipe:
    """How to make a tensor again. Holds the result from the first to the last of its uses in backward."""

    def __init__(self, output: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        self.versions = [a._version for a in self.args if isinstance(a, Tensor)]
        self.kind = output.device.type
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)
        self.uses = 0
        self.left = 0
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        if self.result is None:
            if self.versions != [a._version for a in self.args if isinstance(a, Tensor)]:
                raise RuntimeError("a tensor from which backward makes an activation again was changed in place")
            enabled, dtype = self.autocast
            with torch.no_grad(), torch.autocast(self.kind, dtype=dtype, enabled=enabled):
                self.result = self.function(*self.args)
            self.left = self.uses
        made = self.result
        self.left -= 1
        if self.left <= 0:
            self.result = None
        return made


class _View:
    """A tensor that lies in the memory of a recipe's output."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self.recipe = recipe
        self.where = tensor.shape, tensor.stride(), tensor.storage_offset()
        recipe.uses += 1

    def make(self) -> Tensor:
        return self.recipe.make().as_strided(*self.where)


class _Scope:
    """What has been noted; holds the outputs, so that no other tensor can take their place in memory."""

    def __init__(self) -> None:
        self.noted: dict[int, tuple[Tensor, _Recipe]] = {}

    def note(self, output: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        self.noted[output.untyped_storage().data_ptr()] = (output, _Recipe(output, function, args))

    def pack(self, tensor: Tensor) -> Tensor | _View:
        if type(tensor) is not Tensor:
            return tensor
        found = self.noted.get(tensor.untyped_storage().data_ptr())
        if found is None or found[0].dtype != tensor.dtype:
            return tensor
        return _View(found[1], tensor)


def _unpack(packed: Tensor | _View) -> Tensor:
    return packed.make() if isinstance(packed, _View) else packed


def _scope() -> _Scope | None:
    return None if torch.compiler.is_compiling() else getattr(_LOCAL, "scope", None)


def note(output: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Tell the scope, if there is one, that `function(*args)` gives `output` again, dense and bit for bit.

    Args:
        output: contiguous and new, not a view of an argument.
        function: deterministic, run without gradients and under the autocast of now. Its tensors must be kept for
            backward anyway, or be smaller than what is saved.
    """
    scope = _scope()
    plain = type(output) is Tensor and not output.is_meta and output.requires_grad and output.is_contiguous()
    if scope is not None and plain and output.shape[-1] >= _NARROW and output.numel():
        scope.note(output, function, args)
    return output


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Save recipes in place of what ops note in here; holds the outputs until it is left."""
    before = getattr(_LOCAL, "scope", None)
    scope = _LOCAL.scope = _Scope()
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _LOCAL.scope = before
        scope.noted.clear()
