"""Training in two processes (gloo between CPUs): DDP and FSDP2 give what one gives, and go on from each other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tolerances import BFLOAT16_PARALLEL, PARALLEL
from transformers import AutoModelForCausalLM

from hymba.experiments.ablation.lock import Locks
from hymba.experiments.ablation.plan import AblationError
from hymba.experiments.checkpoints import complete_checkpoints
from hymba.experiments.processes import together
from hymba.experiments.settings import SettingsError
from hymba.experiments.train import lock_of, main

STEPS, SAVED = 6, 3
SETTINGS = {
    # Key norms, so that borrowing layers have a parameter without use; tied embeddings; meta tokens.
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]], "mamba_d_state": 4, "rope_type": "default", "kq_norm": "perhead-rms",
    },
    "data": {"source": "files", "patterns": ["*.py"], "held_out": 0.3, "sequence_length": 24},
    "tokenizer": {"vocab_size": 280},
    "run": {
        "steps": STEPS, "batch_size": 2, "tokens_per_step": 192, "device": "cpu", "threads": 1, "log_every": 1,
        "save_every": SAVED, "tensorboard": False, "evaluate_every": 3,
    },
    "phases": [{"name": "long", "start": 0.5, "sequence_length": 48, "batch_size": 1}],
}  # fmt: skip


@pytest.fixture(scope="module")
def config(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "paths": [str(text)]}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """A run in one process, and a copy of it as it was at its first checkpoint."""
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("alone")
    main(config, [f"run.output={folder / 'run'}", "run.keep_checkpoints=9"])
    torch.set_num_threads(before)
    shutil.copytree(folder / "run", folder / "part", ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "final"))
    return folder


@pytest.fixture(scope="module")
def runs(config, alone, tmp_path_factory):
    """All that two processes do, in one pair of them: starting Python and torch takes most of the time."""
    folder = tmp_path_factory.mktemp("runs")
    copies = {name: folder / name for name in ("grown", "other batch")}
    for copy in copies.values():
        shutil.copytree(alone / "part", copy)
    locked = folder / "locked"
    plan = {
        "ddp": ["run.keep_checkpoints=9"],
        "fsdp2": ["run.distributed=fsdp2", "run.activation_checkpointing=full", "run.evaluate_every=0"],
        "grown": ["run.distributed=fsdp2", "run.reshard=false", "run.activation_checkpointing=selective"],
        "other batch": ["run.tokens_per_step=384"],
        "stopped": ["run.distributed=fsdp2"],
        "locked": [],
    }
    jobs = [
        {"config": str(config), "overrides": [f"run.output={folder / name}", *overrides]}
        for name, overrides in plan.items()
    ]
    jobs[list(plan).index("stopped")]["signal"] = [1, 2]
    with Locks([lock_of(locked)]):
        reports = parallel.start(folder, jobs)
    said = [dict(zip(plan, report)) for report in reports]
    return folder, said


def entries(output):
    return [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]


def curve(output):
    return [number for e in entries(output) if "loss" in e for number in (e["loss"], e["grad_norm"])]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "grown"])
def test_losses_are_those_of_one_process(alone, runs, name):
    """`grown` was begun by one process."""
    folder, said = runs
    assert [report[name] for report in said] == [["finished", STEPS]] * 2
    assert curve(folder / name) == pytest.approx(curve(alone / "run"), rel=PARALLEL)
    assert [e["step"] for e in entries(folder / name) if "loss" in e] == list(range(1, STEPS + 1))


def test_held_out_text_is_measured_alike(alone, runs):
    folder, _ = runs
    mine, theirs = (
        [e["bits_per_byte"] for e in entries(o) if "bits_per_byte" in e] for o in (folder / "ddp", alone / "run")
    )
    assert len(mine) == 1 and mine == pytest.approx(theirs, rel=PARALLEL)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_checkpoint_and_the_export_do_not_say_how_they_came_about(alone, runs, name):
    folder, _ = runs
    saved, expected = (weights(output / f"checkpoint-{STEPS}") for output in (folder / name, alone / "run"))
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in saved.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in expected.items()
    }
    assert "model.layers.0.mamba.A_log.0" in saved and "lm_head.weight" not in saved
    # Where a gradient is nothing but rounding, AdamW still takes a full step.
    assert all(torch.allclose(saved[key], expected[key], atol=2e-3) for key in saved)
    mine, theirs = (
        torch.load(output / f"checkpoint-{STEPS}" / "optimizer.pt") for output in (folder / name, alone / "run")
    )
    assert mine["state"].keys() == theirs["state"].keys()
    assert not any("layers.2" in key and "k_norm" in key for key in mine["state"])
    for key, own in mine["state"].items():
        assert own["exp_avg"].shape == theirs["state"][key]["exp_avg"].shape
        assert own["step"] == STEPS
    exported = AutoModelForCausalLM.from_pretrained(folder / name / "final")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert not list((folder / name).glob(".writing-*")) and not lock_of(folder / name).exists()


def test_one_process_goes_on_from_two(config, alone, runs, tmp_path):
    folder, _ = runs
    ignored = shutil.ignore_patterns(f"checkpoint-{STEPS}", "final", "tokens")
    shutil.copytree(folder / "ddp", tmp_path / "run", ignore=ignored)
    result = main(config, [f"run.output={tmp_path / 'run'}"])
    assert (result.status, result.step) == ("finished", STEPS)
    assert curve(tmp_path / "run") == pytest.approx(curve(alone / "run"), rel=PARALLEL)


def test_a_signal_to_one_process_stops_both_at_the_same_step(config, alone, runs, tmp_path):
    folder, said = runs
    assert said[0]["stopped"] == said[1]["stopped"] == ["interrupted", 3]
    assert [path.name for path in complete_checkpoints(folder / "stopped")] == ["checkpoint-3"]
    shutil.copytree(folder / "stopped", tmp_path / "run")
    main(config, [f"run.output={tmp_path / 'run'}"])
    assert curve(tmp_path / "run") == pytest.approx(curve(alone / "run"), rel=PARALLEL)


def test_the_first_process_refuses_for_all(runs):
    _, said = runs
    kind, text = said[0]["locked"]
    assert kind == "AblationError" and "is at work on this run" in text
    assert said[1]["locked"][0] == "RefusedElsewhere"
    kind, text = said[0]["other batch"]
    assert kind == "SettingsError" and "its steps have 8 rows; now 2 processes" in text
    assert said[1]["other batch"][0] == "RefusedElsewhere"


def test_what_one_process_prints_the_other_does_not(runs):
    folder, _ = runs
    first, second = ((folder / f"output-{rank}.txt").read_text() for rank in (0, 1))
    assert "192 tokens per step = 2 processes (fsdp2) x 2 rows x 24 tokens x 2 passes" in first
    for line in ("step 1/", "exported", "tokens per step", "corpus:"):
        assert line in first and line not in second


def test_two_runs_in_one_folder(config, alone, tmp_path):
    shutil.copytree(alone / "part", tmp_path / "run")
    with Locks([lock_of(tmp_path / "run")]), pytest.raises(AblationError, match=r"choose another run\.output"):
        main(config, [f"run.output={tmp_path / 'run'}"])
    assert not lock_of(tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_would_wrap_the_model_itself(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(SettingsError, match=rf"{name} is set: .* run\.distributed=fsdp2"), together(cpu=True):
        pass


@pytest.mark.slow
def test_autocast_over_sharded_parameters_is_autocast(config, tmp_path):
    """In bfloat16 both round alike, and the parameters stay in float32."""
    overrides = ["run.precision=bfloat16", "run.steps=2", "phases=[]", "export.evaluate=false"]
    jobs = [
        {
            "config": str(config),
            "overrides": [f"run.output={tmp_path / mode}", f"run.distributed={mode}", *overrides],
        }
        for mode in ("ddp", "fsdp2")
    ]
    parallel.start(tmp_path, jobs)
    assert curve(tmp_path / "fsdp2") == pytest.approx(curve(tmp_path / "ddp"), rel=BFLOAT16_PARALLEL)
    saved = weights(tmp_path / "fsdp2" / "checkpoint-2")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_killed_at_random_under_torchrun_and_gone_on(config, alone, tmp_path, mode):
    """The command that users give; the processes are killed wherever they stand, until the run is through."""
    seed = torch.Generator().manual_seed(os.getpid())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hymba", "train", str(config),
        f"run.output={tmp_path / 'run'}", f"run.distributed={mode}", "run.save_every=1",
    ]  # fmt: skip
    for attempt in range(12):
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        log, before = tmp_path / "run" / "log.jsonl", time.monotonic()
        reached = len(curve(tmp_path / "run")) if log.is_file() else 0
        # Not before the run has gone a step further than the last one: some attempts then end it.
        while process.poll() is None and attempt < 3 and time.monotonic() - before < 120:
            time.sleep(0.05)
            if log.is_file() and len(curve(tmp_path / "run")) > reached + 2:
                time.sleep(float(torch.rand((), generator=seed)))
                for child in subprocess.run(
                    ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
                ).stdout.split():
                    with contextlib.suppress(ProcessLookupError):  # torchrun ends the others when one is gone
                        os.kill(int(child), signal.SIGKILL)
                break
        text, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
    assert process.returncode == 0, text
    assert curve(tmp_path / "run") == pytest.approx(curve(alone / "run"), rel=PARALLEL)
