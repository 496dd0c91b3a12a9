"""Selective scan with more states than a thread's registers hold: slices of them, one after another.

States do not touch each other, and y and its gate are linear in what each gives, so every slice is a whole scan; D
comes in with the first. Backward's first kernel holds four numbers to a state; with 64 they no longer fit
(`tests/ops/compile_kernels.py 90 --quick --states 64`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..scan_inputs import ScanInputs
from . import scan, scan_backward

MOST_STATES = 32


def forward(i: ScanInputs, chunk: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ``scan.forward``."""
    if i.A.shape[1] <= MOST_STATES:
        return scan.forward(i, chunk, save)
    ys, finals, states = zip(*(scan.forward(part, chunk, save) for _, part in _slices(i)))
    return _sum(ys), torch.cat(finals, 2), torch.cat(states, 2)


def backward(dy: Tensor | None, dfinal: Tensor | None, i: ScanInputs, states: Tensor, chunk: int) -> list[Tensor]:
    """As ``scan_backward.backward``."""
    if i.A.shape[1] <= MOST_STATES:
        return scan_backward.backward(dy, dfinal, i, states, chunk)
    parts = []
    for n, part in _slices(i):
        end = None if dfinal is None else dfinal[..., n]
        parts.append(scan_backward.backward(dy, end, part, states[:, :, n].contiguous(), chunk))
    dx, ddt, dA, dB, dC, dD, dz, dbias, d_initial = zip(*parts)
    initial = d_initial[0] if i.initial_state is None else torch.cat(d_initial, 2)
    return [
        _sum(dx), _sum(ddt), torch.cat(dA, 1), torch.cat(dB, 2), torch.cat(dC, 2), dD[0], _sum(dz), _sum(dbias), initial
    ]  # fmt: skip


def _slices(i: ScanInputs) -> Iterator[tuple[slice, ScanInputs]]:
    states = i.A.shape[1]
    size = math.ceil(states / math.ceil(states / MOST_STATES))
    for first in range(0, states, size):
        n = slice(first, first + size)
        start = None if i.initial_state is None else i.initial_state[..., n]
        part = i._replace(A=i.A[:, n], B=i.B[..., n], C=i.C[..., n], initial_state=start)
        yield n, part if first == 0 else part._replace(D=None)


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    """Of one dtype; added in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)
