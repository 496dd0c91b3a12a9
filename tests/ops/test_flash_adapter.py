"""flash-attn 2 and 4 behind our attention: values, every gradient, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops import package_fixtures as packages
from torch import Tensor

from hymba.ops import BackendError, adapters, available, backend
from hymba.ops.adapters import flash_attention
from hymba.ops.attention import attention, attention_ref
from hymba.ops.masks import Visibility

# Relative, of tensors in bfloat16.
BFLOAT16 = 1e-2
BACKENDS = [*flash_attention.GENERATIONS]


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Which flash-attn, and where it runs: "cuda" with the real one, "cpu" with a stand-in."""
    packages.fresh(monkeypatch)
    if packages.real("flash_attn_2_cuda" if request.param == "flash_attn" else "flash_attn.cute"):
        yield request.param, "cuda"
    else:
        packages.stand_in(monkeypatch)
        yield request.param, "cpu"
        packages.forget()


def case(b: int, l: int, p: int, *, h: int = 6, kv: int = 2, d: int = 64, e: int = 128, shared: bool = True):
    rows = 1 if shared else b
    shapes = {"q": (b, l, h, d), "k": (b, l, kv, d), "v": (b, l, kv, e)}
    shapes |= {"prefix_k": (rows, p, kv, d), "prefix_v": (rows, p, kv, e)} if p else {}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def seen(l: int, p: int, window: int | None) -> Visibility:
    at = torch.arange(l)[None] + 5
    return Visibility(at, at, window, prefix=p, own_keys=0, start=at[:, 0])


def expected(tensors: dict[str, Tensor], visibility: Visibility) -> Tensor:
    q, k, v = (tensors[n] for n in "qkv")
    if "prefix_k" in tensors:
        k, v = (torch.cat([tensors[f"prefix_{n}"].expand(len(q), -1, -1, -1), x], 1) for n, x in (("k", k), ("v", v)))
    return attention_ref(q, k, v, visibility.dense())[0]


def with_gradients(run, tensors: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    leaves = {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}
    out = run(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad((out.float() * weights).sum(), list(leaves.values()))
    found = {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
    return {name: t.cpu() for name, t in found.items()}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error; absolute where there is next to nothing (one key sends nothing back to the queries)."""
    return max(float((got[n].double() - w).norm() / max(w.norm(), 1)) for n, w in want.items())


def package(name: str, visibility: Visibility, **options):
    return lambda t: attention(**t, visibility=visibility, backend=name, **options)[0]


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize(("length", "prefix"), [(1, 4), (2, 0), (19, 0), (19, 4)])
def test_equals_reference(flash, length, prefix, window, shared):
    name, device = flash
    tensors = case(2, length, prefix, shared=shared)
    want = with_gradients(lambda t: expected(t, seen(length, prefix, window)), tensors, torch.float64)

    got = with_gradients(package(name, seen(length, prefix, window).to(device)), tensors, torch.bfloat16, device)
    assert all(t.dtype == torch.bfloat16 for t in got.values())
    assert worst(got, want) < BFLOAT16


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_code_sees_one_op(flash, window):
    name, device = flash
    tensors, visibility = case(2, 9, 4), seen(9, 4, window).to(device)

    def run(t):
        return attention(**t, visibility=visibility, backend=name)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    want = with_gradients(run, tensors, torch.bfloat16, device)
    assert worst(with_gradients(compiled, tensors, torch.bfloat16, device), want) < BFLOAT16


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
def test_op_registration(flash):
    name, device = flash
    tensors = [t.to(device).requires_grad_() for t in case(2, 9, 4).values()]
    for window in (None, 3):
        arguments = (*tensors, window, flash_attention.GENERATIONS[name])
        # Gradients are compared with the reference above, not with themselves at float32's tolerance.
        torch.library.opcheck(
            flash_attention._attention,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
def test_equal_widths(flash):
    name, device = flash
    tensors = case(1, 7, 3, e=64)
    want = with_gradients(lambda t: expected(t, seen(7, 3, 2)), tensors, torch.float64)
    assert (
        worst(with_gradients(package(name, seen(7, 3, 2).to(device)), tensors, torch.bfloat16, device), want) < BFLOAT16
    )


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
def test_what_they_do_not_serve(flash, monkeypatch):
    name, device = flash
    tensors, visibility = case(1, 6, 2), seen(6, 2, 3)

    def refusal(t=tensors, v=visibility, dtype=torch.bfloat16, **options) -> str:
        with pytest.raises(BackendError) as caught:
            package(name, v.to(device), **options)({n: x.to(device, dtype) for n, x in t.items()})
        return str(caught.value)

    assert "it takes one of bfloat16 and float16" in refusal(dtype=torch.float32)
    assert "dropout=0.1" in refusal(dropout=0.1)
    at = visibility.query
    assert "the order of the keys is unknown" in refusal(v=Visibility(at, at, 3, prefix=2, own_keys=0))
    documents = torch.zeros_like(at)
    packed = Visibility(at, at, 3, 2, 0, query_document=documents, key_document=documents, start=at[:, 0])
    assert "it has no documents within a row" in refusal(v=packed)
    cached = Visibility(at, torch.arange(11)[None], 3, 2, own_keys=5, start=at[:, 0])
    assert "it has no keys from a cache" in refusal(v=cached)
    wide = {"flash_attn": (264, 264, "a head is 264 wide; it takes multiples of 8 up to 256")}
    wide["flash_attn_4"] = (64, 136, "a head is 136 wide; it takes multiples of 8 up to 128")
    d, e, message = wide[name]
    assert message in refusal(case(1, 6, 2, d=d, e=e))
    if name == "flash_attn":
        assert "values are 96 wide; it takes multiples of the queries' width, 64" in refusal(case(1, 6, 2, e=96))
    monkeypatch.setattr(adapters, "DEVICE", "elsewhere")
    assert "the tensors are on" in refusal()


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
def test_usable_in_the_table(flash):
    assert next(row for row in available() if row.backend == flash[0]).usable


@pytest.mark.parametrize("flash", BACKENDS, indirect=True)
def test_a_kernel_that_fails_is_replaced_unless_forced(flash, monkeypatch):
    name, device = flash

    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(flash_attention, "_forward", fail)
    tensors = {n: t.to(device) for n, t in case(1, 6, 2).items()}
    with pytest.raises(BackendError, match="is forced and failed: RuntimeError: no kernel image"):
        package(name, seen(6, 2, 3).to(device))(tensors)
    table = backend._TABLE["attention"]
    entry = backend._Backend(table[name].probe, table[name].serves)
    monkeypatch.setitem(backend._TABLE, "attention", {name: entry, "torch": table["torch"]})
    with pytest.warns(UserWarning, match=f"the {name} kernel failed"):
        got = package("auto", seen(6, 2, 3).to(device))(tensors)
    want = expected({n: t.double() for n, t in case(1, 6, 2).items()}, seen(6, 2, 3))
    assert got.shape == want.shape


def test_a_missing_generation_is_named(monkeypatch):
    packages.fresh(monkeypatch)
    packages.stand_in(monkeypatch)
    found = adapters.importlib.import_module

    def without(name, package=None):
        if name.startswith(("flash_attn.cute", "flash_attn_2_cuda")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, package)

    monkeypatch.setattr(adapters.importlib, "import_module", without)
    reasons = {row.backend: row.reason for row in available() if row.op == "attention"}
    assert reasons["flash_attn"] == "flash_attn is installed without its compiled extension flash_attn_2_cuda"
    assert "flash_attn.cute.interface does not import" in reasons["flash_attn_4"]
    packages.forget()
