"""An ablation from its file to the table: what `hymba ablate` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from hymba.experiments.ablation import plots
from hymba.experiments.ablation.plan import Plan, Unit, make_plan
from hymba.experiments.ablation.runner import Process, Start, run_plan
from hymba.experiments.ablation.settings import load_ablation
from hymba.experiments.ablation.table import NAMES, write_table


def main(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    tasks: Sequence[str] = (),
    jobs: int = 0,
    devices: Sequence[str] = (),
    minutes: float | None = None,
    mode: Literal["run", "check", "table"] = "run",
    start: Start = Process,
    say: Callable[[str], None] = print,
) -> int:
    """Run what is missing of an ablation and write its table and plots.

    Args:
        path: the YAML file. overrides: `key=value` in place of its keys.
        only, seeds, tasks: variants, seeds and tasks to run; empty: all. The table has all that is there.
        jobs: runs at a time. devices: GPUs by index. minutes: after which runs in progress save and stop.
        mode: `check` builds every variant and prints the plan, `table` only writes the table.
        start: what starts a run. say: what prints a line.

    Returns:
        0 when all of the selected runs are done, 1 when one failed, 130 when some were stopped or not reached.

    Raises:
        SettingsError, FileNotFoundError, AblationError: nothing was trained; the message names every fault.
        OutputError: the output folder cannot be written.
    """
    plan = make_plan(load_ablation(path, overrides))
    units = plan.select(only, tasks, seeds)
    for line in describe(plan, units):
        say(line)
    if mode == "check":
        return 0
    code = 0
    if mode == "run":
        report = run_plan(plan, units, jobs=jobs, devices=devices, minutes=minutes, start=start, say=say)
        code = report.exit_code
    table, text = write_table(plan)
    say(f"\n{text}")
    say(f"written: {', '.join(str(plan.output / name) for name in NAMES)}")
    if plan.settings.run.plots:
        try:
            written = plots.draw(plan, table)
        except ImportError as error:
            say(str(error))
        else:
            say(f"plots: {', '.join(map(str, written)) or 'nothing to draw yet'}")
    return code


def describe(plan: Plan, units: Sequence[Unit]) -> list[str]:
    """The plan in lines: how many runs, and each variant's size against the base's."""
    settings = plan.settings
    lines = [
        f"{settings.path}: variants: {len(settings.variants)}, tasks: {len(settings.tasks)}, "
        f"seeds: {len(settings.seeds)}; "
        f"{len(units)} runs selected; output: {plan.output}"
    ]
    width = max(len(variant) for variant in settings.variants)
    for task in settings.tasks:
        base = plan.shapes[None, task.name].parameters
        lines.append(f"{task.name}: base {base:,} parameters")
        for variant in settings.variants:
            shape, difference = plan.shapes[variant, task.name], plan.difference(variant, task.name)
            lines.append(
                f"  {variant:{width}}  {shape.parameters:>12,} parameters ({difference:+.2%})  "
                f"cache {shape.cache_bytes / 2**20:,.2f} MiB"
            )
    return [*lines, *(f"warning: {warning}" for warning in plan.warnings())]
