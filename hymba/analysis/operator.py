"""The selective scan as an attention-like matrix: the data-controlled operator of the paper's section 2.1.

Per channel, with `dt` after softplus and the state starting from zero,

    y_i = sum_j alpha[i, j] x_j,    alpha[i, j] = sum_n C_i[n] exp(A[n] (dt_(j+1) + ... + dt_i)) B_j[n] dt_j,    j <= i

which is the scan without its skip (`D x`) and its gate. Letters: s steps, d channels, n states per channel. In Mamba-2
the decay is one number per head, h of them, and B and C are shared by the heads of a group, so a head's channels have
one matrix:

    alpha[i, j] = (C_i B_j) exp(A (dt_(j+1) + ... + dt_i)) dt_j
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 23
"""Entries of alpha that are computed at once."""
_ROWS = 32
"""Rows whose decay among themselves is computed entry by entry."""


class Operator(ABC):
    """What both scans' operators share, given `dt` (s, channels) and `rows`."""

    dt: Tensor

    @property
    def steps(self) -> int:
        return self.dt.shape[0]

    @property
    def channels(self) -> int:
        """Channels, or heads, each of which has a matrix of its own."""
        return self.dt.shape[1]

    def channels_at_once(self, rows: int) -> int:
        """Channels whose `rows` rows fit into one block."""
        return max(1, _BLOCK // (rows * self.steps))

    @abstractmethod
    def rows(self, first: int, *, channels: slice = slice(None)) -> Tensor:
        """alpha of the outputs from `first` on, signed.

        Args:
            first: index of the first output row; the last ones are `steps - 1` and 0 above the diagonal.
            channels: which of the channels.

        Returns:
            (channels, s - first, s) in the operator's dtype.
        """

    def maps(self, first: int, *, channels: slice = slice(None)) -> Tensor:
        """|alpha| with rows that sum to 1, read as attention weights. Arguments and shape are those of `rows`."""
        alpha = self.rows(first, channels=channels).abs_()
        return alpha.div_(alpha.sum(-1, keepdim=True).clamp_min(torch.finfo(alpha.dtype).tiny))


@dataclass(frozen=True)
class HeadScanOperator(Operator):
    """Mamba-2's over one text, meta tokens first; its `channels` are heads.

    Attributes:
        dt: (s, h) step sizes after softplus. A: (h,), negative. B, C: (s, g, n).
    """

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def rows(self, first: int, *, channels: slice = slice(None)) -> Tensor:
        dt, A = self.dt[:, channels], self.A[channels]
        group = torch.arange(self.channels, device=dt.device)[channels] // (self.channels // self.B.shape[1])
        # Differences of long sums, as in Mamba-1; above the diagonal the exponent would be positive without a bound.
        log = (dt.double() * A.double()).cumsum(0).T
        alpha = (log[:, first:, None] - log[:, None, :]).clamp_(max=0).to(dt.dtype).exp_()
        alpha *= torch.einsum("ign,jgn->gij", self.C[first:], self.B)[group]
        return alpha.tril_(first).mul_(dt.T[:, None, :])


@dataclass(frozen=True)
class ScanOperator(Operator):
    """Mamba-1's over one text, meta tokens first.

    Attributes:
        dt: (s, d) step sizes after softplus. A: (d, n), negative. B, C: (s, n).
    """

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def rows(self, first: int, *, channels: slice = slice(None)) -> Tensor:
        dt, A = self.dt[:, channels], self.A[channels]
        # Differences of long sums: their error would be multiplied by A and exponentiated.
        elapsed = dt.double().cumsum(0).T
        alpha = dt.new_zeros(dt.shape[1], self.steps - first, self.steps)
        for start in range(first, self.steps, _ROWS):
            end = min(start + _ROWS, self.steps)
            rows = alpha[:, start - first : end - first]
            rows[..., start:end] = self._among_themselves(elapsed[:, start:end], A, start, end)
            if start:
                # What came before decays up to this block and then inside it: a product over states, with no exponent
                # above zero.
                since = (elapsed[:, start:end] - elapsed[:, start - 1, None]).to(dt.dtype)
                until = (elapsed[:, start - 1, None] - elapsed[:, :start]).to(dt.dtype)
                left = (since[..., None] * A[:, None]).exp_() * self.C[start:end]
                right = (until[..., None] * A[:, None]).exp_() * self.B[:start]
                rows[..., :start] = left @ right.transpose(1, 2)
        return alpha.mul_(dt.T[:, None, :])

    def _among_themselves(self, elapsed: Tensor, A: Tensor, start: int, end: int) -> Tensor:
        """alpha without its last factor, of a block of steps and the inputs of the same steps: (c, rows, rows)."""
        between = (elapsed[:, :, None] - elapsed[:, None, :]).to(A.dtype)
        # Above the diagonal the exponent would be positive without a bound.
        decay = (between.clamp_(min=0)[..., None] * A[:, None, None]).exp_()
        return torch.einsum("in,jn,cijn->cij", self.C[start:end], self.B[start:end], decay).tril_()
