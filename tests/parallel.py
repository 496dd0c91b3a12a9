"""Trainings in several processes for tests: starts them, and does what a plan says inside each of them.

    python tests/parallel.py PLAN

PLAN is a JSON list of runs: `config`, `overrides` and, if a signal is wanted, `signal`: [process, step]. Each process
writes what came of them to PLAN with its number appended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def start(folder: Path, runs: list[dict[str, Any]], *, processes: int = 2, timeout: float = 900) -> list[list[Any]]:
    """What each process reports of each run: (status, step), or the kind and message of what was raised."""
    plan = folder / "plan.json"
    # A port for each run: a process that is early would meet the store of the run before.
    plan.write_text(json.dumps([{**run, "port": free_port()} for run in runs]), encoding="utf-8")
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        with (folder / f"output-{rank}.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(plan)], env={**common, **own}, stdout=output, stderr=output
                )
            )
    try:
        for process in started:
            process.wait(timeout)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = [(folder / f"output-{rank}.txt").read_text() for rank in range(processes)]
    assert not any(process.returncode for process in started), said
    return [json.loads(Path(f"{plan}.{rank}").read_text()) for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def work(plan: Path, rank: int) -> None:
    """Do the runs of a plan as process `rank`."""
    from hymba.experiments.train import main

    came_of_it: list[Any] = []
    for run in json.loads(plan.read_text(encoding="utf-8")):
        process, step = run.get("signal", (None, 0))
        os.environ["MASTER_PORT"] = str(run["port"])
        try:
            with signalled_at(step) if process == rank else contextlib.nullcontext():
                result = main(run["config"], run["overrides"])
            came_of_it.append((result.status, result.step))
        except Exception as error:
            came_of_it.append((type(error).__name__, str(error)))
    Path(f"{plan}.{rank}").write_text(json.dumps(came_of_it), encoding="utf-8")


@contextlib.contextmanager
def signalled_at(step: int) -> Iterator[None]:
    """SIGTERM to this process in the first forward pass of a step."""
    from hymba.experiments.trainer import HymbaTrainer

    real, sent = HymbaTrainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    HymbaTrainer.training_step = training_step
    try:
        yield
    finally:
        HymbaTrainer.training_step = real


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(os.environ["RANK"]))
