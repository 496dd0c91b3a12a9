"""The `hymba` command as a whole: help, which model, one-line errors, exit codes, terminals."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands.running import error, hymba

from hymba import HymbaForCausalLM
from hymba.commands import errors

# Help and usage.


def test_help_names_the_commands() -> None:
    code = "import sys; sys.argv = ['hymba', '--help']; from hymba.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("generate", "chat", "serve", "inspect", "train", "ablate", "analyze", "convert", "env"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", ["generate", "chat", "serve", "inspect", "train", "ablate", "analyze", "convert", "env"]
)
def test_every_command_has_help(command: str) -> None:
    assert f"Usage: hymba {command}" in " ".join(hymba(command, "--help").stdout.split()).replace("root", "hymba")


def test_version() -> None:
    assert hymba("--version").stdout.startswith("hymba 0.")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["genrate"], ["genrate", "generate"]),
        (["generate", "x", "--max-new-token", "3"], ["--max-new-token", "--max-new-tokens"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens many", "integer"]),
        (["generate", "x", "--max-new-tokens", "0"], ["--max-new-tokens 0", "1"]),
        (["generate", "x", "--top-p=1.5"], ["--top-p 1.5", "1"]),
        (["generate", "x", "--dtype", "float23"], ["--dtype float23", "'float32'", "'bfloat16'"]),
        (["generate", "x", "--cache-implementation", "fast"], ["--cache-implementation fast", "'static'"]),
        (["generate"], ["PROMPT", "--prompts-file", "neither"]),
        (["generate", "x", "--prompts-file", "y"], ["PROMPT", "--prompts-file", "both"]),
        (["generate", ""], ["PROMPT is empty"]),
        (["generate", "-"], ["stdin is empty"]),
        (["chat", " "], ["PROMPT is empty"]),
        (["train"], ["CONFIG"]),
        (["train", "no/such.yaml"], ["CONFIG no/such.yaml", "no such file"]),
        (["inspect", "--length", "-1"], ["--length -1", "0"]),
        (["inspect", "--model", "no such"], ["--model no such", "no such folder", "hub id"]),
    ],
)
def test_usage_errors_are_one_line_with_value_and_way_out(args: list[str], parts: list[str]) -> None:
    line = error(*args)
    assert all(part in line for part in parts), line


# Models.


def test_the_checkpoint_in_the_package_is_the_default(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba.commands.models.files", lambda _: tmp_path)
    assert "no checkpoint inside" in error("inspect")
    shutil.copytree(folder, tmp_path / "assets" / "default")
    assert hymba("generate", "def ", "--max-new-tokens", 4).stdout.startswith("def ")
    assert json.loads(hymba("inspect", "--json").stdout)["model"] == str(tmp_path / "assets" / "default")


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no config.json" in error("inspect", "-m", tmp_path)
    assert "a file; give the folder" in error("inspect", "-m", folder / "config.json")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    assert "model_type='llama'; allowed: 'hymba'" in error("inspect", "-m", tmp_path)
    config.write_text('{"model_type": ')
    assert "config.json cannot be read" in error("inspect", "-m", tmp_path)
    config.write_text('{"model_type": "hymba", "num_experts": 4}')
    assert "num_experts=4 is not supported; allowed: 1" in error("generate", "x", "-m", tmp_path)
    shutil.copy(folder / "config.json", config)
    assert "no tokenizer can be loaded from it; needed: tokenizer.json" in error("generate", "x", "-m", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert "no model.safetensors" in error("generate", "x", "-m", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50_000])
    assert "truncated" in error("generate", "x", "-m", tmp_path)
    # Offline, as every test run is.
    line = error("inspect", "-m", "no/such")
    assert "no such folder, and as a hub id it cannot be fetched" in line


def test_devices_that_are_not_there(folder: Path) -> None:
    assert "--device warp: allowed: auto, cpu, cuda" in error("generate", "x", "-m", folder, "--device", "warp")
    many = f"cuda:{torch.cuda.device_count()}"
    line = error("generate", "x", "-m", folder, "--device", many)
    assert f"--device {many}: this " in line
    assert "use auto or cpu" in line


def test_dtypes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    generate = HymbaForCausalLM.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.dtype)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(HymbaForCausalLM, "generate", watched)
    for dtype in ("auto", "bfloat16"):
        hymba("generate", "x", "-m", folder, "--max-new-tokens", 2, "--dtype", dtype, "--device", "cpu")
    assert seen == [torch.float32, torch.bfloat16]


# Messages.


def test_messages() -> None:
    assert errors.message(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert errors.message(RuntimeError("a\n b")) == "RuntimeError: a b (run again with --debug to see where)"
    assert errors.message(errors.UsageError("x=1; allowed: 2")) == "x=1; allowed: 2"
    assert errors.message(KeyboardInterrupt()) == "interrupted"
    assert errors.exit_code(KeyboardInterrupt()) == 130
    assert errors.exit_code(errors.UsageError()) == 2
    assert errors.exit_code(ValueError()) == 1


def test_control_characters_are_shown_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from hymba.commands.terminal import say

    written: list[str] = []
    out = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", out)
    say("a\x1b[31m\n\té\x9b")
    assert written == ["a\\x1b[31m\n\té\\x9b"]


def test_spinner_and_bar_only_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hymba.commands.terminal import progress, status

    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with status("loading [a]"):
            pass
        with progress(3, shown=True) as advance:
            advance(2)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("loading [a]" in shown.err) == ("2/3" in shown.err) == terminal


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hymba", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hymba", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("hymba 0.")
