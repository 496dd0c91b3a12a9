"""What every task has in common: rows by seed and index, a held-out side that no training row is on, exact accuracy.

A row is a function of the task's parameters, the side, the seed and the row's index, so every model that is trained
with one seed sees the same tokens, and a resumed run goes on where it stopped.

The two sides are disjoint by construction: a hash of a row's ids says which side the row is on (one row of
``HELD_OUT_SHARE`` is held out), and a row that falls on the other side is drawn again. No seed makes them meet.

Targets follow the convention of causal language models: the label at a position is what the logits one position
before it have to predict, and ``IGNORED`` where nothing is asked. The input at a target's position is a token that
says nothing about it, so the answer itself is never fed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hymba.experiments.packing import IGNORED, Rows, collate
from hymba.experiments.settings import SettingsError

Side = Literal["train", "held_out"]
Ids = NDArray[np.int64]

BLANK = 0
"""The id of the token that says nothing; no task uses it for a key, a value or a content token."""
HELD_OUT_SHARE = 8
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Row:
    """One sequence: ids and labels (length,), and for each label, in order, how far back its answer lies."""

    ids: Ids
    labels: Ids
    distances: Ids


@dataclass(frozen=True)
class Cell:
    """The measurement of one difficulty: ``of`` names it; correct and asked count targets, solved whole rows."""

    of: dict[str, Any]
    rows: int
    correct: int
    asked: int
    solved: int
    hits: NDArray[np.bool_]
    """For each target, in the order of rows and places, whether it was right."""
    distances: Ids

    @property
    def accuracy(self) -> float:
        """Share of the targets that were predicted."""
        return self.correct / self.asked

    def record(self) -> dict[str, Any]:
        """As JSON: the difficulty, the accuracy of targets and of whole rows, and their numbers."""
        return {
            **self.of,
            "accuracy": self.accuracy,
            "rows_solved": self.solved / self.rows,
            "rows": self.rows,
            "targets": self.asked,
        }


class Task(ABC):
    """A task with its parameters; subclasses are dataclasses whose fields are the settings under ``data.task``.

    Attributes:
        name: under which :func:`make_task` finds it.
        length: tokens of a training row.
        test_rows: held-out rows for each difficulty.
    """

    name: ClassVar[str]
    length: int
    test_rows: int

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids that the rows use; a model needs at least as many."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens of the longest row that training or :meth:`evaluate` gives to a model."""

    @abstractmethod
    def difficulty(self, generator: np.random.Generator) -> dict[str, Any]:
        """The difficulty of a training row, as keyword arguments of :meth:`draw`."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, **difficulty: Any) -> Row:
        """One row of a difficulty, of either side."""

    @abstractmethod
    def evaluate(
        self, model: Callable[..., Any], *, seed: int = 0, rows: int | None = None, batch_size: int = 32
    ) -> dict[str, float | list[Any]]:
        """Exact accuracy on held-out rows, the same ones for every model.

        Args:
            model: called as ``model(input_ids=...)`` with (batch, length) int64; returns logits (batch, length, vocab)
                or an object with them as ``logits``. A module is put into evaluation mode meanwhile.
            seed: of the held-out rows.
            rows: for each difficulty; ``test_rows`` by default.
            batch_size: rows in a forward pass.

        Returns:
            Plain numbers and lists, ready for JSON. ``accuracy`` is the mean over the difficulties at the training
            length; ``chance`` what guessing among all answers gives; ``cells`` has every difficulty.
        """

    def row(self, seed: int, index: int, *, side: Side = "train", **difficulty: Any) -> Row:
        """Row ``index`` of a side; without ``difficulty``, one that training draws.

        Raises:
            SettingsError: the parameters leave the side without a row.
        """
        for attempt in range(_ATTEMPTS):
            generator = np.random.default_rng((seed, int(side == "held_out"), index, attempt))
            row = self.draw(generator, **(difficulty or self.difficulty(generator)))
            if side_of(row.ids) == side:
                return row
        raise SettingsError(
            f"data.task: {self!r} has too few different rows: {_ATTEMPTS} in a row belong to the other side of the "
            "split; use a larger vocabulary or longer rows"
        )

    def rows(self, seed: int, rows: int) -> TaskRows:
        """The first ``rows`` training rows of a seed, as a dataset in the order of training."""
        return TaskRows(self, seed=seed, rows=rows)

    def train_batches(self, seed: int, *, batch_size: int = 64, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless ``input_ids`` and ``labels`` (batch_size, length) int64, from batch ``start`` on."""
        batch = start
        while True:
            found = [self.row(seed, batch * batch_size + i) for i in range(batch_size)]
            yield collate([tensors(row) for row in found])
            batch += 1

    def parameters(self) -> dict[str, Any]:
        """Name and parameters, as ``data.task`` in a settings file takes them."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


class TaskRows(Rows):
    """``rows`` training rows of a task by their index, for a sequential loader."""

    def __init__(self, task: Task, *, seed: int, rows: int) -> None:
        self.task, self.seed, self.rows, self.length = task, seed, rows, task.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return tensors(self.task.row(self.seed, index))


def tensors(row: Row) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` (length,) int64."""
    return {"input_ids": torch.from_numpy(row.ids), "labels": torch.from_numpy(row.labels)}


