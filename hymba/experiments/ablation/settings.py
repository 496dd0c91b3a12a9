"""The YAML file of an ablation: a base, the variants, the seeds, the tasks, and how to run them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hymba.config import nearest
from hymba.experiments.settings import (
    SettingsError,
    TrainSettings,
    beside,
    read_raw,
    read_yaml,
    set_key,
    settings_from,
    train_settings,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# A variant may change these; everything else decides which tokens are seen, and belongs to the base or to a task.
_VARIANT_SECTIONS = ("model", "optimizer", "schedule")
_VARIANT_KEYS = ("run.precision", "run.activation_checkpointing", "run.batch_size", "run.gradient_accumulation")
# Decided by the ablation for each run.
_OURS = ("run.output", "run.seed", "run.resume")


class AblationError(ValueError):
    """An ablation that cannot start; the message names every variant at fault, or the folder and who has it."""


@dataclass(frozen=True)
class TaskEntry:
    """What every variant is trained on and measured by."""

    name: str = ""
    """The task's column in the table and its folder."""
    task: dict[str, Any] | None = None
    """``data.task`` of the training: ``name`` and parameters; null: the base's, or language modelling on the base's
    corpus where it has none. ``settings: {data.task: null}`` leaves the base's out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings in place of the base's, the same for every variant."""
    metrics: tuple[str, ...] = ()
    """The measurements that get a column; all are kept. Empty: the task's main one."""


@dataclass(frozen=True)
class AblationRun:
    """Where the runs are written and how many go on at a time."""

    output: str = "runs/ablation"
    jobs: int = 0
    """Runs at a time; 0: one, or one for each of ``devices`` where those are given."""
    devices: tuple[str, ...] = ()
    """GPUs by their index among the visible ones; empty: all visible ones, or the CPU."""
    keep: Literal["final", "all", "nothing"] = "final"
    """Of a finished run's weights: the exported folder, that and the checkpoints, or neither."""
    cache_length: int = 8192
    """Text tokens for which the table gives the cache's bytes (bfloat16, one row)."""
    parameter_tolerance: float = 0.02
    """A warning where a variant's parameters differ from the base's by more than this share."""
    plots: bool = True


@dataclass(frozen=True)
class _File:
    """The keys of the file; ``base`` may also be the path of a training file."""

    base: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[Any, ...] = ()
    run: AblationRun = field(default_factory=AblationRun)


@dataclass(frozen=True)
class AblationSettings:
    """An ablation's file, checked as far as can be without building a model."""

    path: Path
    base: dict[str, Any]
    """Sections of a training file."""
    variants: dict[str, dict[str, Any]]
    """Name to dotted settings; ``model`` without a dot is a whole section in place of the base's."""
    seeds: tuple[int, ...]
    tasks: tuple[TaskEntry, ...]
    run: AblationRun

    def train_settings(self, variant: str | None, task: TaskEntry, seed: int, output: Path) -> TrainSettings:
        """The training of one run; ``variant`` None is the base.

        Raises:
            SettingsError: names the variant or task and the key.
        """
        raw = copy.deepcopy(self.base)
        where = f"{self.path}: tasks: {task.name}"
        if task.task is not None:
            set_key(raw, "data.task", copy.deepcopy(task.task), where=where)
        for key, value in task.settings.items():
            set_key(raw, key, copy.deepcopy(value), where=where)
        # Of the task before the variant's changes, which must leave it as it is.
        rows_per_step = _rows_per_step(train_settings(raw, where=where))
        if variant is not None:
            where = f"{self.path}: variants: {variant}"
            for key, value in self.variants[variant].items():
                if key == "model":
                    raw["model"] = copy.deepcopy(value)
                else:
                    set_key(raw, key, copy.deepcopy(value), where=where)
        for key, value in (("run.output", str(output)), ("run.seed", seed), ("run.resume", "auto")):
            set_key(raw, key, value, where=where)
        settings = train_settings(raw, where=where)
        rows = _rows_per_step(settings)
        if rows != rows_per_step:
            raise SettingsError(
                f"{where}: run.batch_size * run.gradient_accumulation = {rows}: expected the task's "
                f"{rows_per_step}, so that every variant sees the same tokens at each step"
            )
        return settings


def load_ablation(path: str | Path, overrides: Iterable[str] = ()) -> AblationSettings:
    """Read an ablation's YAML file and ``key=value`` overrides of its dotted keys (``base.run.steps=100``).

    ``base`` is the path of a training file, its sections, or both: sections with ``file``, whose keys they replace.
    Paths are looked up beside the file that names them, then in the working directory.

    Raises:
        FileNotFoundError: a file does not exist.
        SettingsError: an unknown key (with the nearest name), a wrong type or value.
    """
    path = Path(path)
    raw = read_yaml(path)
    raw["base"] = _base(path, raw.get("base"))
    for override in overrides:
        _override(raw, override)
    devices = (raw.get("run") or {}).get("devices") if isinstance(raw.get("run"), Mapping) else None
    if isinstance(devices, list):
        raw["run"]["devices"] = [str(device) for device in devices]
    file = settings_from(_File, raw, where=str(path))
    if not file.base:
        raise SettingsError(f"{path}: base: expected a training file, or the sections of one")
    settings = AblationSettings(
        path=path,
        base=file.base,
        variants={name: _variant(path, name, changes) for name, changes in file.variants.items()},
        seeds=file.seeds,
        tasks=tuple(_task(path, i, entry) for i, entry in enumerate(file.tasks)),
        run=file.run,
    )
    _check(settings)
    return settings


