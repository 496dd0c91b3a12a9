"""Argument checks and small helpers shared by the sequence ops."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, value: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raise ValueError unless value has one of the allowed shapes."""
    if tuple(value.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {' or '.join(map(str, allowed))}")


def check_lengths(lengths: Tensor | None, b: int) -> None:
    """lengths: (b,) integers. Values are not read: that would stall a GPU."""
    if lengths is None:
        return
    check_shape("lengths", lengths, (b,))
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths has dtype {lengths.dtype}; expected an integer dtype")


def check_seq_idx(seq_idx: Tensor | None, b: int, l: int) -> None:
    """seq_idx: (b, l) integers."""
    if seq_idx is None:
        return
    check_shape("seq_idx", seq_idx, (b, l))
    if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx has dtype {seq_idx.dtype}; expected an integer dtype")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the recurrences run in: float32, or float64 so that gradients can be checked numerically."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """Autocast would turn the float32 products inside an op into the autocast dtype."""
    # Meta tensors have no autocast of their own to turn off.
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def document_starts(seq_idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(b, l) bool, True where a later document starts; never at step 0 and never in the padding."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if lengths is not None:
        starts &= torch.arange(seq_idx.shape[1], device=seq_idx.device) < lengths[:, None]
    return starts
