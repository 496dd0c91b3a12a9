"""Bits per byte of a language model on documents: a figure that does not depend on the tokenizer.

Every document is scored on its own. Its tokens follow the beginning-of-text token, and each of them, so every byte of
the document, is predicted from what stands before it in the same document; the end-of-text token is not scored. The
figure is the sum of -log2 p over all tokens of all documents, divided by the bytes of the documents in UTF-8.

A document longer than ``context`` tokens is scored in windows that overlap by half: the model starts anew (from its
meta state) at each window, and only the half that no earlier window scored counts, so that a token past the first
window has at least ``context // 2`` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba.experiments.corpus import Document, byte_length
from hymba.experiments.tokenizer import encode_documents


@dataclass(frozen=True)
class Bits:
    """A measurement: total bits, and what they were spent on."""

    bits: float
    bytes: int
    tokens: int
    documents: int

    @property
    def per_byte(self) -> float:
        return self.bits / self.bytes


@dataclass(frozen=True)
class _Window:
    """Ids to run (first to last), of which those from ``scored`` on count; indices into one document."""

    document: int
    first: int
    scored: int
    last: int


def windows(lengths: Sequence[int], context: int) -> list[_Window]:
    """Half-overlapping windows over documents with ``lengths`` ids; each id but a document's first is scored once."""
    found = []
    for document, length in enumerate(lengths):
        first, scored = 0, 1
        while scored < length:
            last = min(first + context, length)
            found.append(_Window(document, first, scored, last))
            first, scored = last - context // 2, last
    return found


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    context: int,
    batch_size: int = 8,
) -> Bits:
    """Measure ``model`` on ``documents``; the module's text says how.

    Args:
        model: a causal language model; its mode is put back afterwards.
        tokenizer: with beginning- and end-of-text tokens.
        context: tokens per window, at least 2.
        batch_size: windows per forward pass.

    Raises:
        ValueError: there is no text to measure, or ``context`` is too short.
    """
    if context < 2:
        raise ValueError(f"context = {context}: expected at least 2 tokens")
    total_bytes = sum(byte_length(document.text) for document in documents)
    if total_bytes == 0:
        raise ValueError("no held-out text to measure; give documents or a larger data.held_out")
    ids = [each[:-1] for each in encode_documents(tokenizer, [document.text for document in documents])]
    plan = sorted(windows([len(each) for each in ids], context), key=lambda window: window.last - window.first)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    bits, tokens = 0.0, 0
    try:
        for start in range(0, len(plan), batch_size):
            batch = plan[start : start + batch_size]
            rows = [ids[window.document][window.first : window.last] for window in batch]
            loss, count = _score(model, rows, [window.scored - window.first for window in batch], device)
            bits += loss / math.log(2)
            tokens += count
    finally:
        model.train(training)
    return Bits(bits, total_bytes, tokens, len(documents))


def _score(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], scored: Sequence[int], device: torch.device
) -> tuple[float, int]:
    """Sum of -ln p over each row's ids from its ``scored`` index on, and how many they are."""
    length = max(map(len, rows))
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    counted = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        counted[i, scored[i] : len(row)] = True
    input_ids, counted = input_ids.to(device), counted.to(device)
    padded = None if bool(mask.all()) else mask.to(device)
    logits: Tensor = model(input_ids=input_ids, attention_mask=padded, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    kept = losses.double()[counted[:, 1:].flatten()]
    return float(kept.sum()), kept.numel()
