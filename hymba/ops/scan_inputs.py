"""The arguments of the selective scan as one value, for the implementations behind the op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """In the order of ``selective_scan``: (b, l, d) x, dt, z; (d, n) A; (b, l, n) B, C; (d,) D, dt_bias."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    lengths: Tensor | None = None
    seq_idx: Tensor | None = None
