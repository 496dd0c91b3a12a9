"""A Markdown table and plots from the JSON lines of the other benchmarks.

    python -m benchmarks.decode --batch 1 16 128 > decode.txt
    python -m benchmarks.report decode.txt length.txt peers.txt --output results

Reads the JSON lines in the files (or stdin) and leaves other lines alone. The table goes to stdout; plots of
throughput and memory against length, against batch, and beside the peers go to OUTPUT as PNG and SVG where there are
rows for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_FACTS = (
    "model op case backend variant blocks work kind way mode setting activation loss policy static compile "
    "batch length chunk"
).split()
"""What was measured, in the order of the table's columns."""


_COPY = ("copy_bytes_per_s", "copy_bytes_per_second", "bandwidth")
_MATRIX = ("matrix_flops_per_s", "matrix_rate")
"""Names under which reports give the measured rates."""


def read_lines(text: Iterable[str]) -> list[dict[str, Any]]:
    """The benchmark reports among some lines."""
    found = []
    for line in text:
        if line.startswith('{"benchmark"'):
            found.append(json.loads(line))
    return found


# Numbers, one function per column: a row to its text, or None where the row has no such number.


def _spread(values: dict[str, float], scale: float) -> str:
    return "{median:.3g} ({p10:.3g} to {p90:.3g})".format(**{k: v * scale for k, v in values.items()})


def _milliseconds(row: dict[str, Any]) -> str | None:
    if "step_ms" in row:
        return _spread(row["step_ms"], 1)
    return _spread(row["seconds"], 1e3) if "seconds" in row else None


def _floor(row: dict[str, Any]) -> str | None:
    value = row.get("floor_ms", 1e3 * row["floor_s"] if "floor_s" in row else None)
    return None if value is None else f"{value:.3g}"


def _note(row: dict[str, Any]) -> str | None:
    notes = [f"out of memory at {', '.join(map(str, row['too_large']))}"] if "too_large" in row else []
    notes += ["out of memory"] if row.get("out_of_memory") else []
    notes += [row["error"]] if "error" in row else []
    return "; ".join(notes) or None


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str | None]:
    return lambda row: form.format(row[name] * scale) if row.get(name) else None


def _pass(way: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda row: _spread(row[way], 1e3) if isinstance(row.get(way), dict) else None


NUMBERS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "tokens/s": _number("tokens_per_s", "{:,.0f}"),
    "ms, median (p10 to p90)": _milliseconds,
    "forward ms": _pass("forward"),
    "backward ms": _pass("backward"),
    "forward of the matrix rate": _number("forward_of_rate", "{:.0%}"),
    "backward of the matrix rate": _number("backward_of_rate", "{:.0%}"),
    "us": _number("us", "{:.2f}"),
    "floor us": _number("floor_us", "{:.2f}"),
    "floor ms": _floor,
    "of the floor": _number("share_of_floor", "{:.0%}"),
    "peak GiB": _number("peak_bytes", "{:.1f}", 2**-30),
    "cache MiB": _number("cache_bytes", "{:.1f}", 2**-20),
    "measured MiB": _number("measured_bytes", "{:.2f}", 2**-20),
    "over computed": _number("measured_over_computed", "{:.4f}"),
    "Llama-3.2-3B over this": _number("llama_3b_over_this", "{:.2f}"),
    "hymba over this": _number("hymba_over_this", "{:.2f}"),
    "note": _note,
}


def table(report: dict[str, Any]) -> str:
    """One report as a Markdown table with its machine in the heading; columns that no row fills are left out."""
    rows = report["rows"]
    facts = [name for name in _FACTS if any(row.get(name) not in (None, "", {}, False) for row in rows)]
    cells = [[_fact(row.get(name)) for name in facts] for row in rows]
    head = list(facts)
    for title, show in NUMBERS.items():
        column = [show(row) or "" for row in rows]
        if any(column):
            head.append(title)
            for line, value in zip(cells, column, strict=True):
                line.append(value)
    machine = report.get("machine", {})
    where = ", ".join(f"{k} {v}" if k != "device" else v for k, v in machine.items() if k != "python")
    lines = [f"### {report['benchmark']}", "", where, ""]
    lines += ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells)]
    rates = [f"copy {report[name] / 1e12:.2f} TB/s" for name in _COPY if name in report]
    rates += [f"matrix products {report[name] / 1e12:.0f} TFLOP/s" for name in _MATRIX if name in report]
    if "long_over_short_per_token" in report:
        rates.append(f"the long prompt costs {report['long_over_short_per_token']:.2f} times the short one per token")
    return "\n".join([*lines, *(["", "Measured here: " + "; ".join(rates) + "."] if rates else [])]) + "\n"


