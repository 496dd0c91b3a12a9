"""Mamba-2 heads against the Mamba-2 mixer of transformers with equal weights: values, gradients, cached decoding."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from helpers import largest, randomise, relative
from tolerances import GRADIENT, LOGITS
from torch import Tensor
from transformers import Mamba2Config
from transformers.cache_utils import DynamicCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from hymba.nn import LayerState, Mamba2Heads

HIDDEN, LENGTH = 24, 37
grouped_norm = pytest.mark.skipif(
    "group_size" not in signature(MambaRMSNormGated).parameters,
    reason="its gated norm runs over all channels here; mamba-ssm's, and later transformers', over each group's",
)
GROUPS = [1, pytest.param(3, marks=grouped_norm)]


def pair(groups: int) -> tuple[Mamba2Heads, Any]:
    """Our branch and their mixer, whose projection makes `gate | x | B | C | dt`, with one set of weights."""
    config = Mamba2Config(
        hidden_size=HIDDEN,
        expand=2,
        head_dim=8,
        num_heads=6,
        n_groups=groups,
        state_size=16,
        chunk_size=16,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-6,
        use_bias=False,
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    randomise(theirs)
    ours = Mamba2Heads(d_inner=2 * HIDDEN, head_dim=8, d_state=16, n_groups=groups)
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("in_proj", "out_proj"))}
    ours.load_state_dict(weights)
    return ours, theirs


def through(ours: Mamba2Heads, theirs: Any, x: Tensor, state: LayerState | None = None) -> Tensor:
    """Our branch between their projections."""
    gate, rest = theirs.in_proj(x).split([ours.gate_width, ours.in_width], dim=-1)
    return theirs.out_proj(ours(rest, gate, state))


@pytest.mark.parametrize("groups", GROUPS)
def test_values_and_gradients(groups: int) -> None:
    ours, theirs = pair(groups)
    x = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    weight = torch.randn(2, LENGTH, HIDDEN)
    got, want = through(ours, theirs, x), theirs(x)
    assert largest(got, want) <= LOGITS
    shared = [x, theirs.in_proj.weight, theirs.out_proj.weight]
    names = [name for name, _ in ours.named_parameters()]
    mine = torch.autograd.grad((got * weight).sum(), [*shared, *(ours.get_parameter(n) for n in names)])
    expected = torch.autograd.grad((want * weight).sum(), [*shared, *(theirs.get_parameter(n) for n in names)])
    for name, a, b in zip(["x", "in_proj", "out_proj", *names], mine, expected, strict=True):
        assert relative(a, b) <= GRADIENT, name


@pytest.mark.parametrize("groups", GROUPS)
@torch.no_grad()
def test_cached_decoding(groups: int) -> None:
    """A prompt, then token by token, each side on its own cache."""
    ours, theirs = pair(groups)
    x = torch.randn(2, LENGTH, HIDDEN)
    prompt = LENGTH - 9
    cache, state = DynamicCache(config=Mamba2Config(num_hidden_layers=1)), LayerState()
    for part in (x[:, :prompt], *x[:, prompt:].split(1, dim=1)):
        assert largest(through(ours, theirs, part, state), theirs(part, cache_params=cache)) <= LOGITS
        state.in_place = True
    assert state.ssm is not None and state.conv is not None
    layer = cache.layers[0]
    assert largest(state.ssm, layer.recurrent_states[0]) <= LOGITS
    # Theirs holds one input more than is needed, channels first.
    assert largest(state.conv, layer.conv_states[0][..., 1:].transpose(1, 2)) <= LOGITS
