"""Numbers that describe one attention map; a map of SSM channels counts as one too.

A map is (..., l, m + l): a row for each of l text tokens, summing to 1, with the m meta tokens' columns first, so that
text token i stands in row i and column m + i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHARES = ("meta", "bos", "self", "cross")


def entropy(maps: Tensor) -> Tensor:
    """Entropy of each row in nats, (..., l): 0 for one token, log n for n tokens alike."""
    return torch.special.entr(maps).sum(-1)


def visible_entropy(length: int, meta: int, window: int | None, like: Tensor) -> Tensor:
    """Entropy that each row would have if all that it can see had the same weight, (l,).

    Args:
        length, meta: text and meta tokens. window: past positions visible; `None` for all. like: dtype and device.
    """
    past = torch.arange(length, device=like.device)
    past = past if window is None else past.clamp(max=window)
    return (past + 1 + meta).to(like.dtype).log()


def shares(maps: Tensor, meta: int) -> dict[str, Tensor]:
    """The mean row's weight on meta tokens, the first text token, the row's own token, and the rest, (...) each.

    This is the split of the paper's figure 7: sums of the map's parts over the length of the text. The first token's
    weight on itself counts as `bos`, as its column does. The four add up to 1.
    """
    length = maps.shape[-2]
    text = maps[..., meta:]
    whole = maps.sum((-1, -2))
    to_meta = maps[..., :meta].sum((-1, -2))
    bos = text[..., 0].sum(-1)
    own = text.diagonal(dim1=-2, dim2=-1)[..., 1:].sum(-1)
    parts = (to_meta, bos, own, whole - to_meta - bos - own)
    return {name: part / length for name, part in zip(SHARES, parts, strict=True)}


def mean_distance(last_row: Tensor, meta: int) -> tuple[Tensor, Tensor]:
    """How far back the last token looks: `sum_s M(S, s) (S - s)`.

    Args:
        last_row: (..., m + l), the map's row of the last token. meta: m.

    Returns:
        (...) over all columns, and (...) over the text's columns alone, whose weights are left as they are.
    """
    last = last_row.shape[-1] - 1
    distance = last - torch.arange(last + 1, device=last_row.device, dtype=last_row.dtype)
    weighted = last_row * distance
    return weighted.sum(-1), weighted[..., meta:].sum(-1)


def effective_receptive_field(distances: Sequence[float]) -> float:
    """The ERF of the paper's equation 5 from each layer's mean distance over its heads, first layer first.

    `sum_n 2 d_n (N - n + 1) / (N (N + 1))`, n from 1 to N: a mean in which early layers, whose tokens later layers
    see through, count more.
    """
    layers = len(distances)
    if not layers:
        raise ValueError("distances is empty; expected one for each layer")
    return sum(2 * d * (layers - n) for n, d in enumerate(distances)) / (layers * (layers + 1))
