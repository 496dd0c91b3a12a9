"""Linear layers that read oneDNN's own weight layout: decoding in 16 bit on CPUs at the speed of memory.

`F.linear` with one row reads a bfloat16 weight at about a third of the memory bandwidth. In the layout that oneDNN
chooses for itself the same product runs at nearly all of it. That layout is a second copy of the weights, and PyTorch
reaches it through private names only, so it is an option with a fallback:

    with prepacked_linears(model) as packed:
        model.generate(...)

A copy is never read once its weight has changed. Every call compares what is free to compare (the parameter object,
its address, its version counter), and whatever starts anew (a call on an empty cache, or without one) compares sums
over the bits of the weight first, because fused optimizers, adapter merges and `p.data` leave no other trace. A weight
that has changed is packed again. Only a silent change in the middle of one cache stays unseen until the next; the
meta state has that limit too.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes worth packing; in float32 `F.linear` reaches the bandwidth by itself."""


@dataclass
class Prepacked:
    """What a scope has packed.

    Attributes:
        layers: linear layers that read a packed copy. bytes: size of the copies.
        reason: why nothing could be packed on this machine, or `None`.
    """

    layers: int = 0
    bytes: int = 0
    reason: str | None = None


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def refusal(dtype: torch.dtype) -> str | None:
    """Why this machine cannot use packed weights of this dtype, or `None`; tried once on a small product."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    try:
        with torch.no_grad():
            x, weight = torch.eye(8, 32).to(dtype), torch.arange(2048.0).view(64, 32).remainder(7).to(dtype)
            if not torch.equal(_product(x, _reorder(weight), None), weight[:, :8].t()):
                return "the packed product is wrong here"
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"PyTorch {torch.__version__} does not offer it here ({str(error).splitlines()[0]})"
    return None


def bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a matrix's bits by row and by column, as integers: no change to a weight leaves both as they were.

    That is, none that happens in practice: changes would have to cancel in every row and every column at once.

    Args:
        weight: (o, i), contiguous.

    Returns:
        (o,) and (words of a row,) int64; a word is eight bytes where rows are a multiple of that, else one number.
    """
    wide = weight.shape[1] * weight.element_size() % 8 == 0 and weight.storage_offset() * weight.element_size() % 8 == 0
    words = weight.detach().view(torch.int64 if wide else torch.int16)
    return words.sum(dim=1), words.sum(dim=0)


class _Clock:
    """Counts what starts anew; a copy that was compared at an earlier count is compared again before it is read.

    Args:
        cached: it is hooked to modules that take `past_key_values`; otherwise every call starts anew.
    """

    def __init__(self, *, cached: bool) -> None:
        self.cached, self.now = cached, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values") if self.cached else None
        if past is None or past.get_seq_length() == 0:
            self.now += 1


class _PackedForward:
    """The forward of one linear layer while a scope is open."""

    def __init__(self, layer: nn.Linear, clock: _Clock) -> None:
        self.layer, self.clock = layer, clock
        self.open = True
        self.pack(layer.weight)

    def pack(self, weight: Tensor) -> None:
        self.weight, self.mark = weight, _mark(weight)
        self.packed = _reorder(weight.detach())
        self.sums = bit_sums(weight)
        self.compared = self.clock.now

    def refresh(self, weight: Tensor) -> bool:
        """Make the copy one of this weight as it is now; whether there can be one."""
        if weight is not self.weight or _mark(weight) != self.mark:
            if not _packable(weight):
                return False
            self.pack(weight)
        elif self.compared != self.clock.now:
            if all(map(torch.equal, bit_sums(weight), self.sums)):
                self.compared = self.clock.now
            else:
                self.pack(weight)
        return True

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if self.open and x.dtype == weight.dtype and _plain(x, weight, bias) and self.refresh(weight):
            return _product(x.contiguous(), self.packed, bias)
        return F.linear(x, weight, bias)

    def close(self) -> None:
        """Forget the copy; whoever still holds this forward gets the plain one."""
        self.open = False
        self.weight = self.packed = self.sums = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        # A copied or pickled layer has a weight of its own: it gets the plain forward.
        return functools.partial, (nn.Linear.forward, self.layer)


def _mark(weight: Tensor) -> tuple[int, int, torch.dtype, torch.Size]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape


def _packable(weight: Any) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.is_contiguous()
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the product is wanted: no gradients, no casts, nobody looking on."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return (
        not needs_grad
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@contextmanager
def prepacked_linears(model: nn.Module) -> Iterator[Prepacked]:
    """Let the model's 16-bit linear layers on the CPU read packed copies of their weights inside the scope.

    Parameters, modules, hooks, `state_dict()` and results with gradients stay what they are; outputs without gradients
    differ by rounding. The copies take as much memory as the weights and go when the scope ends. Layers with a forward
    of their own (offloaded, quantised) are left alone.

    Args:
        model: any module; those inside that take `past_key_values` say when a computation starts anew.

    Yields:
        what was packed. Where the machine or this PyTorch cannot do it: nothing, with one warning.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear)
        and type(m).forward is nn.Linear.forward
        and "forward" not in m.__dict__
        and _packable(m._parameters.get("weight"))
    ]
    report = Prepacked()
    for dtype in {layer.weight.dtype for layer in layers}:
        reason = refusal(dtype)
        if reason is not None:
            report.reason = reason
            warnings.warn(f"linear layers stay unpacked in {dtype}: {reason}", stacklevel=3)
    layers = [layer for layer in layers if refusal(layer.weight.dtype) is None]

    takers = [m for m in model.modules() if "past_key_values" in inspect.signature(type(m).forward).parameters]
    clock = _Clock(cached=bool(takers))
    hooks = [m.register_forward_pre_hook(clock, with_kwargs=True) for m in takers or [model]] if layers else []
    forwards: list[_PackedForward] = []
    try:
        for layer in layers:
            forwards.append(_PackedForward(layer, clock))
            layer.forward = forwards[-1]  # type: ignore[method-assign, assignment]
            report.layers += 1
            report.bytes += layer.weight.nbytes
        yield report
    finally:
        for forward in forwards:
            if forward.layer.__dict__.get("forward") is forward:
                del forward.layer.forward
            forward.close()
        for hook in hooks:
            hook.remove()
