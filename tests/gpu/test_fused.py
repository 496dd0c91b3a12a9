"""The ops around the products at the released widths against float64, and what they save in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu.on_gpu import VOCAB, model_on_gpu, needs_gpu
from helpers import gradients, relative
from tolerances import LOSS
from torch import Tensor

from hymba.nn.mamba import MambaHeads
from hymba.ops import use_backend
from hymba.ops.gate import relu2, swiglu
from hymba.ops.loss import linear_cross_entropy, linear_cross_entropy_ref
from hymba.ops.norm import add_rms_norm, mean_rms_norm, rms_norm
from hymba.ops.rope import apply_rope
from hymba.ops.split_norm import split_rms_norm

pytestmark = needs_gpu

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
ROWS = 700


@pytest.fixture(autouse=True)
def _no_kernel_fails() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes its place.*")
        yield


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def run(op: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(o.shape, device="cuda", generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    projected = normal(dtype, 2, ROWS, 8960)
    small = [normal(dtype, n) for n in (100, 16, 16)]
    angles = torch.randn(1, ROWS, 32, device="cuda")
    hidden, inner = (lambda: normal(dtype, 2, ROWS, 1600)), (lambda: normal(dtype, 2, ROWS, 3200))
    yield "norm", lambda x, w: rms_norm(x, w, 1e-6), [hidden(), normal(dtype, 1600)]
    yield "add", lambda x, r, w: add_rms_norm(x, r, w, 1e-6), [hidden(), hidden(), normal(dtype, 1600)]
    weights = [normal(dtype, 3200), normal(dtype, 3200)]
    yield "mean", lambda a, b, w, v: mean_rms_norm(a, b, w, v, 1e-6), [inner(), inner(), *weights]
    spare = normal(dtype, 2, ROWS, 136)
    yield "split", lambda x, *w: split_rms_norm(x, *w, 1e-6, width=104), [spare, *small]
    yield "swiglu", swiglu, [normal(dtype, 2, ROWS, 5504), normal(dtype, 2, ROWS, 5504)]
    yield "relu2", relu2, [normal(dtype, 2, ROWS, 5504)]
    q = projected[..., :1600].unflatten(-1, (25, 64))
    yield "rope", lambda x: apply_rope(x, angles.cos(), angles.sin()), [q]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_ops(dtype: torch.dtype) -> None:
    for name, op, inputs in cases(dtype):
        with use_backend("torch"):
            want = run(op, [x.double() for x in inputs])
        errors = [relative(g.double(), w.double()) for g, w in zip(run(op, inputs), want, strict=True)]
        assert max(errors) < TOLERANCE[dtype], (name, errors)
        assert not any(torch.isnan(g).any() for g in run(op, inputs)), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_loss(dtype: torch.dtype) -> None:
    """An odd vocabulary, in one block of rows."""
    inputs = [normal(dtype, ROWS, 1600), normal(dtype, 32001, 1600) * 0.02]
    targets = torch.randint(0, 32001, (ROWS,), device="cuda")
    targets[3] = -100
    want = run(lambda h, w: linear_cross_entropy_ref(h, w, targets), [x.double() for x in inputs])
    got = run(lambda h, w: linear_cross_entropy(h, w, targets), inputs)
    errors = [relative(g.double(), w) for g, w in zip(got, want, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


def test_padded_products() -> None:
    """Step sizes, B and C of many tokens, whose products are padded to multiples of eight."""
    heads = MambaHeads(d_inner=3200, dt_rank=100).to("cuda")
    u = normal(torch.float32, 2, ROWS, 3200)
    with use_backend("torch"):
        want = run(heads._scan_inputs, [u])
    for got, expected in zip(run(heads._scan_inputs, [u]), want, strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < 1e-5


def test_training_with_less_memory() -> None:
    """The same loss and gradients under every policy and with the fused loss, and less memory each time."""
    model = model_on_gpu(4).train()
    ids = torch.randint(3, VOCAB, (2, 1500), device="cuda")
    found, peaks = {}, {}
    for name, policy, fused in (
        ("plain", "none", False), ("fused", "none", True), ("selective", "selective", True), ("full", "full", True)
    ):  # fmt: skip
        model.set_activation_checkpointing(policy)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # with the gradients found so far
        loss = model(ids, labels=ids, return_logits=not fused).loss
        loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        found[name] = (float(loss.detach()), gradients(model))
    want, expected = found["plain"]
    for name, (loss, grads) in found.items():
        assert loss == pytest.approx(want, rel=LOSS), name
        total = relative(
            torch.cat([grads[n].flatten() for n in expected]), torch.cat([g.flatten() for g in expected.values()])
        )
        assert total < 1e-4, (name, total)
    assert peaks["full"] < peaks["selective"] < peaks["fused"] < peaks["plain"], peaks
