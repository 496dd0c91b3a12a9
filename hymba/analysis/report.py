"""What an analysis found: rows of numbers, a summary, and the files that they are written to."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba.saving import replacing

NO_PLOTS = "no figure: matplotlib is not installed; pip install 'hymba[plots]' brings it"


@dataclass
class Result:
    """The numbers of one analysis.

    Attributes:
        name: of the analysis; its files are called so.
        rows: the figure's numbers, one dict per point, the same keys in all.
        summary: what the rows come to.
        about: model, texts and settings.
    """

    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values; numbers that are not finite are `None`, which JSON has."""
        return _plain({"analysis": self.name, **self.about, "summary": self.summary, "rows": self.rows})


class Table:
    """Collects values under keys, then averages them over the samples."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self._values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, /, *key: Any, **values: float) -> None:
        for name, value in values.items():
            self._values[key][name].append(float(value))

    def rows(self) -> list[dict[str, Any]]:
        """One row per key in the order of the first addition: means over what was added, and standard deviations."""
        found = []
        for key, values in self._values.items():
            row: dict[str, Any] = dict(zip(self.keys, key, strict=True))
            row |= {name: mean(each) for name, each in values.items()}
            row |= {f"{name}_std": deviation(each) for name, each in values.items()}
            row["samples"] = max(map(len, values.values()))
            found.append(row)
        return found


def mean(values: list[float]) -> float:
    """The mean; not a number for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: list[float]) -> float:
    """The standard deviation of a sample of values; 0 for one."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def write(result: Result, folder: Path) -> tuple[list[Path], str | None]:
    """Write NAME.json, NAME.csv and, where matplotlib is installed, NAME.png and NAME.svg, all or none.

    Returns:
        The files, and why there is no figure or `None`.

    Raises:
        OSError: the folder cannot be written; what it held is as it was.
    """
    why = None
    with replacing(folder) as new:
        (new / f"{result.name}.json").write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
        with (new / f"{result.name}.csv").open("w", newline="", encoding="utf-8") as file:
            sheet = csv.DictWriter(file, list(result.rows[0]) if result.rows else [])
            sheet.writeheader()
            sheet.writerows(result.rows)
        try:
            from hymba.analysis.figures import draw

            figure = draw(result)
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            why = NO_PLOTS
        else:
            for kind in ("png", "svg"):
                figure.savefig(new / f"{result.name}.{kind}", dpi=150)
        names = sorted(path.name for path in new.iterdir())
    return [folder / name for name in names], why


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
