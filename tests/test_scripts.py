"""The scripts around checkpoints: random ones, converted ones, and what loading and decoding are measured with."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import build, small_config, some_ids
from safetensors.torch import load_file
from torch import Tensor

from hymba import HymbaConfig, HymbaForCausalLM, HymbaModel, hub, loading
from hymba.hub import CheckpointError

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A folder with the small configuration alone."""
    folder = tmp_path / "config"
    small_config().save_pretrained(folder)
    return folder


# Random checkpoints.


def test_the_shipped_configuration_is_the_released_one() -> None:
    config = HymbaConfig.from_pretrained(script("random_checkpoint").DEFAULT_CONFIG)
    config.validate_architecture()
    assert (config.num_hidden_layers, config.hidden_size, config.num_memory_tokens) == (32, 1600, 128)
    total = sum(shape.numel() for _, _, shape in script("random_checkpoint").parameters(config))
    assert total == 1_522_797_824


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_random_checkpoint_loads(tmp_path: Path, small_folder: Path, shards: int, dtype: str) -> None:
    out = tmp_path / "made" / "here"
    script("random_checkpoint").main(
        [str(out), "--config", str(small_folder), "--dtype", dtype, "--shards", str(shards)]
    )
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == (
        ["model.safetensors"] if shards == 1 else [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    )
    assert not list(tmp_path.rglob("*.tmp"))
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert max(sizes) < 2 * min(sizes)
    model = HymbaForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert torch.isfinite(model(some_ids(1, 9)).logits).all()
    # The initialisation table: norms of ones, the S4D spectrum, step sizes in their range.
    mamba = model.model.layers[0].mixer.mamba
    assert torch.equal(model.model.final_norm.weight, torch.ones_like(model.model.final_norm.weight))
    torch.testing.assert_close(mamba.A_log.float().exp()[0], torch.arange(1.0, 5), rtol=1e-2, atol=0)
    steps = torch.nn.functional.softplus(mamba.dt_bias.float())
    assert steps.min() > 0.9e-3 and steps.max() < 0.11
    assert 0.8 < model.model.meta_tokens.weight.float().std() < 1.2


def test_fewer_layers_of_the_release(tmp_path: Path) -> None:
    maker = script("random_checkpoint")
    fields = maker.cut_layers(json.loads(maker.DEFAULT_CONFIG.read_text()), 17)
    config = HymbaConfig.from_dict(fields)
    config.validate_architecture()
    whole = HymbaConfig.from_pretrained(maker.DEFAULT_CONFIG)
    assert config.layers == whole.layers[:17]
    assert config.global_attn_idx == [0, 15] and len(config.conv_dim) == len(config.layer_type) == 17


def test_a_random_checkpoint_is_made_whole_or_not_at_all(
    tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = script("random_checkpoint")
    out = tmp_path / "out"
    written = []

    def fails(file: Any, tensors: Any, **options: Any) -> int:
        written.append(file.write(b"half"))
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(maker, "write_shard", fails)
        with pytest.raises(OSError, match="no space"):
            maker.main([str(out), "--config", str(small_folder)])
    assert written and not out.exists() and not list(tmp_path.glob(".out*"))

    maker.main([str(out), "--config", str(small_folder), "--seed", "7"])
    first = load_file(out / "model.safetensors")
    with pytest.raises(SystemExit, match="not an empty folder"):
        maker.main([str(out), "--config", str(small_folder)])
    again = tmp_path / "again"
    again.mkdir()
    maker.main([str(again), "--config", str(small_folder), "--seed", "7"])
    second = load_file(again / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "0"], "allowed: 1 to"),
        (["--layers", "40"], "--layers 40: allowed: 1 to 4"),
        (["--config", "/nowhere"], "--config /nowhere"),
    ],
)
def test_bad_options_of_a_random_checkpoint(
    tmp_path: Path, small_folder: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script("random_checkpoint").main([str(tmp_path / "out"), "--config", str(small_folder), *options])
    assert not (tmp_path / "out").exists()


# Pickles.


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint folder with its tensors in one pickle, the tied head among them."""
    folder = tmp_path / "pickled"
    build(dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def shard(folder: Path) -> None:
    """The pickle of a folder as three shards with an index."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors.pop("lm_head.weight", None)
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    weight_map = {tensor: names[i % 3] for i, tensor in enumerate(tensors)}
    for name in names:
        torch.save({t: v for t, v in tensors.items() if weight_map[t] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "pytorch_model.bin").unlink()


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_refused_and_converted(pickled: Path, sharded: bool) -> None:
    if sharded:
        shard(pickled)
    with pytest.raises(CheckpointError, match="bin_to_safetensors"):
        HymbaForCausalLM.from_pretrained(pickled)
    done = run("bin_to_safetensors", pickled)
    assert done.returncode == 0, done.stderr
    model = HymbaForCausalLM.from_pretrained(pickled)
    for name, parameter in build(dtype=torch.bfloat16).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert (pickled / "model.safetensors.index.json").is_file() == sharded
    assert "lm_head.weight" not in hub.read_header(next(pickled.glob("*.safetensors")))
    assert not list(pickled.glob(".*"))
    with pytest.raises(SystemExit, match="already"):
        script("bin_to_safetensors").main([str(pickled)])


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.x": Evil()}, "not a file of tensors alone"),
        ([torch.ones(2)], "holds a list"),
        ({"model.x": 3}, "entry 'model.x' is a int"),
    ],
)
def test_pickles_of_other_things(
    tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match=message):
        script("bin_to_safetensors").main([str(tmp_path)])
    assert "code ran" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_folders_without_pickles(tmp_path: Path, pickled: Path) -> None:
    converter = script("bin_to_safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="found: nothing"):
        converter.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="no such folder"):
        converter.main([str(tmp_path / "nowhere")])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1})[:7])
    with pytest.raises(SystemExit, match="not a file of tensors alone"):
        converter.main([str(tmp_path / "junk")])
    shard(pickled)
    (pickled / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(SystemExit, match="1 of 3 shards are missing: pytorch_model-00002"):
        converter.main([str(pickled)])


def test_a_conversion_that_fails_leaves_nothing(pickled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = script("bin_to_safetensors")
    shard(pickled)
    before = sorted(pickled.iterdir())
    save = converter.save_file

    def fails(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        if "00003-of" in path.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(converter, "save_file", fails)
    with pytest.raises(SystemExit, match="no space"):
        converter.main([str(pickled)])
    assert sorted(pickled.iterdir()) == before


# Loading.


def as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading._Files, "fit", lambda *args: False)


def described(model: Any) -> dict[str, Any]:
    """What there is to compare about two loaded models besides their tensors."""
    return {
        "training": model.training,
        "config": model.config.to_dict(),
        "generation": getattr(model, "generation_config", None) and model.generation_config.to_dict(),
        "path": model.name_or_path,
        "buffers": dict(model.named_buffers()),
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "tied": model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no meta tokens": {"num_memory_tokens": 0},
    "query norms": {"kq_norm": "perhead-rms", "mlp_hidden_act": "relu2", "mamba_proj_bias": True},
}


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("saved", ["whole", "bare", "sharded"])
@pytest.mark.parametrize("cls", [HymbaForCausalLM, HymbaModel])
def test_assigning_files_is_loading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], saved: str, cls: type
) -> None:
    """The short way from files to parameters gives the model that transformers' own loader gives."""
    model = build(dtype=torch.float32, **fields)
    # Tensors of a precision of their own keep it.
    model.model.layers[1].mixer.mamba.A_log.data = model.model.layers[1].mixer.mamba.A_log.data.double()
    target = model.model if saved == "bare" else model
    target.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if saved == "sharded" else {}))
    if saved == "bare" and fields.get("tie_word_embeddings") is False and cls is HymbaForCausalLM:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
            cls.from_pretrained(tmp_path)
        return
    used = []
    load = loading.load_file
    monkeypatch.setattr(loading, "load_file", lambda path: used.append(path) or load(path))
    short, short_info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert len(used) == len(list(tmp_path.glob("*.safetensors"))) >= (2 if saved == "sharded" else 1)
    as_transformers_does(monkeypatch)
    long, long_info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert {k: set(v) for k, v in short_info.items()} == {k: set(v) for k, v in long_info.items()}
    assert described(short) == described(long)
    ours, theirs = short.state_dict(), long.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name

    short.save_pretrained(tmp_path / "short")
    long.save_pretrained(tmp_path / "long")
    a, b = load_file(tmp_path / "short" / "model.safetensors"), load_file(tmp_path / "long" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"torch_dtype": torch.float32},
        {"key_mapping": {"^model.final_layernorm": "model.final_norm"}},
        {"device_map": "meta"},
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
    ],
    ids=str,
)
def test_what_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    build(dtype=torch.bfloat16, tie_word_embeddings=False).save_pretrained(tmp_path / "saved")
    used = []
    load = loading.load_file
    monkeypatch.setattr(loading, "load_file", lambda path: used.append(path) or load(path))
    if "disk" in str(options):
        options = {**options, "offload_folder": str(tmp_path / "offload")}
    HymbaForCausalLM.from_pretrained(tmp_path / "saved", **options)
    assert not used
    HymbaForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    HymbaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert len(used) == 2