def _base(path: Path, given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        return read_raw(beside(path, given))
    if not isinstance(given, Mapping):
        raise SettingsError(f"{path}: base = {given!r}: expected a training file, or the sections of one")
    sections = dict(given)
    if isinstance(sections.get("model"), str):
        sections["model"] = read_yaml(beside(path, sections["model"]))
    file = sections.pop("file", None)
    if file is None:
        return sections
    if not isinstance(file, str):
        raise SettingsError(f"{path}: base.file = {file!r}: expected the path of a training file")
    base = read_raw(beside(path, file))
    for section, values in sections.items():
        before = base.get(section)
        base[section] = {**before, **values} if isinstance(before, dict) and isinstance(values, Mapping) else values
    return base


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise SettingsError(f"override {override!r}: expected key=value, for example seeds=[0] or base.run.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: the value is not readable as YAML: {error}") from error
    target = raw
    for name in names[:-1]:
        inner = target.get(name)
        if inner is None:
            inner = target[name] = {}
        if not isinstance(inner, dict):
            raise SettingsError(f"override {override!r}: {name!r} is {inner!r}, which has no keys")
        target = inner
    target[names[-1]] = value


def _variant(path: Path, name: str, changes: Any) -> dict[str, Any]:
    where = f"{path}: variants: {name}"
    if changes is None:
        return {}
    if not isinstance(changes, Mapping):
        raise SettingsError(f"{where} = {changes!r}: expected dotted settings, such as model.num_memory_tokens: 0")
    made: dict[str, Any] = {}
    for key, value in changes.items():
        section = str(key).partition(".")[0]
        if key == "model":
            if not isinstance(value, str):
                raise SettingsError(f"{where}: model = {value!r}: expected a file; a single field is model.<field>")
            # First, whatever its place: single fields change what the file says.
            made = {"model": read_yaml(beside(path, value)), **made}
            continue
        if key not in _VARIANT_KEYS and (section not in _VARIANT_SECTIONS or "." not in str(key)):
            allowed = ", ".join((*(f"{section}.<field>" for section in _VARIANT_SECTIONS), *_VARIANT_KEYS))
            known = [f"{kind.name}.{item.name}" for kind in dataclasses.fields(TrainSettings) for item in _fields(kind)]
            hint = "" if key in known else nearest(str(key), known)
            raise SettingsError(
                f"{where}: {key!r}: a variant may set {allowed}; what decides the tokens that are seen is the same for "
                f"all variants, and belongs to base or tasks.{hint}"
            )
        made[str(key)] = value
    return made


def _fields(section: dataclasses.Field[Any]) -> tuple[dataclasses.Field[Any], ...]:
    factory = section.default_factory
    return dataclasses.fields(factory) if dataclasses.is_dataclass(factory) else ()


def _task(path: Path, index: int, entry: Any) -> TaskEntry:
    where = f"{path}: tasks[{index}]"
    if not isinstance(entry, Mapping):
        raise SettingsError(f"{where} = {entry!r}: expected a mapping with a name")
    task = settings_from(TaskEntry, entry, where=where)
    if not task.name:
        raise SettingsError(f"{where}: name: give the task one; it is its column in the table")
    for key, value in task.settings.items():
        section, _, leaf = key.partition(".")
        if key == "data.task" and value is not None:
            raise SettingsError(f"{where}: settings: 'data.task' is null or left out; a task stands in `task`")
        if key in _OURS or (section == "model" and leaf != "vocab_size"):
            raise SettingsError(f"{where}: settings: {key!r} is not a task's to set; the ablation or a variant does")
    return task


def _check(settings: AblationSettings) -> None:
    path, run = settings.path, settings.run

    def need(condition: bool, key: str, value: Any, allowed: str) -> None:
        if not condition:
            raise SettingsError(f"{path}: {key} = {value!r}: {allowed}")

    need(bool(settings.variants), "variants", settings.variants, "name at least one variant")
    need(bool(settings.tasks), "tasks", [], "name at least one task")
    need(bool(settings.seeds), "seeds", [], "name at least one seed")
    seeds = list(settings.seeds)
    need(len(set(seeds)) == len(seeds) and min(seeds) >= 0, "seeds", seeds, "expected different numbers from 0")
    names = [task.name for task in settings.tasks]
    need(len(set(names)) == len(names), "tasks", names, "two tasks have one name")
    for name in (*settings.variants, *names):
        need(
            _NAME.fullmatch(name) is not None,
            "name",
            name,
            "it names a folder: letters, digits and . _ + = - only, a letter or digit first",
        )
    need(run.jobs >= 0, "run.jobs", run.jobs, "expected 0 or more")
    need(run.cache_length >= 0, "run.cache_length", run.cache_length, "expected 0 or more")
    need(run.parameter_tolerance >= 0, "run.parameter_tolerance", run.parameter_tolerance, "expected 0 or more")


def _rows_per_step(settings: TrainSettings) -> int:
    return settings.run.batch_size * settings.run.gradient_accumulation
