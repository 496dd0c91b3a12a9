"""Whether a module may be replaced by an op that computes the same from its parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as _module

_ORDINARY = (nn.Parameter, torch.Tensor)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing but `kind.forward` happens when the module is called.

    False for subclasses and replacements (adapters, quantised layers), a `forward` of its own (offloading),
    parametrised weights, weights of a tensor class of their own (quantised or distributed ones), and any hook on it
    or on all modules: those must see the module called.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if any(type(p) not in _ORDINARY for p in module._parameters.values() if p is not None):
        return False
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if own:
        return False
    if torch.compiler.is_compiling():
        # What all modules are hooked with, a compiler does not see either.
        return True
    return not (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def product_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast brings `x` to before a product, or `None` when it leaves it alone."""
    kind = x.device.type
    # Meta tensors, which stand for what is on no device yet, have no autocast to ask about.
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
