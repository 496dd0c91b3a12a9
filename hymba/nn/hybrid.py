"""The hybrid-head mixer: attention heads and Mamba heads in parallel (section 2.1 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba.nn.attention import AttentionHeads, Collected, SharedKV
from hymba.nn.hooks import is_plain
from hymba.nn.init import initialise
from hymba.nn.mamba import MambaHeads
from hymba.nn.mamba2 import Mamba2Heads
from hymba.nn.norm import RMSNorm
from hymba.nn.state import LayerState, Span
from hymba.ops.norm import mean_rms_norm


def _span(x: Tensor, state: LayerState) -> Span:
    """The span of a mixer used alone: all tokens are real and follow the state."""
    return Span.following(
        x.shape[1],
        start=state.seen,
        columns=state.columns,
        offset=state.prefix,
        uniform=state.uniform,
        device=x.device,
    )


def _advance(state: LayerState, span: Span) -> None:
    state.seen, state.columns, state.uniform = span.end, span.columns + span.length, span.uniform


def _mamba_heads(
    kind: str,
    *,
    hidden_size: int,
    expand: int,
    d_state: int,
    d_conv: int,
    dt_rank: int | None,
    head_dim: int | None,
    groups: int | None,
    eps: float,
    norm: bool,
) -> MambaHeads | Mamba2Heads:
    """The Mamba branch of a mixer; norm: whether Mamba-2's norm of the gated output is part of it."""
    d_inner = expand * hidden_size
    if kind == "mamba":
        rank = -(-hidden_size // 16) if dt_rank is None else dt_rank
        return MambaHeads(d_inner=d_inner, d_state=d_state, d_conv=d_conv, dt_rank=rank, eps=eps)
    if kind != "mamba2":
        raise ValueError(f"ssm={kind!r}: allowed: 'mamba', 'mamba2'")
    return Mamba2Heads(
        d_inner=d_inner,
        head_dim=64 if head_dim is None else head_dim,
        d_state=d_state,
        n_groups=1 if groups is None else groups,
        d_conv=d_conv,
        norm=norm,
        eps=eps,
    )


def _check_kv(borrows_kv: bool, kv: SharedKV | None) -> None:
    if borrows_kv != (kv is not None):
        need = "needs kv, the keys and values of its lender" if borrows_kv else "computes its own kv"
        raise ValueError(f"this layer has borrows_kv={borrows_kv} and {need}")


class HybridHeads(nn.Module):
    """One input projection feeds both branches; their normed outputs are averaged and projected.

    `out_proj((attention_norm(attention(x)) + mamba_norm(mamba(x))) / 2)`. The projection's rows stand in the order
    `q | k | v | ssm input | gate`; a layer that borrows keys and values has no k and v rows.

    Args:
        hidden_size: width of input and output.
        num_heads, num_kv_heads: attention heads and key/value heads.
        head_dim, v_head_dim: width of a query/key head and of a value head; by default `hidden_size / num_heads` and
            `expand * hidden_size / num_heads`, which makes both branches equally wide.
        expand: `d_inner / hidden_size`, the width of the Mamba branch.
        fusion: `"mean"` of the normed branches, or `"concat"`: the output projection reads both side by side, and they
            may differ in width (table 10 of the paper, row 11).
        d_state, d_conv, dt_rank: shape of the Mamba heads; dt rank defaults to `ceil(hidden_size / 16)`.
        ssm: `"mamba"`, or `"mamba2"`, whose norm of the gated output `mamba_norm` then is.
        ssm_head_dim, ssm_groups: of Mamba-2 heads, by default 64 channels and one group.
        window: past positions that the attention heads see; `None` for all.
        borrows_kv: take keys and values from another layer (`kv` of `forward`).
        rope_base, qk_norm, dropout: of the attention heads.
        bias: bias on both projections.
        eps: of all norms.

    Shapes and dtypes: input and output (b, l, hidden_size) in the parameters' dtype (or autocast's).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        window: int | None = None,
        borrows_kv: bool = False,
        rope_base: float = 10000.0,
        qk_norm: str | None = "none",
        dropout: float = 0.0,
        bias: bool = False,
        eps: float = 1e-6,
        fusion: str = "mean",
        ssm: str = "mamba",
        ssm_head_dim: int | None = None,
        ssm_groups: int | None = None,
    ) -> None:
        super().__init__()
        d_inner = expand * hidden_size
        given = (head_dim, v_head_dim)
        for width, name, own in zip(
            (hidden_size, d_inner), ("hidden_size", "expand * hidden_size"), given, strict=True
        ):
            if own is None and width % num_heads:
                raise ValueError(f"num_heads={num_heads}: allowed: divisors of {name}={width}")
        if fusion not in ("mean", "concat"):
            raise ValueError(f"fusion={fusion!r}: allowed: 'mean', 'concat'")
        self.fusion = fusion
        self.attention = AttentionHeads(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=hidden_size // num_heads if head_dim is None else head_dim,
            v_head_dim=d_inner // num_heads if v_head_dim is None else v_head_dim,
            window=window,
            rope_base=rope_base,
            qk_norm=qk_norm,
            dropout=dropout,
            eps=eps,
        )
        self.mamba = _mamba_heads(
            ssm,
            hidden_size=hidden_size,
            expand=expand,
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=dt_rank,
            head_dim=ssm_head_dim,
            groups=ssm_groups,
            eps=eps,
            norm=False,
        )
        self.borrows_kv = borrows_kv
        kv = [] if borrows_kv else [self.attention.k_width, self.attention.v_width]
        self.splits = [self.attention.q_width, *kv, self.mamba.in_width, d_inner]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=bias)
        attended = self.attention.out_width
        if fusion == "mean" and attended != d_inner:
            raise ValueError(
                f"the attention branch is {attended} wide and the Mamba branch {d_inner}; fusion='mean' needs equal "
                "widths, allowed otherwise: 'concat'"
            )
        self.attention_norm = RMSNorm(attended, eps=eps)
        self.mamba_norm = RMSNorm(d_inner, eps=eps)
        self.out_proj = nn.Linear(d_inner if fusion == "mean" else attended + d_inner, hidden_size, bias=bias)
        for projection in (self.in_proj, self.out_proj):
            initialise(projection)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        span: Span | None = None,
        kv: SharedKV | None = None,
        weights: Collected | None = None,
    ) -> tuple[Tensor, LayerState, SharedKV]:
        """Mix tokens.

        Args:
            x: (b, l, hidden_size).
            state: where to start; `None` is the empty state. The returned state takes its place and may share memory
                with it.
            span: where the tokens stand; by default all are real and follow the state.
            kv: keys and values of the lending layer, for a layer that borrows them.
            weights: receives the attention weights.

        Returns:
            output (b, l, hidden_size), the new state, and the keys and values attended to.

        Raises:
            ValueError: a borrowing layer without `kv`, or an own-KV layer with one.
        """
        _check_kv(self.borrows_kv, kv)
        state = LayerState() if state is None else state.fork()
        span = _span(x, state) if span is None else span
        q, *own, u, z = self.in_proj(x).split(self.splits, dim=-1)
        if kv is None:
            kv = self.attention.keys_and_values(own[0], own[1], state, span=span)
        attended = self.attention(q, kv, span=span, weights=weights)
        scanned = self.mamba(u, z, state, span=span)
        out = self.out_proj(self._fuse(attended, scanned))
        _advance(state, span)
        return out, state, kv

    def _fuse(self, attended: Tensor, scanned: Tensor) -> Tensor:
        """The mean of the branches' norms, (b, l, d_inner), or both side by side."""
        first, second = self.attention_norm, self.mamba_norm
        if self.fusion == "concat":
            return torch.cat([first(attended), second(scanned)], dim=-1)
        if is_plain(first, RMSNorm) and is_plain(second, RMSNorm) and first.eps == second.eps:
            return mean_rms_norm(attended, scanned, first.weight, second.weight, first.eps)
        return (first(attended) + second(scanned)) / 2


class AttentionMixer(nn.Module):
    """Attention heads alone, between the projections of a Transformer layer (`q | k | v` in one).

    Args:
        hidden_size: width of input and output.
        num_heads, num_kv_heads: attention heads and key/value heads.
        head_dim, v_head_dim: width of a query/key head, by default `hidden_size / num_heads`, and of a value head, by
            default the same.
        window, borrows_kv, rope_base, qk_norm, dropout, bias, eps: of `HybridHeads`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        window: int | None = None,
        borrows_kv: bool = False,
        rope_base: float = 10000.0,
        qk_norm: str | None = "none",
        dropout: float = 0.0,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads}: allowed: divisors of hidden_size={hidden_size}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.attention = AttentionHeads(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else v_head_dim,
            window=window,
            rope_base=rope_base,
            qk_norm=qk_norm,
            dropout=dropout,
            eps=eps,
        )
        self.borrows_kv = borrows_kv
        kv = [] if borrows_kv else [self.attention.k_width, self.attention.v_width]
        self.splits = [self.attention.q_width, *kv]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=bias)
        self.out_proj = nn.Linear(self.attention.out_width, hidden_size, bias=bias)
        for projection in (self.in_proj, self.out_proj):
            initialise(projection)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        span: Span | None = None,
        kv: SharedKV | None = None,
        weights: Collected | None = None,
    ) -> tuple[Tensor, LayerState, SharedKV]:
        """Mix tokens; arguments and results are those of `HybridHeads.forward`."""
        _check_kv(self.borrows_kv, kv)
        state = LayerState() if state is None else state.fork()
        span = _span(x, state) if span is None else span
        q, *own = self.in_proj(x).split(self.splits, dim=-1)
        if kv is None:
            kv = self.attention.keys_and_values(own[0], own[1], state, span=span)
        out = self.out_proj(self.attention(q, kv, span=span, weights=weights))
        _advance(state, span)
        return out, state, kv


class MambaMixer(nn.Module):
    """Mamba heads alone, between the projections of a Mamba layer (`ssm input | gate` in one).

    Mamba-2 heads norm their gated output here, as published.

    Args:
        hidden_size: width of input and output.
        expand: `d_inner / hidden_size`.
        d_state, d_conv, dt_rank, ssm, ssm_head_dim, ssm_groups, bias, eps: of `HybridHeads`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        eps: float = 1e-6,
        ssm: str = "mamba",
        ssm_head_dim: int | None = None,
        ssm_groups: int | None = None,
    ) -> None:
        super().__init__()
        d_inner = expand * hidden_size
        self.mamba = _mamba_heads(
            ssm,
            hidden_size=hidden_size,
            expand=expand,
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=dt_rank,
            head_dim=ssm_head_dim,
            groups=ssm_groups,
            eps=eps,
            norm=True,
        )
        self.splits = [self.mamba.in_width, d_inner]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=bias)
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=bias)
        for projection in (self.in_proj, self.out_proj):
            initialise(projection)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        span: Span | None = None,
        kv: SharedKV | None = None,
        weights: Collected | None = None,
    ) -> tuple[Tensor, LayerState, None]:
        """Mix tokens; arguments and results are those of `HybridHeads.forward`, without keys and values."""
        _check_kv(False, kv)
        state = LayerState() if state is None else state.fork()
        span = _span(x, state) if span is None else span
        u, z = self.in_proj(x).split(self.splits, dim=-1)
        out = self.out_proj(self.mamba(u, z, state, span=span))
        _advance(state, span)
        return out, state, None


MIXERS: dict[str, type[nn.Module]] = {"hybrid": HybridHeads, "attention": AttentionMixer, "mamba": MambaMixer}
"""The mixer of a layer by the name that `hymba.layout.LayerSpec` gives it."""
