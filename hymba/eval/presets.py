"""Task lists as data: what to run with how many shots, and the paper's figures to set the results beside.

The files are in `hymba/assets/eval/presets`; `protocol` says what the paper states, `guesses` what it leaves open. A
file of one's own has the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hymba.config import nearest
from hymba.eval import EvaluationError

PRESETS = Path(str(files("hymba"))) / "assets" / "eval" / "presets"
PAPER = ("table2", "table3", "table9", "table4")
"""Presets with the paper's figures."""
DEFAULT = "offline"


@dataclass(frozen=True)
class TaskShots:
    """A task, group or tag of the harness, and its shots; `None` leaves them to the task."""

    task: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the paper's table: where the harness has it.

    Attributes:
        name: the table's. task, metric, filter: the harness's. also: another task that measures the same.
        num_fewshot: shots of the paper's figure.
        percent: the paper prints 100 times the harness's number.
    """

    name: str
    task: str
    metric: str
    filter: str = "none"
    also: str | None = None
    num_fewshot: int | None = None
    percent: bool = True

    def is_of(self, task: str, metric: str, filter_name: str) -> bool:
        """Whether this is the paper's figure for a harness's result: its task (or group), metric and filter."""
        return task in (self.task, self.also) and metric == self.metric and filter_name in (self.filter, "none")


@dataclass(frozen=True)
class Preset:
    """A file of a task list.

    Attributes:
        name: of the file. title: for a table's head.
        tasks: what to run.
        figures: those of the paper's table. averages: means that it prints, as names of figures.
        paper: of each model its figures and averages by name, as printed. shown: models beside the results.
        protocol: what is known about how the paper measured. guesses: what is not.
    """

    name: str
    title: str
    tasks: tuple[TaskShots, ...]
    figures: tuple[Figure, ...] = ()
    averages: Mapping[str, tuple[str, ...]] | None = None
    paper: Mapping[str, Mapping[str, float]] | None = None
    shown: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()

    def printed(self, model: str, figure: str) -> float | None:
        """The paper's figure in the harness's unit (a share of 1 for a percentage)."""
        value = (self.paper or {}).get(model, {}).get(figure)
        percent = all(f.percent for f in self.figures if f.name == figure)
        return value / 100 if value is not None and percent else value


def names() -> list[str]:
    """The presets of this package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """A preset by its name, or by the path of its file.

    Raises:
        EvaluationError: no such preset, or a file that does not make one; the message names file and key.
    """
    raw, path = _read(name)
    if "like" in raw:
        base, _ = _read(str(raw.pop("like")))
        raw = {**{key: value for key, value in base.items() if key not in ("paper", "shown")}, **raw}
    try:
        return _preset(raw, path)
    except EvaluationError as error:
        raise EvaluationError(f"--preset {path}: {error}") from error


def _read(name: str) -> tuple[dict[str, Any], Path]:
    path = PRESETS / f"{name}.yaml" if name in names() else Path(name).expanduser()
    if not path.is_file():
        hint = "" if path.suffix in (".yaml", ".yml") else nearest(name, names())
        raise EvaluationError(f"--preset {name}: allowed: {', '.join(names())}, or a YAML file.{hint}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--preset {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise EvaluationError(f"--preset {path}: {type(raw).__name__}; needed: a mapping with title and tasks")
    return raw, path


def _preset(raw: dict[str, Any], path: Path) -> Preset:
    _check_keys(raw, Preset, "", needed=("title", "tasks"))
    tasks = tuple(_entry(TaskShots, each, f"tasks[{i}]", ("task",)) for i, each in enumerate(_list(raw, "tasks")))
    if not tasks:
        raise EvaluationError("tasks: none; needed: at least one {task: NAME, num_fewshot: N}")
    shots = {task.task: task.num_fewshot for task in tasks}
    for name, count in shots.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise EvaluationError(f"tasks: {name}: num_fewshot={count!r}; allowed: 0, 1, 2, ...")
    figures = []
    for i, each in enumerate(_list(raw, "figures")):
        figure = _entry(Figure, each, f"figures[{i}]", ("name", "task", "metric"))
        if figure.task not in shots:
            raise EvaluationError(
                f"figures[{i}]: task={figure.task!r} is not among tasks.{nearest(figure.task, shots)}"
            )
        figures.append(_replace_shots(figure, shots[figure.task]))
    known = {figure.name for figure in figures}
    averages = {}
    for i, each in enumerate(_list(raw, "averages")):
        if not isinstance(each, dict) or set(each) != {"name", "of"}:
            raise EvaluationError(f"averages[{i}]: {each!r}; needed: {{name: NAME, of: [FIGURE, ...]}}")
        unknown = [name for name in each["of"] if name not in known]
        if unknown:
            raise EvaluationError(f"averages[{i}]: {unknown[0]!r} is no figure.{nearest(unknown[0], known)}")
        averages[each["name"]] = tuple(each["of"])
    paper = raw.get("paper") or {}
    for model, printed in paper.items():
        unknown = [name for name in printed if name not in known and name not in averages]
        if unknown:
            raise EvaluationError(
                f"paper: {model}: {unknown[0]!r} is no figure.{nearest(unknown[0], [*known, *averages])}"
            )
    shown = tuple(_list(raw, "shown"))
    for model in shown:
        if model not in paper:
            raise EvaluationError(f"shown: {model!r} is not in paper.{nearest(model, paper)}")
    texts = {key: tuple(map(str, _list(raw, key))) for key in ("protocol", "guesses")}
    return Preset(path.stem, str(raw["title"]), tasks, tuple(figures), averages, paper, shown, **texts)


def _replace_shots(figure: Figure, shots: int | None) -> Figure:
    return figure if figure.num_fewshot is not None else Figure(**{**vars(figure), "num_fewshot": shots})


def _list(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw.get(key) or []
    if not isinstance(value, list):
        raise EvaluationError(f"{key}: {value!r}; needed: a list")
    return value


def _entry(kind: type[Any], each: Any, where: str, needed: tuple[str, ...]) -> Any:
    if not isinstance(each, dict):
        raise EvaluationError(f"{where}: {each!r}; needed: a mapping with {', '.join(needed)}")
    _check_keys(each, kind, f"{where}: ", needed=needed)
    return kind(**each)


def _check_keys(raw: dict[str, Any], kind: type[Any], where: str, *, needed: tuple[str, ...]) -> None:
    allowed = [*(name for name in kind.__dataclass_fields__ if kind is not Preset or name != "name")]
    for key in raw:
        if key not in allowed:
            raise EvaluationError(f"{where}no key {key!r}; allowed: {', '.join(allowed)}.{nearest(str(key), allowed)}")
    for key in needed:
        if key not in raw:
            raise EvaluationError(f"{where}{key} is missing")
