"""What a mixer carries from one call to the next, and where the tokens of a call stand.

A mixer maps (tokens, state) to (outputs, state). The state of one layer is: keys and values seen so far, the last
inputs of the convolution, and the SSM state. `Span` says for the tokens of one call how many came before them, which
of them are real and which document they belong to.

Masked rows are compacted before they reach a mixer: the real tokens of each row stand first, padding follows.
A key at text position p is written to slot `p % slots` of its row, so a windowed layer is a ring buffer whose slots
carry positions, and masks never ask where padding was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hymba.ops.masks import Visibility

_GROWTH = 64
"""Slots by which a growing buffer is extended at least."""


@dataclass
class Span:
    """Where the tokens of one call stand.

    Attributes:
        length: tokens per row in this call, padding included.
        columns: tokens per row in earlier calls, padding included: an upper bound of `start` known to the host.
        start: (b or 1,) real text tokens of each row before this call.
        lengths: (b,) real tokens of each row in this call, or `None` when all are real.
        positions: (b or 1, length) text position of each token; text starts at 0 behind the meta tokens.
        seq_idx: (b or 1, length) document numbers of packed rows, or `None`.
        offset: meta tokens before the text; rotary positions are `positions + offset`.
        in_prefix: the tokens are the meta tokens themselves, which every later token sees.
        last: no call follows this one, so that nothing needs to keep its keys and values.
        uniform: no row has had padding so far, so that `start == columns` for all.
    """

    length: int
    columns: int
    start: Tensor
    positions: Tensor
    lengths: Tensor | None = None
    seq_idx: Tensor | None = None
    offset: int = 0
    in_prefix: bool = False
    last: bool = False
    uniform: bool = True
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def following(
        cls,
        length: int,
        *,
        start: Tensor | None = None,
        columns: int = 0,
        lengths: Tensor | None = None,
        offset: int = 0,
        uniform: bool = True,
        in_prefix: bool = False,
        last: bool = False,
        device: torch.device | str | None = None,
    ) -> Span:
        """The span of `length` tokens that follow `start` earlier ones (`columns` for the host)."""
        if start is None:
            start = torch.full((1,), columns, dtype=torch.long, device=device)
        positions = start[:, None] + torch.arange(length, device=start.device)
        return cls(
            length=length,
            columns=columns,
            start=start,
            positions=positions,
            lengths=lengths,
            offset=offset,
            uniform=uniform and lengths is None,
            in_prefix=in_prefix,
            last=last,
        )

    @property
    def end(self) -> Tensor:
        """(b or 1,) real text tokens of each row after this call."""
        return self.start + (self.length if self.lengths is None else self.lengths)

    @property
    def valid(self) -> Tensor | None:
        """(b,) bool for a single-token call: whether the row's token is real; `None` when all are."""
        return None if self.lengths is None else self.lengths > 0

    def visibility(
        self,
        window: int | None,
        *,
        prefix: int,
        slots: int = 0,
        written: bool = False,
        shown: int | None = None,
    ) -> Visibility:
        """Who sees whom in this call.

        Args:
            window: past positions visible; `None` for all.
            prefix: meta keys in front.
            slots: size of the row's key buffer; 0 when only this call's keys take part.
            written: the buffer already holds this call's keys; otherwise they stand behind the slots.
            shown: leading slots that take part; all by default.
        """
        window = None if self.in_prefix else window
        key = ("visibility", window, prefix, slots, written, shown)
        if key not in self._memo:
            own: int | None = 0
            keys = self.positions
            if slots:
                held = slot_positions(self.end if written else self.start, slots)[:, :shown]
                if written:
                    keys, own = held, None
                else:
                    rows = max(held.shape[0], keys.shape[0])
                    keys = torch.cat([held.expand(rows, -1), keys.expand(rows, -1)], dim=1)
                    own = held.shape[1]
            self._memo[key] = Visibility(
                query=self.positions,
                key=keys,
                window=window,
                prefix=prefix,
                own_keys=own,
                query_document=self.seq_idx,
                key_document=self.seq_idx,
                start=self.start,
            )
        return self._memo[key]

    def memo(self, key: Any, compute: Any) -> Any:
        """A value that depends on the span alone, computed once per call of the model."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def to(self, device: torch.device | str, *_: object, **__: object) -> Span:
        """The same span with its tensors on `device`."""
        device = torch.device(device)
        if self.start.device == device:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        # One copy per device, so that the layers there share masks.
        return self.memo(
            ("device", device),
            lambda: replace(
                self,
                start=self.start.to(device),
                positions=self.positions.to(device),
                lengths=move(self.lengths),
                seq_idx=move(self.seq_idx),
                _memo={},
            ),
        )


def slot_positions(seen: Tensor, slots: int) -> Tensor:
    """Which text position each slot of a row holds once `seen` tokens have been written.

    Args:
        seen: (b,) tokens written to each row.
        slots: buffer size; position p stands in slot `p % slots`.

    Returns:
        (b, slots) positions; negative where nothing was written.
    """
    last = seen[:, None] - 1
    return last - torch.remainder(last - torch.arange(slots, device=seen.device), slots)


@dataclass
class KVState:
    """Keys and values of one layer, by row and text position.

    Attributes:
        window: past positions that may still be needed; `None` for all.
        keys, values: (b, slots, heads, width) buffers, or `None` before the first write.
        capacity: fixed number of text tokens (then `slots` never changes), or `None` to grow.
        in_place: writes may change the buffers; otherwise each write makes new ones.
    """

    window: int | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    capacity: int | None = None
    in_place: bool = False

    @property
    def slots(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def slots_for(self, columns: int) -> int:
        """Slots that `columns` tokens need. A fixed ring has one more than the window, for the token being written."""
        if self.capacity is not None:
            return self.capacity if self.window is None else min(self.capacity, self.window + 1)
        if columns <= self.slots:
            return self.slots
        # The first call takes what it needs; a buffer that grows takes a quarter more, so that few calls copy it.
        grown = max(columns, self.slots + max(_GROWTH, self.slots // 4)) if self.slots else columns
        return grown if self.window is None else min(grown, self.window)

    def allocate(self, rows: int, columns: int, k: Tensor, v: Tensor) -> None:
        """Make room for `columns` tokens; what is held keeps its slots (before a ring is full, slot = position)."""
        slots = self.slots_for(columns)
        if self.keys is not None and self.values is not None:
            if self.keys.shape[0] != rows:
                raise ValueError(
                    f"the state holds {self.keys.shape[0]} rows, the input has {rows}; use expand() or select() first"
                )
            if slots == self.slots:
                return
        held = self.slots
        # A tensor made in inference mode could not be written outside of it, where a conversation may go on.
        with torch.inference_mode(False):
            keys = k.new_zeros(rows, slots, *k.shape[2:])
            values = v.new_zeros(rows, slots, *v.shape[2:])
        if held and self.keys is not None and self.values is not None:
            keys[:, :held], values[:, :held] = self.keys, self.values
        self.keys, self.values = keys, values

    def extend(self, k: Tensor, v: Tensor, span: Span, *, prefix: int) -> tuple[Tensor, Tensor, Visibility]:
        """Add this call's keys and values; returns what its queries attend to.

        Args:
            k: (b, l, heads, d), rotated. v: (b, l, heads, e).
            span: where the tokens stand. prefix: meta keys in front of them.

        Returns:
            keys (b, s, heads, d), values (b, s, heads, e) and their visibility.
        """
        rows, length = k.shape[:2]
        total = span.columns + length
        if self.capacity is not None and total > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} text tokens and would need {total}; "
                "make it with a larger max_length"
            )
        if not self.in_place and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        if not span.columns:
            if span.last:
                pass
            elif self.in_place or not span.uniform or self.slots_for(total) != length:
                self.allocate(rows, total, k, v)
                self._write(k, v, span)
            else:
                self.keys, self.values = k, v
            return k, v, span.visibility(self.window, prefix=prefix)
        self.allocate(rows, total, k, v)
        assert self.keys is not None and self.values is not None
        if self.window is None or self.slots >= self.window + length:
            self._write(k, v, span)
            shown = min(total, self.slots) if self.capacity is None else self.slots
            seen = span.visibility(self.window, prefix=prefix, slots=self.slots, written=True, shown=shown)
            return self.keys[:, :shown], self.values[:, :shown], seen
        keys = torch.cat([self.keys, k.to(self.keys.dtype)], dim=1)
        values = torch.cat([self.values, v.to(self.values.dtype)], dim=1)
        seen = span.visibility(self.window, prefix=prefix, slots=self.slots)
        self._write(k, v, span)
        return keys, values, seen

    def _write(self, k: Tensor, v: Tensor, span: Span) -> None:
        assert self.keys is not None and self.values is not None
        if span.uniform and (self.capacity is None or not span.columns):
            self._write_columns(self.keys, k, span.columns)
            self._write_columns(self.values, v, span.columns)
        elif k.shape[1] == 1:
            slot = span.memo(("slot", self.slots), lambda: torch.remainder(span.start, self.slots))
            row = torch.arange(k.shape[0], device=k.device)
            slot = slot.expand(k.shape[0])
            for buffer, new in ((self.keys, k), (self.values, v)):
                token = new[:, 0].to(buffer.dtype)
                if span.valid is not None:
                    token = torch.where(span.valid[:, None, None], token, buffer[row, slot])
                buffer[row, slot] = token
        else:
            source, fresh = span.memo(("source", self.slots), lambda: self._sources(span))
            rows = k.shape[0]
            for buffer, new in ((self.keys, k), (self.values, v)):
                index = source.expand(rows, -1)[:, :, None, None].expand(-1, -1, *buffer.shape[2:])
                taken = new.to(buffer.dtype).gather(1, index)
                buffer.copy_(torch.where(fresh[:, :, None, None], taken, buffer))

    def _sources(self, span: Span) -> tuple[Tensor, Tensor]:
        """For each slot: which token of this call it takes, and whether it takes one at all."""
        positions = slot_positions(span.end, self.slots)
        source = positions - span.start[:, None]
        return source.clamp(0, span.length - 1), (source >= 0) & (positions >= 0)

    def _write_columns(self, buffer: Tensor, new: Tensor, first: int) -> None:
        """Write rows without padding: positions are known to the host, so a write is one or two slices."""
        slots = buffer.shape[1]
        last = first + new.shape[1]
        first = max(first, last - slots)
        new = new[:, new.shape[1] - (last - first) :].to(buffer.dtype)
        at = first % slots
        head = min(slots - at, last - first)
        buffer[:, at : at + head] = new[:, :head]
        if head < last - first:
            buffer[:, : last - first - head] = new[:, head:]


@dataclass
class LayerState:
    """The state of one layer; fields of branches that the layer lacks stay `None`.

    Attributes:
        kv: keys and values of the text, `None` for a layer that borrows them.
        prefix_k, prefix_v: (b or 1, m, heads, width) keys and values of the meta tokens.
        conv: (b or 1, k - 1, d_inner) last inputs of the convolution.
        ssm: (b or 1, d_inner, n) SSM state, float32.
        seen: (b or 1,) text tokens of each row so far. columns: the same, padding included, known to the host.
        uniform: no row has had padding so far.
        in_place: tensors keep their addresses and are overwritten (the states of a cache).
    """

    kv: KVState | None = None
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None
    conv: Tensor | None = None
    ssm: Tensor | None = None
    seen: Tensor | None = None
    columns: int = 0
    uniform: bool = True
    in_place: bool = False

    @property
    def prefix(self) -> int:
        """Number of meta tokens in front of the text."""
        return 0 if self.prefix_k is None else self.prefix_k.shape[1]

    def fork(self) -> LayerState:
        """A state that shares tensors with this one; a mixer fills in the fork and leaves the caller's alone."""
        return replace(self, kv=None if self.kv is None else replace(self.kv))

    def store_mamba(self, *, conv: Tensor | None = None, ssm: Tensor | None = None) -> None:
        """Take a branch's new state: into the same memory for a cache, by reference otherwise."""
        for name, new in (("conv", conv), ("ssm", ssm)):
            if new is None:
                continue
            old = getattr(self, name)
            if self.in_place and old is not None and old.shape == new.shape and old.device == new.device:
                old.copy_(new)
            else:
                setattr(self, name, new.to(old.dtype) if old is not None and not self.in_place else new)

    def as_prefix(self) -> LayerState:
        """The state after the meta tokens as the state before the text: their keys become a prefix that all see.

        Copied out of the layer's projection where they are a view of it, which a cache would otherwise keep whole.
        """
        kv = self.kv
        return LayerState(
            prefix_k=None if kv is None or kv.keys is None else kv.keys.contiguous(),
            prefix_v=None if kv is None or kv.values is None else kv.values.contiguous(),
            conv=self.conv,
            ssm=self.ssm,
        )

    def to(self, device: torch.device | str, *_: object, **__: object) -> LayerState:
        """The same state with its tensors on `device`."""
        device = torch.device(device)
        tensors = [self.prefix_k, self.prefix_v, self.conv, self.ssm, self.seen]
        if self.kv is not None:
            tensors += [self.kv.keys, self.kv.values]
        if all(t is None or t.device == device for t in tensors):
            return self
        return map_tensors(self, lambda _, t: t.to(device))


def map_tensors(state: LayerState, function: Any) -> LayerState:
    """A copy of the state with `function(name, tensor)` applied to each tensor that it holds."""

    def apply(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(name, tensor)

    kv = state.kv
    if kv is not None:
        kv = replace(kv, keys=apply("keys", kv.keys), values=apply("values", kv.values))
    return replace(
        state,
        kv=kv,
        prefix_k=apply("prefix_k", state.prefix_k),
        prefix_v=apply("prefix_v", state.prefix_v),
        conv=apply("conv", state.conv),
        ssm=apply("ssm", state.ssm),
        seen=apply("seen", state.seen),
    )
