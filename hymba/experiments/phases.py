"""The parts of a run: which steps, rows, batch and model fields each has, and how a step's tokens are dealt out.

A run without ``phases`` has one part. Learning rate, optimizer and checkpoints know nothing of phases: a phase begins
from the checkpoint that the one before it has left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba.experiments import checkpoints
from hymba.experiments.mixing import LaterRows, MixedRows, Mixture
from hymba.experiments.packing import Rows, TokenRows, Tokens, rows_digest
from hymba.experiments.ranges import phase_start
from hymba.experiments.settings import RunSettings, SettingsError, TrainSettings
from hymba.experiments.tasks import Task, make_task

FIRST = "first"
"""The name of the part before the first phase."""
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` to ``end`` of a run.

    Attributes:
        settings: of the run, with what the phase changes.
        length: tokens of a row. rows_per_step: rows of an optimizer step over all devices.
        accumulation: forward passes of a device for one step.
        weights: of the sources by name; none for a single source or a task.
        task: of ``data.task`` with the phase's parameters; its rows have a length of their own.
    """

    name: str
    settings: TrainSettings
    start: int
    end: int
    length: int
    rows_per_step: int
    accumulation: int
    weights: dict[str, float]
    task: Task | None = None

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.length

    def record(self) -> dict[str, Any]:
        """What must be the same when the run goes on, on however many devices."""
        return {"name": self.name, "start": self.start, "length": self.length, "rows_per_step": self.rows_per_step}


def plan_phases(settings: TrainSettings, world: int) -> list[Phase]:
    """The run's parts in order.

    Args:
        world: processes, one device each.

    Raises:
        SettingsError: ``run.tokens_per_step`` cannot be dealt out to these processes (says what can), or several are
            to replay a CUDA graph.
    """
    if settings.run.cuda_graph and world > 1:
        raise SettingsError(
            f"run.cuda_graph = True: {world} processes exchange gradients between the kernels; allowed: one process, "
            "or leave run.cuda_graph out"
        )
    weights = {source.name: source.weight for source in settings.data.sources}
    parts = [(FIRST, 0, settings, weights)]
    for phase in settings.phases:
        changed = _changed(settings, phase)
        parts.append((phase.name, phase_start(phase.start, settings.run.steps), changed, phase.weights or weights))
    phases: list[Phase] = []
    for i, (name, start, own, mix) in enumerate(parts):
        end = parts[i + 1][1] if i + 1 < len(parts) else settings.run.steps
        task = None if own.data.task is None else make_task(**own.data.task)
        length = own.data.sequence_length if task is None else task.length
        accumulation = accumulation_of(own.run, length, world, where="" if i == 0 else f"phase {name!r}: ")
        rows = own.run.batch_size * accumulation * world
        phases.append(Phase(name, own, start, end, length, rows, accumulation, mix, task))
    return phases


def tokens_after(phases: list[Phase], step: int) -> int:
    """Tokens of the first ``step`` steps of a run."""
    return sum(min(max(step - phase.start, 0), phase.steps) * phase.tokens_per_step for phase in phases)


def _changed(settings: TrainSettings, phase: Any) -> TrainSettings:
    data, run = settings.data, settings.run
    if phase.sequence_length is not None:
        data = dataclasses.replace(data, sequence_length=phase.sequence_length)
    if phase.task:
        data = dataclasses.replace(data, task={**(data.task or {}), **phase.task})
    for name in ("batch_size", "activation_checkpointing"):
        if (value := getattr(phase, name)) is not None:
            run = dataclasses.replace(run, **{name: value})
    return dataclasses.replace(settings, data=data, run=run, model={**settings.model, **phase.model})


def accumulation_of(run: RunSettings, length: int, world: int, where: str = "") -> int:
    """Forward passes of a device for one optimizer step.

    Raises:
        SettingsError: ``run.tokens_per_step`` is not a multiple of what one pass of all processes takes.
    """
    if run.tokens_per_step is None:
        return run.gradient_accumulation
    once = run.batch_size * world * length
    if run.tokens_per_step % once:
        message = (
            f"{where}run.tokens_per_step = {run.tokens_per_step:,}: one pass of {world} "
            f"{'process' if world == 1 else 'processes'} x run.batch_size = {run.batch_size} rows x {length:,} tokens "
            f"takes {once:,}, which does not divide it"
        )
        rows, left = divmod(run.tokens_per_step, world * length)
        if left:
            near = max(1, round(run.tokens_per_step / (world * length))) * world * length
            raise SettingsError(f"{message}; with {world} x {length:,} it has to be a multiple, such as {near:,}")
        fitting = [size for size in range(1, rows + 1) if rows % size == 0]
        nearest = sorted(fitting, key=lambda size: abs(size - run.batch_size))[:4]
        raise SettingsError(f"{message}; allowed run.batch_size: {', '.join(map(str, sorted(nearest)))}")
    return run.tokens_per_step // once


