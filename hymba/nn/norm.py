"""RMS norm (section 2.2 of the specification)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba.nn.init import initialise
from hymba.ops.norm import rms_norm, rms_norm_ref


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
        if self.weight.dim() == 1:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_ref(x, self.weight[0, :, 0], self.eps)
