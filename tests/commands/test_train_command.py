"""`hymba train` as a command: arguments, exit codes, names in its files; its runs are tested in tests/experiments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands.running import error, hymba
from safetensors import safe_open

from hymba.commands import errors


def test_train_hands_its_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    result = SimpleNamespace(status="finished")
    monkeypatch.setattr("hymba.experiments.train.main", lambda *args: calls.append(args) or result)
    config = tmp_path / "tiny.yaml"
    config.write_text(f"run: {{output: {tmp_path / 'run'}}}")
    hymba("train", config, "run.steps=3", "run.seed=1")
    assert calls == [(config, ["run.steps=3", "run.seed=1"])]
    result.status = "interrupted"
    hymba("train", config, code=errors.INTERRUPTED)
    assert "'steps' is not a setting; write KEY=VALUE" in error("train", config, "steps")


def test_a_training_saves_by_the_released_names(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("run: {output: run}")
    code = (
        "import sys, types; sys.argv = ['hymba', 'train', 'tiny.yaml']\n"
        "from hymba.cli import app\n"
        "def main(*_):\n"
        "    from hymba.model import HymbaConfig, HymbaForCausalLM\n"
        "    sizes = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)\n"
        "    HymbaForCausalLM(HymbaConfig(vocab_size=9, intermediate_size=8, **sizes)).save_pretrained('out')\n"
        "    return types.SimpleNamespace(status='finished')\n"
        "sys.modules['hymba.experiments.train'] = types.SimpleNamespace(main=main)\n"
        "app()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.memory_tokens", "model.layers.0.mamba.A_log.0", "model.final_layernorm.weight"} <= names


def test_a_wrong_setting_of_a_training_is_a_usage_error(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("run: {stepz: 3}")
    line = error("train", config)
    assert "stepz" in line
    assert "steps" in line
