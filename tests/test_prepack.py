"""Prepacked linear layers: the same model, faster, and never a copy of weights that are no more."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import build, gradients, largest, randomise, some_ids
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_checkpoint import tiny_checkpoint
from tolerances import BFLOAT16
from torch import Tensor, nn
from typer.testing import CliRunner

from hymba import HymbaCache
from hymba.cli import app
from hymba.ops import prepack
from hymba.ops.prepack import Prepacked, bit_sums, prepacked_linears

available = pytest.mark.skipif(
    prepack.refusal(torch.bfloat16) is not None, reason=f"bfloat16: {prepack.refusal(torch.bfloat16)}"
)


class Layer(nn.Module):
    """A linear layer in a module that takes a cache."""

    def __init__(self, inputs: int = 24, outputs: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        return self.proj(x)


CONTINUED = SimpleNamespace(get_seq_length=lambda: 3)


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a weight's bits are read for a comparison or a copy."""
    count = [0]

    def counted(weight: Tensor) -> tuple[Tensor, Tensor]:
        count[0] += 1
        return bit_sums(weight)

    monkeypatch.setattr(prepack, "bit_sums", counted)
    return count


def outputs(model: Any) -> list[Tensor]:
    """Logits of a forward pass, and of a cached prefill with decode steps."""
    ids = some_ids(2, 7, seed=4)
    with torch.no_grad():
        cache = HymbaCache(model.config)
        out = [model(input_ids=ids, use_cache=False).logits, model(input_ids=ids, past_key_values=cache).logits]
        out += [model(input_ids=some_ids(2, 1, seed=step), past_key_values=cache).logits for step in range(2)]
    return out


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    assert all(map(torch.equal, found, want)), [largest(a, b) for a, b in zip(found, want, strict=True)]


@available
@pytest.mark.parametrize("dtype", prepack.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 3, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    if reason := prepack.refusal(dtype):
        pytest.skip(reason)
    layer = Layer(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    want = layer(x)
    with prepacked_linears(layer) as packed:
        assert packed == Prepacked(layers=1, bytes=layer.proj.weight.nbytes)
        found = layer(x)
        strided = layer(torch.randn(*shape[:-1], 48).to(dtype)[..., ::2])
    assert found.dtype == want.dtype and strided.shape == want.shape
    torch.testing.assert_close(found, want)


@available
def test_a_model() -> None:
    model = build(dtype=torch.bfloat16)
    want = outputs(model)
    keys = set(model.state_dict())
    with prepacked_linears(model) as packed:
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert packed.layers == len(linears)
        assert packed.bytes == sum(m.weight.nbytes for m in linears)
        assert set(model.state_dict()) == keys
        found = outputs(model)
    for a, b in zip(found, want, strict=True):
        assert largest(a, b) <= BFLOAT16
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert_same(outputs(model), want)


@available
def test_the_packed_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    product = prepack._product
    monkeypatch.setattr(prepack, "_product", lambda *args: calls.append(1) or product(*args))
    layer, x = Layer(), torch.ones(1, 24, dtype=torch.bfloat16)
    with torch.no_grad(), prepacked_linears(layer):
        layer(x)
        assert calls == [1]
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    with torch.inference_mode(), prepacked_linears(layer):
        layer(x)
    assert calls == [1, 1]


@available
def test_gradients_are_the_plain_ones() -> None:
    model = build(dtype=torch.bfloat16)
    ids = some_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    want = gradients(model)
    with prepacked_linears(model):
        model(ids, labels=ids).loss.backward()
        found = gradients(model)
    assert found.keys() == want.keys()
    assert_same(list(found.values()), list(want.values()))


@available
@torch.no_grad()
def test_hooks_of_a_layer_run() -> None:
    layer, x = Layer(), torch.randn(1, 24).bfloat16()
    with prepacked_linears(layer):
        before = layer(x)
        layer.proj.register_forward_hook(lambda module, args, output: output * 2)
        assert torch.equal(layer(x), before * 2)


@available
@torch.no_grad()
def test_compared_where_something_starts_and_nowhere_else(comparisons: list[int]) -> None:
    layer, x = Layer(), torch.randn(1, 24).bfloat16()
    with prepacked_linears(layer):
        assert comparisons == [1]
        for _ in range(3):
            layer(x, past_key_values=CONTINUED)
        assert comparisons == [1]
        layer(x)
        layer(x, past_key_values=SimpleNamespace(get_seq_length=lambda: 0))
        assert comparisons == [3]

    model = build(dtype=torch.bfloat16)
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    with prepacked_linears(model):
        comparisons[0] = 0
        model.generate(some_ids(1, 5), max_new_tokens=8, eos_token_id=None)
    assert comparisons == [linears]


@available
@torch.no_grad()
def test_what_is_seen_in_the_middle_of_a_cache() -> None:
    """Everything that moves the parameter, its memory or its counter is seen at once."""
    layer, x = Layer(), torch.randn(1, 24).bfloat16()

    def replaced() -> None:
        layer.proj.weight = nn.Parameter(layer.proj.weight * 2)

    def data_replaced() -> None:
        layer.proj.weight.data = layer.proj.weight.data * 2

    def written() -> None:
        layer.proj.weight.mul_(2)

    def loaded() -> None:
        layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})

    with prepacked_linears(layer):
        for change in (replaced, data_replaced, written, loaded):
            change()
            found = layer(x, past_key_values=CONTINUED)
            torch.testing.assert_close(found, copy.deepcopy(layer)(x))
        layer.float()
        assert torch.equal(layer(x.float(), past_key_values=CONTINUED), copy.deepcopy(layer)(x.float()))
        layer.bfloat16()
        torch.testing.assert_close(layer(x, past_key_values=CONTINUED), copy.deepcopy(layer)(x))


