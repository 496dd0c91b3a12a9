"""`hymba convert`: every direction bit for bit, folders that load without this package, refusals, interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, some_ids
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from hymba import HymbaConfig, HymbaForCausalLM, conversion
from hymba.cli import app
from hymba.conversion import ConversionError, convert
from hymba.experiments.checkpoints import OutputError
from hymba.hub import CheckpointError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in bfloat16 with a tokenizer's files and a record."""
    folder = tmp_path_factory.mktemp("source") / "released"
    build(dtype=torch.bfloat16, torch_dtype="bfloat16").save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    (folder / "training.json").write_text("{}")
    (folder / "optimizer.pt").write_text("left where it is")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# Every direction.


def test_round_trips_are_bit_for_bit(released: Path, tmp_path: Path) -> None:
    """From each of layout and number of files to each other one, and through float32 and back."""
    steps: list[dict[str, Any]] = [
        {"layout": "remote-code"},
        {"layout": "released", "max_shard_size": "9KB"},
        {"layout": "remote-code", "max_shard_size": "9KB"},
        {"layout": "remote-code", "dtype": "float32"},
        {"layout": "released", "max_shard_size": "20KB"},
        {"layout": "released"},
        {"layout": "released", "max_shard_size": "9KB", "dtype": "bfloat16"},
        {"layout": "remote-code"},
    ]
    folders = [released, *(tmp_path / str(i) for i in range(len(steps)))]
    for step, (before, after) in zip(steps, pairwise(folders), strict=True):
        made = convert(before, after, **step)
        config = fields(after)
        sharded = "max_shard_size" in step
        assert (after / "model.safetensors").exists() != sharded
        assert (after / "model.safetensors.index.json").exists() == sharded == (len(made.files) > 1)
        assert made.dtypes == {config["torch_dtype"]: len(tensors(after))}
        assert made.bytes == sum(tensor.nbytes for tensor in tensors(after).values())
        remote = step["layout"] == "remote-code"
        assert (after / "modeling_hymba.py").exists() == (after / "configuration_hymba.py").exists() == remote
        assert config["auto_map"]["AutoConfig"].endswith("configuration_hymba.HymbaConfig")
        assert ("--" in config["auto_map"]["AutoConfig"]) != remote
        assert {path.name for path in after.glob("t*.json")} == {"tokenizer.json", "training.json"}
        assert (after / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
        assert not (after / "optimizer.pt").exists()
        if "dtype" not in step:
            same(before, after)
        assert all("config.json" in os.listdir(folder) for folder in folders if folder.exists())
    same(released, folders[-1])
    wide = {name: tensor.float() for name, tensor in tensors(released).items()}
    assert all(torch.equal(tensor, wide[name]) for name, tensor in tensors(folders[4]).items())
    assert set(os.listdir(tmp_path)) == {folder.name for folder in folders[1:]}
    left = {k: v for k, v in fields(folders[6]).items() if k != "torch_dtype"}
    assert left == {k: v for k, v in fields(folders[6 - 4]).items() if k != "torch_dtype"}


def test_tensors_of_several_dtypes_keep_them(tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mixer.mamba.A_log.data = layer.mixer.mamba.A_log.data.float()
    model.save_pretrained(tmp_path / "mixed")
    made = convert(tmp_path / "mixed", tmp_path / "again")
    assert made.dtypes["float32"] == 4 and made.dtypes["bfloat16"] > 4
    same(tmp_path / "mixed", tmp_path / "again")


def test_untied_and_bare_checkpoints(tmp_path: Path) -> None:
    model = build(dtype=torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    convert(tmp_path / "untied", tmp_path / "one", dtype="float16")
    assert tensors(tmp_path / "one")["lm_head.weight"].dtype == torch.float16
    model = build(dtype=torch.float32)
    model.model.save_pretrained(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "two")
    assert torch.equal(
        HymbaForCausalLM.from_pretrained(tmp_path / "two")(some_ids(1, 5)).logits, model(some_ids(1, 5)).logits
    )


# Who can load it.

_LOADER = """
import json, sys
remote, linked, out = sys.argv[1:]
sys.modules["hymba"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
errors = []
for auto in (AutoConfig, AutoModelForCausalLM):
    try:
        auto.from_pretrained(remote, trust_remote_code=True)
    except ImportError as error:
        errors.append(str(error))
del sys.modules["hymba"]
import torch
ids = torch.arange(7)[None]
logits = {}
for name, folder in (("linked", linked), ("remote", remote)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    logits[name] = model(ids).logits.tolist()
body = AutoModel.from_pretrained(remote, trust_remote_code=True)
model.save_pretrained(out)
print(json.dumps({"errors": errors, "class": type(model).__module__, "body": type(body).__name__, "logits": logits}))
"""


def test_a_process_that_has_never_imported_the_package(released: Path, tmp_path: Path) -> None:
    """`trust_remote_code` finds this package; without it, the error says what to install.

    The released layout links to the code of the released repository, for which the hub's cache holds a stand-in.
    """
    convert(released, tmp_path / "remote", layout="remote-code")
    convert(released, tmp_path / "linked")
    snapshot = tmp_path / "hub" / "models--nvidia--Hymba-1.5B-Base" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c" * 40)
    for name in ("configuration_hymba.py", "modeling_hymba.py"):
        shutil.copy(tmp_path / "remote" / name, snapshot / name)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    arguments = [str(tmp_path / "remote"), str(tmp_path / "linked"), str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["errors"]) == 2
    assert all("hymba package, which is not installed here: pip install it" in error for error in found["errors"])
    assert found["class"] == "hymba.model" and found["body"] == "HymbaModel"
    want = HymbaForCausalLM.from_pretrained(released)(torch.arange(7)[None]).logits
    assert torch.equal(torch.tensor(found["logits"]["remote"]).to(want.dtype), want)
    assert found["logits"]["linked"] == found["logits"]["remote"]
    # Saved again, it is a plain folder: no code of the package beside it.
    assert not list((tmp_path / "saved").glob("*.py")) and "auto_map" not in fields(tmp_path / "saved")


def test_the_reference_is_not_promised_what_it_cannot_read(tmp_path: Path) -> None:
    layers = [{"mixer": "hybrid"}, {"mixer": "mamba"}]
    nothing = {"sliding_window": None, "global_attn_idx": None, "kv_reuse_group": None, "num_hidden_layers": 2}
    model = build(dtype=torch.float32, layer_pattern=layers, **nothing)
    model.save_pretrained(tmp_path / "pattern")
    made = convert(tmp_path / "pattern", tmp_path / "one")
    assert len(made.notes) == 1 and "layer_pattern, which the reference cannot read" in made.notes[0]
    assert "auto_map" not in fields(tmp_path / "one")
    assert convert(tmp_path / "one", tmp_path / "two", layout="remote-code").notes == ()
    same(tmp_path / "pattern", tmp_path / "two")


# Sources and outputs that are refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': allowed: float32, bfloat16, float16"),
        ({"layout": "gguf"}, "layout='gguf': allowed: released, remote-code"),
        ({"max_shard_size": "2"}, "max_shard_size='2': allowed: a number with KB, MB or GB"),
    ],
)
def test_wrong_settings(released: Path, tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(released, tmp_path / "out", **settings)
    assert not os.listdir(tmp_path)


def test_sources_that_are_no_checkpoints(released: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"no config\.json in it; allowed"):
        convert(tmp_path / "run", tmp_path / "out")
    shutil.copy(released / "config.json", tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ConversionError, match="there are checkpoints in it: checkpoint-3"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "checkpoint-3" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"python scripts/bin_to_safetensors\.py FOLDER"):
        convert(tmp_path / "run" / "checkpoint-3", tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"holds an adapter, not a model; merge it .* .hymba merge .*adapter"):
        convert(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"torn': its config.json cannot be read"):
        convert(tmp_path / "torn", tmp_path / "out")
    rounded = shutil.copytree(released, tmp_path / "rounded")
    changed = fields(rounded) | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (rounded / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConversionError, match=r"quantised .bitsandbytes., and what was rounded cannot be undone"):
        convert(rounded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_in_the_way(released: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    convert(released, tmp_path / "folder")
    for output, message in (
        (tmp_path / "file", "a file; allowed: a folder's name"),
        (tmp_path / "folder", r"exists and is not empty; allowed: another name, or overwrite \(--overwrite\)"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(released, output)
    (tmp_path / "folder" / "notes.txt").write_text("goes with the old checkpoint")
    convert(released, tmp_path / "folder", dtype="float32", overwrite=True)
    assert fields(tmp_path / "folder")["torch_dtype"] == "float32"
    assert not (tmp_path / "folder" / "notes.txt").exists()
    with pytest.raises(ConversionError, match="holds the source"):
        convert(tmp_path / "folder", tmp_path / "folder", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ConversionError, match="is no checkpoint folder, and is not overwritten"):
        convert(released, tmp_path / "thesis", overwrite=True)
    assert set(os.listdir(tmp_path)) == {"file", "folder", "thesis"}


def test_values_beyond_float16(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mixer.out_proj.weight[0, 0] = 1e6
        model.model.layers[1].mixer.out_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(ConversionError, match=r"'float16': model\.layers\.2\.mamba\.out_proj\.weight hold values"):
        convert(tmp_path / "wide", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_nan_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mixer.mamba.D[2] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    told: list[str] = []
    monkeypatch.setattr("hymba.hub.logger.warning", told.append)
    made = convert(tmp_path / "broken", tmp_path / "out", dtype="bfloat16")
    assert made.nan == ("model.layers.1.mamba.D.0",)
    assert len(told) == 1 and "holds NaN in 1 tensors: model.layers.1.mamba.D.0" in told[0]


# Interruptions.


def test_a_full_disk(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(released, tmp_path / "out")
    before = tensors(tmp_path / "out")

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        for output, overwrite in ((tmp_path / "new", False), (tmp_path / "out", True)):
            with pytest.raises(OutputError, match=r"No space left on device; .* MB are free there"):
                convert(released, output, dtype="float32", overwrite=overwrite)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(OutputError, match=r"the weights take 0.0 MB and 0.0 MB are free there; make room"):
            convert(released, tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_control_c(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: Any, path: Any, metadata: Any = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9(released: Path, tmp_path: Path) -> None:
    """A process that dies while it writes leaves no OUTPUT; the next one clears up."""
    child = os.fork()
    if not child:
        try:
            conversion._lay_out = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            convert(released, tmp_path / "out")
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / "out").exists() and len(os.listdir(tmp_path)) == 1
    convert(released, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    same(released, tmp_path / "out")


# The command.


def test_the_command(released: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "out")
    result = run(app, ["convert", str(released), out, "--layout", "remote-code", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "remote-code layout, model.safetensors, 0.1 MB, " in result.output and "in float32" in result.output
    for arguments, message in (
        ([str(released), out], "OUTPUT '"),
        ([str(tmp_path / "no"), out], f"SOURCE '{tmp_path / 'no'}': no such folder"),
        ([str(released), f"{out}2", "--max-shard-size", "2"], "--max-shard-size '2': allowed:"),
        ([str(released), f"{out}2", "--dtype", "int8"], "--dtype int8: 'int8' is not one of"),
    ):
        result = run(app, ["convert", *arguments])
        assert result.exit_code == 2 and message in result.output, result.output
        assert "Traceback" not in result.output


def test_the_checkpoint_in_the_package(tmp_path: Path) -> None:
    """What `hymba train` has exported: its record comes along, and the tensors are the file's to the last bit."""
    embedded = Path(conversion.__file__).parent / "assets" / "default"
    convert(embedded, tmp_path / "out")
    same(embedded, tmp_path / "out")
    assert (tmp_path / "out" / "training.json").read_bytes() == (embedded / "training.json").read_bytes()
    assert HymbaConfig.from_pretrained(tmp_path / "out").layers == HymbaConfig.from_pretrained(embedded).layers
