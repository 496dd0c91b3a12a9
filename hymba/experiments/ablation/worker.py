"""One run in a process of its own: train (or go on), measure, write the result.

    python -m hymba.experiments.ablation.worker FOLDER

FOLDER holds `unit.json` and `config.yaml`, which `hymba train` takes as well. The process ends with its parent.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import hymba
from hymba.experiments import checkpoints, train
from hymba.experiments.ablation.plan import CONFIG, FAILURE, RESULT, TRAIN, UNIT
from hymba.experiments.phases import plan_phases, tokens_after
from hymba.experiments.processes import uses_gpu
from hymba.experiments.settings import load_settings
from hymba.experiments.trainer import LOG_NAME
from hymba.experiments.versions import versions_of
from hymba.memory import MemoryEstimateError

INTERRUPTED = 130
KINDS = {errno.ENOMEM: "out of memory", errno.ENOSPC: "disk full", 1: "error"}
"""Exit status to what went wrong, for a process that could not even write that down."""


def main(arguments: list[str]) -> int:
    """Do the run of the folder in `arguments`; the exit status is 0, 130 (interrupted) or one of `KINDS`."""
    (folder,) = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return run(Path(folder))


def run(folder: Path) -> int:
    """Train, measure and write `result.json`, or `failure.json` with the kind and message of what went wrong."""
    unit = json.loads((folder / UNIT).read_text(encoding="utf-8"))
    try:
        result = work(folder, unit)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        code = failure_code(error)
        record = {"kind": KINDS[code], "message": " ".join(str(error).split()) or type(error).__name__}
        record["type"] = type(error).__name__
        try:
            checkpoints.write_text(folder / FAILURE, json.dumps(record, indent=1) + "\n")
        except OSError:
            # The disk is full; the exit status still says what happened.
            traceback.print_exc()
        return code
    return INTERRUPTED if result is None else 0


def work(folder: Path, unit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's result, also written; None when a signal stopped the training after it saved a checkpoint."""
    began = time.perf_counter()
    done = train.main(folder / CONFIG)
    if done.status == "interrupted":
        return None
    assert done.exported is not None
    settings = load_settings(folder / CONFIG)
    log = read_log(folder / TRAIN / LOG_NAME)
    record = json.loads((done.exported / train.RECORD_NAME).read_text(encoding="utf-8"))
    metrics = measured(record)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if losses:
        metrics["train_loss"] = losses[-1]
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    result = {
        **unit,
        "metrics": metrics,
        "held_out": record["held_out"],
        "parameters": done.parameters,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "tokens": tokens_after(plan_phases(settings, 1), settings.run.steps),
        "rows": done.rows,
        "seconds": time.perf_counter() - began,
        "commit": commit(),
        "device": device_name(record["settings"]),
        "versions": {"python": platform.python_version()} | versions_of("hymba", "torch", "transformers"),
        "settings": record["settings"],
    }
    with checkpoints.write_failures(folder):
        checkpoints.write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def measured(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name from a finished training's record.

    Those of a task's measurement; of text, loss (nats per token) and bits per byte of the held-out documents.

    Raises:
        ValueError: nothing was measured.
    """
    held_out = record["held_out"]
    if held_out is None:
        raise ValueError("nothing was measured: export.evaluate is off, or data.held_out leaves no document")
    if record["settings"]["data"].get("task") is not None:
        return scalars(held_out)
    loss = held_out["bits"] * math.log(2) / held_out["tokens"]
    return {"bits_per_byte": held_out["bits_per_byte"], "loss": loss}


def scalars(measured: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a task's measurement.

    A list `X_by_Y` beside a list `Y` or `Ys` gives one number each, `X[Y=value]`.
    """
    found: dict[str, float] = {}
    for name, value in measured.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
            continue
        kind, by, over = name.rpartition("_by_")
        places = measured.get(over, measured.get(over + "s"))
        if by and isinstance(value, list) and isinstance(places, list) and len(places) == len(value):
            for place, number in zip(places, value):
                if isinstance(number, (int, float)):
                    found[f"{kind}[{over}={place}]"] = float(number)
    return found


def failure_code(error: BaseException) -> int:
    """Which of `KINDS` an exception is."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, MemoryEstimateError)) or (
        # torch's CPU allocator and cuBLAS have no exception of their own.
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "ALLOC_FAILED" in text)
    ):
        return errno.ENOMEM
    if isinstance(error, checkpoints.OutputError) or checkpoints.is_write_failure(error):
        return errno.ENOSPC
    return 1


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a training's log that are whole."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def device(settings: Mapping[str, Any]) -> torch.device:
    """Where a training with these settings runs."""
    return torch.device("cuda" if uses_gpu(settings["run"]["device"]) else "cpu")


def device_name(settings: Mapping[str, Any]) -> str:
    """The GPU's name, or the processor's kind and the threads used."""
    if device(settings).type == "cuda":  # pragma: gpu
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """The commit of this code, `+` behind it for uncommitted changes; HYMBA_COMMIT names it where git cannot.

    An installed package has no history: "release <version>".
    """
    if named := os.environ.get("HYMBA_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[3]
    if not (root / "pyproject.toml").is_file():
        return f"release {hymba.__version__}"
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"release {hymba.__version__}"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def prune(folder: Path, keep: str) -> None:
    """Delete a finished run's weights as far as `AblationRun.keep` says."""
    output = folder / TRAIN
    if keep == "all" or not output.is_dir():
        return
    for path in list(output.iterdir()):
        exported = (path / train.RECORD_NAME).is_file()
        if checkpoints.checkpoint_step(path) is not None or (exported and keep == "nothing"):
            shutil.rmtree(path, ignore_errors=True)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and the run's lock: when it is gone, another may take the run up."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
