"""Mamba-2 heads on their own: the formulas, any split, any padding, any packing, and how a hybrid norms them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import SEEDS
from helpers import cut, largest, randomise, relative
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64, FLOAT64_GRADIENT
from torch import Tensor

from hymba.nn import GroupedRMSNorm, LayerState, Mamba2Heads, RMSNorm, Span
from hymba.nn.init import DECAYS, STEP_SIZES, rule_for

SMALL: dict[str, Any] = {"d_inner": 12, "head_dim": 3, "d_state": 5, "n_groups": 2}


def made(seed: int = 0, **fields: Any) -> Mamba2Heads:
    heads = Mamba2Heads(**(SMALL | fields)).double()
    randomise(heads, seed)
    return heads


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(heads: Mamba2Heads, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return some(rows, length, heads.in_width, seed=seed), some(rows, length, heads.gate_width, seed=seed + 1)


@st.composite
def branches(draw: st.DrawFn) -> Mamba2Heads:
    groups = draw(st.integers(1, 3))
    head_dim = draw(st.integers(1, 4))
    return made(
        draw(SEEDS),
        d_inner=groups * draw(st.integers(1, 3)) * head_dim,
        head_dim=head_dim,
        d_state=draw(st.integers(1, 5)),
        n_groups=groups,
        d_conv=draw(st.integers(2, 5)),
        norm=draw(st.booleans()),
    )


def running(heads: Mamba2Heads, rows: int) -> LayerState:
    """A cache's state: tensors that steps overwrite."""
    conv = torch.zeros(rows, heads.d_conv - 1, heads.conv_width, dtype=torch.float64)
    ssm = torch.zeros(rows, heads.num_heads, heads.head_dim, heads.d_state, dtype=torch.float64)
    return LayerState(conv=conv, ssm=ssm, in_place=True)


# One branch, any split, any padding, any packing.


@given(heads=branches(), length=st.integers(1, 30), seed=SEEDS, most=st.integers(1, 12), in_place=st.booleans())
def test_decode_equals_forward(heads: Mamba2Heads, length: int, seed: int, most: int, in_place: bool) -> None:
    x, z = inputs(heads, 2, length, seed % 1000)
    with torch.no_grad():
        end = LayerState()
        whole = heads(x, z, end)
        state = running(heads, 2) if in_place else LayerState()
        held = state.ssm, state.conv
        sizes = cut(length, random.Random(seed), most=most)
        parts = [heads(a, b, state) for a, b in zip(x.split(sizes, 1), z.split(sizes, 1), strict=True)]
    assert largest(torch.cat(parts, 1), whole) <= FLOAT64
    assert largest(state.ssm, end.ssm) <= FLOAT64 and largest(state.conv, end.conv) <= FLOAT64
    if in_place:
        assert state.ssm is held[0] and state.conv is held[1]


@given(heads=branches(), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), seed=SEEDS)
def test_padded_equals_alone(heads: Mamba2Heads, lengths: list[int], seed: int) -> None:
    """Rows end anywhere, also before their first token; what stands behind is not looked at, and decoding goes on."""
    rows, longest = len(lengths), max(1, *lengths)
    x, z = inputs(heads, rows, longest + 2, seed % 1000)
    real = torch.tensor(lengths)
    poisoned = x[:, :longest].masked_fill(torch.arange(longest)[:, None] >= real[:, None, None], float("nan"))
    state = running(heads, rows)
    with torch.no_grad():
        got = heads(poisoned, z[:, :longest], state, span=Span.following(longest, lengths=real))
        for t in (longest, longest + 1):
            valid = torch.arange(rows) % 2 == t % 2
            span = Span.following(1, columns=t, lengths=valid.long())
            step = heads(
                x[:, t : t + 1].masked_fill(~valid[:, None, None], float("nan")), z[:, t : t + 1], state, span=span
            )
            assert not step[~valid].any()
            got = torch.cat([got, step], 1)
        for row in range(rows):
            own = [*range(lengths[row]), longest + (row + longest) % 2]
            alone = LayerState()
            want = heads(x[row : row + 1, own], z[row : row + 1, own], alone)
            assert largest(got[row, own], want[0]) <= FLOAT64
            assert largest(state.ssm[row], alone.ssm[0]) <= FLOAT64
            assert largest(state.conv[row], alone.conv[0]) <= FLOAT64
            assert not got[row, lengths[row] : longest].any()


