"""Multi-query associative recall (Arora et al., "Zoology"): pairs of key and value, then the keys again.

A row starts with its pairs, ``k1 v1 k2 v2 ...``: keys from one half of the vocabulary, values from the other, each
key bound once. Every key is asked once in the rest of the row; the value is the target after it. The slot of a
query (two tokens: the key and the place of its answer) is drawn without replacement with a probability that falls
as ``slot ** (power - 1)``: most queries come soon after the pairs, some late. The rest of the row is blank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hymba.experiments.tasks.base import (
    BLANK,
    IGNORED,
    Row,
    Task,
    by_distance,
    join,
    measure,
    measured_lengths,
    need,
)


@dataclass(frozen=True)
class MQAR(Task):
    """``pairs``: numbers of key-value pairs, one of which each training row draws."""

    name: ClassVar[str] = "mqar"

    pairs: tuple[int, ...] = (4, 8)
    length: int = 64
    vocabulary: int = 128
    """Keys and values, half of each; the blank comes on top."""
    power: float = 0.01
    """Of the distribution of gaps: 1 is uniform, towards 0 the queries crowd behind the pairs."""
    test_lengths: tuple[int, ...] = ()
    """Further lengths to measure at, with the same pairs; twice and four times the training length by default."""
    distance_bins: int = 4
    test_rows: int = 64

    def __post_init__(self) -> None:
        need(bool(self.pairs) and min(self.pairs) >= 1, "pairs", self.pairs, "expected numbers from 1")
        need(len(set(self.pairs)) == len(self.pairs), "pairs", self.pairs, "a number is there twice")
        most = max(self.pairs)
        need(
            self.vocabulary % 2 == 0 and self.vocabulary >= 2 * most,
            "vocabulary",
            self.vocabulary,
            f"expected an even number, at least {2 * most}: {most} different keys, as many values",
        )
        for key, lengths in (("length", (self.length,)), ("test_lengths", self.test_lengths)):
            for length in lengths:
                need(length >= 4 * most, key, length, f"{most} pairs with their queries take {4 * most} tokens")
        need(0.0 < self.power <= 1.0, "power", self.power, "expected 0 < value <= 1")
        need(self.distance_bins >= 1, "distance_bins", self.distance_bins, "expected at least 1")
        need(self.test_rows >= 1, "test_rows", self.test_rows, "expected at least 1")

    @property
    def vocab_size(self) -> int:
        return 1 + self.vocabulary

    @property
    def max_length(self) -> int:
        return max(measured_lengths(self.length, self.test_lengths))

    def difficulty(self, generator: np.random.Generator) -> dict[str, Any]:
        return {"pairs": self.pairs[generator.integers(len(self.pairs))], "length": self.length}

    def draw(self, generator: np.random.Generator, **difficulty: Any) -> Row:
        pairs, length = difficulty["pairs"], difficulty["length"]
        half = self.vocabulary // 2
        keys = 1 + generator.choice(half, size=pairs, replace=False)
        values = 1 + half + generator.integers(half, size=pairs)
        slots = (length - 2 * pairs) // 2
        weight = np.arange(1, slots + 1, dtype=np.float64) ** (self.power - 1.0)
        asked = 2 * pairs + 2 * generator.choice(slots, size=pairs, replace=False, p=weight / weight.sum())

        ids = np.full(length, BLANK, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2] = keys, values
        ids[asked], labels[asked + 1] = keys, values
        order = np.argsort(asked)
        return Row(ids, labels, distances=(asked - np.arange(0, 2 * pairs, 2))[order])

    def evaluate(
        self, model: Callable[..., Any], *, seed: int = 0, rows: int | None = None, batch_size: int = 32
    ) -> dict[str, float | list[Any]]:
        """See :meth:`Task.evaluate`. ``grid``: per length, accuracy over how far back the pair lies, all pairs."""
        lengths = measured_lengths(self.length, self.test_lengths)
        cells = {
            (length, pairs): measure(
                self, model, {"pairs": pairs, "length": length},
                seed=seed, rows=rows or self.test_rows, batch_size=batch_size,
            )
            for length in lengths
            for pairs in self.pairs
        }  # fmt: skip
        by_pairs = [cells[self.length, pairs].accuracy for pairs in self.pairs]
        by_length = [float(np.mean([cells[length, pairs].accuracy for pairs in self.pairs])) for length in lengths]
        return {
            "accuracy": float(np.mean(by_pairs)),
            "chance": 2.0 / self.vocabulary,
            "pairs": list(self.pairs),
            "accuracy_by_pairs": by_pairs,
            "lengths": list(lengths),
            "accuracy_by_length": by_length,
            "distances": [(i + 0.5) / self.distance_bins for i in range(self.distance_bins)],
            "grid": [
                by_distance(join([cells[length, pairs] for pairs in self.pairs]), length, self.distance_bins)
                for length in lengths
            ],
            "cells": [cell.record() for cell in cells.values()],
        }
