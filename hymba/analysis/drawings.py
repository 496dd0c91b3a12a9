"""Figures of an architecture, from what `hymba.analysis.architecture` reads off it. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hymba import cost
from hymba.analysis.architecture import LayerMemory, Mask, layer_memory, mask_cells, masks
from hymba.config import HymbaConfig
from hymba.saving import replacing

ATTENTION, SSM, META, GREY = "#3b6fb6", "#d9822b", "#2f9e77", "#9aa0a6"
PALE = {ATTENTION: "#dbe6f5", SSM: "#fbe8d3", META: "#d8f0e6", GREY: "#eef0f2"}
INK, FAINT = "#24292f", "#6b7280"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#c6cbd1",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "hymba",
}


def write_figures(config: HymbaConfig, folder: Path, *, length: int = 8192, name: str = "") -> list[Path]:
    """Draw an architecture: `masks`, `layers`, and for one with hybrid layers `hybrid-head`, each as SVG and PNG.

    Args:
        config: the architecture. folder: takes the files, all or none.
        length: text tokens behind the bytes of `layers`. name: goes into the titles.

    Returns:
        The files.
    """
    figures = {}
    if any(spec.attends for spec in config.layers):
        figures["masks"] = draw_masks(masks(config))
    figures["layers"] = draw_layers(layer_memory(config, length), length=length, name=name)
    if any(spec.mixer == "hybrid" for spec in config.layers):
        figures["hybrid-head"] = draw_hybrid_head(config)
    return save(figures, folder)


def save(figures: dict[str, Figure], folder: Path, *, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write figures as NAME.svg and NAME.png, all or none; the same figure gives the same bytes."""
    with replacing(folder) as new, matplotlib.rc_context(_STYLE):
        for name, figure in figures.items():
            for kind in kinds:
                metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
                figure.savefig(new / f"{name}.{kind}", dpi=160, metadata=metadata)
    return [folder / f"{name}.{kind}" for name in figures for kind in kinds]


# Masks.


