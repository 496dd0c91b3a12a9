"""Text for training: named documents, a split that depends on their names alone, and a record of both.

The default corpus is the Python standard library of the running interpreter, because every machine has it.
Left out, with the reason:

* ``site-packages``, ``dist-packages``: not the standard library.
* test packages (a folder called ``test``, ``tests`` or ``idle_test``): many installations come without them.
* ``_sysconfigdata*`` and ``config-*``: written when the interpreter was built, different on every machine.
* files whose head says that a program generated them (encoding tables, the help topics): data, not sources.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hymba.experiments.settings import DataSettings, TextSettings

_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_GENERATED = re.compile(r"auto-?generated|file is generated|generated from '", re.IGNORECASE)
_HEAD = 400


class CorpusError(ValueError):
    """A corpus that is missing, empty or not text; the message names the file or folder."""


@dataclass(frozen=True)
class Document:
    """One text with the name that decides its side of the split (a relative POSIX path, or a row number)."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents on the two sides of the split, in the order of their names."""

    description: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def record(self) -> dict[str, Any]:
        """What was read: file names and sizes per side, a hash, the Python version."""
        return {
            "corpus": self.description,
            "python": platform.python_version(),
            "sha256": self.digest(),
            "train": _record_side(self.train),
            "held_out": _record_side(self.held_out),
        }

    def digest(self) -> str:
        """SHA-256 over every document's side, name and text."""
        total = hashlib.sha256()
        for side, documents in (("train", self.train), ("held_out", self.held_out)):
            for document in documents:
                for part in (side, document.name, document.text):
                    encoded = part.encode("utf-8", "surrogatepass")
                    total.update(len(encoded).to_bytes(8, "big"))
                    total.update(encoded)
        return total.hexdigest()


def _record_side(documents: Sequence[Document]) -> dict[str, Any]:
    sizes = {document.name: byte_length(document.text) for document in documents}
    return {"files": len(sizes), "bytes": sum(sizes.values()), "list": sizes}


def byte_length(text: str) -> int:
    """Bytes of ``text`` in UTF-8, the denominator of bits per byte."""
    return len(text.encode("utf-8"))


def load_corpus(settings: DataSettings) -> Corpus:
    """All documents of the settings' sources.

    Raises:
        CorpusError, ImportError: as :func:`read_corpus`.
    """
    return join(load_corpora(settings))


def load_corpora(settings: DataSettings) -> dict[str, Corpus]:
    """The corpus of each of ``data.sources`` by its name; of a single source, its corpus under "".

    Raises:
        CorpusError, ImportError: as :func:`read_corpus`.
    """
    if not settings.sources:
        return {"": read_corpus(settings, held_out=settings.held_out)}
    return {source.name: read_corpus(source, held_out=settings.held_out) for source in settings.sources}


def join(corpora: Mapping[str, Corpus]) -> Corpus:
    """All sources as one corpus, in which the source's name stands before a document's."""
    if list(corpora) == [""]:
        return corpora[""]

    def side(documents: Callable[[Corpus], Sequence[Document]]) -> tuple[Document, ...]:
        return tuple(
            Document(f"{name}/{document.name}", document.text)
            for name, corpus in corpora.items()
            for document in documents(corpus)
        )

    description = "; ".join(f"{name}: {corpus.description}" for name, corpus in corpora.items())
    return Corpus(description, side(lambda corpus: corpus.train), side(lambda corpus: corpus.held_out))


def read_corpus(settings: TextSettings, *, held_out: float) -> Corpus:
    """Read the documents that ``settings`` name and split them; ``held_out``: the share kept for evaluation.

    Raises:
        CorpusError: nothing found, a file that is not text, or a side of the split without a document.
        ImportError: ``source: datasets`` without the ``datasets`` package.
    """
    if settings.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        description = "Python standard library sources"
        documents = list(standard_library(root))
        origin = str(root)
    elif settings.source == "files":
        description = "files: " + ", ".join(settings.paths)
        documents = list(read_files(settings.paths, settings.patterns))
        origin = ", ".join(settings.paths)
    else:
        description = f"dataset: {settings.dataset} [{settings.dataset_split}]"
        documents = list(read_dataset(settings))
        origin = str(settings.dataset)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise CorpusError(f"data: the corpus is empty: no text in {origin}; give files or folders with text")
    train = [d for d in documents if split_position(d.name) >= held_out]
    kept = [d for d in documents if split_position(d.name) < held_out]
    if not train:
        raise CorpusError(
            f"data.held_out = {held_out}: all {len(documents)} documents of {origin} fall on the held-out "
            "side; give more documents or a smaller share"
        )
    return Corpus(description, tuple(train), tuple(kept))


