"""Rows of token ids for training, as a function of documents, seed and position: resuming stores no order.

Each pass over the corpus is one long text of documents in a new order, cut into rows; the rows of a pass are
shuffled too, so that a batch does not hold consecutive pieces of one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100


class Rows(Dataset[dict[str, Tensor]]):
    """``rows`` rows of ``length`` token ids, whose order is the order of training."""

    rows: int
    length: int

    def __len__(self) -> int:
        return self.rows


class TokenRows(Rows):
    """``rows`` rows of ``length`` token ids; as many passes over the documents as that takes.

    Items hold ``input_ids`` and ``labels`` (length,) int64. With ``layout="packed"`` they also hold
    ``position_ids`` and ``seq_idx`` (length,), and a label at a document's first token is ignored: the state
    starts anew there. A document that is cut at a row's end continues in another row as a document of its own.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        *,
        length: int,
        rows: int,
        seed: int,
        layout: Literal["packed", "stream"],
    ) -> None:
        """``documents``: token ids, each with its beginning- and end-of-text tokens.

        Raises:
            ValueError: there are fewer tokens than one row takes.
        """
        widest = max((max(document, default=0) for document in documents), default=0)
        kind = np.uint16 if widest < 2**16 else np.int32
        self._documents = [np.asarray(document, dtype=kind) for document in documents]
        self.length, self.rows, self.seed, self.layout = length, rows, seed, layout
        self.tokens = sum(len(document) for document in self._documents)
        if self.tokens < length:
            raise ValueError(
                f"data.sequence_length = {length}: the training side has only {self.tokens} tokens; "
                "give more text or shorter rows"
            )
        self._pass = -1
        self._stream: NDArray[Any] = np.empty(0)
        self._starts: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @cached_property
    def rows_per_pass(self) -> int:
        """Full rows in one pass; the rest of the last row is left out of that pass."""
        return self.tokens // self.length

    @property
    def passes(self) -> float:
        """How often the rows go through the corpus."""
        return self.rows / self.rows_per_pass

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        number, place = divmod(index, self.rows_per_pass)
        if number != self._pass:
            self._shuffle(number)
        start = int(self._order[place]) * self.length
        ids = torch.from_numpy(self._stream[start : start + self.length].astype(np.int64))
        if self.layout == "stream":
            return {"input_ids": ids, "labels": ids.clone()}
        starts = torch.from_numpy(self._starts[start : start + self.length].copy())
        return {"input_ids": ids, **packed_fields(ids, starts)}

    def _shuffle(self, number: int) -> None:
        generator = np.random.default_rng((self.seed, number))
        order = generator.permutation(len(self._documents))
        self._stream = np.concatenate([self._documents[i] for i in order])
        self._starts = np.zeros(len(self._stream), dtype=np.bool_)
        self._starts[np.cumsum([0] + [len(self._documents[i]) for i in order[:-1]])] = True
        self._order = generator.permutation(self.rows_per_pass)
        self._pass = number


def rows_digest(rows: Rows, sample: int = 16) -> str:
    """A hash of the number of rows and of the first and last ``sample`` rows' ids and labels.

    Trainings with equal hashes saw the same tokens in the same order: what lies between follows from the same seed.
    """
    total = hashlib.sha256(str((rows.rows, rows.length)).encode())
    for index in sorted({*range(min(sample, rows.rows)), *range(max(0, rows.rows - sample), rows.rows)}):
        row = rows[index]
        for name in ("input_ids", "labels"):
            total.update(row[name].numpy().astype("<i8").tobytes())
    return total.hexdigest()[:16]


def packed_fields(ids: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """``labels``, ``position_ids`` and ``seq_idx`` of one packed row.

    Args:
        ids: (length,) token ids.
        starts: (length,) bool, True at each document's first token; the row's first token always starts one.

    Returns:
        Tensors of shape (length,): labels and position_ids int64, seq_idx int32; labels are ignored at document starts.
    """
    starts = starts.clone()
    starts[0] = True
    seq_idx = starts.long().cumsum(0) - 1
    places = torch.arange(len(ids))
    return {
        "labels": ids.masked_fill(starts, IGNORED),
        "position_ids": places - places[starts][seq_idx],
        "seq_idx": seq_idx.to(torch.int32),
    }


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack equal-length rows to (batch, length)."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
