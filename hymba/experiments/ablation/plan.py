"""A run for every variant, task and seed: its settings, folder and shape, all checked before the first one trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hymba import HymbaConfig, HymbaForCausalLM, cost
from hymba.config import nearest
from hymba.experiments import checkpoints
from hymba.experiments.ablation.settings import AblationError, AblationSettings, TaskEntry
from hymba.experiments.checkpoints import read_json
from hymba.experiments.resuming import changed_settings
from hymba.experiments.settings import SettingsError, TrainSettings
from hymba.experiments.tasks import make_task
from hymba.experiments.tokenizer import build_tokenizer
from hymba.experiments.train import check_generation

UNIT, CONFIG, RESULT, FAILURE, LOG, TRAIN = (
    "unit.json",
    "config.yaml",
    "result.json",
    "failure.json",
    "log.txt",
    "train",
)


@dataclass(frozen=True)
class Shape:
    """What a variant is for one task: parameters (counted on the built model) and bytes of its cache."""

    parameters: int
    cache_bytes: int


@dataclass(frozen=True)
class Unit:
    """One run."""

    variant: str
    task: TaskEntry
    seed: int
    settings: TrainSettings
    folder: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant} · {self.task.name} · seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What a finished run with these very settings left, or None.

        Raises:
            AblationError: the folder has the result of other settings.
        """
        found = read_json(self.folder / RESULT)
        if found is None:
            return None
        different = changed_settings(found["settings"], self.settings.to_dict())
        if different:
            raise AblationError(
                f"{self.folder}: has the result of other settings: {'; '.join(different)}; "
                "choose another run.output, or delete that folder"
            )
        return found

    def failure(self) -> dict[str, Any] | None:
        """Why the last attempt failed, or None."""
        return read_json(self.folder / FAILURE)

    def prepare(self) -> None:
        """Write what the worker reads: the training's settings, as `hymba train` takes them, and what to measure."""
        with checkpoints.write_failures(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FAILURE).unlink(missing_ok=True)
            text = yaml.safe_dump(self.settings.to_dict(), sort_keys=False)
            checkpoints.write_text(self.folder / CONFIG, text)
            record = {"variant": self.variant, "task": asdict(self.task), "seed": self.seed}
            checkpoints.write_text(self.folder / UNIT, json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True)
class Plan:
    """All runs in the order in which they start, and the shapes by (variant, task); variant None is the base."""

    settings: AblationSettings
    units: tuple[Unit, ...]
    shapes: dict[tuple[str | None, str], Shape]

    @property
    def output(self) -> Path:
        return Path(self.settings.run.output).expanduser()

    def select(
        self, variants: Sequence[str] = (), tasks: Sequence[str] = (), seeds: Sequence[int] = ()
    ) -> tuple[Unit, ...]:
        """The runs of some variants, tasks and seeds; empty means all.

        Raises:
            AblationError: a name or seed that the file does not have.
        """
        known: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
            ("--only", variants, list(self.settings.variants)),
            ("--task", tasks, [task.name for task in self.settings.tasks]),
            ("--seed", seeds, self.settings.seeds),
        )
        for option, asked, there in known:
            for one in asked:
                if one not in there:
                    names = ", ".join(map(str, there))
                    raise AblationError(f"{option} {one}: the file has {names}.{nearest(str(one), there)}")
        return tuple(
            unit
            for unit in self.units
            if (not variants or unit.variant in variants)
            and (not tasks or unit.task.name in tasks)
            and (not seeds or unit.seed in seeds)
        )

    def difference(self, variant: str, task: str) -> float:
        """How much larger a variant is than the base, as a share of the base's parameters."""
        base = self.shapes[None, task].parameters
        return (self.shapes[variant, task].parameters - base) / base

    def warnings(self) -> list[str]:
        """A line for each variant whose parameters differ from the base's by more than the tolerance."""
        tolerance = self.settings.run.parameter_tolerance
        lines = []
        for variant in self.settings.variants:
            apart = max((self.difference(variant, task.name) for task in self.settings.tasks), key=abs)
            if abs(apart) > tolerance:
                lines.append(
                    f"{variant} has {apart:+.1%} parameters against the base, beyond {tolerance:.0%}: "
                    "its gap may be one of size"
                )
        return lines


def make_plan(settings: AblationSettings) -> Plan:
    """Make every run, build every model without memory (on the meta device), and check all settings.

    Seeds come outermost, so that a cut leaves as many complete ladders as possible.

    Raises:
        AblationError: names every variant and task that cannot run, with the reason.
    """
    output = Path(settings.run.output).expanduser()
    units, problems = [], []
    shapes: dict[tuple[str | None, str], Shape] = {}
    for seed in settings.seeds:
        for task in settings.tasks:
            for variant in (None, *settings.variants):
                key = (variant, task.name)
                folder = output / "runs" / str(variant) / task.name / f"seed-{seed}"
                try:
                    train = settings.train_settings(variant, task, seed, folder / TRAIN)
                    if key not in shapes:
                        shapes[key] = _shape(train, settings.run.cache_length)
                except (ValueError, TypeError, OSError) as error:
                    problem = f"{variant or 'base'} ({task.name}): {error}"
                    if problem not in problems:
                        problems.append(problem)
                    continue
                if variant is not None:
                    units.append(Unit(variant, task, seed, train, folder))
    if problems:
        raise AblationError(f"{settings.path}: nothing was trained: " + "; ".join(problems))
    return Plan(settings, tuple(units), shapes)


def vocabulary(settings: TrainSettings) -> int:
    """Entries of the embedding that a training gives a model whose settings name none."""
    task = getattr(settings.data, "task", None)
    if task is not None:
        return make_task(**task).vocab_size
    if settings.tokenizer.path is None:
        return settings.tokenizer.vocab_size
    return len(build_tokenizer(settings.tokenizer, ()))


def _shape(settings: TrainSettings, cache_length: int) -> Shape:
    check_generation(settings.export.generation)
    fields = dict(settings.model)
    if settings.run.init_from is None:
        fields.setdefault("vocab_size", vocabulary(settings))
        config = HymbaConfig(**fields)
    else:
        config = HymbaConfig.from_pretrained(settings.run.init_from, **fields)
    needed = vocabulary(settings)
    if config.vocab_size < needed:
        raise SettingsError(f"model.vocab_size = {config.vocab_size}: the data has {needed} tokens")
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(parameters, cost.cache_bytes(config, cache_length).total)
