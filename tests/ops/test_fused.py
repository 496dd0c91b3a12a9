"""The ops around the products without kernels: what takes their place, eager and where a compiler sees an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.ops.gate import _gate, gate_ref, relu2, swiglu
from hymba.ops.norm import (
    _add_norm,
    _mean_norm,
    _norm,
    add_rms_norm,
    add_rms_norm_ref,
    mean_rms_norm,
    mean_rms_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from hymba.ops.rope import _rope, apply_rope_ref
from hymba.ops.split_norm import _split, split_rms_norm, split_rms_norm_ref

LAST = ("torch", False)
F64 = torch.float64
ANGLES = torch.randn(1, 3, 4, dtype=F64)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "norm": (lambda x, w: _norm(x, w, 0.1, F64, *LAST), lambda x, w: rms_norm_ref(x, w, 0.1), [(2, 3, 8), (8,)]),
    "one row": (lambda x, w: _norm(x, w, 0.1, F64, *LAST), lambda x, w: rms_norm_ref(x, w, 0.1), [(8,), (8,)]),
    "add": (
        lambda x, r, w: _add_norm(x, r, w, 0.1, F64, *LAST),
        lambda x, r, w: add_rms_norm_ref(x, r, w, 0.1),
        [(2, 3, 8), (2, 3, 8), (8,)],
    ),
    "mean": (
        lambda a, b, w, v: _mean_norm(a, b, w, v, 0.1, *LAST),
        lambda a, b, w, v: mean_rms_norm_ref(a, b, w, v, 0.1),
        [(2, 3, 8), (2, 3, 8), (8,), (8,)],
    ),
    "split": (
        lambda x, a, b, c: _split(x, a, b, c, 0.1, 8, *LAST),
        lambda x, a, b, c: split_rms_norm_ref(x, a, b, c, 0.1, 8),
        [(2, 3, 11), (5,), (2,), (3,)],
    ),
    "swiglu": (lambda g, u: _gate(g, u, *LAST), gate_ref, [(2, 3, 8), (2, 3, 8)]),
    "relu2": (lambda u: _gate(None, u, *LAST), lambda u: gate_ref(None, u), [(2, 3, 8)]),
    "rope": (
        lambda x: _rope(x, ANGLES.cos(), ANGLES.sin(), False, *LAST),
        lambda x: apply_rope_ref(x, ANGLES.cos(), ANGLES.sin()),
        [(2, 3, 2, 8)],
    ),
}


def run(op: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_formulas(name: str, compiled: bool) -> None:
    op, reference, shapes = CASES[name]
    inputs = [normal(*shape) for shape in shapes]
    ran = torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op
    for got, want in zip(run(ran, inputs), run(reference, inputs), strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        out = op(*inputs)
        assert not (out[0] if isinstance(out, tuple) else out).requires_grad


def test_no_second_derivative() -> None:
    x = normal(3, 8).requires_grad_()
    (first,) = torch.autograd.grad(_norm(x, torch.ones(8), 0.1, F64, *LAST).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_on_the_cpu_the_plain_versions_run_to_the_bit() -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    w = torch.rand(8)
    assert torch.equal(rms_norm(x, w, 1e-6), rms_norm_ref(x, w, 1e-6))
    assert rms_norm(x, w, 1e-6, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert all(map(torch.equal, add_rms_norm(x, y, w, 1e-6), add_rms_norm_ref(x, y, w, 1e-6)))
    assert torch.equal(mean_rms_norm(x, y, w, w, 1e-6), mean_rms_norm_ref(x, y, w, w, 1e-6))
    parts = split_rms_norm(x, w[:2], w[2:4], w[4:], 1e-6)
    assert all(map(torch.equal, parts, split_rms_norm_ref(x, w[:2], w[2:4], w[4:], 1e-6)))
    assert torch.equal(swiglu(x, y), gate_ref(x, y)) and torch.equal(relu2(x), gate_ref(None, x))


def test_shapes_that_do_not_fit() -> None:
    x = torch.randn(2, 8)
    for op in (lambda: add_rms_norm(x, x[:1], x[0], 1e-6), lambda: mean_rms_norm(x, x[:1], x[0], x[0], 1e-6)):
        with pytest.raises(ValueError, match="has shape"):
            op()
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(x, x[:1])
    with pytest.raises(ValueError, match="at least 9"):
        split_rms_norm(x, x[0, :5], x[0, :2], x[0, :2], 1e-6)
