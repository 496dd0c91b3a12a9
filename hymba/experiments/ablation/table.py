"""The table of an ablation: a row per variant, mean and spread over seeds, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hymba.experiments import checkpoints
from hymba.experiments.ablation.plan import CONFIG, LOG, TRAIN, Plan, Unit
from hymba.experiments.ablation.settings import TaskEntry
from hymba.experiments.train import DAMAGED
from hymba.experiments.trainer import LOG_NAME

FORMAT = 1
"""Of the JSON file; raised when a field is renamed or taken away."""
NAMES = ("table.md", "table.csv", "table.json")
_MAIN = ("bits_per_byte", "accuracy")
"""The column that a task has when its entry names none: the first of these that was measured."""
_TITLES = {"bits_per_byte": "bits/byte"}


def shown_metrics(task: TaskEntry, measured: Iterable[str]) -> list[str]:
    """The measurements that get a column: those that the task's entry names (`*`: anything), or the main one."""
    names = list(measured)
    if task.metrics:
        found = [name for pattern in task.metrics for name in names if name == pattern or _matches(name, pattern)]
        return list(dict.fromkeys(found))
    main = [name for name in _MAIN if name in names]
    return main[:1] or [name for name in names if name not in ("train_loss", "chance")][:1]


def _matches(name: str, pattern: str) -> bool:
    # A metric's brackets are part of its name.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def checkpoint_notes(unit: Unit) -> list[str]:
    """What the run's log says about checkpoints that could not be used."""
    try:
        lines = (unit.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(DAMAGED)]


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (n - 1; None for one value), extremes and values by seed."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
        "n": len(numbers),
        "values": {str(seed): value for seed, value in values.items()},
    }


def make_table(plan: Plan) -> dict[str, Any]:
    """What is in the output folder by now, as plain data; the fields are those of `table.json`."""
    rows = [_row(plan, variant) for variant in plan.settings.variants]
    settings = plan.settings
    return {
        "format": FORMAT,
        "file": str(settings.path),
        "seeds": list(settings.seeds),
        "tasks": [asdict(task) for task in settings.tasks],
        "cache_length": settings.run.cache_length,
        "base": {task.name: asdict(plan.shapes[None, task.name]) for task in settings.tasks},
        "warnings": [*plan.warnings(), *_unfair(plan), *_several_commits(rows)],
        "rows": rows,
    }


def _row(plan: Plan, variant: str) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for task in plan.settings.tasks:
        units = plan.select([variant], [task.name])
        results = {unit.seed: result for unit in units if (result := unit.result()) is not None}
        shape = plan.shapes[variant, task.name]
        names = dict.fromkeys(name for result in results.values() for name in result["metrics"])
        speeds = {
            seed: result["tokens_per_second"]
            for seed, result in results.items()
            if result["tokens_per_second"] is not None
        }
        tasks[task.name] = {
            "parameters": shape.parameters,
            "parameters_vs_base": plan.difference(variant, task.name),
            "cache_bytes": shape.cache_bytes,
            "tokens_per_second": spread(speeds) if speeds else None,
            "metrics": {
                name: spread({s: r["metrics"][name] for s, r in results.items() if name in r["metrics"]})
                for name in names
            },
        }
        runs.extend(_run(plan, unit, results.get(unit.seed)) for unit in units)
    return {
        "variant": variant,
        "changes": plan.settings.variants[variant],
        "status": _status(runs),
        "tasks": tasks,
        "commits": sorted({run["commit"] for run in runs if run["commit"] is not None}),
        "runs": runs,
    }


def _run(plan: Plan, unit: Unit, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """One run: how it ended, and what made it."""
    failure = None if result is not None else unit.failure()
    return {
        "task": unit.task.name,
        "seed": unit.seed,
        "status": "done" if result is not None else "failed" if failure is not None else "missing",
        "failure": failure,
        "notes": checkpoint_notes(unit),
        "config": (unit.folder / CONFIG).relative_to(plan.output).as_posix(),
        "commit": None if result is None else result["commit"],
        "device": None if result is None else result["device"],
        "tokens": None if result is None else result["tokens"],
        "rows": None if result is None else result["rows"],
        "seconds": None if result is None else result["seconds"],
    }


def _status(runs: Sequence[Mapping[str, Any]]) -> str:
    counts = {kind: sum(run["status"] == kind for run in runs) for kind in ("done", "failed", "missing")}
    if counts["done"] == len(runs):
        return "done"
    return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)


def _unfair(plan: Plan) -> list[str]:
    """A line for each task and seed whose runs did not see the same rows."""
    lines = []
    for task in plan.settings.tasks:
        for seed in plan.settings.seeds:
            seen: dict[str, list[str]] = {}
            for unit in plan.select(tasks=[task.name], seeds=[seed]):
                result = unit.result()
                if result is not None:
                    seen.setdefault(result["rows"], []).append(unit.variant)
            if len(seen) > 1:
                sides = " against ".join(", ".join(variants) for variants in seen.values())
                lines.append(f"{task.name}, seed {seed}: the runs did not see the same tokens: {sides}")
    return lines


