"""Where the examples come from, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba.finetuning.examples import EXAMPLES
from hymba.finetuning.rows import (
    CONVERSATIONAL,
    FORMS,
    MESSAGES,
    PAIRS,
    PAIRS_MESSAGES,
    PROMPT,
    PROMPT_MESSAGES,
    TEXT,
    DataError,
    Row,
    read_file,
    read_row,
)
from hymba.finetuning.settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = {
    TEXT: ("text",),
    PROMPT: ("prompt", "completion"),
    MESSAGES: ("messages",),
    PROMPT_MESSAGES: ("prompt", "completion"),
    PAIRS: ("prompt", "chosen", "rejected"),
    PAIRS_MESSAGES: ("prompt", "chosen", "rejected"),
}


@dataclass(frozen=True)
class Examples:
    """Examples of one form, to train on and held out.

    Attributes:
        form: one of those of :mod:`hymba.finetuning.rows`.
        train, held_out: tables with TRL's columns.
        description: the source in words.
    """

    form: str
    train: Dataset
    held_out: Dataset
    description: str

    @property
    def conversational(self) -> bool:
        """Whether a chat template writes the examples."""
        return self.form in CONVERSATIONAL

    def digest(self) -> str:
        """A hash of every example and of which side it is on."""
        total = hashlib.sha256()
        for side in (self.train, self.held_out):
            total.update(str(len(side)).encode())
            for row in side:
                total.update(_canonical(row))
        return total.hexdigest()[:16]


def load_examples(settings: DataSettings, method: str) -> Examples:
    """Read the examples that the settings name.

    Raises:
        DataError: nothing is there, an example of another form than the first one, or one that cannot be used.
        ImportError: the datasets package is not there.
    """
    sides: tuple[Iterable[tuple[str, Any]], Iterable[tuple[str, Any]] | None]
    if settings.source == "example":
        made = EXAMPLES[settings.example].rows()
        sides = _placed(settings.example, made), None
        described = f"example {settings.example!r}"
    elif settings.source == "files":
        files = find_files(settings.paths, "data.paths")
        apart = find_files(settings.held_out_paths, "data.held_out_paths") if settings.held_out_paths else None
        sides = _read_all(files), None if apart is None else _read_all(apart)
        described = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    else:
        split = settings.held_out_split
        sides = _dataset(settings, settings.dataset_split), None if split is None else _dataset(settings, split)
        described = f"{settings.dataset} ({settings.dataset_split})"
    form, rows = _read_side(sides[0], method, settings.rows, None, f"data: {described}")
    if sides[1] is not None:
        train, held_out = rows, _read_side(sides[1], method, 0, form, "data: the held-out side")[1]
    else:
        train, held_out = [], []
        for row in rows:
            (held_out if is_held_out(row, settings.held_out) else train).append(row)
    if not train:
        raise DataError(f"data: {described}: no example is left to train on; give more, or lower data.held_out")
    return Examples(form, _table(form, train), _table(form, held_out), described)


def is_held_out(row: Row, share: float) -> bool:
    """Whether an example is among the ``share`` that is kept for measuring: by what it says, wherever it stands."""
    return int.from_bytes(hashlib.sha256(_canonical(row)).digest()[:8], "big") < share * 2**64


def find_files(paths: Iterable[str], key: str) -> list[Path]:
    """The .json and .jsonl files that the paths name, those of a folder in the order of their names.

    Raises:
        DataError: a path that is not there, or of another kind; a folder without any.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl") and p.is_file())
            if not inside:
                raise DataError(f"{key}: {name}: no .json or .jsonl file in this folder")
            found += inside
        elif not path.exists():
            raise DataError(f"{key}: {name}: no such file or folder")
        elif path.suffix not in (".json", ".jsonl"):
            raise DataError(f"{key}: {name}: allowed are .json and .jsonl files, and folders with such files")
        else:
            found.append(path)
    return found


def _read_all(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        yield from read_file(path)


def _placed(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}[{i}]", row) for i, row in enumerate(rows))


def _dataset(settings: DataSettings, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name = settings.dataset
    assert name is not None
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(name, settings.dataset_config, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.dataset = {name!r}, split {split!r}: cannot be loaded: {error}") from error
    return _placed(f"{name} ({split})", table)


def _read_side(
    rows: Iterable[tuple[str, Any]], method: str, limit: int, form: str | None, source: str
) -> tuple[str, list[Row]]:
    found: list[Row] = []
    for where, raw in rows:
        if limit and len(found) == limit:
            break
        kind, row = read_row(raw, method=method, where=where)
        if form is not None and kind != form:
            raise DataError(f"{where}: {kind}, where the examples before have {form}; expected one form for all")
        form = kind
        found.append(row)
    if form is None:
        raise DataError(f"{source}: there is no example in it; expected {FORMS[method]}")
    return form, found


def _table(form: str, rows: list[Row]) -> Dataset:
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    features: dict[str, Any] = dict.fromkeys(_COLUMNS[form], text)
    if form in CONVERSATIONAL:
        features = dict.fromkeys(_COLUMNS[form], List({"role": text, "content": text}))
        features |= {"tools": text, "chat_template_kwargs": {"contexts": List(text)}}
    # By columns, which an empty table has as well.
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=Features(features))


def _canonical(row: Row) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
