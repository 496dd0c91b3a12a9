"""The kernels around the products in Triton's interpreter against plain PyTorch: values and every gradient."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import build, gradients, some_ids
from ops.op_cases import worst
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from hymba.ops import use_backend
from hymba.ops.backend import BackendError
from hymba.ops.gate import relu2, swiglu
from hymba.ops.loss import linear_cross_entropy, linear_cross_entropy_ref
from hymba.ops.norm import add_rms_norm, mean_rms_norm, rms_norm
from hymba.ops.rope import apply_rope
from hymba.ops.split_norm import split_rms_norm

FLOAT32 = 1e-6
BFLOAT16 = 1e-2
TOLERANCE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def run(op: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of every input under fixed random weights on the outputs."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = op(*leaves.values(), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for leaf, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))


def compare(op: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    wide = {k: v.double() for k, v in inputs.items()}
    got = run(op, inputs, backend="triton", **options)
    assert worst(got, run(op, wide, **options)) < TOLERANCE[dtype]
    same = run(op, inputs, backend="torch", **options)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in same.items()}


def part(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random numbers that are a slice of something wider."""
    return torch.randn(*shape[:-1], shape[-1] + 7).to(dtype)[..., 3 : 3 + shape[-1]]


@DTYPES
@pytest.mark.parametrize("width", [3, 5, 37, 64])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (3, 1)])
def test_norm(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    weight = torch.rand(width) + 0.5
    compare(lambda x, w, **k: rms_norm(x, w, 1e-6, **k), {"x": part(dtype, *rows, width), "w": weight}, dtype)
    compare(lambda x, w, **k: rms_norm(x, w, 0.1, **k), {"x": part(dtype, *rows, width), "w": weight.to(dtype)}, dtype)


def test_norm_of_rows_that_are_not_equally_far_apart() -> None:
    x = torch.randn(2, 3, 4, 5)[:, :, :3].transpose(0, 1)
    compare(lambda x, w, **k: rms_norm(x, w, 1e-6, **k), {"x": x, "w": torch.rand(5)}, torch.float32)
    x = torch.randn(4, 6).t()
    compare(lambda x, w, **k: rms_norm(x, w, 1e-6, **k), {"x": x, "w": torch.rand(4)}, torch.float32)


def test_norm_in_another_dtype() -> None:
    """What a product under autocast would round its input to, and gradients in the input's dtype."""
    x, weight = torch.randn(3, 8), torch.rand(8)
    want = run(lambda x, w, **k: rms_norm(x, w, 1e-6, **k).to(torch.bfloat16), {"x": x, "w": weight}, backend="torch")
    for name in ("triton", "torch"):
        got = run(
            lambda x, w, **k: rms_norm(x, w, 1e-6, dtype=torch.bfloat16, **k), {"x": x, "w": weight}, backend=name
        )
        assert got["out0"].dtype == torch.bfloat16
        assert worst(got, want) < BFLOAT16


@DTYPES
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_norm_behind_an_addition(residual: torch.dtype, dtype: torch.dtype) -> None:
    inputs = {"x": part(dtype, 2, 3, 9), "r": part(residual, 2, 3, 9), "w": torch.rand(9)}
    narrow = torch.bfloat16 if torch.bfloat16 in (dtype, residual) else torch.float32
    compare(lambda x, r, w, **k: add_rms_norm(x, r, w, 1e-6, **k), inputs, narrow)
    # One output that nothing uses.
    compare(lambda x, r, w, **k: add_rms_norm(x, r, w, 1e-6, **k)[1], inputs, narrow)
    only_sum = {"x": inputs["x"], "r": inputs["r"]}
    compare(lambda x, r, **k: add_rms_norm(x, r, torch.ones(9), 1e-6, **k)[0], only_sum, narrow)


@DTYPES
def test_mean_of_norms(dtype: torch.dtype) -> None:
    inputs = {"a": part(dtype, 2, 5, 33), "b": part(dtype, 2, 5, 33), "wa": torch.rand(33), "wb": torch.rand(33)}
    compare(lambda a, b, wa, wb, **k: mean_rms_norm(a, b, wa, wb, 1e-6, **k), inputs, dtype)


@DTYPES
@pytest.mark.parametrize(("spare", "width"), [(0, None), (3, 8), (0, 16)])
@pytest.mark.parametrize("rows", [1, 11])
def test_norms_of_slices(rows: int, spare: int, width: int | None, dtype: torch.dtype) -> None:
    inputs = {"x": part(dtype, 2, rows, 12 + spare), "a": torch.rand(5), "b": torch.rand(4), "c": torch.rand(3)}
    compare(lambda x, a, b, c, **k: split_rms_norm(x, a, b, c, 1e-3, width=width, **k), inputs, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 33)])
def test_products_of_the_mlp(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, {"gate": 4 * part(dtype, *shape), "up": part(dtype, *shape)}, dtype)
    compare(relu2, {"up": part(dtype, *shape)}, dtype)


@DTYPES
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(rows: int, heads: int, dtype: torch.dtype) -> None:
    q = part(dtype, 2, 7, heads * 6).unflatten(-1, (heads, 6))
    angles = torch.randn(rows, 7, 3)
    compare(lambda q, **k: apply_rope(q, angles.cos(), angles.sin(), **k), {"q": q}, dtype)


