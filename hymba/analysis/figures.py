"""The figures of the analyses, drawn from a `Result` alone. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hymba.analysis.measures import SHARES
from hymba.analysis.report import Result, mean

_COLORS = {"attention": "#3b6fb6", "ssm": "#d9822b", "with": "#3b6fb6", "without": "#9aa0a6"}
_NAMES = {"attention": "attention heads", "ssm": "SSM heads"}
_SHARE_NAMES = {"meta": "meta tokens", "bos": "first token (BOS)", "self": "self", "cross": "cross"}
_SHARE_COLORS = {"meta": "#3b6fb6", "bos": "#c44e52", "self": "#d9822b", "cross": "#bfc5cc"}

Row = dict[str, Any]


def draw(result: Result) -> Figure:
    """The figure of a result; files are written with its `savefig`."""
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "hymba"}):
        figure = _DRAWINGS[result.name](result)
        figure.suptitle(_title(result), x=0.01, ha="left", fontsize=8, color="0.4")
    return figure


def _title(result: Result) -> str:
    about = result.about
    texts = ", ".join(about.get("domains", ()))
    return "   ".join(str(part) for part in (about.get("model"), texts, about.get("tokens_per_sample")) if part) + (
        " tokens" if about.get("tokens_per_sample") else ""
    )


def _panels(count: int, *, width: float = 4.2, height: float = 3.4, share: bool = True) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(max(width * count, 5.5), height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=share)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    return figure, list(panels)


def _layers(panel: Any, rows: list[Row]) -> list[int]:
    layers = sorted({row["layer"] for row in rows})
    step = max(1, len(layers) // 16)
    panel.set_xticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
    panel.set_xlabel("layer")
    return layers


def _branches(rows: list[Row]) -> list[str]:
    return [branch for branch in _NAMES if any(row["branch"] == branch for row in rows)]


def _entropy(result: Result) -> Figure:
    branches = _branches(result.rows)
    figure, panels = _panels(len(branches))
    for panel, branch in zip(panels, branches, strict=True):
        rows = [row for row in result.rows if row["branch"] == branch]
        layers = _layers(panel, rows)
        conditions = list(dict.fromkeys(row["meta"] for row in rows))
        for shift, condition in zip((-0.08, 0.08), conditions, strict=False):
            points = [row for row in rows if row["meta"] == condition]
            places = [layers.index(row["layer"]) + shift for row in points]
            panel.scatter(places, [row["entropy"] for row in points], s=14, alpha=0.5, color=_COLORS[condition], lw=0)
            means = [mean([row["entropy"] for row in points if row["layer"] == layer]) for layer in layers]
            panel.plot(means, color=_COLORS[condition], lw=1.6, label=_condition(condition, result))
        panel.set_title(_NAMES[branch], loc="left")
    # Behind all drawing: a limit stops the shared axis from growing.
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("entropy of a row (nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _condition(condition: str, result: Result) -> str:
    if condition == "with":
        return "with meta tokens (dots: heads, line: their mean)"
    other = result.about.get("without")
    return f"without meta tokens ({other})" if other else "without meta tokens"


def _split(result: Result) -> Figure:
    branches = _branches(result.rows)
    figure, panels = _panels(len(branches))
    for panel, branch in zip(panels, branches, strict=True):
        rows = [row for row in result.rows if row["branch"] == branch]
        layers = _layers(panel, rows)
        groups = [[row for row in rows if row["layer"] == layer] for layer in layers] + [rows]
        places = [*range(len(layers)), len(layers) + 0.5]
        below = [0.0] * len(groups)
        for name in SHARES:
            heights = [mean([row[name] for row in group]) for group in groups]
            bars = panel.bar(places, heights, 0.75, below, color=_SHARE_COLORS[name], label=_SHARE_NAMES[name])
            labels = [f"{height:.0%}" if height >= 0.06 else "" for height in heights]
            if len(layers) <= 12:
                panel.bar_label(bars, labels, label_type="center", fontsize=7, color="k" if name == "cross" else "w")
            below = [low + height for low, height in zip(below, heights, strict=True)]
        panel.set_xticks([*panel.get_xticks(), places[-1]], [*(t.get_text() for t in panel.get_xticklabels()), "all"])
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_title(_NAMES[branch], loc="left")
    panels[0].set_ylabel("share of a row's weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _erf(result: Result) -> Figure:
    models = list(result.summary)
    branches = _branches(result.rows)
    figure, panels = _panels(len(models) + 1 if len(models) > 1 else 1, share=False)
    for panel, model in zip(panels, models, strict=False):
        rows = [row for row in result.rows if row["model"] == model]
        layers = _layers(panel, rows)
        for branch in _branches(rows):
            own = [row for row in rows if row["branch"] == branch]
            places = [layers.index(row["layer"]) for row in own]
            panel.scatter(places, [row["distance"] for row in own], s=14, alpha=0.5, color=_COLORS[branch], lw=0)
            for value, style in (("distance", "-"), ("text_distance", ":")):
                means = [mean([row[value] for row in own if row["layer"] == layer]) for layer in layers]
                where = "" if value == "distance" else ", text only"
                panel.plot(means, style, color=_COLORS[branch], lw=1.6, label=f"{_NAMES[branch]}{where}")
        panel.set_ylabel("mean distance seen by the last token")
        panel.set_ylim(bottom=0)
        erf = result.summary[model]
        panel.set_title(f"{_short(model)}: ERF {erf['erf']:.1f} (text only {erf['erf, text only']:.1f})", loc="left")
    if len(models) > 1:
        keys = ["erf", *(f"erf, {branch} heads" for branch in branches)]
        colors = ["0.35", *(_COLORS[branch] for branch in branches)]
        for i, (key, color) in enumerate(zip(keys, colors, strict=True)):
            centres = [m + (i - (len(keys) - 1) / 2) * 0.25 for m in range(len(models))]
            heights = [result.summary[model].get(key, float("nan")) for model in models]
            label = "all heads" if key == "erf" else key.removeprefix("erf, ").replace("ssm", "SSM")
            panels[-1].bar(centres, heights, 0.22, color=color, label=label)
        panels[-1].set_xticks(range(len(models)), [_short(model) for model in models])
        panels[-1].set_title("effective receptive field (equation 5)", loc="left")
        panels[-1].legend(frameon=False, fontsize=7)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _importance(result: Result) -> Figure:
    scores = [key.removesuffix("_change") for key in result.rows[0] if key.endswith("_change")]
    figure, panels = _panels(len(scores), share=False)
    whole = result.summary["whole model"]
    singles = any(row["head"] is not None for row in result.rows)
    for panel, score in zip(panels, scores, strict=True):
        layers = _layers(panel, result.rows)
        scale = 1 if score == "loss" else 100
        for branch, shift in zip(_branches(result.rows), (-0.2, 0.2), strict=False):
            rows = [row for row in result.rows if row["branch"] == branch]
            bars = [row for row in rows if row["head"] is None]
            places = [layers.index(row["layer"]) + shift for row in bars]
            heights = [row[f"{score}_change"] * scale for row in bars]
            panel.bar(places, heights, 0.38, color=_COLORS[branch], label=f"without {_NAMES[branch]}")
            dots = [row for row in rows if row["head"] is not None]
            panel.scatter(
                [layers.index(row["layer"]) + shift for row in dots],
                [row[f"{score}_change"] * scale for row in dots],
                s=12, color="white", edgecolors="black", linewidths=0.7, zorder=3,
            )  # fmt: skip
        panel.axhline(0, color="0.3", lw=0.8)
        if score == "loss":
            panel.set_title(f"loss (whole model: {whole[score]:.2f})", loc="left")
            panel.set_ylabel("change of loss (nats per token)")
        else:
            name = "next-token accuracy" if score == "accuracy" else f"accuracy at {score}"
            panel.set_title(f"{name} (whole model: {whole[score]:.0%})", loc="left")
            panel.set_ylabel("change of accuracy (points)")
    handles, labels = panels[0].get_legend_handles_labels()
    if singles:
        handles.append(panels[0].scatter([], [], s=12, color="white", edgecolors="black", linewidths=0.7))
        labels.append("without one head")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _meta_tokens(result: Result) -> Figure:
    domains = list(dict.fromkeys(row["domain"] for row in result.rows))
    values = [[row["attention"] for row in result.rows if row["domain"] == domain] for domain in domains]
    count = len(values[0])
    figure = Figure(figsize=(min(14.0, max(6.5, 2.5 + 0.28 * count)), 1.6 + 0.4 * len(domains)), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    names = [f"{domain} ({sum(row):.0%})" for domain, row in zip(domains, values, strict=True)]
    panel.set_yticks(range(len(domains)), names)
    step = max(1, count // 16)
    panel.set_xticks(range(0, count, step))
    panel.set_xlabel("meta token")
    layer = result.about.get("layer")
    panel.set_title(f"attention that meta tokens receive in layer {layer} (in brackets: all together)", loc="left")
    figure.colorbar(image, ax=panel, label="mean weight", pad=0.02)
    return figure


def _magnitude(result: Result) -> Figure:
    values = {
        "output": "branch output (RMS)",
        "normed": "behind its norm (RMS)",
        "beta": "mean |β|, the norm's weight",
        "gate": "mean |SiLU(z)|, the SSM's gate",
    }
    shown = [value for value in values if any(row[value] == row[value] for row in result.rows)]
    figure, panels = _panels(len(shown), width=3.2, share=False)
    for panel, value in zip(panels, shown, strict=True):
        layers = _layers(panel, result.rows)
        for branch in _branches(result.rows):
            points = [(layers.index(r["layer"]), r[value]) for r in result.rows if r["branch"] == branch]
            points = [point for point in points if point[1] == point[1]]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", ms=4, color=_COLORS[branch], label=_NAMES[branch])
        panel.set_title(values[value], loc="left")
        panel.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


_DRAWINGS: dict[str, Callable[[Result], Figure]] = {
    "entropy": _entropy,
    "attention-split": _split,
    "erf": _erf,
    "importance": _importance,
    "meta-tokens": _meta_tokens,
    "magnitude": _magnitude,
}
