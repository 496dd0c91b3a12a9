"""Selective copying (Gu and Dao, "Mamba"): repeat the content tokens of a row in order, leaving the noise out.

The content tokens stand at random places among noise; then come as many markers, one for each answer. The distance
between content and answer differs from row to row, so a fixed convolution cannot solve it.
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

MARKER = 1


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """``tokens``: numbers of content tokens, one of which each training row draws; noise fills the rest of a row.

    A row of ``length`` is content and noise, a marker per answer, and one blank at the end, where the last answer
    is the target. Noise is the blank token.
    """

    name: ClassVar[str] = "copying"

    tokens: tuple[int, ...] = (4, 8)
    length: int = 64
    vocabulary: int = 14
    """Content tokens; noise and marker come on top (16 in all, as in the paper)."""
    test_lengths: tuple[int, ...] = ()
    """Further lengths to measure at, the additional tokens all noise; twice and four times the training length by
    default."""
    distance_bins: int = 4
    test_rows: int = 64

    def __post_init__(self) -> None:
        need(bool(self.tokens) and min(self.tokens) >= 1, "tokens", self.tokens, "expected numbers from 1")
        need(len(set(self.tokens)) == len(self.tokens), "tokens", self.tokens, "a number is there twice")
        need(self.vocabulary >= 2, "vocabulary", self.vocabulary, "expected at least 2 content tokens")
        room = 2 * max(self.tokens) + 1
        for key, lengths in (("length", (self.length,)), ("test_lengths", self.test_lengths)):
            for length in lengths:
                need(length >= room, key, length, f"{max(self.tokens)} tokens with their copies take {room}")
        need(self.distance_bins >= 1, "distance_bins", self.distance_bins, "expected at least 1")
        need(self.test_rows >= 1, "test_rows", self.test_rows, "expected at least 1")

    @property
    def vocab_size(self) -> int:
        return 2 + self.vocabulary

    @property
    def max_length(self) -> int:
        return max(measured_lengths(self.length, self.test_lengths))

    def difficulty(self, generator: np.random.Generator) -> dict[str, Any]:
        return {"tokens": self.tokens[generator.integers(len(self.tokens))], "length": self.length}

    def draw(self, generator: np.random.Generator, **difficulty: Any) -> Row:
        tokens, length = difficulty["tokens"], difficulty["length"]
        body = length - tokens - 1
        content = 2 + generator.integers(self.vocabulary, size=tokens)
        places = np.sort(generator.choice(body, size=tokens, replace=False))
        ids = np.full(length, BLANK, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        ids[places], ids[body:-1] = content, MARKER
        labels[body + 1 :] = content
        return Row(ids, labels, distances=body + np.arange(tokens) - places)

    def evaluate(
        self, model: Callable[..., Any], *, seed: int = 0, rows: int | None = None, batch_size: int = 32
    ) -> dict[str, float | list[Any]]:
        """See :meth:`Task.evaluate`. ``grid``: per length, accuracy over how far back the original lies."""
        lengths = measured_lengths(self.length, self.test_lengths)
        cells = {
            (length, tokens): measure(
                self, model, {"tokens": tokens, "length": length},
                seed=seed, rows=rows or self.test_rows, batch_size=batch_size,
            )
            for length in lengths
            for tokens in self.tokens
        }  # fmt: skip
        by_tokens = [cells[self.length, tokens].accuracy for tokens in self.tokens]
        return {
            "accuracy": float(np.mean(by_tokens)),
            "chance": 1.0 / self.vocabulary,
            "tokens": list(self.tokens),
            "accuracy_by_tokens": by_tokens,
            "lengths": list(lengths),
            "accuracy_by_length": [
                float(np.mean([cells[length, tokens].accuracy for tokens in self.tokens])) for length in lengths
            ],
            "distances": [(i + 0.5) / self.distance_bins for i in range(self.distance_bins)],
            "grid": [
                by_distance(join([cells[length, tokens] for tokens in self.tokens]), length, self.distance_bins)
                for length in lengths
            ],
            "cells": [cell.record() for cell in cells.values()],
        }
