"""`hymba ablate` on a few hundred bytes: what it runs, skips, resumes, refuses, and the table's numbers."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hymba import HymbaConfig, HymbaForCausalLM, cost
from hymba.cli import app
from hymba.experiments import checkpoints
from hymba.experiments.ablation import command, lock, plots, worker
from hymba.experiments.ablation.plan import AblationError, make_plan
from hymba.experiments.ablation.runner import Process, run_plan, visible_devices
from hymba.experiments.ablation.settings import load_ablation
from hymba.experiments.ablation.table import shown_metrics
from hymba.experiments.packing import TokenRows, rows_digest
from hymba.experiments.settings import SettingsError
from hymba.memory import MemoryEstimateError

MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]], "mamba_d_state": 4, "rope_type": "default",
}  # fmt: skip
BASE = {
    "model": MODEL,
    "data": {"source": "files", "patterns": ["*.py"], "held_out": 0.3, "sequence_length": 24},
    "tokenizer": {"vocab_size": 280},
    "run": {
        "steps": 4, "batch_size": 2, "device": "cpu", "threads": 1, "log_every": 1, "save_every": 2,
        "tensorboard": False,
    },
}  # fmt: skip
VARIANTS = {"hymba": None, "no-meta": {"model.num_memory_tokens": 0}, "wide": {"model.intermediate_size": 64}}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(10):
        body = f"def function_{i}(x, y):\n    return x * {i} + y\n\n\n" * (2 + i)
        (folder / f"module_{i}.py").write_text(body, encoding="utf-8")
    return folder


@pytest.fixture
def file(text, tmp_path):
    """Writes an ablation's YAML with some keys in place of the usual ones."""

    def write(**keys):
        base = {**BASE, "data": {**BASE["data"], "paths": [str(text)]}}
        output = str(tmp_path / "out")
        whole = {"base": base, "variants": VARIANTS, "tasks": [{"name": "text"}], "run": {"output": output}, **keys}
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        return path

    return write


class Here:
    """Runs in this process without training; counts the starts, and breaks those that it is told to."""

    def __init__(self, breaks=None):
        self.breaks, self.started, self.threads = breaks or {}, [], []

    def __call__(self, unit, device, threads):
        self.started.append(unit.name)
        self.threads.append(threads)
        error = self.breaks.get(unit.variant)
        if isinstance(error, int):
            return Ended(error)

        def work(folder, record):
            if error is not None:
                raise error
            return made_up(folder, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "work", work)
            return Ended(worker.run(unit.folder))


class Training(Here):
    """Real runs in this process."""

    def __call__(self, unit, device, threads):
        self.started.append(unit.name)
        return Ended(worker.run(unit.folder))


def made_up(folder, unit):
    """What a run leaves, without one: bits per byte are 2 + seed / 10 for any variant."""
    train = folder / "train"
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        (train / name).mkdir(parents=True)
        (train / name / "model.safetensors").touch()
    (train / "final" / "training.json").write_text("{}")
    (train / "log.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.0}\n')
    result = {
        **unit, "metrics": {"bits_per_byte": 2 + unit["seed"] / 10, "train_loss": 5.0}, "tokens_per_second": 100.0,
        "tokens": 192, "rows": f"rows of {unit['seed']}", "seconds": 1.5, "commit": "abc", "device": "none",
        "settings": yaml.safe_load((folder / "config.yaml").read_text()),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return result


class Ended:
    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code


class Endless:
    """A run that goes on until it is told to stop."""

    def __init__(self):
        self.code, self.calls = None, []

    def poll(self):
        return self.code

    def stop(self):
        self.calls.append("stop")
        self.code = worker.INTERRUPTED

    def kill(self):
        self.calls.append("kill")


def ablate(path, *overrides, start=None, **options):
    lines = []
    code = command.main(path, overrides, start=start or Here(), say=lines.append, **options)
    return code, "\n".join(lines)


def table_of(tmp_path):
    return json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))


# The whole way.


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


# Locks.


def test_locks_are_all_or_none_and_let_go(tmp_path):
    one, other = tmp_path / "one.lock", tmp_path / "other.lock"
    with lock.Locks([other]):
        with pytest.raises(AblationError, match=rf"other\.lock: process {os.getpid()} on .* is at work"):
            lock.Locks([one, other]).__enter__()
        assert not one.exists() and other.exists()
    assert not other.exists()