def draw_masks(shown: Sequence[Mask], *, documents: Sequence[int] | None = None) -> Figure:
    """One panel for each mask; with `documents` one more, of the last mask's layers on a row with packed documents."""
    panels: list[tuple[str, Any, Mask]] = [(_title(mask), mask.cells, mask) for mask in shown]
    if documents is not None:
        mask = shown[-1]
        cells = mask_cells(mask.window, tokens=sum(documents), meta=mask.meta, documents=documents)
        panels.append((f"the same, {len(documents)} documents in the row", cells, mask))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.05 * len(panels) + 0.25, 3.55), layout="constrained")
        for panel, (title, cells, mask) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_mask(panel, cells, mask)
            panel.set_title(title, loc="left", pad=8)
            panel.set_xlabel("key: text token")
        figure.axes[0].set_ylabel("query: text token")
        handles = [Patch(color=ATTENTION, label="sees a text token"),
                   Patch(facecolor=_UNSEEN, edgecolor="#c6cbd1", label="does not see it")]  # fmt: skip
        if meta := max(mask.meta for mask in shown):
            handles.insert(0, Patch(color=META, label=f"sees a meta token ({meta} in front)"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


_UNSEEN = "#f4f5f7"


def _draw_mask(panel: Any, cells: Tensor, mask: Mask) -> None:
    rows, columns = cells.shape
    front = mask.meta_columns
    colors = [_UNSEEN, ATTENTION, META]
    # Runs of one kind in a row as one rectangle: small files, sharp at any size.
    edges, faces = [], []
    for y, row in enumerate(cells.tolist()):
        x = 0
        for kind, run in itertools.groupby(row):
            width = len(list(run))
            edges.append([(x, y), (x + width, y), (x + width, y + 1), (x, y + 1)])
            faces.append(colors[kind])
            x += width
    panel.add_collection(PolyCollection(edges, facecolors=faces, edgecolors=faces, linewidths=0.2))
    panel.set(aspect="equal", xlim=(0, columns), ylim=(rows, 0))
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    cellwise = columns <= 64
    if cellwise:
        panel.hlines(range(1, rows), 0, columns, color="white", lw=0.8)
        panel.vlines(range(1, columns), 0, rows, color="white", lw=0.8)
    if front:
        panel.plot([front] * 2, [0, rows], color=INK, lw=0.9)
    marks = [int(mark) for mark in MaxNLocator(4, integer=True).tick_values(0, (rows - 1) * mask.stride)]
    marks = [mark for mark in marks if mark <= (rows - 1) * mask.stride]
    places = [mark / mask.stride + (0.5 if cellwise else 0) for mark in marks]
    labels = [f"{mark:,}" for mark in marks]
    panel.set_xticks([front + place for place in places], labels)
    panel.set_yticks(places, labels)


def _title(mask: Mask) -> str:
    layers = ", ".join(map(str, mask.layers)) if len(mask.layers) <= 4 else f"{len(mask.layers)} layers"
    layers = f"layer{'s' * (len(mask.layers) > 1)} {layers}" if len(mask.layers) <= 4 else layers
    return f"global ({layers})" if mask.window is None else f"window of {mask.window:,} ({layers})"


# The map of keys and values.


def draw_layers(layers: Sequence[LayerMemory], *, length: int, name: str = "") -> Figure:
    """Which layer lends its keys and values to which, and what each puts into the cache."""
    count = len(layers)
    span = max((layer.index - layer.kv_from for layer in layers if layer.kv_from is not None), default=0)
    arcs = 0.35 * min(span, 4)
    kinds = len({layer.mixer for layer in layers}) > 1
    with matplotlib.rc_context(_STYLE):
        # However few the layers, the legends need their width: the layout would squeeze the panels for them.
        figure = Figure(figsize=(min(9.6, max(8.0, 1.4 + 0.26 * count)), 4.0), layout="constrained")
        top, bars = figure.subplots(2, 1, height_ratios=[1.0 + arcs, 4.2], sharex=True)
        for layer in layers:
            top.add_patch(_tile(layer))
            if kinds:
                strong = layer.window is None and layer.mixer != "mamba"
                label = {"hybrid": "A‖S", "attention": "A", "mamba": "S"}[layer.mixer]
                top.text(layer.index, 0.5, label, ha="center", va="center", fontsize=6,
                         color="white" if strong else INK)  # fmt: skip
            if layer.kv_from is not None:
                # As high over few wide tiles as over many.
                bend = (-0.45 if layer.index - layer.kv_from > 1 else -0.7) * min(1.0, count / 26)
                top.add_patch(
                    FancyArrowPatch(
                        (layer.kv_from, 1.0), (layer.index, 1.0), connectionstyle=f"arc3,rad={bend}",
                        arrowstyle="-|>", mutation_scale=6, color=INK, lw=0.9, shrinkA=1, shrinkB=1,
                    )
                )  # fmt: skip
        top.set(xlim=(-0.8, count - 0.2), ylim=(-0.05, 1.25 + arcs), yticks=[])
        top.spines[:].set_visible(False)
        top.tick_params(bottom=False)
        top.set_title(" ".join(filter(None, [name, "who lends keys and values to whom"])), loc="left")
        tiles = {_kind(layer): _tile(layer) for layer in layers}
        handles = [Patch(label=kind, facecolor=tiles[kind].get_facecolor(), edgecolor=tiles[kind].get_edgecolor(),
                         hatch=tiles[kind].get_hatch()) for kind in _KINDS if kind in tiles]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        _draw_bytes(bars, layers, length)
    return figure


_KINDS = ("global attention", "windowed attention", "borrows keys and values", "no attention")


def _kind(layer: LayerMemory) -> str:
    if layer.mixer == "mamba":
        return _KINDS[3]
    if layer.kv_from is not None:
        return _KINDS[2]
    return _KINDS[0] if layer.window is None else _KINDS[1]


def _tile(layer: LayerMemory) -> Rectangle:
    kind = _kind(layer)
    fill = {_KINDS[0]: ATTENTION, _KINDS[1]: "#a9c4e6", _KINDS[2]: "white", _KINDS[3]: PALE[SSM]}[kind]
    edge = SSM if kind == _KINDS[3] else ATTENTION
    hatch = "////" if kind == _KINDS[2] and layer.window is None else None
    return Rectangle((layer.index - 0.42, 0), 0.84, 1, facecolor=fill, edgecolor=edge, lw=1.0, hatch=hatch)


def _draw_bytes(panel: Any, layers: Sequence[LayerMemory], length: int) -> None:
    places = [layer.index for layer in layers]
    parts = [
        ("keys and values of the text", ATTENTION, [layer.text_bytes for layer in layers]),
        ("of the meta tokens (once for a batch)", META, [layer.meta_bytes for layer in layers]),
        ("SSM state and convolution inputs", SSM, [layer.state_bytes for layer in layers]),
    ]
    below = [0.0] * len(layers)
    for label, color, values in parts:
        heights = [value / 2**20 for value in values]
        panel.bar(places, heights, 0.84, bottom=below, color=color, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    total = sum(layer.text_bytes + layer.meta_bytes + layer.state_bytes for layer in layers) / 2**20
    panel.set_ylabel("MiB in the cache")
    panel.set_xlabel("layer")
    panel.set_title(f"cache of one row of {length:,} tokens: {total:,.1f} MiB", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.set_xticks(places[:: -(-len(places) // 40)])
    panel.tick_params(axis="x", labelsize=7.5)
    panel.set_ylim(0, max(below) * 1.3 or 1)
    panel.legend(loc="upper center", ncols=3, frameon=False, fontsize=8)


# Diagrams.


def _canvas(width: float, height: float, *, scale: float = 1.0) -> tuple[Figure, Any]:
    """A figure whose coordinates are inches times `scale`, without axes."""
    figure = Figure(figsize=(width * scale, height * scale))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    panel.axis("off")
    return figure, panel


def _box(
    panel: Any, x: float, y: float, width: float, height: float, text: str, color: str = GREY, *, size: float = 9,
    bold: bool = False,
) -> None:  # fmt: skip
    """A rounded box around (x, y)."""
    panel.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=PALE[color], edgecolor=color, lw=1.2,
        )
    )  # fmt: skip
    panel.text(x, y, text, ha="center", va="center", fontsize=size, fontweight="bold" if bold else "normal",
               linespacing=1.35)  # fmt: skip


def _arrow(panel: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style: Any) -> None:
    look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.2, "shrinkA": 0, "shrinkB": 0} | style
    panel.add_patch(FancyArrowPatch(start, end, color=color, **look))


def _line(panel: Any, *points: tuple[float, float], color: str = INK, arrow: bool = True) -> None:
    """A line through points, with a head at the last."""
    *first, last = points
    panel.plot(*zip(*first, strict=True), color=color, lw=1.2, solid_joinstyle="round", solid_capstyle="butt")
    if arrow:
        _arrow(panel, first[-1], last, color)
    else:
        panel.plot(*zip(first[-1], last, strict=True), color=color, lw=1.2, solid_capstyle="butt")


def _split_bar(
    panel: Any, x: float, y: float, width: float, height: float, parts: Sequence[tuple[str, int, str]]
) -> list[float]:
    """A bar in parts as wide as their numbers (but not too narrow to be read); returns the middle of each."""
    total = sum(size for _, size, _ in parts)
    widths = [max(0.4, width * size / total) for _, size, _ in parts]
    widths = [part * width / sum(widths) for part in widths]
    middles = []
    for (name, size, color), part in zip(parts, widths, strict=True):
        panel.add_patch(Rectangle((x, y), part, height, facecolor=PALE[color], edgecolor=color, lw=1.2))
        panel.text(
            x + part / 2, y + height / 2, f"{name}\n{size:,}", ha="center", va="center", fontsize=8, linespacing=1.3
        )
        middles.append(x + part / 2)
        x += part
    return middles


def draw_hybrid_head(config: HymbaConfig) -> Figure:
    """The mixer of a hybrid layer with the widths of a configuration (section 2.1 of the paper)."""
    hybrid = [spec for spec in config.layers if spec.mixer == "hybrid"]
    spec = next((spec for spec in hybrid if spec.kv_from is None), hybrid[0])
    heads, kv_heads, value = config.attention_shape(spec)
    attended, inner = cost.attended_width(config, spec), config.d_inner
    mamba2 = spec.ssm == "mamba2"
    parts = [
        ("q", heads * config.head_dim, ATTENTION),
        ("k", kv_heads * config.head_dim, ATTENTION),
        ("v", kv_heads * value, ATTENTION),
        ("SSM input", cost.ssm_widths(config, spec)[1], SSM),
        ("gate", inner, SSM),
    ]
    ends = [(1.8, 2.35, 6.32), (2.6, 3.1, 6.32), (3.2, 3.62, 5.02), (4.0, 5.7, 6.32), (7.3, 8.5, 3.06)]
    left, right, states, middle = 2.5, 4.83, 6.55, 3.66
    with matplotlib.rc_context(_STYLE):
        figure, panel = _canvas(8.9, 7.9)
        tokens = f"tokens  (batch, length, {config.hidden_size:,})"
        panel.text(middle, 7.72, tokens, ha="center", va="center")
        _arrow(panel, (middle, 7.60), (middle, 7.22))
        panel.text(middle + 0.1, 7.42, "in_proj", fontsize=8.5, color=FAINT, va="center")
        middles = _split_bar(panel, 1.65, 6.74, 6.9, 0.48, parts)
        for i, (start, (low, high, bottom)) in enumerate(zip(middles, ends, strict=True)):
            x, bend = min(max(start, low), high), 6.66 - 0.05 * i
            color = parts[i][2]
            if i == 4:
                _line(panel, (start, 6.74), (start, bend), (x, bend), (x, bottom), (right + 0.55, bottom), color=color)
            else:
                _line(panel, (start, 6.74), (start, bend), (x, bend), (x, bottom), color=color)

        # Attention heads.
        _box(panel, left - 0.08, 6.10, 1.44, 0.44, "rotary positions", ATTENTION)
        _arrow(panel, (left - 0.08, 5.88), (left - 0.08, 5.02), ATTENTION)
        text = f"{heads} attention heads\n{kv_heads} key/value head{'s' * (kv_heads != 1)}\nthe layer's mask"
        _box(panel, left, 4.62, 2.3, 0.8, text, ATTENTION)
        _state(panel, 0.68, 4.62, "keys and\nvalues", left - 1.15)
        _arrow(panel, (left, 4.22), (left, 2.62), ATTENTION)
        panel.text(left + 0.1, 3.42, f"{attended:,}", fontsize=8.5, color=FAINT, va="center")
        _box(panel, left, 2.40, 1.7, 0.44, "RMSNorm, β₁", ATTENTION)

        # Mamba heads.
        _box(panel, right, 6.10, 1.95, 0.44, f"convolution, {config.mamba_d_conv} taps", SSM)
        _state(panel, states, 6.10, f"last {config.mamba_d_conv - 1}\ninputs", right + 0.98)
        _arrow(panel, (right, 5.88), (right, 5.44), SSM)
        rates = "Δ, B, C" if mamba2 else "Δ, B, C from the input,\neach normed"
        _box(panel, right, 5.16, 1.95, 0.56, rates, SSM)
        _arrow(panel, (right, 4.88), (right, 4.44), SSM)
        scan = "SSD scan" if mamba2 else "selective scan"
        _box(panel, right, 4.10, 1.95, 0.68, f"{scan}\n{config.mamba_d_state} states a channel", SSM)
        _state(panel, states, 4.10, "SSM\nstate", right + 0.98)
        _arrow(panel, (right, 3.76), (right, 3.28), SSM)
        _box(panel, right, 3.06, 1.1, 0.44, "× SiLU(gate)", SSM)
        _arrow(panel, (right, 2.84), (right, 2.62), SSM)
        panel.text(right + 0.1, 2.73, f"{inner:,}", fontsize=8.5, color=FAINT, va="center")
        _box(panel, right, 2.40, 1.7, 0.44, "RMSNorm, β₂", SSM)

        # Fusion.
        _line(panel, (left, 2.18), (left, 1.55), (middle - 0.7, 1.55), color=ATTENTION)
        _line(panel, (right, 2.18), (right, 1.55), (middle + 0.7, 1.55), color=SSM)
        _box(panel, middle, 1.55, 1.4, 0.44, "mean" if spec.fusion == "mean" else "side by side")
        _arrow(panel, (middle, 1.33), (middle, 0.60))
        panel.text(middle + 0.1, 0.97, f"out_proj from {cost.fused_width(config, spec):,}", fontsize=8.5, color=FAINT,
                   va="center")  # fmt: skip
        panel.text(middle, 0.44, tokens, ha="center", va="center")
        _legend(panel, 6.35, 1.55)
    return figure


def _state(panel: Any, x: float, y: float, text: str, edge: float) -> None:
    """A part of the state beside the box that reads and writes it."""
    _box(panel, x, y, 1.0, 0.56, text, META, size=8.5)
    near = x + 0.5 if edge > x else x - 0.5
    _arrow(panel, (near, y), (edge, y), META, arrowstyle="<|-|>")


def _legend(panel: Any, x: float, y: float) -> None:
    for i, (color, text) in enumerate(
        [(ATTENTION, "attention branch"), (SSM, "SSM branch"), (META, "state, kept between calls")]
    ):
        panel.add_patch(Rectangle((x, y - 0.26 * i), 0.2, 0.16, facecolor=PALE[color], edgecolor=color, lw=1.2))
        panel.text(x + 0.3, y + 0.08 - 0.26 * i, text, fontsize=8.5, va="center")


def draw_state(config: HymbaConfig) -> Figure:
    """Meta tokens, a prompt and decoding as calls of one function from (tokens, state) to (outputs, state)."""
    meta = config.num_memory_tokens
    calls = [
        (f"{meta} meta tokens", "learned vectors,\nbatch 1, no outputs", META),
        ("prompt", "any length, in any chunks:\nforward pass, prefill, chat", ATTENTION),
        ("next token", "one at a time:\ndecoding", ATTENTION),
    ]
    with matplotlib.rc_context(_STYLE):
        figure, panel = _canvas(9.2, 4.1)
        places, states = [2.25, 5.0, 7.75], [0.87, 3.62, 6.37]
        for x, (front, behind) in zip(states, [(0, 0), (2, 0), (2, 4)], strict=True):
            _memory(panel, x, 2.0, front, behind)
        names = ["empty state", "meta state, then\nexpanded over rows", "snapshot, restore,\nsave, expand"]
        for x, text in zip(states, names, strict=True):
            panel.text(x, 1.27, text, ha="center", va="top", fontsize=8, color=FAINT, linespacing=1.3)
        for i, (x, (name, note, color)) in enumerate(zip(places, calls, strict=True)):
            _box(panel, x, 2.0, 1.06, 0.8, "mixer", GREY, size=10, bold=True)
            _arrow(panel, (x - 0.78, 2.0), (x - 0.54, 2.0))
            _arrow(panel, (x + 0.54, 2.0), (x + 0.78, 2.0))
            _arrow(panel, (x, 0.98), (x, 1.60), color)
            panel.text(x, 0.82, name, ha="center", va="center", fontsize=9.5, fontweight="bold", color=color)
            panel.text(x, 0.42, note, ha="center", va="center", fontsize=8, color=FAINT, linespacing=1.35)
            if i:
                _arrow(panel, (x, 2.40), (x, 2.92), color)
                panel.text(x, 3.06, "outputs", ha="center", va="center", fontsize=9)
        panel.text(8.72, 2.0, "...", ha="center", va="center", fontsize=14)
        named = [(META, "keys and values of meta tokens,\nonce for all rows"),
                 (ATTENTION, "keys and values of the text,\nas far as the window goes"),
                 (SSM, "convolution inputs and\nSSM state")]  # fmt: skip
        for i, (color, text) in enumerate(named):
            panel.add_patch(Rectangle((0.3 + 3.1 * i, 3.70), 0.2, 0.16, facecolor=color, lw=0))
            panel.text(0.6 + 3.1 * i, 3.78, text, fontsize=8.5, va="center", linespacing=1.3)
    return figure


def _memory(panel: Any, x: float, y: float, meta: int, text: int) -> None:
    """A layer's state: cells of keys and values, and a block for the Mamba branch."""
    panel.add_patch(
        FancyBboxPatch((x - 0.58, y - 0.62), 1.16, 1.24, boxstyle="round,pad=0,rounding_size=0.07",
                       facecolor="white", edgecolor="#c6cbd1", lw=1.0, linestyle=(0, (3, 2)))
    )  # fmt: skip
    slots = 7
    for i in range(slots):
        color = META if i < meta else ATTENTION if i < meta + text else "#eef0f2"
        panel.add_patch(Rectangle((x - 0.47 + i * 0.135, y + 0.1), 0.115, 0.36, facecolor=color, lw=0))
    filled = meta or text
    panel.add_patch(Rectangle((x - 0.47, y - 0.46), 0.925, 0.36, facecolor=SSM if filled else "#eef0f2", lw=0))
