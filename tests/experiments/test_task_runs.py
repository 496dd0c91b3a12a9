"""`hymba train` on a synthetic task: settings, results in the run's folder, exact resuming."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hymba.experiments import callbacks
from hymba.experiments.settings import SettingsError, load_settings
from hymba.experiments.tasks import make_task
from hymba.experiments.tasks.base import TaskRows
from hymba.experiments.tasks.mqar import MQAR
from hymba.experiments.train import main
from hymba.experiments.trainer import HymbaTrainer

TASK = {"name": "mqar", "pairs": [1, 2], "length": 12, "vocabulary": 8, "test_rows": 4}
SETTINGS = {
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
        "mamba_d_state": 4, "rope_type": "default",
    },
    "data": {"task": TASK},
    "run": {
        "steps": 6, "batch_size": 2, "gradient_accumulation": 2, "device": "cpu", "threads": 1, "log_every": 3,
        "save_every": 2, "tensorboard": False, "evaluate_every": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    path.write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return main(config, [f"run.output={tmp_path_factory.mktemp('whole') / 'run'}"])


def entries(output: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def test_a_run_ends_with_the_tasks_results(whole):
    assert (whole.status, whole.step, whole.passes, whole.bits_per_byte) == ("finished", 6, 0.0, None)
    record = json.loads((whole.output / "results.json").read_text())
    assert record == {"task": TASK, "seed": 0, "step": 6, "results": whole.results}
    assert whole.results["lengths"] == [12, 24, 48]
    exported = json.loads((whole.exported / "training.json").read_text())
    assert exported["held_out"] == whole.results
    assert exported["corpus"] is None
    settings = json.loads((whole.exported / "config.json").read_text())
    assert settings["vocab_size"] == make_task(**TASK).vocab_size
    assert not list(whole.output.rglob("*tokenizer*"))
    assert not list(whole.output.glob(".*"))


def test_the_log_counts_the_tasks_tokens_and_its_accuracy(whole):
    assert [step for step, _ in entries(whole.output, "loss")] == [3, 6]
    assert [step for step, _ in entries(whole.output, "accuracy")] == [4]
    assert all(rate > 0 for _, rate in entries(whole.output, "tokens_per_second"))


def test_speed_counts_rows_and_waiting_for_the_device_but_no_measuring_or_saving(config, tmp_path, monkeypatch):
    now = 0.0

    def takes(seconds, real):
        def slow(*args, **kwargs):
            nonlocal now
            now += seconds
            return real(*args, **kwargs)

        return slow

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=time.monotonic))
    monkeypatch.setattr(TaskRows, "__getitem__", takes(1.0, TaskRows.__getitem__))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    # The device is asked at each pause, and has work of a hundred seconds left.
    monkeypatch.setattr(torch.cuda, "synchronize", takes(100.0, lambda: None))
    monkeypatch.setattr(HymbaTrainer, "_write_checkpoint", takes(10_000.0, HymbaTrainer._write_checkpoint))
    monkeypatch.setattr(MQAR, "evaluate", takes(10_000.0, MQAR.evaluate))
    output = main(config, [f"run.output={tmp_path}"]).output
    seconds = [3 * 4 * 12 / rate for _, rate in entries(output, "tokens_per_second")]
    # Saved after step 2, logged after 3; measured and saved after 4, logged after 6. The loader is a batch ahead.
    assert seconds == pytest.approx([14 + 2 * 100, 10 + 3 * 100])


def test_an_interrupted_run_goes_on_with_the_rows_it_would_have_seen(whole, config, tmp_path, monkeypatch):
    real = HymbaTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise RuntimeError("cut")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HymbaTrainer, "training_step", cut)
    with pytest.raises(RuntimeError, match="cut"):
        main(config, [f"run.output={tmp_path}"])
    monkeypatch.undo()
    assert not (tmp_path / "results.json").exists()
    result = main(config, [f"run.output={tmp_path}"])
    assert entries(tmp_path, "loss") == entries(whole.output, "loss")
    assert result.results == whole.results
    one, other = (load_file(run.exported / "model.safetensors") for run in (result, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_other_parameters_are_another_run(whole, config):
    with pytest.raises(SettingsError, match=r"data\.task"):
        main(config, [f"run.output={whole.output}", "data.task.length=16"])


def test_a_vocabulary_smaller_than_the_tasks_is_refused(config, tmp_path):
    with pytest.raises(SettingsError, match=r"model\.vocab_size = 4: the task mqar has 9 tokens"):
        main(config, [f"run.output={tmp_path}", "model.vocab_size=4"])


def test_overrides_reach_into_the_task(config):
    settings = load_settings(config, ["data.task.pairs=[2]", "data.task.power=1.0"])
    assert settings.data.task == {**TASK, "pairs": [2], "power": 1.0}
    fresh = load_settings(config, ["data.task={name: mqar}"])
    assert fresh.data.task == {"name": "mqar"}
    assert load_settings(config, ["data.task=null"]).data.task is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.task.lenght=3", ["data.task.lenght", "did you mean 'data.task.length'"]),
        ("data.task.name=mqra", ["data.task.name = 'mqra'", "'mqar'"]),
        ("data.task={pairs: [2]}", ["data.task.name = None", "mqar"]),
        ("data.task=mqar", ["data.task = 'mqar'", "mapping"]),
        ("data.tusk={}", ["data.tusk", "did you mean 'data.task'"]),
    ],
)
def test_refusals(config, override, parts):
    with pytest.raises(SettingsError) as caught:
        load_settings(config, [override])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