@pytest.mark.parametrize("left", ["dead process", "later process", "other host, old", "half a file, old"])
def test_a_stale_lock_is_taken_over(tmp_path, left):
    path = tmp_path / "run.lock"
    holder = {"pid": os.getpid(), "host": lock.this_process().host, "started": 0, "since": "then"}
    if left == "dead process":
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        holder["pid"] = gone.pid
    elif left == "later process":
        if not lock.this_process().started:
            pytest.skip("this system does not say when a process started")
        holder["started"] = lock.this_process().started - 1
    elif left == "other host, old":
        holder["host"] = "elsewhere.example"
    path.write_text('{"pid": 3,' if "half" in left else json.dumps(holder))
    if "old" in left:
        before = time.time() - 2 * lock.STALE_SECONDS
        os.utime(path, (before, before))
    locks = lock.Locks([path])
    with locks:
        assert lock.read_holder(path) == lock.this_process() or lock.read_holder(path).pid == os.getpid()
        assert "taken over" in locks.stale[0]


@pytest.mark.parametrize("left", ["other host", "half a file"])
def test_a_lock_that_may_be_alive_is_kept(tmp_path, left):
    path = tmp_path / "run.lock"
    text = json.dumps({"pid": 1, "host": "elsewhere.example", "started": 5, "since": "then"})
    path.write_text(text if left == "other host" else text[:9])
    with pytest.raises(AblationError, match="elsewhere" if left == "other host" else "another process"):
        lock.Locks([path]).__enter__()
    assert path.exists()


def test_shards_of_one_folder_go_on_side_by_side(file, tmp_path):
    path = file()
    settings = load_ablation(path)
    plan = make_plan(settings)
    (mine,) = plan.select(["wide"])
    start = Here()
    with lock.Locks([mine.folder.with_name(f"{mine.folder.name}.lock")]):
        with pytest.raises(AblationError, match="take other runs with --only"):
            run_plan(plan, plan.units, start=start)
        assert start.started == []
        assert ablate(path, start=start, only=["hymba", "no-meta"])[0] == 0
    assert [row["status"] for row in table_of(tmp_path)["rows"]] == ["done", "done", "1 missing"]


# Settings and refusals.


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"variant": {}}, ["unknown key 'variant'", "did you mean 'variants'"]),
        ({"run": {"output": "x", "job": 2}}, ["unknown key 'run.job'", "did you mean 'run.jobs'"]),
        ({"tasks": [{"name": "a", "setings": {}}]}, ["tasks[0]", "'setings'", "did you mean 'settings'"]),
        ({"tasks": [{"name": "a", "settings": {"run.step": 3}}]}, ["tasks: a", "run.step", "'run.steps'"]),
        ({"tasks": [{"name": "a", "settings": {"run.seed": 3}}]}, ["'run.seed' is not a task's to set"]),
        ({"tasks": [{"name": "a", "settings": {"data.task": {"name": "mqar"}}}]}, ["'data.task' is null or left out"]),
        ({"tasks": ["text"]}, ["tasks[0] = 'text': expected a mapping"]),
        ({"tasks": [{"metrics": []}]}, ["tasks[0]: name: give the task one"]),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, ["two tasks have one name"]),
        ({"tasks": [{"name": "a/b"}]}, ["name = 'a/b': it names a folder"]),
        ({"tasks": []}, ["tasks = []: name at least one task"]),
        ({"seeds": [0, 0]}, ["seeds = [0, 0]: expected different numbers"]),
        ({"seeds": []}, ["seeds = []"]),
        ({"seeds": ["a"]}, ["seeds[0] = 'a': expected a whole number"]),
        ({"variants": {}}, ["variants = {}: name at least one"]),
        ({"variants": {"a": {"modell.hidden_size": 3}}}, ["variants: a: 'modell.hidden_size'", "a variant may set"]),
        ({"variants": {"a": {"run.steps": 3}}}, ["variants: a: 'run.steps': a variant may set model.<field>"]),
        ({"variants": {"a": {"optimizer.lerning_rate": 3}}}, ["variants: a", "'optimizer.learning_rate'"]),
        ({"variants": {"a": {"model": {"hidden_size": 3}}}}, ["variants: a: model = ", "expected a file"]),
        ({"variants": {"a": 3}}, ["variants: a = 3: expected dotted settings"]),
        ({"variants": {"a": {"run.batch_size": 1}}}, ["variants: a", "= 1: expected the task's 2", "same tokens"]),
        ({"base": None}, ["base = None: expected a training file"]),
        ({"base": {}}, ["base: expected a training file"]),
        ({"base": {"file": 3}}, ["base.file = 3"]),
        ({"run": {"jobs": -1}}, ["run.jobs = -1: expected 0 or more"]),
    ],
)
def test_refusals_name_key_value_and_remedy(file, keys, parts):
    with pytest.raises((SettingsError, AblationError)) as refused:
        make_plan(load_ablation(file(**keys)))
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("override", ["seeds", "=3", "seeds=[", "seeds.a=3"])
def test_overrides_that_are_none(file, override):
    with pytest.raises(SettingsError, match="override"):
        load_ablation(file(), [override])


