"""Who sees whom: one predicate over positions, from which every mask comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    query: Tensor,
    key: Tensor,
    window: int | None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
) -> Tensor:
    """Whether a query may see a key (section 2.5 of the specification: `q - k <= window`, causal).

    Args:
        query: (b, l) integer positions of the queries.
        key: (b, s) integer positions of the keys; negative marks an empty slot.
        window: past positions visible besides the query's own; `None` for all.
        query_document, key_document: (b, l) and (b, s) document numbers of a packed row.

    Returns:
        (b, l, s) bool, True where the key is seen. Batch sizes of 1 broadcast.
    """
    q, k = query[:, :, None], key[:, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen = seen & (q - k <= window)
    if query_document is not None and key_document is not None:
        seen = seen & (query_document[:, :, None] == key_document[:, None, :])
    return seen


@dataclass
class Visibility:
    """The keys of one attention call: `prefix` keys that everybody sees, then keys with positions.

    Attributes:
        query: (b or 1, l) positions of the queries.
        key: (b or 1, s) positions of the keys behind the prefix, negative for empty slots.
        window: past positions visible; `None` for all.
        prefix: number of keys in front that every query sees (meta tokens).
        own_keys: index among the s keys where the queries' own keys start, in order, or `None` when the keys are the
            slots of a cache. Lets a backend skip blocks without reading positions.
        query_document, key_document: document numbers of a packed row, or `None`.
        start: (b or 1,) text tokens of each row before the first query, which says that all stand in order: query i
            and its own key at position `start + i`; in packed rows documents and the positions inside them rise; and
            slot j holds the last position p with `p % slots == j`. `None` when only the positions say who sees whom.
    """

    query: Tensor
    key: Tensor
    window: int | None
    prefix: int = 0
    own_keys: int | None = None
    query_document: Tensor | None = None
    key_document: Tensor | None = None
    start: Tensor | None = None
    _dense: Tensor | None = field(default=None, repr=False)
    _bounds: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def dense(self) -> Tensor:
        """(b or 1, l, prefix + s) bool. Computed once; layers of one kind share it."""
        if self._dense is None:
            seen = visible(self.query, self.key, self.window, self.query_document, self.key_document)
            self._dense = F.pad(seen, (self.prefix, 0), value=True) if self.prefix else seen
        return self._dense

    def block(self, first: int, last: int, cut: slice) -> Tensor:
        """(b or 1, last - first, prefix + len(cut)) bool for some queries and some of the keys."""
        seen = visible(
            self.query[:, first:last],
            self.key[:, cut],
            self.window,
            None if self.query_document is None else self.query_document[:, first:last],
            None if self.key_document is None else self.key_document[:, cut],
        )
        return F.pad(seen, (self.prefix, 0), value=True) if self.prefix else seen

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of packed rows in order, (b or 1, l) int32 each: the first key that a query sees, and the query behind the
        last one that sees a key. Computed once; both rise along a row."""
        if self._bounds is None:
            assert self.query_document is not None
            document, position = torch.broadcast_tensors(self.query_document.long() << 32, self.query)
            reach = position * 0 if self.window is None else (position - self.window).clamp(min=0)
            here = torch.arange(position.shape[1], device=position.device).expand(position.shape).contiguous()
            first = torch.searchsorted((document + position).contiguous(), (document + reach).contiguous())
            # Padding behind a row may have any positions: it sees itself at least.
            first = torch.minimum(first, here).cummax(dim=1).values
            behind = torch.searchsorted(first, here, right=True)
            self._bounds = first.int(), behind.int()
        return self._bounds

    def to(self, device: torch.device | str, *_: object, **__: object) -> Visibility:
        """The same visibility with its tensors on `device`."""
        if self.query.device == torch.device(device):
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Visibility(
            query=self.query.to(device),
            key=self.key.to(device),
            window=self.window,
            prefix=self.prefix,
            own_keys=self.own_keys,
            query_document=move(self.query_document),
            key_document=move(self.key_document),
            start=move(self.start),
        )
