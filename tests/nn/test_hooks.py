"""Which modules an op may take the place of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hymba.nn import HybridHeads, RMSNorm
from hymba.nn.hooks import is_plain, product_dtype


class _Quantised(Tensor):
    """A weight with a class of its own."""


def test_what_makes_a_module_special() -> None:
    def linear() -> nn.Linear:
        return nn.Linear(3, 3)

    assert is_plain(linear(), nn.Linear) and is_plain(RMSNorm(3), RMSNorm)
    assert not is_plain(RMSNorm(3), nn.Linear)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = linear()
        handle = getattr(module, f"register_{register}")(lambda *_: None)
        assert not is_plain(module, nn.Linear), register
        handle.remove()
        assert is_plain(module, nn.Linear), register
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(linear(), nn.Linear)
    handle.remove()
    offloaded = linear()
    offloaded.forward = lambda x: x
    assert not is_plain(offloaded, nn.Linear)
    assert not is_plain(parametrizations.weight_norm(linear()), nn.Linear)
    quantised = linear()
    quantised.weight = nn.Parameter(torch.randn(3, 3).as_subclass(_Quantised))
    assert not is_plain(quantised, nn.Linear)


def test_hooks_on_the_norms_of_the_branches_are_called() -> None:
    mixer = HybridHeads(hidden_size=16, num_heads=2, window=4)
    x = torch.randn(1, 5, 16)
    want = mixer(x)[0]
    seen: list[Any] = []
    mixer.attention_norm.register_forward_hook(lambda _, __, out: seen.append(out))
    assert torch.equal(mixer(x)[0], want)
    assert seen[0].shape == (1, 5, 32)
    mixer.mamba_norm = nn.Identity()
    assert not torch.equal(mixer(x)[0], want)


def test_the_dtype_of_products() -> None:
    x = torch.randn(3)
    assert product_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) is None
