"""The arguments of the Mamba-2 scan as one value, for the implementations behind the op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SsdInputs(NamedTuple):
    """In the order of ``ssd_scan``: (b, l, h, p) x; (b, l, h) dt; (h,) A; (b, l, g, n) B, C; (h,) D, dt_bias."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    lengths: Tensor | None = None
    seq_idx: Tensor | None = None
