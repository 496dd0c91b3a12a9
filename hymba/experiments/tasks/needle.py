"""A needle in a haystack, for models trained on it: one fact somewhere in filler, asked for at the end.

A fact is ``fact key value``. A row holds ``facts`` of them with different keys among random filler, and ends with
``ask key``; the value of that key is the target. The asked fact stands at a depth (0 at the start of the row, 1 just
before the question), the others anywhere else: with one fact the marker alone says where to look, with more the key
has to be matched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hymba.experiments.tasks.base import BLANK, IGNORED, Row, Task, measure, measured_lengths, need

FACT, ASK = 1, 2
_FACT_TOKENS = 3


@dataclass(frozen=True)
class Needle(Task):
    """``length``: of a training row; its depth is drawn evenly. Ids: blank, fact, ask, keys, values, fillers."""

    name: ClassVar[str] = "needle"

    length: int = 64
    facts: int = 4
    keys: int = 16
    values: int = 16
    fillers: int = 16
    test_lengths: tuple[int, ...] = ()
    """Further lengths to measure at; twice and four times the training length by default."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    test_rows: int = 64
    """Held-out rows for each length and depth."""

    def __post_init__(self) -> None:
        need(self.facts >= 1, "facts", self.facts, "expected at least 1")
        need(self.keys >= self.facts, "keys", self.keys, f"{self.facts} facts need as many different keys")
        need(self.values >= 2, "values", self.values, "expected at least 2")
        need(self.fillers >= 1, "fillers", self.fillers, "expected at least 1")
        # A fact more than there are: the asked one may stand across two places for others.
        room = _FACT_TOKENS * (self.facts + (self.facts > 1)) + 3
        for key, lengths in (("length", (self.length,)), ("test_lengths", self.test_lengths)):
            for length in lengths:
                need(length >= room, key, length, f"{self.facts} facts and the question take {room} tokens")
        need(bool(self.depths), "depths", self.depths, "name at least one")
        for depth in self.depths:
            need(0.0 <= depth <= 1.0, "depths", self.depths, "expected depths between 0 and 1")
        need(self.test_rows >= 1, "test_rows", self.test_rows, "expected at least 1")

    @property
    def vocab_size(self) -> int:
        return 3 + self.keys + self.values + self.fillers

    @property
    def max_length(self) -> int:
        return max(measured_lengths(self.length, self.test_lengths))

    def difficulty(self, generator: np.random.Generator) -> dict[str, Any]:
        return {"depth": float(generator.random()), "length": self.length}

    def draw(self, generator: np.random.Generator, **difficulty: Any) -> Row:
        length, depth = difficulty["length"], difficulty["depth"]
        body = length - 3
        keys = 3 + generator.choice(self.keys, size=self.facts, replace=False)
        values = 3 + self.keys + generator.integers(self.values, size=self.facts)
        ids = 3 + self.keys + self.values + generator.integers(self.fillers, size=length)
        places = self._places(generator, body, depth)
        for place, key, value in zip(places, keys, values):
            ids[place : place + _FACT_TOKENS] = FACT, key, value
        ids[body:] = ASK, keys[0], BLANK
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[-1] = values[0]
        return Row(ids, labels, distances=np.array([length - 2 - (places[0] + 1)]))

    def _places(self, generator: np.random.Generator, body: int, depth: float) -> list[int]:
        """Where the facts start, the asked one first: at its depth, the others in what is left, without overlap."""
        asked = round(depth * (body - _FACT_TOKENS))
        before, after = asked // _FACT_TOKENS, (body - asked) // _FACT_TOKENS - 1
        slots = [i * _FACT_TOKENS for i in range(before)] + [asked + (i + 1) * _FACT_TOKENS for i in range(after)]
        taken = generator.choice(len(slots), size=self.facts - 1, replace=False)
        return [asked, *(slots[i] for i in taken)]

    def evaluate(
        self, model: Callable[..., Any], *, seed: int = 0, rows: int | None = None, batch_size: int = 32
    ) -> dict[str, float | list[Any]]:
        """See :meth:`Task.evaluate`. ``grid``: per length, the accuracy at each of ``depths``."""
        lengths = measured_lengths(self.length, self.test_lengths)
        cells = [
            [
                measure(
                    self, model, {"length": length, "depth": depth},
                    seed=seed, rows=rows or self.test_rows, batch_size=batch_size,
                )
                for depth in self.depths
            ]
            for length in lengths
        ]  # fmt: skip
        grid = [[cell.accuracy for cell in line] for line in cells]
        return {
            "accuracy": float(np.mean(grid[0])),
            "chance": 1.0 / self.values,
            "lengths": list(lengths),
            "accuracy_by_length": [float(np.mean(line)) for line in grid],
            "depths": list(self.depths),
            "grid": list(grid),
            "cells": [cell.record() for line in cells for cell in line],
        }
