"""Data and scores of the tasks in `hymba/assets/eval/tasks`, as their YAML files name them.

A task's data set is made by a function of its metadata, which `--metadata` adds to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hymba.eval import EvaluationError
from hymba.experiments.corpus import CorpusError, Document, load_corpus, read_files
from hymba.experiments.settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def default_corpus(**metadata: Any) -> dict[str, Dataset]:
    """Held-out files of the default corpus: split `test` with the columns `name` and `text`."""
    return {"test": _rows(load_corpus(DataSettings()).held_out)}


def text_files(*, paths: str | Sequence[str] | None = None, **metadata: Any) -> dict[str, Dataset]:
    """Text files as documents: split `test` with the columns `name` and `text`.

    Args:
        paths: files, and folders that are searched for .py, .txt and .md.

    Raises:
        EvaluationError: no paths, or one without text.
    """
    if not paths:
        raise EvaluationError('hymba_text needs files: --metadata \'{"paths": ["FILE or FOLDER"]}\'')
    named = [paths] if isinstance(paths, str) else list(paths)
    try:
        documents = [d for d in read_files(named, DataSettings().patterns) if d.text.strip()]
    except CorpusError as error:
        raise EvaluationError(str(error).replace("data.paths", "hymba_text: paths")) from error
    if not documents:
        raise EvaluationError(f"hymba_text: paths={named}: no text in them")
    return {"test": _rows(documents)}


def swde(*, swde_files: str | Sequence[str] | None = None, **metadata: Any) -> DatasetDict:
    """`hazyresearch/based-swde-v2`, or local files with its columns `text` and `value`; split `validation`."""
    return _completions("hazyresearch/based-swde-v2", "swde_files", swde_files)


def squad(*, squad_files: str | Sequence[str] | None = None, **metadata: Any) -> DatasetDict:
    """`hazyresearch/based-squad`, or local files with its columns `text` and `value`; split `validation`."""
    return _completions("hazyresearch/based-squad", "squad_files", squad_files)


def contains(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the generated text contains the document's `value`, whatever the case; 0 where it does not."""
    return {"contains": float(document["value"].strip().lower() in results[0].lower())}


def _completions(name: str, key: str, files: str | Sequence[str] | None) -> DatasetDict:
    from datasets import load_dataset

    if files is None:
        return load_dataset(name)
    named = [files] if isinstance(files, str) else list(files)
    data = load_dataset("json", data_files={"validation": named})
    missing = {"text", "value"} - set(data["validation"].column_names)
    if missing:
        raise EvaluationError(f"{key}={named}: no column {', '.join(sorted(missing))}; needed: text and value")
    return data


def _rows(documents: Iterable[Document]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([{"name": document.name, "text": document.text} for document in documents])
