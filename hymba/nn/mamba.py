"""The Mamba heads of a mixer, without input and output projection (section 2.3 of the specification)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.nn.hooks import is_plain
from hymba.nn.init import initialise
from hymba.nn.norm import RMSNorm
from hymba.nn.state import LayerState, Span
from hymba.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from hymba.ops.recompute import note
from hymba.ops.selective_scan import selective_scan, selective_state_update
from hymba.ops.split_norm import MULTIPLE, split_rms_norm, takes_kernel

_MANY = 1024
"""Tokens from which a product is worth two copies of a small weight."""


class CausalConv(nn.Module):
    """The depthwise causal convolution and its SiLU.

    A module of its own, called as one, so that whatever hooks modules (offloading, quantisation) sees it used.

    Args:
        channels: width of input and output. taps: inputs that each output sees.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        valid: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x: (b, l, channels).
            state: (b or 1, taps - 1, channels) inputs before the first; `None` is zeros.
            lengths, seq_idx: of `hymba.ops.causal_conv1d`.
            in_place: x is one step, and `state` (b, ...) is overwritten. valid: (b,) bool rows that take it.

        Returns:
            output (b, l, channels), and the state after it.
        """
        weight, bias = self.weight.squeeze(1), self.bias
        if in_place:
            assert state is not None
            return causal_conv1d_update(state, x[:, 0], weight, bias, valid=valid)[:, None], state
        return causal_conv1d(x, weight, bias, initial_state=state, lengths=lengths, seq_idx=seq_idx)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, taps={self.weight.shape[2]}"


class MambaHeads(nn.Module):
    """Causal convolution, data-dependent step sizes and the selective scan of Mamba-1, gated.

    Takes the projected SSM input and gate. Its output is the SSM branch before fusion (`M_ssm X` of the paper's
    section 2.1). Step size, B and C each have a norm of their own.

    Args:
        d_inner: width of input, gate and output.
        d_state: SSM states per channel.
        d_conv: taps of the convolution.
        dt_rank: rank of the step-size projection.
        eps: of the three norms.
    """

    def __init__(self, *, d_inner: int, d_state: int = 16, d_conv: int = 4, dt_rank: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_inner, d_state, d_conv, dt_rank
        self.conv1d = CausalConv(d_inner, d_conv)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        # The bias is a parameter of its own, added inside the scan, so that adapters on dt_proj take effect.
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.dt_norm = RMSNorm(dt_rank, eps=eps)
        self.B_norm = RMSNorm(d_state, eps=eps)
        self.C_norm = RMSNorm(d_state, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    @property
    def in_width(self) -> int:
        """Width of what the input projection makes for this branch, besides the gate."""
        return self.d_inner

    def forward(self, x: Tensor, z: Tensor, state: LayerState | None = None, *, span: Span | None = None) -> Tensor:
        """Run the branch.

        Args:
            x: (b, l, d_inner) SSM input. z: (b, l, d_inner) gate.
            state: where to start; filled in with where the branch ends. `None` starts from zeros and forgets.
            span: where the tokens stand; by default all are real and follow the state.

        Returns:
            (b, l, d_inner) in `x.dtype`.
        """
        state = LayerState() if state is None else state
        lengths = None if span is None else span.lengths
        seq_idx = None if span is None or span.seq_idx is None else span.seq_idx.expand(x.shape[0], -1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

        # One token on a state that may be overwritten: no copy of the state.
        step = state.in_place and x.shape[1] == 1 and not torch.is_grad_enabled()
        step = step and state.conv is not None and state.ssm is not None and state.ssm.shape[0] == x.shape[0]
        if step:
            assert state.conv is not None and state.ssm is not None
            valid = None if span is None else span.valid
            u, _ = self.conv1d(x, state.conv, valid=valid, in_place=True)
            dt, B, C = self._scan_inputs(u)
            y = selective_state_update(
                state.ssm, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], self.dt_bias, valid=valid
            )
            return y[:, None]

        u, conv = self.conv1d(x, state.conv, lengths=lengths, seq_idx=seq_idx)
        dt, B, C = self._scan_inputs(u)
        y, ssm = selective_scan(
            u, dt, A, B, C, self.D, z, self.dt_bias, initial_state=state.ssm, lengths=lengths, seq_idx=seq_idx
        )
        state.store_mamba(conv=conv, ssm=ssm)
        return y

    def _scan_inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step size before softplus and bias (b, l, d_inner), B and C (b, l, d_state)."""
        norms = (self.dt_norm, self.B_norm, self.C_norm)
        plain = is_plain(self.x_proj, nn.Linear) and is_plain(self.dt_proj, nn.Linear)
        if plain and takes_kernel(u) and all(is_plain(norm, RMSNorm) for norm in norms):
            return self._normed_scan_inputs(u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        narrow = self.dt_norm(dt)
        dt = self.dt_proj(narrow)
        if is_plain(self.dt_proj, nn.Linear):
            # Thirty times as wide as what it is made from.
            note(dt, F.linear, narrow, self.dt_proj.weight)
        return dt, self.B_norm(B), self.C_norm(C)

    def _normed_scan_inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_scan_inputs` with one kernel for the three norms."""
        x_weight, dt_weight, width = self.x_proj.weight, self.dt_proj.weight, self.dt_rank
        if u.shape[0] * u.shape[1] >= _MANY:
            # Long products with widths that are not multiples of eight run at a third of the speed.
            x_weight = F.pad(x_weight, (0, 0, 0, -x_weight.shape[0] % MULTIPLE))
            width += -width % MULTIPLE
            dt_weight = F.pad(dt_weight, (0, width - self.dt_rank))
        parts = F.linear(u, x_weight)
        weights = self.dt_norm.weight, self.B_norm.weight, self.C_norm.weight
        narrow, B, C = split_rms_norm(parts, *weights, self.dt_norm.eps, width=width)
        dt = F.linear(narrow, dt_weight)
        return note(dt, F.linear, narrow, dt_weight), B, C

    def extra_repr(self) -> str:
        return f"d_inner={self.d_inner}, d_state={self.d_state}, d_conv={self.d_conv}, dt_rank={self.dt_rank}"
