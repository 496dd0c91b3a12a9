"""Figures of an ablation: what was measured, how it was learned, and what it costs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba.experiments.ablation.plan import Plan
from hymba.experiments.ablation.table import columns, training_log
from hymba.experiments.ablation.worker import read_log
from hymba.experiments.phases import plan_phases, tokens_after
from hymba.experiments.tasks.heat_maps import draw_heat_maps

MISSING = "plots: matplotlib is not there: pip install 'hymba[plots]'"
_CURVES = ("loss", "accuracy", "bits_per_byte")
"""Entries of a training's log that are drawn over the tokens seen; the last two only with run.evaluate_every."""


def draw(plan: Plan, table: Mapping[str, Any]) -> list[Path]:
    """Write `metrics.png`, `curves.png`, `cost.png` and `heat-maps.png` to the output folder, those with numbers.

    The heat maps are of tasks that are measured at several lengths; their numbers are in `heat-maps.json`.

    Raises:
        ImportError: matplotlib is missing; the message is :data:`MISSING`.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(MISSING) from error
    # Without a display, and whatever the user's own style is.
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "font.size": 9}):
        figures = {"metrics.png": _metrics(plan, table), "curves.png": _curves(plan), "cost.png": _cost(plan, table)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(plan.output / name, dpi=150)
            written.append(plan.output / name)
    maps = heat_maps(plan)
    if maps:
        written.append(draw_heat_maps(maps, plan.output / "heat-maps.png"))
    return written


def heat_maps(plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """Task to variant to accuracy over length and depth (or distance), the mean over the seeds that are done.

    Tasks that are measured at one length are left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in plan.settings.tasks:
        for variant in plan.settings.variants:
            results = [result for unit in plan.select([variant], [task.name]) if (result := unit.result())]
            held_out = [result.get("held_out") or {} for result in results]
            measured = [result for result in held_out if len(result.get("grid", ())) > 1]
            if measured:
                grids = [result["grid"] for result in measured]
                found.setdefault(task.name, {})[variant] = {**measured[0], "grid": mean_grid(grids)}
    return found


def mean_grid(grids: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Cell by cell; a cell in which nothing was asked is None, and is left out of the mean."""
    mean: list[list[float | None]] = []
    for lines in zip(*grids):
        mean.append([])
        for cell in zip(*lines):
            asked = [value for value in cell if value is not None]
            mean[-1].append(sum(asked) / len(asked) if asked else None)
    return mean


def _figure(panels: int, height: float, columns: int = 3) -> tuple[Any, list[Any]]:
    # Not through pyplot, which would keep the figures and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(4.2 * across + 1.0, height * down))
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for spare in axes[panels:]:
        spare.axis("off")
    return figure, axes[:panels]


def _metrics(plan: Plan, table: Mapping[str, Any]) -> Any:
    """Mean and standard deviation of each measured column, with every seed as a dot."""
    shown = columns(plan, table)
    if not shown:
        return None
    rows = table["rows"]
    figure, axes = _figure(len(shown), 0.9 + 0.32 * len(rows))
    for axis, (task, metric) in zip(axes, shown):
        for place, row in enumerate(rows):
            value = row["tasks"][task]["metrics"].get(metric)
            if value is None:
                continue
            axis.errorbar(value["mean"], place, xerr=value["std"] or 0.0, fmt="o", color=f"C{place % 10}", capsize=3)
            seeds = list(value["values"].values())
            axis.plot(seeds, [place + 0.22] * len(seeds), ".", color=f"C{place % 10}", alpha=0.5, markersize=4)
        axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(f"{task}: {metric.replace('_', ' ')}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    return figure


def _curves(plan: Plan) -> Any:
    """Training loss and held-out measurements over the tokens seen: mean over seeds, extremes as a band."""
    curves: dict[tuple[str, str], dict[str, dict[int, dict[int, float]]]] = {}
    for unit in plan.units:
        phases = plan_phases(unit.settings, 1)
        for entry in read_log(training_log(plan, unit)):
            for name in _CURVES:
                if name in entry:
                    lines = curves.setdefault((unit.task.name, name), {})
                    points = lines.setdefault(unit.variant, {}).setdefault(unit.seed, {})
                    points[tokens_after(phases, entry["step"])] = entry[name]
    if not curves:
        return None
    order = {task.name: i for i, task in enumerate(plan.settings.tasks)}
    panels = sorted(curves, key=lambda panel: (order[panel[0]], _CURVES.index(panel[1])))
    figure, axes = _figure(len(panels), 3.2)
    colors = {variant: f"C{i % 10}" for i, variant in enumerate(plan.settings.variants)}
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels):
        for variant in plan.settings.variants:
            seeds = list(curves[panel].get(variant, {}).values())
            places = sorted(set.intersection(*(set(points) for points in seeds))) if seeds else []
            if not places:
                continue
            values = [[points[place] for points in seeds] for place in places]
            color = colors[variant]
            means = [sum(each) / len(each) for each in values]
            (handles[variant],) = axis.plot(places, means, color=color, linewidth=1.2)
            axis.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
        axis.set_title(
            f"{panel[0]}: {'training loss' if panel[1] == 'loss' else panel[1].replace('_', ' ')}", fontsize=9
        )
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _cost(plan: Plan, table: Mapping[str, Any]) -> Any:
    """Each measured column against the cache's bytes."""
    shown = columns(plan, table)
    if not shown:
        return None
    figure, axes = _figure(len(shown), 3.0)
    for axis, (task, metric) in zip(axes, shown):
        for place, row in enumerate(table["rows"]):
            value = row["tasks"][task]["metrics"].get(metric)
            if value is not None:
                size = row["tasks"][task]["cache_bytes"] / 2**20
                axis.errorbar(
                    size, value["mean"], yerr=value["std"] or 0.0, fmt="o", color=f"C{place % 10}", capsize=3,
                    label=row["variant"],
                )  # fmt: skip
        sizes = [row["tasks"][task]["cache_bytes"] for row in table["rows"]]
        # Labels of a logarithmic axis that spans less than a decade run into each other.
        if max(sizes) > 10 * min(sizes) > 0:
            axis.set_xscale("log")
        else:
            axis.ticklabel_format(axis="x", useOffset=False)
            axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(f"cache at {table['cache_length']:,} tokens, MiB")
        axis.set_title(f"{task}: {metric.replace('_', ' ')}", fontsize=9)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
