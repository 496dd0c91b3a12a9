"""Attention maps that need no model."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(length: int, meta: int, window: int | None = None) -> Tensor:
    """(length, meta + length) equal weights on all that is visible."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen &= torch.ones(length, length, dtype=torch.bool).triu(-window)
    seen = torch.cat([torch.ones(length, meta, dtype=torch.bool), seen], 1).double()
    return seen / seen.sum(1, keepdim=True)
