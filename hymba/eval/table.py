"""The results as a table, beside the paper's figures where the task is one of the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hymba.eval.presets import PAPER, Figure, Preset, load_preset
from hymba.eval.run import Evaluation

_HYMBA = {"table2": "Hymba 1.5B", "table3": "Hymba 1B", "table9": "Hymba 300M", "table4": "Hymba 1.5B"}


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Attributes:
        task, shots, metric: as the harness names them; the filter follows the metric in brackets where there is one.
        value: the harness's number. stderr: its standard error, where there is one.
        paper: the figures in `Table.models`, in the unit of `value`.
    """

    task: str
    shots: int | None
    metric: str
    value: float
    stderr: float | None
    paper: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    """Rows, and the models of the paper beside them."""

    title: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Value:
    task: str
    shots: int | None
    metric: str
    filter: str
    value: float
    stderr: float | None


def table(evaluation: Evaluation, preset: Preset | None = None) -> Table:
    """The results of what was asked for, one row for each metric.

    Without a preset of the paper's, a task that stands in one of its tables with the same shots and metric has the
    figure of that table's Hymba beside it. Averages stand at the end when everything that they are made of was run.
    """
    values = list(_values(evaluation))
    if preset is not None and preset.paper:
        columns = [(preset, model, model) for model in preset.shown]
    else:
        columns = [(p, _HYMBA[p.name], f"{_HYMBA[p.name]} (table {p.name[5:]})") for p in map(load_preset, PAPER)]
    rows = []
    for value in values:
        printed = tuple(_printed(value, p, model) for p, model, _ in columns)
        metric = value.metric if value.filter == "none" else f"{value.metric} ({value.filter})"
        rows.append(Row(value.task, value.shots, metric, value.value, value.stderr, printed))
    if preset is not None:
        rows += list(_averages(values, preset))
    used = [i for i in range(len(columns)) if any(row.paper[i] is not None for row in rows)]
    kept = [Row(r.task, r.shots, r.metric, r.value, r.stderr, tuple(r.paper[i] for i in used)) for r in rows]
    return Table("" if preset is None else preset.title, tuple(columns[i][2] for i in used), tuple(kept))


def render(found: Table) -> Any:
    """The table for a terminal (a `rich.table.Table`)."""
    from rich.table import Table as RichTable

    shown = RichTable(title=found.title or None, title_justify="left")
    for head in ("Task", "Shots", "Metric"):
        shown.add_column(head, overflow="fold")
    for head in ("Value", "± stderr", *(f"Paper: {model}" for model in found.models)):
        shown.add_column(head, justify="right", overflow="fold")
    last = None
    for row in found.rows:
        first = ("", "") if row.task == last else (row.task, "" if row.shots is None else str(row.shots))
        last = row.task
        shown.add_row(*first, row.metric, _number(row.value), _number(row.stderr), *map(_number, row.paper))
    return shown


def _values(evaluation: Evaluation) -> Iterator[_Value]:
    results = evaluation.results
    for task in evaluation.tasks:
        found = {**results.get("groups", {}).get(task, {}), **results["results"].get(task, {})}
        members: Sequence[str] = () if any("," in key for key in found) else results["group_subtasks"].get(task, ())
        for name in members or (task,):
            # A group without a mean of its own is shown by its members.
            metrics = found if not members else results["results"].get(name, {})
            for key in sorted(metrics):
                metric, comma, filter_name = key.partition(",")
                if comma and not metric.endswith("_stderr") and isinstance(metrics[key], (int, float)):
                    stderr = metrics.get(f"{metric}_stderr,{filter_name}")
                    stderr = float(stderr) if isinstance(stderr, (int, float)) else None
                    shots = results["n-shot"].get(name)
                    yield _Value(name, shots, metric, filter_name, float(metrics[key]), stderr)


def _figure(value: _Value, preset: Preset) -> Figure | None:
    for figure in preset.figures:
        if figure.is_of(value.task, value.metric, value.filter) and figure.num_fewshot in (None, value.shots):
            return figure
    return None


def _printed(value: _Value, preset: Preset, model: str) -> float | None:
    figure = _figure(value, preset)
    return None if figure is None else preset.printed(model, figure.name)


def _averages(values: Sequence[_Value], preset: Preset) -> Iterator[Row]:
    measured = {figure.name: value.value for value in values if (figure := _figure(value, preset)) is not None}
    for name, parts in (preset.averages or {}).items():
        if all(part in measured for part in parts):
            mean = sum(measured[part] for part in parts) / len(parts)
            yield Row(name, None, "mean", mean, None, tuple(preset.printed(model, name) for model in preset.shown))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
