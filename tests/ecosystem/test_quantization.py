"""int8 and int4 weights: what is rounded and what is not, files, steps, adapters, refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import build, pad, relative, small_config, some_ids, through_cache
from safetensors.torch import load_file, save_file
from tolerances import BFLOAT16_RELATIVE, QUANTISED, RELATIVE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hymba import HymbaForCausalLM, quantization
from hymba.cli import app
from hymba.decoding import why_not_fused
from hymba.hub import CheckpointError
from hymba.ops.prepack import prepacked_linears, refusal
from hymba.quantization import Int8Linear, QuantizationError, quantization_config, report

pytest.importorskip("torchao", reason="pip install 'hymba[quantization]'")

# Widths that groups of 32 divide, except the last MLP's input.
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
LARGE = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
KINDS = pytest.mark.parametrize("kind", quantization.KINDS)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build(dtype=torch.float32, **SIZES)


@pytest.fixture(scope="module")
def folder(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantised(folder: Path) -> Callable[[str], Any]:
    """The model in one of the kinds, loaded once; tests leave it as it is."""
    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            settings = quantization_config(kind)
            loaded[kind] = HymbaForCausalLM.from_pretrained(folder, quantization_config=settings).eval()
        return loaded[kind]

    return get


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(some_ids(2, 11, vocab=97) if ids is None else ids, use_cache=False).logits


def dequantised(weight: Any) -> Tensor:
    if type(weight).__name__ == "Int8Tensor":
        return weight.dequantize()
    weight = quantization._to_plain(weight)
    codes = quantization._nibbles(weight.qdata).view(weight.shape).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes).view(weight.shape[0], -1, weight.block_size[1])
    return (codes * weight.scale.t()[..., None] + weight.zero_point.t()[..., None]).flatten(1)


# What is rounded.


@KINDS
def test_large_projections_are_rounded_and_nothing_else(kind: str, plain: Any, quantised: Any) -> None:
    model, kept = quantised(kind), dict(plain.named_parameters())
    wanted = {"int8": "Int8Tensor", "int4": "Int4OpaqueTensor"}[kind]
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in LARGE:
            assert type(parameter).__name__ == wanted, name
            assert not parameter.requires_grad
        else:
            assert type(parameter) is nn.Parameter, name
            assert parameter.dtype == torch.float32 and torch.equal(parameter, kept[name]), name
    names = {name.split(".")[-1] for name in kept} | {name.split(".")[-2] for name in kept}
    assert {"A_log", "D", "dt_bias", "conv1d", "dt_norm", "meta_tokens", "embed_tokens", "x_proj", "dt_proj"} <= names
    found = report(model)
    assert found.kinds == {wanted: 15} and len(found.quantised) == 15
    assert {name.split(".")[-1] for name in found.unquantised} == {"x_proj", "dt_proj", "lm_head"}
    assert found.bytes < report(plain).bytes / {"int8": 1.8, "int4": 2.2}[kind]


@KINDS
def test_it_computes_what_its_rounded_weights_say(kind: str, plain: Any, quantised: Any) -> None:
    model, same = quantised(kind), copy.deepcopy(plain)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            if type(weights[name]) is not nn.Parameter:
                parameter.copy_(dequantised(weights[name]))
    assert relative(logits(model), logits(same)) <= RELATIVE
    assert 1e-4 < relative(logits(model), logits(plain)) <= QUANTISED[kind]


@KINDS
def test_steps_chunks_and_padding_give_what_the_forward_pass_gives(kind: str, quantised: Any) -> None:
    model, ids = quantised(kind), some_ids(2, 11, vocab=97)
    assert relative(through_cache(model, ids, [1, 1, 4, 1, 4]), logits(model)) <= RELATIVE
    rows, mask = pad([ids[0], ids[1][:5]])
    with torch.no_grad():
        got = model(rows, attention_mask=mask, use_cache=False).logits
    assert relative(got[1, -5:], logits(model, ids[1:, :5])[0]) <= RELATIVE


@pytest.mark.parametrize("group_size", [64, 128])
def test_layers_that_groups_do_not_divide_stay(folder: Path, group_size: int) -> None:
    settings = quantization_config("int4", group_size=group_size)
    model = HymbaForCausalLM.from_pretrained(folder, quantization_config=settings)
    left = {name.split(".")[-1] for name in report(model).unquantised} - {"x_proj", "dt_proj", "lm_head"}
    # Inputs of width 64, 128 and 96.
    assert left == {"down_proj"} | ({"in_proj", "gate_proj", "up_proj"} if group_size == 128 else set())


def test_everything_can_be_rounded_when_asked(folder: Path, tmp_path: Path, plain: Any) -> None:
    settings = quantization_config("int8", keep=["lm_head"])
    model = HymbaForCausalLM.from_pretrained(folder, quantization_config=settings).eval()
    assert report(model).unquantised == ("lm_head",)
    assert relative(logits(model), logits(plain)) <= QUANTISED["int8"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(HymbaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_kernel_for_single_tokens_gives_what_torchao_gives(folder: Path) -> None:
    model = HymbaForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=quantization_config("int8"))
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 15
    x = torch.randn(2, 1, 64, dtype=torch.bfloat16)
    exact = x.double() @ layers[0].weight.dequantize(torch.float32).double().t()
    with torch.no_grad():
        ours, theirs = layers[0](x), nn.Linear.forward(layers[0], x)
    assert relative(ours.double(), exact) <= relative(theirs.double(), exact) + 1e-4
    ids = some_ids(1, 11, vocab=97)
    assert relative(through_cache(model.eval(), ids, [1, 1, 8, 1]), logits(model, ids)) <= BFLOAT16_RELATIVE
    # Gradients take torchao's way.
    held = x.clone().requires_grad_()
    layers[0](held).float().sum().backward()
    assert held.grad is not None and held.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [10, 16, 24, 48])
def test_single_tokens_of_any_width(width: int) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(width, 40, bias=False, dtype=torch.bfloat16)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    quantization.settle(model := nn.Sequential(layer))
    assert type(model[0]) is Int8Linear
    # What lies behind a row, as behind a part of a wider activation, is none of its business.
    row = torch.full((1, width + 64), torch.nan, dtype=torch.bfloat16)
    row[:, :width] = torch.randn(1, width)
    with torch.no_grad():
        y = model(row[:, :width])
    exact = row[:, :width].double() @ layer.weight.dequantize(torch.float32).double().t()
    assert relative(y.double(), exact) <= BFLOAT16_RELATIVE


# Files.


@pytest.mark.parametrize(("kind", "size"), [("int8", "30KB"), ("int4", "5GB")])
def test_files(kind: str, size: str, quantised: Any, tmp_path: Path) -> None:
    """Saved, loaded, saved again: the same outputs to the last bit; the model that was saved is as it was."""
    model = quantised(kind)
    before, held = logits(model), dict(model.named_parameters())
    model.save_pretrained(tmp_path / "one", max_shard_size=size)
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(logits(loaded), before) and report(loaded) == report(model)
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(HymbaForCausalLM.from_pretrained(tmp_path / "two")), before)
    stored = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "torchao" and "lm_head" in stored["modules_to_not_convert"]
    if size == "30KB":
        assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 3


@KINDS
def test_files_that_are_not_whole(kind: str, quantised: Any, tmp_path: Path) -> None:
    quantised(kind).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("_weight_qdata"))
    group = gone.removesuffix("qdata")
    cases = {
        "model.layers.0.mamba.D.0: missing": {k: v for k, v in tensors.items() if k != "model.layers.0.mamba.D.0"},
        f"{gone.removesuffix('._weight_qdata')}.weight: missing": {
            k: v for k, v in tensors.items() if not k.startswith(group)
        },
        "not a tensor of this model": tensors | {"model.layers.9.mamba.in_proj._weight_qdata": torch.zeros(2)},
        "expected shape": tensors | {"model.layers.0.mamba.D.0": torch.zeros(3)},
    }
    for message, changed in cases.items():
        save_file(changed, file, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nan_is_seen_before_it_is_rounded_away(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy.deepcopy(plain)
    with torch.no_grad():
        broken.model.layers[1].mixer.out_proj.weight[3, 5] = float("nan")
    broken.save_pretrained(tmp_path)
    told: list[str] = []
    monkeypatch.setattr("hymba.hub.logger.warning", told.append)
    HymbaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization_config("int8"))
    assert len(told) == 1 and "model.layers.1.mamba.out_proj.weight" in told[0]


def test_weights_laid_out_for_another_device() -> None:
    layer = nn.Linear(2, 2)

    class Int4TilePackedTo4dTensor(Tensor):
        pass

    layer._parameters["weight"] = torch.zeros(2, 2).as_subclass(Int4TilePackedTo4dTensor)  # type: ignore[assignment]
    with pytest.raises(QuantizationError, match="saved on a GPU run on GPUs only"):
        quantization.settle(nn.ModuleDict({"in_proj": layer}))


# Beside the library's other ways to run.


def test_prepacking_and_the_fused_step_leave_rounded_weights_alone(quantised: Any, folder: Path) -> None:
    assert why_not_fused(quantised("int4")) == "model.layers.0.mixer.in_proj.weight is a Int4OpaqueTensor"
    assert why_not_fused(quantised("int8")) == "model.layers.0.mixer.in_proj is a Int8Linear"
    if refusal(torch.bfloat16) is not None:
        pytest.skip(f"prepacking: {refusal(torch.bfloat16)}")
    model = HymbaForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=quantization_config("int8"))
    before = logits(model)
    with prepacked_linears(model) as packed:
        assert packed.layers == len(report(model).unquantised)
        assert relative(logits(model), before) <= BFLOAT16_RELATIVE


def test_adapters_learn_and_merge_on_int8(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'hymba[finetune]'")
    model = HymbaForCausalLM.from_pretrained(folder, quantization_config=quantization_config("int8"))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "out_proj", "down_proj"], r=4))
    ids, losses = some_ids(2, 11, vocab=97), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    learned = logits(model)
    merged = model.merge_and_unload()
    # Rounded again with the adapters in.
    assert report(merged).kinds == {"Int8Tensor": 15}
    assert relative(logits(merged), learned) <= QUANTISED["int8"]


# Refusals.


def test_wrong_settings() -> None:
    for settings, message in (
        ({"kind": "int3"}, "quantization='int3': allowed: int8, int4"),
        ({"kind": "int8", "backend": "gptq"}, "backend='gptq': allowed: torchao, bitsandbytes"),
        ({"kind": "int4", "group_size": 48}, "group_size=48: allowed: 32, 64, 128"),
        ({"kind": "int4", "group_size": 64, "config": small_config()}, "no layer .16, 32, 24.; allowed"),
    ):
        with pytest.raises(QuantizationError, match=message):
            quantization_config(**settings)


def test_configurations_of_one_s_own(folder: Path) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    eight = Int8WeightOnlyConfig(set_inductor_config=False)
    given = TorchAoConfig(eight)
    left = report(AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)).unquantised
    assert {name.split(".")[-1] for name in left} == {"lm_head", "x_proj", "dt_proj"}
    assert given.modules_to_not_convert is None  # the caller's object is left alone
    assert quantization.completed(BitsAndBytesConfig(load_in_8bit=True)).llm_int8_skip_modules == list(
        quantization.KEEP
    )
    for chosen in (
        TorchAoConfig(eight, modules_to_not_convert=["lm_head"]),
        TorchAoConfig(eight, include_input_output_embeddings=True),
        {"quant_method": "torchao"},
    ):
        assert quantization.completed(chosen) is chosen
    if importlib.util.find_spec("mslk") is None:
        with pytest.raises(QuantizationError, match=r"needs mslk and a GPU; allowed on this machine: .*\"int4\""):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(Int4WeightOnlyConfig(32)))


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchao is not installed; pip install 'hymba\[quantization\]'"):
        quantization_config("int8")
    with pytest.raises(ImportError, match="bitsandbytes is not installed; pip install bitsandbytes"):
        quantization_config("int8", backend="bitsandbytes", device="cuda")
    result = CliRunner().invoke(app, ["generate", "def ", "--quantization", "int8"])
    assert result.exit_code == 2
    assert "--quantization int8: torchao is not installed; pip install 'hymba[quantization]'" in result.output
    with pytest.raises(ImportError, match=r"by torchao, which is not installed; pip install 'hymba\[quantization\]'"):
        quantization.require("torchao")
    quantization.require(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(QuantizationError, match="on cpu: allowed: cuda"):
        quantization_config("int8", backend="bitsandbytes")


def test_the_quantiser_of_a_configuration() -> None:
    assert quantization.method(small_config()) is None
    assert quantization.method(SimpleNamespace(quantization_config={"quant_method": "gptq"})) == "gptq"
    assert quantization.method(SimpleNamespace(quantization_config=quantization_config("int8"))) == "torchao"


# The command line.


def test_generate() -> None:
    result = CliRunner().invoke(app, ["generate", "def ", "--quantization", "int4", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("def ")


def test_generate_from_files_that_are_quantised(folder: Path, tmp_path: Path, quantised: Any) -> None:
    quantised("int8").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["generate", "def ", "--model", str(tmp_path), "--quantization", "int4"])
    assert result.exit_code == 2
    assert "--quantization int4: the checkpoint's weights are quantised already (torchao)" in result.output