# Every way in which weights change.


def _fused_adamw(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = some_ids(2, 9)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _data_written(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.75)


def _one_number_written(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 4


def _rows_swapped(model: Any) -> None:
    weight = model.model.layers[1].mixer.out_proj.weight
    weight.data.copy_(weight.data.flip(0))


def _columns_swapped(model: Any) -> None:
    weight = model.model.layers[1].mixer.out_proj.weight
    weight.data.copy_(weight.data.roll(8, dims=1))


def _data_replaced(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.75


def _assigned(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other, seed=9)
    model.load_state_dict(other.state_dict(), assign=True)


def _loaded(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other, seed=11)
    model.load_state_dict(other.state_dict())


def _there_and_back(model: Any) -> None:
    model.to(torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(0.75)
    model.to(torch.bfloat16)


def _to_float32(model: Any) -> None:
    model.to(torch.float32)


def _parameters_exchanged(model: Any) -> None:
    first, second = model.model.layers[1].mlp, model.model.layers[2].mlp
    first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight


def _layers_exchanged(model: Any) -> None:
    model.model.layers[1].mlp, model.model.layers[2].mlp = model.model.layers[2].mlp, model.model.layers[1].mlp


def _resized(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.get_input_embeddings().weight.data[:5].mul_(0.5)


def _hooked(model: Any) -> None:
    model.model.layers[0].mixer.out_proj.register_forward_hook(lambda module, args, output: output * 1.5)


CHANGES: dict[str, Callable[[Any], None]] = {
    "fused AdamW": _fused_adamw,
    "p.data written": _data_written,
    "one number of p.data written": _one_number_written,
    "rows swapped": _rows_swapped,
    "columns swapped": _columns_swapped,
    "p.data replaced": _data_replaced,
    "load_state_dict(assign=True)": _assigned,
    "load_state_dict": _loaded,
    "to float32 and back": _there_and_back,
    "to float32": _to_float32,
    "parameters exchanged": _parameters_exchanged,
    "layers exchanged": _layers_exchanged,
    "embeddings resized": _resized,
    "forward hook": _hooked,
}


def assert_fresh(model: Any, before: list[Tensor]) -> list[Tensor]:
    """The packed model's outputs are those of a copy packed just now, and are not what they were."""
    after = outputs(model)
    twin = copy.deepcopy(model)
    with prepacked_linears(twin):
        assert_same(after, outputs(twin))
    for new, old in zip(after, before, strict=True):
        assert new.shape != old.shape or largest(new, old) > 1e-4, "the change should be seen"
    return after


@available
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_never_stale(change: Callable[[Any], None]) -> None:
    model = build(dtype=torch.bfloat16)
    with prepacked_linears(model):
        before = outputs(model)
        change(model)
        assert_fresh(model, before)


@available
def test_never_stale_under_adapters() -> None:
    """PEFT's merge writes to `p.data`, which moves no counter."""
    targets = "in_proj out_proj x_proj dt_proj gate_proj up_proj down_proj".split()
    config = LoraConfig(target_modules=targets, r=2, lora_alpha=8, init_lora_weights=False)
    model = get_peft_model(build(dtype=torch.bfloat16), config, autocast_adapter_dtype=False).eval()
    model.add_adapter("other", config)
    with prepacked_linears(model):
        first = outputs(model)
        model.set_adapter("other")
        second = assert_fresh(model, first)
        model.set_adapter("default")
        assert_same(assert_fresh(model, second), first)
        model.merge_adapter()
        merged = assert_fresh(model, second)
        model.unmerge_adapter()
        assert_fresh(model, merged)
        with model.disable_adapter():
            assert_fresh(model, merged)


@available
@torch.no_grad()
def test_copies_of_a_packed_model_are_plain() -> None:
    layer, x = Layer(), torch.randn(1, 24).bfloat16()
    with prepacked_linears(layer):
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
    for other in (twin, saved):
        other.proj.weight.data.mul_(2)
        other.proj.bias.data.mul_(2)
        torch.testing.assert_close(other(x), layer(x) * 2)


@available
@torch.no_grad()
def test_the_scope_ends_cleanly() -> None:
    layer, x = Layer(), torch.randn(1, 24).bfloat16()
    with pytest.raises(KeyError), prepacked_linears(layer):
        raise KeyError
    assert "forward" not in vars(layer.proj) and not layer._forward_pre_hooks

    with prepacked_linears(layer):
        kept = layer.proj.forward
        with prepacked_linears(layer) as inner:
            assert inner.layers == 0
        assert layer.proj.forward is kept
        # As offloading does: a forward around the one that was there.
        layer.proj.forward = lambda x: kept(x)
    assert "forward" in vars(layer.proj), "somebody else's forward stays"
    layer.proj.weight.data.mul_(2)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.proj.weight, layer.proj.bias))


@available
def test_what_is_left_alone() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    own = nn.Linear(4, 4, dtype=torch.bfloat16)
    own.forward = lambda x: x  # type: ignore[method-assign]
    with prepacked_linears(nn.ModuleList([nn.Linear(4, 4), Other(4, 4, dtype=torch.bfloat16), own])) as packed:
        assert packed == Prepacked()


@torch.no_grad()
def test_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that has dropped them, or whose product is wrong: one warning, and the plain model."""

    def gone(*args: Any) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    model = build(dtype=torch.bfloat16)
    want = outputs(model)
    for fault, message in ((gone, "does not offer it"), (lambda x, packed, bias: x[:, :1] * 0, "is wrong here")):
        prepack.refusal.cache_clear()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(prepack, "_product", fault)
                patch.setattr(prepack, "_reorder", lambda weight: weight)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    with prepacked_linears(model) as packed:
                        found = outputs(model)
        finally:
            prepack.refusal.cache_clear()
        mine = [str(w.message) for w in caught if "unpacked" in str(w.message)]
        assert len(mine) == 1 and message in mine[0]
        assert packed.layers == 0 and message in (packed.reason or "")
        assert_same(found, want)


@pytest.mark.parametrize(("command", "text"), [(["generate", "def "], ""), (["chat"], "hello\n")], ids=str)
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], text: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    packed: list[Any] = []
    real = prepacked_linears
    monkeypatch.setattr(prepack, "prepacked_linears", lambda model: packed.append(model.dtype) or real(model))

    def run(*options: str) -> Any:
        arguments = [*command, "--model", str(folder), "--max-new-tokens", "5", "--device", "cpu", *options]
        return CliRunner().invoke(app, arguments, input=text)

    plain, done = run("--dtype", "bfloat16"), run("--dtype", "bfloat16", "--prepack")
    assert plain.exit_code == done.exit_code == 0, done.output
    assert packed == [torch.bfloat16]
    assert done.stdout.strip()
    wrong = run("--dtype", "float32", "--prepack")
    assert wrong.exit_code == 2 and "--prepack: the weights are float32 on cpu" in wrong.stderr


@given(
    st.integers(1, 9),
    st.integers(1, 17),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
    st.data(),
)
def test_bit_sums_property(rows: int, columns: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    """One number changed, rows or columns in another order, a sign turned: the sums tell."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    kind = data.draw(st.sampled_from(["number", "sign", "rows", "columns"]))
    other = weight.clone()
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    if kind == "number":
        other[row, column] = data.draw(st.floats(-10, 10))
    elif kind == "sign":
        other[row] = -other[row]
    elif kind == "rows":
        other = other[torch.randperm(rows, generator=generator)].contiguous()
    else:
        other = other[:, torch.randperm(columns, generator=generator)].contiguous()
    same_bits = torch.equal(weight.view(torch.int16), other.view(torch.int16))
    assert all(map(torch.equal, bit_sums(weight), bit_sums(other))) == same_bits
