"""Accuracy over length and depth, beside one another for several models and tasks in one figure. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hymba.experiments.checkpoints import write_text

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Task to model to what the task's ``evaluate`` returned; a model may lack a task."""


def draw_heat_maps(results: Results, path: str | Path, *, trained: int = 1) -> Path:
    """Draw the ``grid`` of every result, a line of panels per task and a column per model.

    Args:
        results: by task and model.
        path: of the figure (PNG); the numbers go beside it as JSON.
        trained: how many of the lengths, from the first, were trained on; a line parts them from the others.

    Returns:
        The figure's path.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no result, or one without a grid.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("heat maps: matplotlib is not there: pip install 'hymba[plots]'") from error
    models = list(dict.fromkeys(model for of_task in results.values() for model in of_task))
    if not models:
        raise ValueError("heat maps: there is no result to draw")
    for task, of_task in results.items():
        for model, result in of_task.items():
            if not result.get("grid"):
                raise ValueError(f"heat maps: the result of {model} on {task} has no grid")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "font.size": 9}):
        _figure(results, models, trained).savefig(path, dpi=150)
    numbers = {
        task: {
            model: {key: result[key] for key in ("lengths", "depths", "distances", "grid", "chance") if key in result}
            for model, result in of_task.items()
        }
        for task, of_task in results.items()
    }
    write_text(path.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")
    return path


def _figure(results: Results, models: list[str], trained: int) -> Any:
    # Not through pyplot, which would keep the figure and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(models) + 1.0, 2.5 * len(results)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), len(models), squeeze=False)
    image: Any = None
    for line, (task, of_task) in zip(axes, results.items()):
        for axis, model in zip(line, models):
            if model not in of_task:
                axis.axis("off")
                continue
            result = of_task[model]
            places = result.get("depths", result.get("distances"))
            # A cell in which nothing was asked stays white.
            values = [[float("nan") if value is None else value for value in row] for row in result["grid"]]
            image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            for i, row in enumerate(result["grid"]):
                for j, value in enumerate(row):
                    if value is not None:
                        color = "white" if value < 0.6 else "black"
                        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
            axis.set_xticks(range(len(places)), [f"{place:g}" for place in places])
            axis.set_yticks(range(len(result["lengths"])), [str(length) for length in result["lengths"]])
            axis.axhline(trained - 0.5, color="red", linewidth=1.0)
            axis.set_title(f"{model}: {task}")
            axis.set_xlabel("depth" if "depths" in result else "how far back, of the length")
            axis.set_ylabel("length in tokens")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="accuracy")
    return figure
