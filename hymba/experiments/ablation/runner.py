"""Gives the runs of a plan to worker processes, a few at a time, and says what becomes of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hymba.experiments import checkpoints
from hymba.experiments.ablation import worker
from hymba.experiments.ablation.lock import Locks
from hymba.experiments.ablation.plan import FAILURE, LOG, AblationError, Plan, Unit
from hymba.experiments.ablation.table import checkpoint_notes, shown_metrics
from hymba.experiments.callbacks import StopOnSignal

LOCK = "lock"
_POLL_SECONDS = 0.2


class Running(Protocol):
    """A run that is going on elsewhere."""

    def poll(self) -> int | None:
        """The exit status, or None while it goes on; negative: the signal that ended it."""

    def stop(self) -> None:
        """Ask for a checkpoint and an end."""

    def kill(self) -> None:
        """End it at once."""


Start = Callable[[Unit, str | None, int], Running]
"""Starts a run on a device (None: the CPU, or whatever is visible) with so many CPU threads (0: no limit)."""


@dataclass
class Report:
    """What an invocation did, by the names of its runs."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: list[str] = field(default_factory=list)
    """Started and stopped, or not started."""

    @property
    def exit_code(self) -> int:
        """1 when a run failed, else 130 when some were cut or not reached, else 0."""
        return 1 if self.failed else worker.INTERRUPTED if self.interrupted else 0


