"""Rows from several sources by weight, as a function of seed and position: resuming stores no order.

Rows come in blocks of :data:`BLOCK`. A block holds each source's share of it, rounded up or down by chance so that the
mean is exact, in an order of its own. Which row of a source comes next follows from the blocks before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hymba.experiments.packing import Rows, TokenRows

BLOCK = 256


class Mixture:
    """Which source each of ``rows`` rows comes from.

    Args:
        weights: of the sources; they need not add up to 1.
        rows: how many.
        seed: any integers.
    """

    def __init__(self, weights: Sequence[float], rows: int, seed: Sequence[int]) -> None:
        self.rows, self._seed = rows, tuple(seed)
        edges = np.cumsum(weights) / np.sum(weights)
        edges[-1] = 1.0
        # One offset for all edges of a block: shares of a block add up to it, and each is right in the mean.
        offsets = np.random.default_rng(self._seed).random(-(-rows // BLOCK))
        cuts = np.minimum(np.floor(edges * BLOCK + offsets[:, None]), BLOCK).astype(np.int64)
        self._counts = np.diff(cuts, axis=1, prepend=0)
        self._before = np.concatenate([np.zeros_like(self._counts[:1]), np.cumsum(self._counts, axis=0)])
        self._block = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """The source of a row, and how many rows of that source come before it."""
        block, at = divmod(index, BLOCK)
        self._open(block)
        source = int(self._order[at])
        return source, int(self._before[block, source]) + int(np.count_nonzero(self._order[:at] == source))

    def totals(self) -> list[int]:
        """Rows of each source."""
        block, at = divmod(self.rows, BLOCK)
        totals = self._before[block].copy()
        if at:
            self._open(block)
            totals += np.bincount(self._order[:at], minlength=len(totals))
        return [int(total) for total in totals]

    def _open(self, block: int) -> None:
        if block != self._block:
            order = np.repeat(np.arange(self._counts.shape[1]), self._counts[block])
            self._order = np.random.default_rng((*self._seed, block)).permutation(order)
            self._block = block


class MixedRows(Rows):
    """Rows of several sources in the order of a :class:`Mixture`, from row ``first`` on.

    Args:
        sources: rows of equal length.
        begin: the row of each source that is read first.
        mixture: of the rows from ``first`` on.
        first: rows that stand for earlier phases and are never read.
    """

    def __init__(self, sources: Sequence[TokenRows], begin: Sequence[int], mixture: Mixture, *, first: int) -> None:
        self.sources, self._begin, self._mixture = list(sources), list(begin), mixture
        self.first, self.rows, self.length = first, first + mixture.rows, sources[0].length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not self.first <= index < self.rows:
            raise IndexError(index)
        source, place = self._mixture.place(index - self.first)
        return self.sources[source][self._begin[source] + place]


class LaterRows(Rows):
    """Rows of which the first ones were read by earlier phases under other numbers.

    Args:
        rows: all of them.
        first: what the first row is called here. begin: what it is called in ``rows``.
        count: how many there are from there on.
    """

    def __init__(self, rows: Rows, *, first: int, begin: int, count: int) -> None:
        self._rows, self._shift = rows, begin - first
        self.first, self.rows, self.length = first, first + count, rows.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not self.first <= index < self.rows:
            raise IndexError(index)
        return self._rows[index + self._shift]