def text_rows(phases: list[Phase], tokens: Mapping[str, Tokens]) -> tuple[list[Rows], dict[str, float]]:
    """The rows of each phase, and how often the run goes through each source.

    A source goes on where the phase before left it, as long as its rows keep their length; with another length it
    starts another pass.

    Args:
        tokens: of each source by name; a single source without a name is called "".
    """
    found: list[Rows] = []
    names = list(tokens)
    # Of each source: the rows' length, and the first row of that length that nobody has read.
    reached: dict[str, tuple[int, int]] = {}
    passes = dict.fromkeys(names, 0.0)
    for number, phase in enumerate(phases):
        mix = phase.weights or {names[0]: 1.0}
        count, first = phase.steps * phase.rows_per_step, phase.start * phase.rows_per_step
        read = [name for name in names if mix.get(name)]
        mixture = Mixture([mix[name] for name in read], count, (phase.settings.run.seed, number, len(names)))
        sources, begin = [], []
        for name, rows in zip(read, mixture.totals(), strict=True):
            per_pass = len(tokens[name]) // phase.length
            length, row = reached.get(name, (phase.length, 0))
            if length != phase.length:
                row = -(-row // (len(tokens[name]) // length)) * per_pass
            source = TokenRows(
                tokens[name],
                length=phase.length,
                rows=row + rows,
                seed=phase.settings.run.seed,
                layout=phase.settings.data.layout,
                stream=names.index(name) if len(names) > 1 else None,
                name=f"source {name!r}" if name else "the training side",
            )
            sources.append(source)
            begin.append(row)
            reached[name] = (phase.length, row + rows)
            passes[name] += rows / per_pass
        if len(read) == 1:
            (only,), (at,) = sources, begin
            found.append(LaterRows(only, first=first, begin=at, count=count) if first or at else only)
        else:
            found.append(MixedRows(sources, begin, mixture, first=first))
    return found, passes


def task_rows(phases: list[Phase]) -> list[Rows]:
    """The rows of each phase of a run on a task, all of them new."""
    counts = [phase.steps * phase.rows_per_step for phase in phases]
    found: list[Rows] = []
    for i, phase in enumerate(phases):
        assert phase.task is not None
        rows = phase.task.rows(phase.settings.run.seed, sum(counts))
        first = phase.start * phase.rows_per_step
        found.append(LaterRows(rows, first=first, begin=sum(counts[:i]), count=counts[i]) if i else rows)
    return found


def digest(rows: list[Rows]) -> str:
    """`rows_digest` of one phase, or a hash of those of all."""
    parts = [rows_digest(each) for each in rows]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def write_plan(phases: list[Phase], output: Path) -> None:
    """Keep what a resumed run is held to."""
    checkpoints.write_text(output / PLAN_NAME, json.dumps([phase.record() for phase in phases], indent=1) + "\n")


def check_plan(phases: list[Phase], output: Path, world: int) -> None:
    """Refuse to go on with another number of rows in a step: the data would come in another order.

    Raises:
        SettingsError: names both numbers and what they are made of.
    """
    try:
        before = json.loads((output / PLAN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A run of a version that did not keep it.
        return
    for old, phase in zip(before, phases):
        if old["rows_per_step"] != phase.rows_per_step:
            raise SettingsError(
                f"run.output = {str(output)!r}: its steps have {old['rows_per_step']} rows; now {world} "
                f"{'process' if world == 1 else 'processes'} x run.batch_size = {phase.settings.run.batch_size} x "
                f"accumulation {phase.accumulation} make {phase.rows_per_step}; run.tokens_per_step = "
                f"{old['rows_per_step'] * old['length']} keeps it whatever the number of processes"
            )