def _fact(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def points(reports: list[dict[str, Any]], axis: str) -> dict[str, list[tuple[int, float, float]]]:
    """Curves against `axis` ("length" or "batch"): label to (x, tokens/s, bytes), those of two points and more.

    Bytes are the cache's where the row has them, else the peak. Rows of the peers are left to their own plot.
    """
    curves: dict[str, list[tuple[int, float, float]]] = {}
    other = "batch" if axis == "length" else "length"
    for report in reports:
        if report["benchmark"] == "peers":
            continue
        for row in report["rows"]:
            if "tokens_per_s" not in row or axis not in row:
                continue
            kind = row.get("kind") or row.get("way") or report["benchmark"]
            label = f"{kind}, {other} {row[other]:,}" + (f", {row['mode']}" if "mode" in row else "")
            size = row.get("cache_bytes") or row.get("peak_bytes") or 0
            curves.setdefault(label, []).append((row[axis], row["tokens_per_s"], size))
    return {label: sorted(set(curve)) for label, curve in curves.items() if len({x for x, _, _ in curve}) > 1}


def plot(reports: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the plots for which there are rows; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
            written.append(folder / f"{name}.{suffix}")
        plt.close(figure)

    for axis in ("length", "batch"):
        curves = points(reports, axis)
        if not curves:
            continue
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="tight")
        for label, curve in curves.items():
            x = [point[0] for point in curve]
            panels[0].plot(x, [point[1] for point in curve], marker="o", markersize=4, label=label)
            if all(point[2] for point in curve):
                panels[1].plot(x, [point[2] / 2**30 for point in curve], marker="o", markersize=4, label=label)
        for panel, title in zip(panels, ("tokens per second", "GiB: cache of decoding, peak of the rest"), strict=True):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(title, loc="left", fontsize=10)
            panel.set_xlabel("text tokens" if axis == "length" else "rows")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            panel.grid(True, which="major", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.98, 0.5), fontsize=8,
                      frameon=False)  # fmt: skip
        save(figure, f"against_{axis}")

    rows = [row for report in reports if report["benchmark"] == "peers" for row in report["rows"]]
    works = list(dict.fromkeys((row["work"], row["length"]) for row in rows))
    if works:
        figure, panels = plt.subplots(1, len(works), figsize=(3.2 * len(works), 3.2), squeeze=False)
        for panel, (work, length) in zip(panels[0], works, strict=True):
            shown = [row for row in rows if (row["work"], row["length"]) == (work, length) and "tokens_per_s" in row]
            names = [f"{row['model']}\n(batch {row['batch']})" for row in shown]
            colors = ["C0" if row["model"] == "hymba" else "0.7" for row in shown]
            bars = panel.barh(names, [row["tokens_per_s"] for row in shown], color=colors)
            panel.bar_label(bars, [f"{row['tokens_per_s']:,.0f}" for row in shown], fontsize=8, padding=2)
            panel.set_title(f"{work}, {length:,} tokens", loc="left", fontsize=10)
            panel.set_xlabel("tokens per second", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.invert_yaxis()
            panel.margins(x=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        save(figure, "peers")
    return written


def _short(value: float) -> str:
    """131072 as 128k, 2000000 as 2M: powers of two in k when they are whole."""
    if value >= 1024 and value == int(value) and int(value) % 1024 == 0:
        return f"{int(value) // 1024}k"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="output of benchmarks; stdin without")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the plots there")
    args = parser.parse_args(arguments)
    try:
        texts = [path.read_text("utf-8") for path in args.files] or [sys.stdin.read()]
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    reports = [report for text in texts for report in read_lines(text.splitlines())]
    if not reports:
        print("no benchmark's JSON line in the input", file=sys.stderr)
        return 2
    print("\n".join(table(report) for report in reports))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        try:
            for path in plot(reports, args.output):
                print(path, file=sys.stderr)
        except ImportError:
            print("plots need matplotlib: pip install 'hymba[plots]'", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