def split_position(name: str) -> float:
    """A document's place in [0, 1), from a hash of its name: the same for every version of the file.

    Documents below ``held_out`` are held out. The name is relative, so the place does not depend on where the
    corpus is installed either.
    """
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") / 2**64


def standard_library(root: Path) -> Iterator[Document]:
    """The default corpus under ``root``, by name; the module's text says what is left out."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        folders = set(name.parts[:-1])
        if folders & (_FOREIGN_FOLDERS | _TEST_FOLDERS):
            continue
        if name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            # A handful of sources declare another encoding; they are not worth a second decoder.
            continue
        if not _GENERATED.search(text[:_HEAD]):
            yield Document(name.as_posix(), text)


def read_files(paths: Iterable[str], patterns: Sequence[str]) -> Iterator[Document]:
    """Text files, and folders searched for ``patterns``; names are relative to the folder given.

    Raises:
        CorpusError: a path that does not exist, a folder without a match, or a file that is not UTF-8 text.
    """
    seen: set[str] = set()
    for given in paths:
        root = Path(given).expanduser()
        if root.is_file():
            found = [(root.name, root)]
        elif root.is_dir():
            matches = sorted({path for pattern in patterns for path in root.rglob(pattern) if path.is_file()})
            if not matches:
                raise CorpusError(f"data.paths: no file in {given} matches data.patterns = {list(patterns)}")
            found = [(PurePosixPath(path.relative_to(root)).as_posix(), path) for path in matches]
        else:
            problem = "is neither a file nor a folder" if root.exists() else "does not exist"
            raise CorpusError(f"data.paths: {given} {problem}; give files or folders")
        for name, path in found:
            # Two folders may hold the same relative name; the later one is told apart by its folder.
            folder = root.resolve().parent.name if root.is_file() else root.resolve().name
            unique = name if name not in seen else f"{folder}/{name}"
            while unique in seen:
                unique += "+"
            seen.add(unique)
            yield Document(unique, read_text(path))


def read_text(path: Path) -> str:
    """A file as UTF-8 text.

    Raises:
        CorpusError: the file cannot be read, has NUL bytes, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"data.paths: cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"data.paths: {path} is not text: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert it or narrow data.patterns"
        ) from error
    if "\0" in text:
        raise CorpusError(f"data.paths: {path} is not text: NUL byte at offset {data.index(0)}; narrow data.patterns")
    return text


def read_dataset(settings: TextSettings) -> Iterator[Document]:
    """Rows of a ``datasets`` dataset, named by their row number.

    Raises:
        ImportError: the optional package is missing.
        CorpusError: the dataset has no column ``data.text_field``, or a row in it is not text.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data.source: datasets needs the datasets package: pip install datasets") from error
    name = settings.dataset
    assert name is not None
    local = Path(name)
    try:
        if (local / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(name)
        elif (local / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[settings.dataset_split]
        else:
            rows = datasets.load_dataset(name, settings.dataset_config, split=settings.dataset_split)
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(
            f"data.dataset = {name!r} (data.dataset_config = {settings.dataset_config!r}, data.dataset_split = "
            f"{settings.dataset_split!r}) cannot be loaded: {error}"
        ) from error
    if settings.text_field not in rows.column_names:
        raise CorpusError(
            f"data.text_field = {settings.text_field!r}: {name} has the columns {', '.join(rows.column_names)}"
        )
    for index, text in enumerate(rows[settings.text_field]):
        if not isinstance(text, str):
            raise CorpusError(
                f"data.text_field = {settings.text_field!r}: row {index} of {name} is {type(text).__name__}, not text"
            )
        yield Document(f"{settings.dataset_split}/{index}", text)