def test_a_variant_that_does_not_build_is_named_before_anything_trains(file, tmp_path):
    path = file(variants={"hymba": None, "odd": {"model.num_attention_heads": 3}, "typo": {"model.sliding_windw": 4}})
    start = Here()
    with pytest.raises(AblationError) as refused:
        ablate(path, start=start)
    message = str(refused.value)
    assert "nothing was trained" in message
    assert "odd (text): " in message and "num_attention_heads=3" in message
    assert "typo (text): " in message and "'sliding_window'" in message
    assert start.started == [] and not (tmp_path / "out").exists()


def test_a_base_from_a_file_and_models_from_files(file, text, tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump({**MODEL, "intermediate_size": 64}))
    data = {**BASE["data"], "paths": [str(text)]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**BASE, "data": data, "model": "model.yaml"}))
    variants = {"wide": {"model.num_memory_tokens": 0, "model": "wide.yaml"}}
    for base in ("train.yaml", {"file": "train.yaml", "run": {"steps": 3}}):
        settings = load_ablation(file(base=base, variants=variants), ["base.run.batch_size=4"])
        (unit,) = make_plan(settings).units
        run = unit.settings.run
        assert (run.steps, run.batch_size, run.log_every) == (3 if isinstance(base, dict) else 4, 4, 1)
        assert unit.settings.model == {**MODEL, "intermediate_size": 64, "num_memory_tokens": 0}
    settings = load_ablation(file(base={**BASE, "model": "model.yaml"}))
    assert settings.base["model"] == MODEL
    halved = {"halved": {"run.batch_size": 1, "run.gradient_accumulation": 2}}
    assert make_plan(load_ablation(file(base="train.yaml", variants=halved))).units


def test_selection_by_name(file):
    plan = make_plan(load_ablation(file(seeds=[3, 4])))
    assert [unit.name for unit in plan.select(["wide"], ["text"], [4])] == ["wide · text · seed 4"]
    with pytest.raises(AblationError, match=r"--only wid: the file has hymba, no-meta, wide\. Did you mean 'wide'"):
        plan.select(["wid"])
    with pytest.raises(AblationError, match="--seed 7: the file has 3, 4"):
        plan.select(seeds=[7])


# Numbers and figures.


def test_the_numbers_of_a_task():
    measured = {
        "accuracy": 0.5, "solved": True, "pairs": [4, 8], "accuracy_by_pairs": [1.0, None], "lengths": [64],
        "accuracy_by_length": [0.25], "grid": [[1.0]], "loss_by_x": [1.0],
    }  # fmt: skip
    assert worker.scalars(measured) == {"accuracy": 0.5, "accuracy[pairs=4]": 1.0, "accuracy[length=64]": 0.25}


def test_the_columns_of_a_task(file):
    def entry(*metrics):
        return load_ablation(file(tasks=[{"name": "a", "metrics": list(metrics)}])).tasks[0]

    names = ["chance", "accuracy", "accuracy[pairs=4]", "accuracy[pairs=8]", "train_loss"]
    assert shown_metrics(entry(), names) == ["accuracy"]
    assert shown_metrics(entry(), ["train_loss", "other"]) == ["other"]
    assert shown_metrics(entry("accuracy[pairs=*]", "accuracy"), names) == [names[2], names[3], names[1]]