class Process:
    """A worker process; its output goes to the run's log."""

    def __init__(self, unit: Unit, device: str | None, threads: int) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        command = [sys.executable, "-m", "hymba.experiments.ablation.worker", str(unit.folder)]
        with checkpoints.write_failures(unit.folder), (unit.folder / LOG).open("ab") as log:
            # A session of its own: Ctrl-C reaches the parent, which passes it on once. The worker ends when its
            # stdin does, so also when the parent is killed.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def visible_devices(wanted: Sequence[str]) -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES for single-GPU processes: of those `wanted`, or of all that there are.

    Raises:
        AblationError: a device that there is not.
    """
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in masked.split(",") if name] if masked is not None else []
    if not names:
        names = [str(i) for i in range(torch.cuda.device_count())]
    for name in wanted:
        if not name.isdigit() or int(name) >= len(names):
            raise AblationError(
                f"--devices {name}: {f'GPUs 0 to {len(names) - 1} are visible' if names else 'no GPU is visible'}; "
                "leave it out to take what there is"
            )
    return [names[int(name)] for name in wanted] if wanted else names


def run_plan(
    plan: Plan,
    units: Sequence[Unit],
    *,
    jobs: int = 0,
    devices: Sequence[str] = (),
    minutes: float | None = None,
    start: Start = Process,
    say: Callable[[str], None] = print,
) -> Report:
    """Do those of `units` that are not done: at most `jobs` at a time, dealt out over `devices`.

    A run that fails is reported and the others go on. Ctrl-C, SIGTERM or the end of `minutes` make the runs in
    progress save and stop; the same call goes on later.

    Raises:
        AblationError: a device that there is not, another process at work on one of the runs, or a folder with the
            result of other settings.
        OutputError: the output folder cannot be written.
    """
    wanted = tuple(devices) or plan.settings.run.devices
    places: list[str] = visible_devices(wanted)
    jobs = jobs or plan.settings.run.jobs or max(1, len(wanted))
    report = Report()
    missing = [unit for unit in units if unit.result() is None]
    report.skipped = [unit.name for unit in units if unit not in missing]
    if report.skipped:
        say(f"{len(report.skipped)} of {len(units)} runs are done already")
    if not missing:
        return report
    checkpoints.check_output(plan.output, needed=0)
    with (
        Locks(unit.folder.with_name(f"{unit.folder.name}.{LOCK}") for unit in missing) as locks,
        StopOnSignal() as stop,
    ):
        for line in locks.stale:
            say(line)
        threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and not places else 0
        loop = _Loop(plan, missing, report, start=start, say=say, jobs=jobs, places=places, threads=threads)
        loop.run(stop, None if minutes is None else time.monotonic() + 60 * minutes)
    return report


class _Loop:
    """The runs that wait and those that go on."""

    def __init__(
        self,
        plan: Plan,
        units: Sequence[Unit],
        report: Report,
        *,
        start: Start,
        say: Callable[[str], None],
        jobs: int,
        places: Sequence[str],
        threads: int,
    ) -> None:
        self.waiting = deque(units)
        self.total = len(units)
        self.running: dict[int, tuple[Unit, Running, float]] = {}
        self.report, self.start, self.say, self.threads, self.plan = report, start, say, threads, plan
        self.slots: list[str | None] = [places[i % len(places)] if places else None for i in range(jobs)]

    def run(self, stop: StopOnSignal, deadline: float | None) -> None:
        stopping = False
        try:
            while self.running or (self.waiting and not stopping):
                if not stopping and (
                    stop.received is not None or (deadline is not None and time.monotonic() > deadline)
                ):
                    stopping = True
                    if stop.received is None:
                        self.say("the time is up: saving checkpoints")
                    for _, running, _ in self.running.values():
                        running.stop()
                if not stopping:
                    self._start_some()
                self._gather(stopping)
                if self.running:
                    time.sleep(_POLL_SECONDS)
        finally:
            for _, running, _ in self.running.values():
                running.kill()
        self.report.interrupted.extend(unit.name for unit in self.waiting)

    def _start_some(self) -> None:
        for slot, device in enumerate(self.slots):
            if slot in self.running or not self.waiting:
                continue
            unit = self.waiting.popleft()
            try:
                unit.prepare()
                self.running[slot] = (unit, self.start(unit, device, self.threads), time.monotonic())
            except OSError as error:
                self._fail(unit, "disk full" if isinstance(error, checkpoints.OutputError) else "error", str(error))

    def _gather(self, stopping: bool) -> None:
        for slot, (unit, running, began) in list(self.running.items()):
            code = running.poll()
            if code is None:
                continue
            del self.running[slot]
            seconds = time.monotonic() - began
            result = unit.result() if code == 0 else None
            if result is not None:
                worker.prune(unit.folder, self.plan.settings.run.keep)
                self.report.done.append(unit.name)
                shown = ", ".join(
                    f"{name} {result['metrics'][name]:.4g}" for name in shown_metrics(unit.task, result["metrics"])
                )
                self.say(f"[{self._count()}/{self.total}] {unit.name}: done in {seconds:.0f} s: {shown}")
                self._say_notes(unit)
            elif code == worker.INTERRUPTED or (stopping and code in (-signal.SIGTERM, -signal.SIGINT)):
                self.report.interrupted.append(unit.name)
                self.say(f"{unit.name}: stopped; the same command goes on from its last checkpoint")
            else:
                self._fail(unit, *self._reason(unit, code))

    def _say_notes(self, unit: Unit) -> None:
        """What the training said about checkpoints that it could not use."""
        for line in checkpoint_notes(unit):
            self.say(f"  {line}")

    def _reason(self, unit: Unit, code: int) -> tuple[str, str]:
        failure = unit.failure()
        if failure is not None:
            return failure["kind"], failure["message"]
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as the system does to a process when memory runs out" if -code == signal.SIGKILL else ""
            return "killed", f"ended by {name}{hint}; the same command goes on from its last checkpoint"
        return worker.KINDS.get(code, "error"), f"exit status {code}; see {unit.folder / LOG}"

    def _fail(self, unit: Unit, kind: str, message: str) -> None:
        self.report.failed[unit.name] = f"{kind}: {message}"
        self.say(f"[{self._count()}/{self.total}] {unit.name}: FAILED: {kind}: {message}")
        if unit.failure() is None:
            try:
                record = {"kind": kind, "message": message, "type": None}
                checkpoints.write_text(unit.folder / FAILURE, json.dumps(record, indent=1) + "\n")
            except OSError as error:
                self.say(f"  {unit.folder / FAILURE} could not be written: {error}")

    def _count(self) -> int:
        return len(self.report.done) + len(self.report.failed)