@given(heads=branches(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=SEEDS)
def test_packed_equals_apart(heads: Mamba2Heads, sizes: list[int], seed: int) -> None:
    """Each document starts from the state that the row starts from, and gets its own gradients."""
    x, z = (v.requires_grad_() for v in inputs(heads, 1, sum(sizes), seed % 1000))
    start = running(heads, 1)
    conv, ssm = some(*start.conv.shape), some(*start.ssm.shape)
    span = Span.following(sum(sizes))
    span.seq_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    packed = heads(x, z, LayerState(conv=conv, ssm=ssm), span=span)
    apart = [
        heads(a, b, LayerState(conv=conv, ssm=ssm)) for a, b in zip(x.split(sizes, 1), z.split(sizes, 1), strict=True)
    ]
    assert largest(packed, torch.cat(apart, 1)) <= FLOAT64
    leaves = [x, z, *heads.parameters()]
    weight = some(*packed.shape, seed=3)
    got = torch.autograd.grad((packed * weight).sum(), leaves)
    want = torch.autograd.grad((torch.cat(apart, 1) * weight).sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert relative(mine, theirs) <= FLOAT64_GRADIENT


# The formulas.


def test_step_by_step() -> None:
    """The recurrence written out, one token at a time."""
    heads = made()
    x, z = inputs(heads, 1, 9)
    h = torch.zeros(4, 3, 5, dtype=torch.float64)
    mixed, dt = x[0].split([heads.conv_width, 4], dim=-1)
    padded, rows = F.pad(mixed, (0, 0, 3, 0)), []
    for t in range(9):
        u = F.silu((padded[t : t + 4].T * heads.conv1d.weight[:, 0]).sum(-1) + heads.conv1d.bias)
        u, B, C = u.split([12, 10, 10])
        u, B, C = u.view(4, 3), B.view(2, 5).repeat_interleave(2, 0), C.view(2, 5).repeat_interleave(2, 0)
        step = F.softplus(dt[t] + heads.dt_bias)
        h = torch.exp(-step * heads.A_log.exp())[:, None, None] * h + (step[:, None] * u)[..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + heads.D[:, None] * u
        gated = (y.flatten() * F.silu(z[0, t])).view(2, 6)
        unit = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-6)
        rows.append(unit.flatten() * heads.norm.weight)
    assert largest(heads(x, z)[0], torch.stack(rows)) <= FLOAT64


def test_a_hybrids_branch_norm_is_the_norm_of_mamba_2() -> None:
    """One group: the branch without its norm, normed by the mixer, is the branch with it."""
    whole = made(n_groups=1)
    bare = Mamba2Heads(**(SMALL | {"n_groups": 1, "norm": False})).double()
    weights = whole.state_dict()
    branch_norm = RMSNorm(12).double()
    branch_norm.weight.data.copy_(weights.pop("norm.weight"))
    bare.load_state_dict(weights)
    x, z = inputs(whole, 2, 7)
    assert largest(branch_norm(bare(x, z)), whole(x, z)) <= FLOAT64


def test_gradients_through_a_state() -> None:
    """Back-propagation through time over chunks is that of the whole."""
    heads = made()
    x, z = inputs(heads, 2, 14)
    leaves = [x.requires_grad_(), z.requires_grad_(), *heads.parameters()]
    want = torch.autograd.grad(heads(x, z).pow(2).sum(), leaves)
    state, loss = LayerState(), torch.zeros((), dtype=torch.float64)
    for a, b in zip(x.split([5, 1, 8], 1), z.split([5, 1, 8], 1), strict=True):
        loss = loss + heads(a, b, state).pow(2).sum()
    for got, expected in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        assert relative(got, expected) <= FLOAT64_GRADIENT


def test_gradcheck() -> None:
    heads = made(d_inner=2, head_dim=1, d_state=2, n_groups=1, d_conv=2)
    x, z = (v.requires_grad_() for v in inputs(heads, 1, 3))
    names, values = zip(*heads.named_parameters())

    def run(x: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(heads, dict(zip(names, parameters)), (x, z))

    assert torch.autograd.gradcheck(run, (x, z, *values))


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_norm(groups: int) -> None:
    norm = GroupedRMSNorm(12, groups=groups, eps=1e-3).double()
    randomise(norm)
    x = some(2, 5, 12)
    parts = x.view(2, 5, groups, -1)
    want = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(2) * norm.weight
    assert largest(norm(x), want) <= FLOAT64


# Shapes, dtypes, initialisation, bad input.


def test_widths() -> None:
    heads = Mamba2Heads(d_inner=256)
    assert heads.splits == (256, 128, 128, 4) and heads.in_width == 516
    assert heads.conv_width == 512 and heads.gate_width == 256
    assert "head_dim=64" in repr(heads) and "groups=1" in repr(heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_are_float32(dtype: torch.dtype) -> None:
    heads = Mamba2Heads(**SMALL).to(dtype)
    x, z = (v.to(dtype) for v in inputs(heads, 2, 6))
    state = LayerState()
    out = heads(x, z, state)
    assert out.dtype == dtype and state.conv.dtype == dtype and state.ssm.dtype == torch.float32
    assert state.conv.shape == (2, 3, heads.conv_width) and state.ssm.shape == (2, 4, 3, 5)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_initialisation() -> None:
    heads = Mamba2Heads(d_inner=4096, head_dim=4, d_state=4)
    for name, _ in heads.named_parameters():
        assert rule_for(f"layers.0.mixer.mamba.{name}")
    decay, step = heads.A_log.exp(), F.softplus(heads.dt_bias)
    for value, (low, high) in ((decay, DECAYS), (step, STEP_SIZES)):
        assert low * 0.999 <= value.min() < low + 0.1 * (high - low) and 0.9 * high < value.max() <= high * 1.001
    assert torch.equal(heads.D, torch.ones(1024)) and torch.equal(heads.norm.weight, torch.ones(4096))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 5}, "head_dim=5: allowed: divisors of d_inner=12"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"n_groups": 3}, "n_groups=3: allowed: divisors of the 4 heads"),
        ({"n_groups": 0}, "n_groups=0"),
    ],
)
def test_bad_shapes(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2Heads(**(SMALL | fields))
    with pytest.raises(ValueError, match="groups=5: allowed: divisors of 12"):
        GroupedRMSNorm(12, groups=5)