@DTYPES
@pytest.mark.parametrize("at_once", [37 * 7, 1 << 20])
def test_loss(at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba.ops.loss._AT_ONCE_ELSEWHERE", at_once)
    inputs = {"h": part(dtype, 23, 12), "w": torch.randn(37, 12).to(dtype)}
    targets = torch.randint(0, 37, (23,)).index_fill_(0, torch.tensor([0, 3, 22]), -100)
    compare(lambda h, w, **k: linear_cross_entropy(h, w, targets, **k), inputs, dtype)
    exact = linear_cross_entropy_ref(inputs["h"].double(), inputs["w"].double(), targets)
    assert float(linear_cross_entropy(*inputs.values(), targets, backend="triton")) == pytest.approx(
        float(exact), rel=TOLERANCE[dtype]
    )


def test_loss_of_a_target_outside_the_vocabulary_is_not_a_number() -> None:
    total = linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 5]), backend="triton")
    assert total.isnan()


OPS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, y, w: rms_norm(x, w, 1e-6),
    "add": lambda x, y, w: add_rms_norm(x, y, w, 1e-6),
    "mean": lambda x, y, w: mean_rms_norm(x, y, w, w, 1e-6),
    "split": lambda x, y, w: split_rms_norm(x, w[:2], w[2:5], w[5:6], 1e-6, width=4),
    "swiglu": lambda x, y, w: swiglu(x, y),
    "relu2": lambda x, y, w: relu2(x),
    "rope": lambda x, y, w: apply_rope(x.unflatten(-1, (2, 4))[None], y[None, :, :2], y[None, :, 2:4]),
    "loss": lambda x, y, w: linear_cross_entropy(x, y, torch.tensor([1, 2, -100])),
}


@pytest.mark.parametrize("name", OPS)
def test_kernels_compile_into_one_op(name: str) -> None:
    op = OPS[name]
    inputs = {"x": torch.randn(3, 8), "y": torch.randn(3, 8), "w": torch.rand(8)}
    used = {"swiglu": "xy", "relu2": "x", "rope": "x", "loss": "xy", "norm": "xw", "split": "xw"}.get(name, "xyw")
    leaves = {k: v for k, v in inputs.items() if k in used}
    call = lambda *a: op(**(inputs | dict(zip(leaves, a, strict=True))))  # noqa: E731
    with use_backend("triton"):
        want = run(call, leaves)
        assert worst(run(torch.compile(call, backend="aot_eager", fullgraph=True), leaves), want) == 0


@pytest.mark.parametrize("name", OPS)
def test_no_second_derivative(name: str) -> None:
    op = OPS[name]
    x, y, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.rand(8)
    with use_backend("triton"):
        out = op(x, y, w)
        out = out[1] if isinstance(out, tuple) else out
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            first.sum().backward()


@pytest.mark.parametrize("through", ["function", "op"])
def test_the_formulas_behind_the_kernels(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a kernel's place inside an op, in eager code and where a compiler sees the op."""
    monkeypatch.setattr("hymba.ops.backend.wants_kernel", lambda *_: False)
    inputs = {"x": torch.randn(3, 8), "y": torch.randn(3, 8), "w": torch.rand(8)}
    for name, op in OPS.items():
        used = {"swiglu": "xy", "relu2": "x", "rope": "x", "loss": "xy", "norm": "xw", "split": "xw"}.get(name, "xyw")
        leaves = {k: v for k, v in inputs.items() if k in used}
        call = lambda *a, op=op, leaves=leaves: op(**(inputs | dict(zip(leaves, a, strict=True))))  # noqa: E731
        with use_backend("torch"):
            want = run(call, {k: v.double() for k, v in leaves.items()} if name != "rope" else leaves)
        with use_backend("triton"):
            ran = call if through == "function" else torch.compile(call, backend="aot_eager", fullgraph=True)
            assert worst(run(ran, leaves), want) < FLOAT32, name


def test_a_kernel_that_fails_hands_over_once_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("hymba.ops.triton.norm.forward", broken)
    monkeypatch.setattr("hymba.ops.triton.norm.backward", broken)
    monkeypatch.setattr("hymba.ops.backend._FAILED", {})
    x, w = torch.randn(3, 8), torch.rand(8)
    with pytest.raises(BackendError, match="no such instruction"):
        rms_norm(x, w, 1e-6, backend="triton")
    from hymba.ops.norm import _norm

    want = run(lambda x, w: rms_norm(x, w, 1e-6, backend="torch"), {"x": x, "w": w})
    with pytest.warns(UserWarning, match="PyTorch takes its place"):
        got = run(lambda x, w: _norm(x, w, 1e-6, x.dtype, "triton", False), {"x": x, "w": w})
    assert worst(got, want) < FLOAT32


@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_a_model_through_the_kernels(dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to PyTorch's numbers, and the same to the bit whatever is made again in backward."""
    monkeypatch.setattr("hymba.ops.recompute._NARROW", 1)
    monkeypatch.setattr("hymba.nn.mamba._MANY", 1 if padded else 1000)
    model = build(dtype=dtype, num_hidden_layers=2, kv_reuse_group=[[0, 1]], global_attn_idx=[]).train()
    ids = some_ids(2, 7)
    found = []
    for name, policy in (("torch", "none"), ("triton", "none"), ("triton", "selective"), ("triton", "full")):
        model.set_activation_checkpointing(policy)
        with use_backend(rms_norm=name, gate=name, rope=name, linear_cross_entropy=name):
            loss = model(ids, labels=ids, return_logits=False).loss
            loss.backward()
        found.append({"loss": loss.detach()} | gradients(model))
    assert float(found[1]["loss"]) == pytest.approx(float(found[0]["loss"]), rel=TOLERANCE[dtype])
    if dtype == torch.float32:
        assert worst(found[1], found[0]) < 1e-5
    for other in found[2:]:
        assert all(torch.equal(other[key], found[1][key]) for key in found[1])
