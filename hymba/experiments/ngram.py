"""Interpolated Kneser-Ney n-gram over token ids: the baseline that a trained model has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order k: n-grams as keys, sorted; and per context its total and the mass given to order k - 1."""

    grams: Ids
    counts: Ids
    discounts: NDArray[np.float64]
    contexts: Ids
    totals: Ids
    backoff: NDArray[np.float64]


class KneserNey:
    """Modified Kneser-Ney (Chen and Goodman's three discounts), interpolated down to the uniform distribution.

    Documents are sequences of token ids; each is preceded by ``order - 1`` padding tokens, which are never
    predicted. Keys are n-grams read as numbers in base ``vocabulary + 1``, in exact 64-bit arithmetic.
    """

    def __init__(self, documents: Sequence[Sequence[int]], *, vocabulary: int, order: int = 5) -> None:
        """Count ``documents``.

        Raises:
            ValueError: ``(vocabulary + 1) ** order`` does not fit 63 bits, or there is no text.
        """
        self.vocabulary, self.order, self._base = vocabulary, order, vocabulary + 1
        if self._base**order >= 2**63:
            raise ValueError(f"order = {order} with {vocabulary} tokens: keys do not fit 63 bits; lower the order")
        stream, places = self._pad(documents)
        if len(places) == 0:
            raise ValueError("no tokens to count; give documents with text")
        self._orders = []
        for k in range(1, order + 1):
            if k == order:
                grams, counts = np.unique(self._keys(stream, places, k), return_counts=True)
            else:
                # A lower order counts in how many different contexts a gram was seen, not how often.
                longer = np.unique(self._keys(stream, places, k + 1))
                grams, counts = np.unique(longer % self._base**k, return_counts=True)
            self._orders.append(self._smooth(grams, counts))

    def _pad(self, documents: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
        """All documents in one array with padding before each, and the places of their tokens in it."""
        padding = np.full(self.order - 1, self.vocabulary, dtype=np.int64)
        parts = [part for document in documents for part in (padding, np.asarray(document, dtype=np.int64))]
        stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return stream, np.flatnonzero(stream != self.vocabulary)

    def _keys(self, stream: Ids, places: Ids, k: int) -> Ids:
        key = np.zeros(len(places), dtype=np.int64)
        for back in range(k - 1, -1, -1):
            key = key * self._base + stream[places - back]
        return key

    def _smooth(self, grams: Ids, counts: Ids) -> _Order:
        n1, n2, n3, n4 = (max(int((counts == i).sum()), 1) for i in (1, 2, 3, 4))
        share = n1 / (n1 + 2 * n2)
        steps = np.array([0.0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
        # Tiny corpora can give estimates that leave a seen gram, or all unseen ones, no probability at all.
        steps = np.clip(steps, np.array([0.0, 1e-3, 1e-3, 1e-3]), np.array([0.0, 0.999, 1.999, 2.999]))
        discounts = steps[np.minimum(counts, 3)]
        contexts, starts = np.unique(grams // self._base, return_index=True)
        totals = np.add.reduceat(counts, starts)
        return _Order(grams, counts, discounts, contexts, totals, np.add.reduceat(discounts, starts) / totals)

    def bits(self, documents: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """-log2 of the probability of every token of ``documents``, in order, as one array."""
        stream, places = self._pad(documents)
        probability = np.full(len(places), 1.0 / self.vocabulary)
        for k, order in enumerate(self._orders, start=1):
            keys = self._keys(stream, places, k)
            gram, seen = _find(order.grams, keys)
            context, known = _find(order.contexts, keys // self._base)
            direct = np.where(seen, order.counts[gram] - order.discounts[gram], 0.0) / order.totals[context]
            probability = np.where(known, direct + order.backoff[context] * probability, probability)
        return -np.log2(probability)


def _find(table: Ids, keys: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """Index of each key in a sorted table (0 where it is absent), and whether it is there."""
    index = np.searchsorted(table, keys)
    index[index == len(table)] = 0
    found = table[index] == keys
    return np.where(found, index, 0), found
