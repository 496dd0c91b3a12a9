"""`hymba ablate` on a few hundred bytes: what it runs, skips, resumes, keeps, and says of what went wrong."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import yaml
from experiments.ablation_runs import MODEL, VARIANTS, Ended, Endless, Here, Training, ablate, table_of

from hymba import HymbaConfig, HymbaForCausalLM, cost
from hymba.experiments import checkpoints
from hymba.experiments.ablation import worker
from hymba.experiments.ablation.plan import AblationError
from hymba.experiments.ablation.runner import Process, visible_devices
from hymba.memory import MemoryEstimateError


def test_a_ladder_is_run_skipped_and_tabled(file, tmp_path):
    path = file(seeds=[0, 1], variants={name: VARIANTS[name] for name in ("hymba", "no-meta")})
    first = Training()
    code, said = ablate(path, start=first)
    assert code == 0 and len(first.started) == 4
    # Seeds outermost: a cut leaves whole ladders.
    assert [name.rpartition(" ")[2] for name in first.started] == ["0", "0", "1", "1"]

    table = table_of(tmp_path)
    rows = {row["variant"]: row for row in table["rows"]}
    values = []
    for seed in (0, 1):
        folder = tmp_path / "out" / "runs" / "no-meta" / "text" / f"seed-{seed}"
        record = json.loads((folder / "train" / "final" / "training.json").read_text())
        values.append(record["held_out"]["bits_per_byte"])
        # Only the exported weights are kept.
        assert not list((folder / "train").glob("checkpoint-*"))
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["num_memory_tokens"] == 0
    measured = rows["no-meta"]["tasks"]["text"]["metrics"]["bits_per_byte"]
    assert measured["mean"] == sum(values) / 2
    assert measured["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-12)
    assert measured["values"] == {"0": values[0], "1": values[1]} and measured["n"] == 2
    mean, std = sum(values) / 2, statistics.stdev(values)
    assert f"{mean:.4g} ± {std:.2g}" in said

    config = HymbaConfig(**{**MODEL, "num_memory_tokens": 0, "vocab_size": 280})
    real = sum(p.numel() for p in HymbaForCausalLM(config).parameters())
    shape = rows["no-meta"]["tasks"]["text"]
    assert shape["parameters"] == real == table["base"]["text"]["parameters"] - 3 * 16
    assert shape["parameters_vs_base"] == pytest.approx(-48 / (real + 48))
    assert shape["cache_bytes"] == cost.cache_bytes(config, 8192).total
    assert shape["tokens_per_second"]["mean"] > 0

    # The same tokens for every variant of a seed, others for another seed.
    seen = {(row["variant"], run["seed"]): run["rows"] for row in table["rows"] for run in row["runs"]}
    assert seen["hymba", 0] == seen["no-meta", 0] != seen["hymba", 1] == seen["no-meta", 1]
    assert all(run["tokens"] == 4 * 2 * 24 for row in table["rows"] for run in row["runs"])
    assert all(run["commit"] for row in table["rows"] for run in row["runs"])
    assert table["warnings"] == []

    again = Here()
    assert ablate(path, start=again)[0] == 0
    assert again.started == []
    # A third seed is all that is missing then.
    ablate(path, "seeds=[0, 1, 2]", start=again)
    assert again.started == ["hymba · text · seed 2", "no-meta · text · seed 2"]
    values.append(2.2)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"metrics.png", "curves.png", "cost.png"}

    with (tmp_path / "out" / "table.csv").open(newline="", encoding="utf-8") as lines:
        (line,) = [r for r in csv.DictReader(lines) if (r["variant"], r["metric"]) == ("no-meta", "bits_per_byte")]
    by_hand = (statistics.mean(values), statistics.stdev(values), min(values), max(values))
    assert [float(line[key]) for key in ("mean", "std", "min", "max")] == pytest.approx(by_hand, rel=1e-12)
    assert line["n"] == "3" and line["configs"].split()[0] == "runs/no-meta/text/seed-0/config.yaml"

    # Other settings under the same name are refused, not mixed into one row.
    with pytest.raises(AblationError, match=r"seed-0: has the result of other settings: run\.steps: 4 -> 5; choose"):
        ablate(path, "base.run.steps=5")


SCHEMA = {
    "format": int, "file": str, "seeds": list, "tasks": list, "cache_length": int, "base": dict, "warnings": list,
    "rows": list,
}  # fmt: skip
ROW = {"variant": str, "changes": dict, "status": str, "tasks": dict, "commits": list, "runs": list}
RUN = {
    "task": str, "seed": int, "status": str, "failure": (dict, type(None)), "notes": list, "config": str,
    "commit": (str, type(None)), "device": (str, type(None)), "tokens": (int, type(None)), "rows": (str, type(None)),
    "seconds": (float, type(None)),
}  # fmt: skip
TASK = {
    "parameters": int, "parameters_vs_base": float, "cache_bytes": int, "tokens_per_second": (dict, type(None)),
    "metrics": dict,
}  # fmt: skip
SPREAD = {
    "mean": float, "std": (float, type(None)), "min": float, "max": float, "n": int, "values": dict,
}  # fmt: skip


def conforms(value, schema):
    assert list(value) == list(schema)
    for key, kind in schema.items():
        assert isinstance(value[key], kind), (key, value[key])


def test_a_failing_variant_is_said_and_the_others_go_on(file, tmp_path):
    path = file()
    start = Here({"no-meta": RuntimeError("CUDA error: something"), "wide": torch.OutOfMemoryError("out of memory")})
    code, said = ablate(path, start=start)
    assert code == 1 and len(start.started) == 3
    assert "no-meta · text · seed 0: FAILED: error: CUDA error: something" in said
    table = table_of(tmp_path)
    conforms(table, SCHEMA)
    for row in table["rows"]:
        conforms(row, ROW)
        for run in row["runs"]:
            conforms(run, RUN)
        for task in row["tasks"].values():
            conforms(task, TASK)
            for measured in task["metrics"].values():
                conforms(measured, SPREAD)
    assert [row["status"] for row in table["rows"]] == ["done", "1 failed", "1 failed"]
    assert table["rows"][2]["runs"][0]["failure"]["kind"] == "out of memory"
    assert "- wide, text, seed 0: out of memory: out of memory" in (tmp_path / "out" / "table.md").read_text()
    # wide is 10% larger than the base.
    assert "wide has +" in table["warnings"][0]
    # Only what failed is tried again.
    again = Here()
    assert ablate(path, start=again)[0] == 0
    assert again.started == ["no-meta · text · seed 0", "wide · text · seed 0"]
    assert [row["status"] for row in table_of(tmp_path)["rows"]] == ["done"] * 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryEstimateError("a training step needs 90 GB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (checkpoints.OutputError("no room"), "disk full"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (-signal.SIGKILL, "killed"),
        (errno.ENOSPC, "disk full"),
        (7, "error"),
    ],
)
def test_what_went_wrong_is_told_apart(file, tmp_path, error, kind):
    code, said = ablate(file(variants={"hymba": None}), start=Here({"hymba": error}))
    assert code == 1
    (row,) = table_of(tmp_path)["rows"]
    assert row["runs"][0]["failure"]["kind"] == kind
    assert f"hymba · text · seed 0: FAILED: {kind}: " in said


def test_a_full_disk_under_one_variant(file, tmp_path, monkeypatch):
    """The disk is full while the checkpoint is written; the run says so and the next variant trains."""
    real = checkpoints.seal

    def full(folder):
        if "no-meta" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoints, "seal", full)
    code, said = ablate(file(), start=Training())
    assert code == 1
    assert [row["status"] for row in table_of(tmp_path)["rows"]] == ["done", "1 failed", "done"]
    assert "no-meta · text · seed 0: FAILED: disk full: " in said and "MB are free there" in said


def test_an_invocation_that_is_stopped_says_what_is_left(file, tmp_path, monkeypatch):
    runs = []

    def start(unit, device, threads):
        runs.append(Endless())
        return runs[-1]

    path = file()
    code, said = ablate(path, start=start, minutes=0.0, jobs=2)
    assert code == worker.INTERRUPTED and runs == []
    code, said = ablate(path, start=start, minutes=0.001, jobs=2)
    assert code == worker.INTERRUPTED
    assert [run.calls for run in runs] == [["stop"], ["stop"]]
    assert "the time is up" in said and "stopped; the same command goes on" in said
    assert [row["status"] for row in table_of(tmp_path)["rows"]] == ["1 missing"] * 3

    def broken(self, unit):
        raise RuntimeError("boom")

    # Whatever happens in the parent, no run goes on without it.
    monkeypatch.setattr("hymba.experiments.ablation.runner._Loop._gather", broken)
    with pytest.raises(RuntimeError, match="boom"):
        ablate(path, start=start, jobs=2)
    assert [run.calls for run in runs[2:]] == [["kill"], ["kill"]]
    assert not list((tmp_path / "out").rglob("*.lock"))


def test_several_at_a_time_share_the_cores(file, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    start = Here()
    ablate(file(), start=start, jobs=2)
    assert start.threads == [4, 4, 4]
    start = Here()
    ablate(file(seeds=[1]), start=start)
    assert start.threads == [0, 0, 0]


def test_devices_are_indices_of_what_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert visible_devices(()) == ["4", "GPU-abc"]
    assert visible_devices(("1",)) == ["GPU-abc"]
    with pytest.raises(AblationError, match="--devices 2: GPUs 0 to 1 are visible"):
        visible_devices(("2",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_devices(()) == []
    with pytest.raises(AblationError, match="no GPU is visible"):
        visible_devices(("0",))


def test_runs_are_dealt_out_over_devices(file, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    places = []

    def start(unit, device, threads):
        places.append(device)
        return Ended(7)

    ablate(file(seeds=[0, 1]), start=start, jobs=4)
    assert places[:4] == ["4", "5", "4", "5"]
    places.clear()
    ablate(file(), start=start, devices=["1"])
    assert places == ["5", "5", "5"]


def test_the_commit_is_named_from_outside_or_by_the_release(monkeypatch, tmp_path):
    worker.commit.cache_clear()
    monkeypatch.setenv("HYMBA_COMMIT", "abc1234")
    assert worker.commit() == "abc1234"
    worker.commit.cache_clear()
    monkeypatch.delenv("HYMBA_COMMIT")
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "a" / "b" / "c" / "worker.py"))
    assert worker.commit().startswith("release ")
    worker.commit.cache_clear()


@pytest.mark.parametrize(("keep", "left"), [("all", 3), ("final", 1), ("nothing", 0)])
def test_the_weights_that_are_kept(file, tmp_path, keep, left):
    path = file(variants={"hymba": None})
    ablate(path, f"run.keep={keep}")
    assert len(list((tmp_path / "out").rglob("model.safetensors"))) == left


# A killed process.


def test_a_run_killed_at_random_goes_on_exactly(file, tmp_path):
    """Worker processes: one is killed with -9 between checkpoints, its newest checkpoint is damaged, and the table
    has the numbers of a run that was not."""
    path = file(variants={"hymba": None})
    ablate(path, "base.run.steps=8", f"run.output={tmp_path / 'whole'}", start=Training())

    output = tmp_path / "out"
    folder = output / "runs" / "hymba" / "text" / "seed-0"
    command_line = [sys.executable, "-m", "hymba", "ablate", str(path), "base.run.steps=8", "run.plots=false"]
    # Slow enough to be caught between its first steps.
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import os, sys\n"
        "if 'ablation.worker' in ' '.join(sys.orig_argv) and os.environ.get('SLOW'):\n"
        "    import hymba.experiments.train as train\n"
        "    real = train.HymbaTrainer.training_step\n"
        "    def step(self, *args, **kwargs):\n"
        "        if self.state.global_step >= 5:\n"
        "            import time; time.sleep(60)\n"
        "        return real(self, *args, **kwargs)\n"
        "    train.HymbaTrainer.training_step = step\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "SLOW": "1"}
    parent = subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (folder / "train" / "checkpoint-4" / checkpoints.SEAL).is_file():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)

    # Two invocations at one run: the second refuses, naming the first.
    with pytest.raises(AblationError, match=rf"process {parent.pid} on .* is at work on this run"):
        ablate(path, "base.run.steps=8")

    parent.send_signal(signal.SIGKILL)
    parent.wait()
    log = folder / "log.txt"
    size = log.stat().st_size
    newest = folder / "train" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)

    code, output_text = ablate(path, "base.run.steps=8", "run.plots=false", start=Process)
    assert code == 0, output_text
    assert f"left behind by process {parent.pid}" in output_text
    said = (
        "damaged checkpoint: checkpoint-4 is damaged: optimizer.pt is not what was written; going on from checkpoint-2"
    )
    assert said in output_text
    assert said in log.read_text()[size:]
    whole = json.loads((tmp_path / "whole" / "table.json").read_text())["rows"][0]
    (row,) = table_of(tmp_path)["rows"]
    assert row["runs"][0]["notes"] == [said]
    assert row["tasks"]["text"]["metrics"] == whole["tasks"]["text"]["metrics"]
    assert row["runs"][0]["rows"] == whole["runs"][0]["rows"]