def test_mapped_weights_are_the_models_own(tmp_path: Path) -> None:
    """Training a mapped model writes to its memory and never to the file."""
    build(dtype=torch.float32).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = HymbaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)
    again = HymbaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.get_parameter(name), p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_is_told_from_infinities(dtype: torch.dtype) -> None:
    tensor = torch.full((100, 7), torch.finfo(dtype).max, dtype=dtype)
    assert not hub.holds_nan(tensor)
    tensor[3, 3], tensor[60, 2] = torch.inf, -torch.inf
    assert not hub.holds_nan(tensor)
    tensor[99, 6] = torch.nan
    assert hub.holds_nan(tensor)
    assert not hub.holds_nan(torch.empty(0, dtype=dtype))


# Measurements.


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_measure_loading(tmp_path: Path) -> None:
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    done = run("measure_loading", tmp_path, "--repeats", 1)
    found = last_json(done)
    # A tiny file shows nothing but overheads; that the numbers are there and judged is all there is to test.
    assert done.returncode == (0 if found["within"] else 1)
    assert set(found["ratios"]) == set(found["limits"]) == {"seconds", "bytes"}
    assert "peak memory is" in done.stdout and "limit 1.5" in done.stdout
    assert "no *.safetensors" in run("measure_loading", tmp_path / "nowhere").stderr


def test_measure_cpu_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(dtype=torch.bfloat16, tie_word_embeddings=False).save_pretrained(tmp_path)
    measure = script("measure_cpu_decode")
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    model = HymbaForCausalLM.from_pretrained(tmp_path)
    whole = sum(p.nbytes for p in model.parameters())
    unread = model.model.embed_tokens.weight.nbytes + model.model.meta_tokens.weight.nbytes
    assert measure.weight_bytes(model) == whole - unread

    arguments = [str(tmp_path), "--prompt-tokens", "5", "--new-tokens", "4", "--rounds", "1"]
    status = measure.main(arguments)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (0 if found["enough"] else 1)
    for way in ("plain", "prepacked"):
        result = found[way]
        assert result["share"] == pytest.approx(result["weights_gb_s"] / result["copy_gb_s"])
    assert found["difference"] < measure.ROUNDING

    # No number from a model that computes something else.
    monkeypatch.setattr(measure, "ROUNDING", 0.0)
    assert measure.main(arguments) == 1
    assert "tokens/s" not in capsys.readouterr().out