def test_runs_that_saw_other_tokens_are_warned_of(file, tmp_path):
    path = file(variants={"hymba": None, "no-meta": {"model.num_memory_tokens": 0}})
    ablate(path)
    result = tmp_path / "out" / "runs" / "hymba" / "text" / "seed-0" / "result.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "rows": "others", "commit": "def"}))
    ablate(path, mode="table")
    fairness, commits = table_of(tmp_path)["warnings"]
    assert fairness == "text, seed 0: the runs did not see the same tokens: hymba against no-meta"
    assert commits.startswith("the runs were made by several commits: ")


def test_the_hash_of_rows_follows_seed_and_documents():
    def digest(seed, last=9, rows=40):
        documents = [[1, 2, 3, 4, 5] * 8, [6, 7, 8, last] * 8]
        return rows_digest(TokenRows(documents, length=8, rows=rows, seed=seed, layout="stream"))

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1), digest(0, last=10), digest(0, rows=41)}) == 4


def test_without_matplotlib_one_line_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = ablate(file(variants={"hymba": None}), start=Here({"hymba": 7}))
    assert said.splitlines()[-1] == plots.MISSING and "pip install" in plots.MISSING


def test_a_task_may_leave_the_bases_task_out(file, text):
    mqar = {"name": "mqar", "pairs": [2], "length": 16}
    base = {**BASE, "data": {**BASE["data"], "paths": [str(text)], "task": mqar}}
    tasks = [{"name": "recall"}, {"name": "text", "settings": {"data.task": None}}]
    plan = make_plan(load_ablation(file(base=base, tasks=tasks)))
    found = {unit.task.name: unit.settings.data.task for unit in plan.units}
    assert found == {"recall": mqar, "text": None}


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


# The command.


def test_the_command_checks_and_refuses(file, tmp_path):
    path = file()
    runner = CliRunner()
    checked = runner.invoke(app, ["ablate", str(path), "--check", "--only", "wide"])
    assert checked.exit_code == 0, checked.output
    assert "1 runs selected" in checked.stdout and "warning: wide has +" in checked.stdout
    assert not (tmp_path / "out").exists()
    for arguments in (["no.yaml"], [str(path), "seeds"], [str(path), "--check", "--table"], [str(path), "--only", "x"]):
        refused = runner.invoke(app, ["ablate", *arguments])
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    assert runner.invoke(app, ["ablate", str(path), "--table"]).exit_code == 0
    assert "3 missing" not in (tmp_path / "out" / "table.md").read_text()
    assert Path(tmp_path / "out" / "table.csv").read_text().count("\n") == 4


def test_heat_maps_of_tasks_at_several_lengths(file, tmp_path):
    task = {"name": "needle", "length": 12, "facts": 2, "keys": 4, "values": 2, "fillers": 2}
    names = ("far", "near", "text")
    tasks = [{"name": name, "task": None if name == "text" else task} for name in names]
    path = file(variants={"hymba": None}, seeds=[0, 1], tasks=tasks)
    ablate(path)
    cells = [[[1.0, None], [0.5, 0.0]], [[0.0, None], [1.0, None]]]
    for name, seed in itertools.product(names, (0, 1)):
        result = tmp_path / "out" / "runs" / "hymba" / name / f"seed-{seed}" / "result.json"
        lines = 2 if name == "far" else 1
        held_out = {"lengths": [12, 20][:lines], "depths": [0, 1], "grid": cells[seed][:lines]}
        result.write_text(
            json.dumps(json.loads(result.read_text()) | ({} if name == "text" else {"held_out": held_out}))
        )
    ablate(path, mode="table")
    maps = json.loads((tmp_path / "out" / "heat-maps.json").read_text(encoding="utf-8"))
    grid = [[0.5, None], [0.75, 0.0]]
    assert maps == {"far": {"hymba": {"lengths": [12, 20], "depths": [0, 1], "grid": grid}}}
    assert (tmp_path / "out" / "heat-maps.png").is_file()