def _several_commits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    commits = sorted({commit for row in rows for commit in row["commits"]})
    return [f"the runs were made by several commits: {', '.join(commits)}"] if len(commits) > 1 else []


def columns(plan: Plan, table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(task, metric) of each measured column, in the order of the tasks."""
    found: list[tuple[str, str]] = []
    for task in plan.settings.tasks:
        measured = dict.fromkeys(name for row in table["rows"] for name in row["tasks"][task.name]["metrics"])
        found.extend((task.name, name) for name in shown_metrics(task, measured))
    return found


def markdown(plan: Plan, table: Mapping[str, Any]) -> str:
    """The table for people, with warnings, failures and where each row comes from underneath."""
    first = plan.settings.tasks[0].name
    shown = columns(plan, table)
    length = table["cache_length"]
    several = len(plan.settings.tasks) > 1
    of = f" ({first})" if several else ""
    titles = [f"{task}: {_TITLES.get(metric, metric)}" for task, metric in shown]
    head = [
        "variant",
        f"parameters{of}",
        "vs. base",
        f"tok/s{of}",
        f"cache, {length:,} tokens",
        *titles,
        "runs",
        "commit",
        "settings",
    ]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 4) + ["---"] * 3)]
    for row in table["rows"]:
        task = row["tasks"][first]
        speed = task["tokens_per_second"]
        cells = [
            row["variant"],
            f"{task['parameters']:,}",
            f"{task['parameters_vs_base']:+.2%}",
            "–" if speed is None else f"{speed['mean']:,.0f}",
            f"{task['cache_bytes'] / 2**20:,.2f} MiB",
            *(_cell(row["tasks"][name]["metrics"].get(metric), len(table["seeds"])) for name, metric in shown),
            row["status"],
            ", ".join(row["commits"]) or "–",
            f"`runs/{row['variant']}/TASK/seed-N/{CONFIG}`",
        ]
        lines.append(_line(cells))
    seeds = ", ".join(map(str, table["seeds"]))
    lines += [
        "",
        f"Mean ± sample standard deviation over the seeds {seeds}; in brackets how many, where some are missing.",
    ]
    if several:
        lines[-1] += f" Parameters and training tokens/s are those of `{first}`; `table.json` has them for each task."
    lines += ["", f"Made from `{table['file']}`; every run's exact settings are in the file of the last column."]
    for title, items in (("Warnings", table["warnings"]), ("Failed", _failures(table)), ("Notes", _notes(table))):
        if items:
            lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Mapping[str, Any] | None, seeds: int) -> str:
    if value is None:
        return "–"
    text = f"{value['mean']:.4g}"
    if value["std"] is not None:
        text += f" ± {value['std']:.2g}"
    return text if value["n"] == seeds else f"{text} ({value['n']} of {seeds})"


def _failures(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['variant']}, {run['task']}, seed {run['seed']}: {run['failure']['kind']}: {run['failure']['message']}"
        for row in table["rows"]
        for run in row["runs"]
        if run["failure"] is not None
    ]


def _notes(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['variant']}, {run['task']}, seed {run['seed']}: {note}"
        for row in table["rows"]
        for run in row["runs"]
        for note in run["notes"]
    ]


def comma_separated(table: Mapping[str, Any]) -> str:
    """One line per variant, task and metric, every measurement included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "variant task parameters parameters_vs_base cache_bytes tokens_per_second metric mean std min max n status"
    writer.writerow([*head.split(), "commits", "configs"])
    for row in table["rows"]:
        for name, task in row["tasks"].items():
            speed = task["tokens_per_second"]
            shape = [task["parameters"], task["parameters_vs_base"], task["cache_bytes"], speed and speed["mean"]]
            configs = " ".join(run["config"] for run in row["runs"] if run["task"] == name)
            # A variant without results keeps its line.
            for metric, value in task["metrics"].items() or [("", {})]:
                numbers = [value.get(key) for key in ("mean", "std", "min", "max", "n")]
                tail = [row["status"], " ".join(row["commits"]), configs]
                writer.writerow([row["variant"], name, *shape, metric, *numbers, *tail])
    return out.getvalue()


def write_table(plan: Plan) -> tuple[dict[str, Any], str]:
    """Make the table, write it in its three forms, and return the data and the Markdown."""
    table = make_table(plan)
    text = markdown(plan, table)
    contents = (text, comma_separated(table), json.dumps(table, indent=1) + "\n")
    checkpoints.check_output(plan.output, needed=0)
    with checkpoints.write_failures(plan.output):
        for name, content in zip(NAMES, contents):
            checkpoints.write_text(plan.output / name, content)
    return table, text


def training_log(plan: Plan, unit: Unit) -> Path:
    """Where the run's losses are."""
    return unit.folder / TRAIN / LOG_NAME