def side_of(ids: Ids) -> Side:
    """The side of the split that a row with these ids is on."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "little") % HELD_OUT_SHARE else "held_out"


@torch.no_grad()
def measure(
    task: Task, model: Callable[..., Any], of: Mapping[str, Any], *, seed: int, rows: int, batch_size: int
) -> Cell:
    """Run ``model`` on ``rows`` held-out rows of the difficulty ``of``; a target is right when its logit is largest.

    Raises:
        ValueError: no rows.
    """
    if rows < 1 or batch_size < 1:
        raise ValueError(f"rows = {rows}, batch_size = {batch_size}: expected at least 1")
    module = model if isinstance(model, torch.nn.Module) else None
    parameter = None if module is None else next(module.parameters(), None)
    training = module is not None and module.training
    if module is not None:
        module.eval()
    hits: list[Tensor] = []
    distances: list[Ids] = []
    solved = 0
    try:
        for first in range(0, rows, batch_size):
            found = [task.row(seed, i, side="held_out", **of) for i in range(first, min(first + batch_size, rows))]
            batch = collate([tensors(row) for row in found])
            ids = batch["input_ids"] if parameter is None else batch["input_ids"].to(parameter.device)
            output = model(input_ids=ids)
            logits: Tensor = output if isinstance(output, Tensor) else output.logits
            labels = batch["labels"][:, 1:]
            asked = labels != IGNORED
            right = (logits[:, :-1].argmax(-1).cpu() == labels) & asked
            solved += int((right.sum(1) == asked.sum(1)).sum())
            hits.append(right[asked])
            distances.extend(row.distances for row in found)
    finally:
        if module is not None:
            module.train(training)
    hit = torch.cat(hits).numpy()
    return Cell(dict(of), rows, int(hit.sum()), len(hit), solved, hit, np.concatenate(distances))


def join(cells: Sequence[Cell]) -> Cell:
    """Several difficulties counted as one."""
    return Cell(
        {},
        sum(cell.rows for cell in cells),
        sum(cell.correct for cell in cells),
        sum(cell.asked for cell in cells),
        sum(cell.solved for cell in cells),
        np.concatenate([cell.hits for cell in cells]),
        np.concatenate([cell.distances for cell in cells]),
    )


def by_distance(cell: Cell, length: int, bins: int) -> list[float | None]:
    """Accuracy over how far back the answer lies, as a share of the row's length, in ``bins`` equal bins.

    A bin in which nothing was asked is None.
    """
    place = np.minimum(cell.distances * bins // length, bins - 1)
    asked = np.bincount(place, minlength=bins)
    right = np.bincount(place, weights=cell.hits, minlength=bins)
    return [float(r / n) if n else None for r, n in zip(right, asked)]


def measured_lengths(length: int, given: Sequence[int]) -> tuple[int, ...]:
    """Row lengths to measure at: the training length first, then ``given``, or twice and four times it."""
    others = given or (2 * length, 4 * length)
    return (length, *(other for other in others if other != length))


def need(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Refuse the value of a task's parameter.

    Raises:
        SettingsError: names key, value and remedy.
    """
    if not condition:
        shown = list(value) if isinstance(value, tuple) else value
        raise SettingsError(f"data.task.{name} = {shown!r}: {allowed}")
