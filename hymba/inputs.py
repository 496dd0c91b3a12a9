"""What a caller hands the model: checked on the host, then brought into the one form that the layers know.

Layers know rows whose real tokens stand first. `Compaction` takes any 0/1 mask (left padding, right padding, holes)
to that form and back; `documents` finds the documents of packed rows.

Values are checked where that costs nothing: on tensors that live on the CPU, and once per `generate`. A tensor on an
accelerator is never read back in the middle of a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hymba.config import nearest


class InputError(ValueError):
    """Inputs that the model cannot take; the message names the argument, its value and what is allowed."""


def check_keywords(kwargs: dict[str, Any], allowed: frozenset[str], known: Any, where: str) -> None:
    """Refuse keyword arguments that nothing reads, with the nearest name."""
    for key in kwargs:
        if key not in allowed:
            raise TypeError(f"{where}() got an unexpected keyword argument {key!r}.{nearest(key, known)}")


def readable(tensor: Tensor) -> bool:
    """Whether looking at values costs nothing: on the CPU, and not while a compiler traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ids(input_ids: Tensor, vocab_size: int, *, read: bool | None = None) -> None:
    """Refuse empty input, wrong dtypes and ids outside the vocabulary.

    Args:
        input_ids: (b, l) integers.
        vocab_size: ids run from 0 to vocab_size - 1.
        read: look at the values; by default only when they are on the CPU.
    """
    if input_ids.dim() != 2:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids has dtype {input_ids.dtype}; expected torch.long (or torch.int)")
    if 0 in input_ids.shape:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}: a prompt of zero tokens; give at least one token a row "
            "(the tokenizer's bos token will do)"
        )
    if read if read is not None else readable(input_ids):
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            row, column = (int(i) for i in (input_ids == bad).nonzero()[0])
            raise InputError(
                f"input_ids[{row}, {column}]={bad} is outside the vocabulary; allowed: 0 to {vocab_size - 1}"
            )


def check_mask(mask: Tensor, *, rows: int, columns: int, need_real: bool, read: bool | None = None) -> None:
    """Refuse an attention mask of another shape, with other values than 0 and 1, or with an empty row.

    Args:
        mask: (rows, columns): one column per token taken in so far, earlier calls included.
        need_real: every row must have a real token.
        read: look at the values; by default only when they are on the CPU.
    """
    if mask.dim() != 2 or tuple(mask.shape) != (rows, columns):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({rows}, {columns}): one column for every token "
            "so far, tokens in the cache included"
        )
    if read if read is not None else readable(mask):
        if mask.dtype != torch.bool:
            wrong = (mask != 0) & (mask != 1)
            if bool(wrong.any()):
                row, column = (int(i) for i in wrong.nonzero()[0])
                raise InputError(
                    f"attention_mask[{row}, {column}]={mask[row, column].item()}; allowed: 0 (padding) and 1 (real)"
                )
        empty = ~(mask != 0).any(dim=1)
        if need_real and bool(empty.any()):
            raise InputError(
                f"attention_mask row {int(empty.nonzero()[0])} has no real token; every row needs at least one 1"
            )


@dataclass
class Compaction:
    """Takes rows with padding anywhere to rows whose real tokens stand first, and back.

    Attributes:
        valid: (b, l) bool, True for real tokens.
        order: (b, l) the column that stands at each compact index. rank: (b, l) the compact index of each column.
    """

    valid: Tensor
    order: Tensor
    rank: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Compaction:
        """mask: (b, l), nonzero for real tokens."""
        valid = mask != 0
        # Stable, so that real tokens keep their order.
        order = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices
        rank = (valid.cumsum(dim=1) - 1).clamp(min=0)
        return cls(valid, order, rank)

    @property
    def lengths(self) -> Tensor:
        """(b,) real tokens per row."""
        return self.valid.sum(dim=1)

    @staticmethod
    def _take(x: Tensor, index: Tensor) -> Tensor:
        index = index.to(x.device)
        while index.dim() < x.dim():
            index = index[..., None]
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, ...) with padding anywhere to (b, l, ...) with real tokens first."""
        return self._take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The way back; padded positions become zero."""
        out = self._take(x, self.rank)
        valid = self.valid.to(x.device)
        while valid.dim() < out.dim():
            valid = valid[..., None]
        return torch.where(valid, out, torch.zeros((), dtype=out.dtype, device=out.device))


def documents(
    *,
    rows: int,
    length: int,
    device: torch.device,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    compaction: Compaction | None,
) -> tuple[Tensor, Tensor] | None:
    """Positions and document numbers of packed rows, as transformers' padding-free collators describe them.

    Args:
        rows, length, device: of the input.
        position_ids: (b or 1, l), starting again at each document.
        seq_idx: (b or 1, l) document numbers.
        cu_seq_lens: (documents + 1,) document boundaries of a single row.
        compaction: how padding was moved away, or `None`.

    Returns:
        positions (b or 1, l) and document numbers (b or 1, l) int32 of the compacted rows, or `None` when no argument
        was given. A row with one document is the special case of a packed row.
    """
    if position_ids is None and seq_idx is None and cu_seq_lens is None:
        return None
    where = torch.arange(length, device=device)

    def per_token(name: str, value: Tensor) -> Tensor:
        if value.dim() == 1:
            value = value[None]
        if value.dim() != 2 or value.shape[0] not in (1, rows) or value.shape[1] != length:
            raise InputError(f"{name} has shape {tuple(value.shape)}; expected ({rows}, {length}) or (1, {length})")
        value = value.to(device=device, dtype=torch.long)
        return value if compaction is None else compaction.pack(value.expand(rows, -1))

    changes = torch.zeros(1, length - 1, dtype=torch.bool, device=device)
    if cu_seq_lens is not None:
        if rows != 1:
            raise InputError(f"cu_seq_lens_q describes one packed row, the input has {rows} rows")
        if cu_seq_lens.dim() != 1:
            raise InputError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens.shape)}; expected (documents + 1,)")
        if readable(cu_seq_lens):
            bounds = cu_seq_lens.tolist()
            if not bounds or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
                raise InputError(f"cu_seq_lens_q={bounds}: boundaries must rise from 0 to the row's {length} tokens")
        passed = where[:, None] >= cu_seq_lens.to(device=device, dtype=torch.long)
        index = per_token("cu_seq_lens_q", passed.sum(dim=1))
        changes = changes | (index[:, 1:] != index[:, :-1])
    if seq_idx is not None:
        index = per_token("seq_idx", seq_idx)
        changes = changes | (index[:, 1:] != index[:, :-1])
    positions = None
    if position_ids is not None:
        positions = per_token("position_ids", position_ids)
        if readable(positions):
            real = positions if compaction is None else positions[where < compaction.lengths[:, None]]
            if real.numel() and int(real.min()) < 0:
                raise InputError(f"position_ids holds {int(real.min())}; allowed: text positions from 0")
        step = positions[:, 1:] - positions[:, :-1]
        jumps = step != 1
        if compaction is not None:
            # Positions that count columns step over masked ones without starting a document.
            jumps = jumps & (step != compaction.order[:, 1:] - compaction.order[:, :-1])
        changes = changes | jumps
    if compaction is not None:
        # Whatever stands behind the real tokens is of no document of theirs.
        changes = changes | (where[1:] == compaction.lengths[:, None])
    starts = torch.cat([changes.new_ones(changes.shape[0], 1), changes], dim=1)
    numbers = starts.cumsum(dim=1, dtype=torch.int32)
    if positions is None:
        first = torch.where(starts, where, 0).cummax(dim=1).values
        positions = where - first
    return positions, numbers
