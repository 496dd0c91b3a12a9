"""RMS norm (section 2.2 of the specification)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.nn.init import initialise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: float32 inside, cast back, then the weight.

    Returns `x.dtype`, also when a file holds the weight in a wider one.
    """
    # PyTorch computes it in float32 for narrower inputs; its own weight would be applied before the cast.
    return (F.rms_norm(x, (x.shape[-1],), None, eps) * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a learned weight.

    Args:
        size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size); returns the same shape."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class HeadNorm(nn.Module):
    """RMS norm of query or key heads before the rotation.

    Args:
        kind: `"rms"` has one weight of `head_dim` for all heads; `"perhead-rms"` has a weight (1, heads, 1, head_dim).
        num_heads, head_dim: shape of the heads.
        eps: added to the mean square.
    """

    def __init__(self, kind: str, *, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        if kind not in ("rms", "perhead-rms"):
            raise ValueError(f"kind={kind!r}: allowed: 'rms', 'perhead-rms'")
        self.eps = eps
        shape = (head_dim,) if kind == "rms" else (1, num_heads, 1, head_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, l, heads, head_dim); returns the same shape."""
        weight = self.weight if self.weight.dim() == 1 else self.weight[0, :, 0]
        return rms_norm(x, weight, self.eps)
