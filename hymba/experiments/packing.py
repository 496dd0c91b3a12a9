"""Rows of token ids for training, as a function of documents, seed and position: resuming stores no order.

Each pass over the corpus is one long text of documents in a new order, cut into rows; the rows of a pass are
shuffled too, so that a batch does not hold consecutive pieces of one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100


class Rows(Dataset[dict[str, Tensor]]):
    """``rows`` rows of ``length`` token ids, whose order is the order of training; it begins at row ``first``."""

    rows: int
    length: int
    first = 0

    def __len__(self) -> int:
        return self.rows


class Tokens:
    """The token ids of all documents in one array, in memory or mapped from a file that processes share."""

    def __init__(self, ids: NDArray[Any], ends: NDArray[np.int64]) -> None:
        """``ids``: of all documents, one behind the other. ``ends``: where each document ends."""
        self.ids, self.ends = ids, ends
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> Tokens:
        """Two bytes per token where the largest id allows it, else four."""
        widest = max((max(document, default=0) for document in documents), default=0)
        kind = np.uint16 if widest < 2**16 else np.int32
        parts = [np.asarray(document, dtype=kind) for document in documents]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.concatenate(parts) if parts else np.empty(0, dtype=kind), ends)

    def save(self, folder: Path) -> None:
        """Write the two arrays."""
        np.save(folder / "ids.npy", self.ids)
        np.save(folder / "ends.npy", self.ends)

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """What :meth:`save` wrote; the ids stay on the disk and are read as they are used."""
        return cls(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "ends.npy"))

    def __len__(self) -> int:
        return len(self.ids)


class TokenRows(Rows):
    """``rows`` rows of ``length`` token ids; as many passes over the documents as that takes.

    Items hold ``input_ids`` and ``labels`` (length,) int64. With ``layout="packed"`` they also hold
    ``position_ids`` and ``seq_idx`` (length,), and a label at a document's first token is ignored: the state
    starts anew there. A document that is cut at a row's end continues in another row as a document of its own.
    """

    def __init__(
        self,
        documents: Tokens | Sequence[Sequence[int]],
        *,
        length: int,
        rows: int,
        seed: int,
        layout: Literal["packed", "stream"],
        stream: int | None = None,
        name: str = "the training side",
    ) -> None:
        """``documents``: token ids, each with its beginning- and end-of-text tokens.

        ``stream`` gives rows of one seed another order; ``name`` stands for the documents in errors.

        Raises:
            ValueError: there are fewer tokens than one row takes.
        """
        self._tokens = documents if isinstance(documents, Tokens) else Tokens.of(documents)
        self.length, self.rows, self.seed, self.layout = length, rows, seed, layout
        self.tokens = len(self._tokens)
        self._stream = () if stream is None else (stream,)
        if self.tokens < length:
            raise ValueError(
                f"data.sequence_length = {length}: {name} has only {self.tokens} tokens; give more text or shorter rows"
            )
        self._pass = -1
        self._documents: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._ends: NDArray[np.int64] = np.empty(0, dtype=np.int64)
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
        ids, starts = self._read(int(self._order[place]) * self.length)
        if self.layout == "stream":
            return {"input_ids": ids, "labels": ids.clone()}
        return {"input_ids": ids, **packed_fields(ids, starts)}

    def _shuffle(self, number: int) -> None:
        generator = np.random.default_rng((self.seed, number, *self._stream))
        self._documents = generator.permutation(len(self._tokens.ends))
        sizes = self._tokens.ends - self._tokens.starts
        self._ends = np.cumsum(sizes[self._documents])
        self._order = generator.permutation(self.rows_per_pass)
        self._pass = number

    def _read(self, place: int) -> tuple[Tensor, Tensor]:
        """Ids of the row at a place of the pass, and which of them are the first of a document."""
        ids = np.empty(self.length, dtype=np.int64)
        starts = np.zeros(self.length, dtype=np.bool_)
        filled = 0
        at = int(np.searchsorted(self._ends, place, side="right"))
        while filled < self.length:
            document = self._documents[at]
            first, end = int(self._tokens.starts[document]), int(self._tokens.ends[document])
            inside = end - first - int(self._ends[at] - place) if not filled else 0
            taken = min(self.length - filled, end - first - inside)
            ids[filled : filled + taken] = self._tokens.ids[first + inside : first + inside + taken]
            starts[filled] = not inside
            filled += taken
            at += 1
        return torch.from_numpy(ids), torch.from_numpy(starts)


def rows_digest(rows: Rows, sample: int = 16) -> str:
    """A hash of the number of rows and of the first and last ``sample`` rows' ids and labels, from ``first`` on.

    Trainings with equal hashes saw the same tokens in the same order: what lies between follows from the same seed.
    """
    begin, end = rows.first, rows.rows
    total = hashlib.sha256(str((end - begin, rows.length)).encode())
    for index in sorted({*range(begin, min(begin + sample, end)), *range(max(begin, end - sample), end)}):
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
