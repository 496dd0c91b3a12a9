"""The Mamba-2 heads of a mixer, without input and output projection (arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba.nn.init import initialise
from hymba.nn.mamba import CausalConv
from hymba.nn.norm import RMSNorm
from hymba.nn.state import LayerState, Span
from hymba.ops.gate import swiglu
from hymba.ops.norm import rms_norm_ref
from hymba.ops.ssd import ssd_scan, ssd_state_update


class GroupedRMSNorm(RMSNorm):
    """RMS norm over each of `groups` equal parts of the last dimension, with one learned weight per channel.

    Args:
        size: width of the last dimension. groups: parts that are normed apart.
        eps: added to the mean square.
    """

    def __init__(self, size: int, *, groups: int = 1, eps: float = 1e-6) -> None:
        if groups < 1 or size % groups:
            raise ValueError(f"groups={groups}: allowed: divisors of {size}")
        super().__init__(size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size); returns the same shape."""
        if self.groups == 1:
            return super().forward(x)
        parts = (self.groups, -1)
        return rms_norm_ref(x.unflatten(-1, parts), self.weight.unflatten(0, parts), self.eps).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class Mamba2Heads(nn.Module):
    """Causal convolution over input, B and C together, the scan of Mamba-2, the gate, and its norm.

    Takes what a mixer's input projection makes: `x | B | C | dt` of `in_width` numbers per token, and the gate. Step
    size, B and C come straight from that projection, which is what differs from `MambaHeads` besides the scan.

    Mamba-2 norms the gated output, `norm(y * silu(z))`, before the output projection. With `norm=True` that norm is
    part of the branch, as a mixer of Mamba-2 heads alone needs it. A hybrid mixer norms each branch before it averages
    them, the same thing at the same place: there the branch is made with `norm=False`, and the mixer's branch norm is
    Mamba-2's (over the whole width, which is also Mamba-2's with one group).

    Args:
        d_inner: width of SSM input, gate and output.
        head_dim: channels per head. d_state: SSM states per channel.
        n_groups: groups of heads that share B and C; the norm goes over each group's channels.
        d_conv: taps of the convolution.
        norm: whether the norm of the gated output is part of the branch.
        eps: of that norm.
    """

    def __init__(
        self,
        *,
        d_inner: int,
        head_dim: int = 64,
        d_state: int = 128,
        n_groups: int = 1,
        d_conv: int = 4,
        norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if head_dim < 1 or d_inner % head_dim:
            raise ValueError(f"head_dim={head_dim}: allowed: divisors of d_inner={d_inner}")
        self.num_heads = d_inner // head_dim
        if n_groups < 1 or self.num_heads % n_groups:
            raise ValueError(f"n_groups={n_groups}: allowed: divisors of the {self.num_heads} heads")
        self.d_inner, self.head_dim, self.d_state, self.d_conv = d_inner, head_dim, d_state, d_conv
        self.n_groups = n_groups
        self.conv1d = CausalConv(self.conv_width, d_conv)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupedRMSNorm(d_inner, groups=n_groups, eps=eps) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    @property
    def splits(self) -> tuple[int, int, int, int]:
        """Widths of x, B, C and dt in the order in which the projection makes them."""
        group = self.n_groups * self.d_state
        return self.d_inner, group, group, self.num_heads

    @property
    def in_width(self) -> int:
        """Width of `x | B | C | dt`."""
        return sum(self.splits)

    @property
    def gate_width(self) -> int:
        """Width of the gate."""
        return self.d_inner

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: all but dt."""
        return sum(self.splits[:3])

    def forward(self, x: Tensor, z: Tensor, state: LayerState | None = None, *, span: Span | None = None) -> Tensor:
        """Run the branch.

        Args:
            x: (b, l, in_width), `x | B | C | dt`. z: (b, l, d_inner) gate.
            state: where to start; filled in with where the branch ends: `conv` (b, d_conv - 1, conv_width) and `ssm`
                (b, heads, head_dim, d_state) float32. `None` starts from zeros and forgets.
            span: where the tokens stand; by default all are real and follow the state.

        Returns:
            (b, l, d_inner) in `x.dtype`.
        """
        state = LayerState() if state is None else state
        lengths = None if span is None else span.lengths
        seq_idx = None if span is None or span.seq_idx is None else span.seq_idx.expand(x.shape[0], -1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        mixed, dt = x.split([self.conv_width, self.num_heads], dim=-1)

        # One token on a state that may be overwritten: no copy of the state.
        step = state.in_place and x.shape[1] == 1 and not torch.is_grad_enabled()
        step = step and state.conv is not None and state.ssm is not None and state.ssm.shape[0] == x.shape[0]
        if step:
            assert state.ssm is not None
            valid = None if span is None else span.valid
            mixed, _ = self.conv1d(mixed, state.conv, valid=valid, in_place=True)
            u, B, C = (part[:, 0] for part in self._parts(mixed))
            y = ssd_state_update(state.ssm, u, dt[:, 0], A, B, C, self.D, self.dt_bias, valid=valid)[:, None]
        else:
            mixed, conv = self.conv1d(mixed, state.conv, lengths=lengths, seq_idx=seq_idx)
            u, B, C = self._parts(mixed)
            y, ssm = ssd_scan(
                u, dt, A, B, C, self.D, self.dt_bias, initial_state=state.ssm, lengths=lengths, seq_idx=seq_idx
            )
            state.store_mamba(conv=conv, ssm=ssm)
        y = swiglu(z, y.flatten(2))
        return y if self.norm is None else self.norm(y)

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolved (b, l, conv_width) as input (b, l, heads, head_dim), and B and C (b, l, groups, d_state)."""
        u, B, C = mixed.split(self.splits[:3], dim=-1)
        per_head, per_group = (self.num_heads, self.head_dim), (self.n_groups, self.d_state)
        return u.unflatten(-1, per_head), B.unflatten(-1, per_group), C.unflatten(-1, per_group)

    def extra_repr(self) -> str:
        return (
            f"d_inner={self.d_inner}, head_dim={self.head_dim}, d_state={self.d_state}, n_groups={self.n_groups}, "
            f"d_conv={self.d_conv}"
        )
