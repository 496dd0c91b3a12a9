"""What the figures of an architecture show, taken from what the model itself runs on.

Masks come from the predicate of `hymba.ops.masks`, the map of keys and values from the layers of the configuration, its
bytes from `hymba.cost`. `hymba.analysis.drawings` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hymba import cost
from hymba.config import HymbaConfig
from hymba.ops.masks import Visibility

HIDDEN, TEXT, META = 0, 1, 2
"""Cells of a mask: a key that the query does not see, a text token that it sees, a meta token that it sees."""

_MOST = 240
"""Cells along one side of a mask, from which on every n-th position is shown."""


@dataclass(frozen=True)
class Mask:
    """Who sees whom on one kind of layer.

    Attributes:
        layers: the layers of this kind.
        window: past positions that a text token sees; `None` for all.
        cells: (queries, meta + keys) int8 of `HIDDEN`, `TEXT` and `META`; rows are text tokens.
        meta: meta tokens in front of the text.
        stride: every how many positions rows and columns stand.
    """

    layers: tuple[int, ...]
    window: int | None
    cells: Tensor
    meta: int
    stride: int

    @property
    def meta_columns(self) -> int:
        """Columns of `cells` that stand for the meta tokens."""
        return -(-self.meta // self.stride)


def mask_cells(
    window: int | None, *, tokens: int, meta: int = 0, documents: Sequence[int] | None = None, stride: int = 1
) -> Tensor:
    """The mask of a layer as the attention gets it (section 2.2 and 2.3 of the paper).

    Args:
        window: past positions visible besides the token itself; `None` for all.
        tokens: text tokens. meta: meta tokens in front of them.
        documents: lengths of the documents that are packed into the row; they add up to `tokens`.
        stride: take every so many positions.

    Returns:
        (tokens / stride, meta / stride + tokens / stride) int8 of `HIDDEN`, `TEXT` and `META`, rounded up.

    Raises:
        ValueError: documents that do not add up.
    """
    position = torch.arange(tokens)
    number = None
    if documents is not None:
        if sum(documents) != tokens or min(documents) < 1:
            raise ValueError(f"documents={list(documents)}: allowed: lengths from 1 that add up to tokens={tokens}")
        position = torch.cat([torch.arange(length) for length in documents])
        number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None, ::stride]
    shown = position[None, ::stride]
    columns = -(-meta // stride)
    seen = Visibility(shown, shown, window, columns, query_document=number, key_document=number).dense()[0]
    cells = torch.where(seen, TEXT, HIDDEN).to(torch.int8)
    cells[:, :columns][seen[:, :columns]] = META
    return cells


def masks(config: HymbaConfig, *, tokens: int | None = None) -> list[Mask]:
    """The masks of a configuration, one for each window that its layers have, global layers first.

    Args:
        config: the architecture. tokens: text tokens; by default the widest window three times, and 24 at least.
    """
    kinds: dict[int | None, list[int]] = {}
    for i, spec in enumerate(config.layers):
        if spec.attends:
            kinds.setdefault(spec.window, []).append(i)
    windows = [window for window in kinds if window is not None]
    tokens = max(24, 3 * max(windows, default=8)) if tokens is None else tokens
    meta = config.num_memory_tokens
    stride = -(-(meta + tokens) // _MOST)
    made = [
        Mask(tuple(layers), window, mask_cells(window, tokens=tokens, meta=meta, stride=stride), meta, stride)
        for window, layers in kinds.items()
    ]
    return sorted(made, key=lambda mask: (mask.window is not None, mask.window or 0))


@dataclass(frozen=True)
class LayerMemory:
    """One layer of the map of keys and values.

    Attributes:
        index, mixer, window, kv_from: of its `LayerSpec`.
        text_bytes, meta_bytes, state_bytes: what a cache holds for the layer: keys and values of the text, those of the
            meta tokens (once for a batch), and the convolution inputs with the SSM state.
    """

    index: int
    mixer: str
    window: int | None
    kv_from: int | None
    text_bytes: int
    meta_bytes: int
    state_bytes: int


def layer_memory(config: HymbaConfig, length: int, *, dtype: Any = "bfloat16") -> list[LayerMemory]:
    """The layers of a configuration with what each puts into the cache of one row; they add up to `cost.cache_bytes`.

    Args:
        config: the architecture. length: text tokens. dtype: of keys, values and convolution inputs.

    Raises:
        ValueError: a dtype that a cache cannot have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in cost.DTYPE_BYTES:
        raise ValueError(f"dtype={dtype!r}: allowed: {', '.join(cost.DTYPE_BYTES)}")
    width = cost.DTYPE_BYTES[name]
    found = []
    for i, spec in enumerate(config.layers):
        position = cost.kv_width(config, spec) * width if spec.attends and spec.kv_from is None else 0
        state = 0
        if spec.scans:
            inputs = cost.ssm_widths(config, spec)[0] * (config.mamba_d_conv - 1) * width
            state = inputs + config.d_inner * config.mamba_d_state * cost.STATE_BYTES
        found.append(
            LayerMemory(
                index=i,
                mixer=spec.mixer,
                window=spec.window,
                kv_from=spec.kv_from,
                text_bytes=position * (length if spec.window is None else min(length, spec.window)),
                meta_bytes=position * config.num_memory_tokens,
                state_bytes=state,
            )
        )
    return found
