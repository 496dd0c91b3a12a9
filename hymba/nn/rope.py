"""Rotary position embedding, half-split form, on the full head width (section 2.6 of the specification)."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.ops.rope import apply_rope

__all__ = ["apply_rope", "rope_tables"]


def rope_tables(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions * base^(-2i / head_dim)`.

    Args:
        positions: (b, l) integers, counted from the first meta token.
        head_dim: width of a head, even.
        base: base of the frequencies.

    Returns:
        cos, sin: (b, l, head_dim / 2) float32. Computed on the fly: nothing to load, move or go stale.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * base**-exponents
    return angles.cos(), angles.sin()
