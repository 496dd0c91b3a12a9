"""Measures of attention maps, and the scan as an operator, on cases with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis.known_maps import uniform
from tolerances import OPERATOR

from hymba.analysis.measures import (
    effective_receptive_field,
    entropy,
    mean_distance,
    shares,
    visible_entropy,
)
from hymba.analysis.operator import HeadScanOperator, ScanOperator
from hymba.ops.selective_scan import selective_scan_ref
from hymba.ops.ssd import ssd_scan_ref


@pytest.mark.parametrize("window", [None, 3])
def test_uniform_attention_has_the_entropy_of_its_size(window: int | None) -> None:
    maps = uniform(7, 2, window)
    sizes = [2 + 1 + (i if window is None else min(i, window)) for i in range(7)]
    expected = torch.tensor([math.log(size) for size in sizes], dtype=torch.double)
    assert torch.allclose(entropy(maps), expected)
    assert torch.allclose(visible_entropy(7, 2, window, maps), expected)


def test_one_token_seen_has_no_entropy() -> None:
    assert entropy(torch.eye(4)).tolist() == [0, 0, 0, 0]


def test_shares_of_known_maps() -> None:
    own = torch.cat([torch.zeros(4, 2), torch.eye(4)], 1)
    assert {name: float(part) for name, part in shares(own, 2).items()} == {
        "meta": 0.0, "bos": 0.25, "self": 0.75, "cross": 0.0
    }  # fmt: skip
    to_meta = torch.zeros(4, 6)
    to_meta[:, 1] = 1
    assert float(shares(to_meta, 2)["meta"]) == 1
    mixed = torch.tensor([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.7, 0], [0.1, 0.2, 0.3, 0.4]])
    found = {name: float(part) for name, part in shares(mixed, 1).items()}
    assert found == pytest.approx({"meta": 0.7 / 3, "bos": 0.9 / 3, "self": 1.1 / 3, "cross": 0.3 / 3})
    assert sum(float(part) for part in shares(uniform(9, 3).expand(2, 9, 12), 3).values() for part in part) == (
        pytest.approx(2)
    )


def test_receptive_field() -> None:
    identity = torch.zeros(9)
    identity[-1] = 1
    far, near = mean_distance(identity, 3)
    assert (float(far), float(near)) == (0, 0)
    assert effective_receptive_field([0.0]) == 0
    back = torch.zeros(9)
    back[1] = back[6] = 0.5
    far, near = mean_distance(back, 3)
    assert (float(far), float(near)) == (0.5 * 7 + 0.5 * 2, 0.5 * 2)
    # One layer: the distance itself. Several that look equally far: that distance, whatever their number.
    assert effective_receptive_field([4.5]) == 4.5
    assert effective_receptive_field([4.5] * 7) == pytest.approx(4.5)
    # The equation written out: 2 (d1 3 + d2 2 + d3 1) / (3 4).
    assert effective_receptive_field([1.0, 2.0, 6.0]) == pytest.approx(2 * (3 + 4 + 6) / 12)
    with pytest.raises(ValueError, match="empty"):
        effective_receptive_field([])


def operator(steps: int, channels: int = 5, states: int = 3, scale: float = 0.5) -> ScanOperator:
    # Decays from almost none to almost all within a step.
    A = -torch.logspace(-3, 1.5, channels * states).reshape(channels, states)
    return ScanOperator(torch.rand(steps, channels) * scale, A, torch.randn(steps, states), torch.randn(steps, states))


@pytest.mark.parametrize("steps", [1, 31, 32, 33, 100])
def test_operator_times_inputs_is_the_scan(steps: int) -> None:
    op, x = operator(steps), torch.randn(steps, 5)
    dt = torch.log(torch.expm1(op.dt.double())).float()
    y, _ = selective_scan_ref(x[None], dt[None], op.A, op.B[None], op.C[None])
    for first in {0, min(3, steps - 1), steps - 1}:
        found = torch.einsum("dij,jd->id", op.rows(first), x)
        assert float((found - y[0, first:]).abs().max()) < OPERATOR * max(1.0, float(y.abs().max()))


def test_operator_entries_are_those_of_the_definition() -> None:
    op = operator(40, channels=2, states=2)
    found, maps = op.rows(0), op.maps(0)
    for i, j in ((0, 0), (39, 0), (39, 39), (20, 5), (33, 31), (33, 32), (7, 30)):
        if j > i:
            assert found[:, i, j].tolist() == [0, 0]
            continue
        decay = torch.exp(op.A * op.dt[j + 1 : i + 1].sum(0)[:, None])
        expected = (op.C[i] * decay * op.B[j]).sum(1) * op.dt[j]
        assert torch.allclose(found[:, i, j], expected, atol=1e-6)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 40), atol=1e-5)
    assert torch.equal(op.rows(3, channels=slice(1, 2)), op.rows(3)[1:])


def heads_operator(steps: int, scale: float = 0.5) -> HeadScanOperator:
    """Four heads in two groups, three states."""
    A = -torch.logspace(-3, 1.5, 4)
    return HeadScanOperator(torch.rand(steps, 4) * scale, A, torch.randn(steps, 2, 3), torch.randn(steps, 2, 3))


@pytest.mark.parametrize("steps", [1, 33])
def test_operator_of_mamba_2_heads_times_inputs_is_the_scan(steps: int) -> None:
    op, x = heads_operator(steps), torch.randn(steps, 4, 5)
    dt = torch.log(torch.expm1(op.dt.double())).float()
    y, _ = ssd_scan_ref(x[None], dt[None], op.A, op.B[None], op.C[None])
    for first in {0, steps - 1}:
        found = torch.einsum("hij,jhp->ihp", op.rows(first), x)
        assert float((found - y[0, first:]).abs().max()) < OPERATOR * max(1.0, float(y.abs().max()))


def test_operator_of_mamba_2_heads_by_definition_and_by_channels() -> None:
    op = heads_operator(20)
    found = op.rows(0)
    for i, j in ((0, 0), (19, 0), (19, 19), (12, 5)):
        for head in range(4):
            decay = torch.exp(op.A[head] * op.dt[j + 1 : i + 1, head].sum())
            expected = (op.C[i, head // 2] @ op.B[j, head // 2]) * decay * op.dt[j, head]
            assert torch.allclose(found[head, i, j], expected, atol=1e-6)
    assert bool(found.triu(1).eq(0).all())
    assert torch.equal(op.rows(3, channels=slice(1, 3)), op.rows(3)[1:3])
    # Mamba-1's, whose channels each have the head's decay for every state.
    one = ScanOperator(op.dt[:, :1], op.A[:1, None].expand(1, 3), op.B[:, 0], op.C[:, 0])
    assert torch.allclose(one.maps(0), op.maps(0, channels=slice(0, 1)), atol=1e-6)


@pytest.mark.parametrize("made", [operator, heads_operator])
def test_operator_of_a_long_fast_scan_stays_finite(made: Callable[..., ScanOperator]) -> None:
    assert bool(made(300, scale=50.0).maps(0).isfinite().all())
