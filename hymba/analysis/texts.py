"""The texts that an analysis reads: files and folders, or the default corpus's held-out files."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hymba.analysis.capture import AnalysisError
from hymba.experiments.corpus import CorpusError, Document, load_corpus, read_files
from hymba.experiments.settings import DataSettings

SHORTEST = 2
"""Tokens that a text must have: one to predict from and one to predict."""


@dataclass(frozen=True)
class Sample:
    """A piece of text on which the model runs by itself.

    Attributes:
        domain: what it belongs to. name: its document.
        ids: (1, tokens), the beginning-of-text token first where the tokenizer has one.
    """

    domain: str
    name: str
    ids: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def held_out() -> list[Document]:
    """The default corpus's held-out files, which the checkpoint in the package was not trained on."""
    return list(load_corpus(DataSettings()).held_out)


def documents(paths: Sequence[str | Path]) -> dict[str, list[Document]]:
    """One domain for each file or folder, under its name; the default corpus's held-out files without any.

    Raises:
        AnalysisError: a path that is missing, empty or not text.
    """
    if not paths:
        return {"default corpus, held out": held_out()}
    found: dict[str, list[Document]] = {}
    for path in map(Path, paths):
        name = path.stem if path.is_file() else path.resolve().name
        while name in found:
            name = f"{path.resolve().parent.name}/{name}"
        try:
            texts = [text for text in read_files([str(path)], DataSettings().patterns) if text.text.strip()]
        except CorpusError as error:
            raise AnalysisError(str(error).removeprefix("data.paths: ")) from error
        if not texts:
            raise AnalysisError(f"{path} has no text in it")
        found[name] = texts
    return found


def default_domains(seed: int = 0) -> dict[str, list[Document]]:
    """Three kinds of text that every machine has: prose and code out of the held-out files, and sums.

    Prose is what stands in docstrings, code the same files without docstrings and comments.
    """
    prose, code = [], []
    for document in held_out():
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            # Templates of another language's syntax.
            continue
        found = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None:
                    found.append(text)
                    node.body = node.body[1:] or [ast.Pass()]
        if found:
            prose.append(Document(document.name, "\n\n".join(found)))
        code.append(Document(document.name, ast.unparse(tree)))
    draw = random.Random(seed)
    sums = []
    for i in range(8):
        lines = []
        for _ in range(400):
            a, b = draw.randrange(1, 1000), draw.randrange(1, 1000)
            lines.append(f"{a} + {b} = {a + b}" if draw.random() < 0.5 else f"{a} * {b} = {a * b}")
        sums.append(Document(f"sums {i}", "\n".join(lines)))
    return {"prose": prose, "code": code, "sums": sums}


def samples(
    tokenizer: PreTrainedTokenizerBase, domains: dict[str, list[Document]], *, length: int, count: int
) -> list[Sample]:
    """Pieces of up to `length` tokens, `count` of each domain.

    The first piece of every document comes before any document's second one. Pieces shorter than `length` are taken,
    the longest first, when there are not enough whole ones.

    Raises:
        AnalysisError: a domain without a text of two tokens.
    """
    if length < SHORTEST or count < 1:
        raise AnalysisError(f"length={length}, count={count}: allowed: at least {SHORTEST} tokens and 1 sample")
    found = []
    for domain, texts in domains.items():
        chosen = _pieces(tokenizer, texts, length, count)
        if not chosen:
            raise AnalysisError(f"{domain}: its text has fewer than {SHORTEST} tokens; give more text")
        found += [Sample(domain, name, torch.tensor([ids])) for name, ids in chosen]
    return found


def _pieces(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Document], length: int, count: int
) -> list[tuple[str, list[int]]]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length - len(start)
    whole: list[tuple[int, int, str, list[int]]] = []
    short = list(whole)
    for order, document in enumerate(texts):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for number, at in enumerate(range(0, len(ids), step)):
            piece = [*start, *ids[at : at + step]]
            if len(piece) >= SHORTEST:
                (whole if len(piece) == length else short).append((number, order, document.name, piece))
        if sum(number == 0 for number, *_ in whole) >= count:
            break
    whole.sort(key=lambda piece: piece[:2])
    short.sort(key=lambda piece: -len(piece[3]))
    return [(name, piece) for _, _, name, piece in [*whole, *short][:count]]
