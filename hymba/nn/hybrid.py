"""The hybrid-head mixer: attention heads and Mamba heads in parallel (section 2.1 of the paper)."""

from __future__ import annotations

from torch import Tensor, nn

from hymba.nn.attention import AttentionHeads, Collected, SharedKV
from hymba.nn.hooks import is_plain
from hymba.nn.init import initialise
from hymba.nn.mamba import MambaHeads
from hymba.nn.norm import RMSNorm
from hymba.nn.state import LayerState, Span
from hymba.ops.norm import mean_rms_norm


class HybridHeads(nn.Module):
    """One input projection feeds both branches; their normed outputs are averaged and projected.

    `out_proj((attention_norm(attention(x)) + mamba_norm(mamba(x))) / 2)`. The projection's rows stand in the order
    `q | k | v | ssm input | gate`; a layer that borrows keys and values has no k and v rows.

    Args:
        hidden_size: width of input and output.
        num_heads, num_kv_heads: attention heads and key/value heads.
        expand: `d_inner / hidden_size`, the width of both branches.
        d_state, d_conv, dt_rank: shape of the Mamba heads; dt rank defaults to `ceil(hidden_size / 16)`.
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
    ) -> None:
        super().__init__()
        d_inner = expand * hidden_size
        for width, name in ((hidden_size, "hidden_size"), (d_inner, "expand * hidden_size")):
            if width % num_heads:
                raise ValueError(f"num_heads={num_heads}: allowed: divisors of {name}={width}")
        self.attention = AttentionHeads(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=hidden_size // num_heads,
            v_head_dim=d_inner // num_heads,
            window=window,
            rope_base=rope_base,
            qk_norm=qk_norm,
            dropout=dropout,
            eps=eps,
        )
        self.mamba = MambaHeads(
            d_inner=d_inner,
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=-(-hidden_size // 16) if dt_rank is None else dt_rank,
            eps=eps,
        )
        self.borrows_kv = borrows_kv
        kv = [] if borrows_kv else [self.attention.k_width, self.attention.v_width]
        self.splits = [self.attention.q_width, *kv, d_inner, d_inner]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=bias)
        self.attention_norm = RMSNorm(d_inner, eps=eps)
        self.mamba_norm = RMSNorm(d_inner, eps=eps)
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
        if self.borrows_kv != (kv is not None):
            need = "needs kv, the keys and values of its lender" if self.borrows_kv else "computes its own kv"
            raise ValueError(f"this layer has borrows_kv={self.borrows_kv} and {need}")
        state = LayerState() if state is None else state.fork()
        if span is None:
            span = Span.following(
                x.shape[1],
                start=state.seen,
                columns=state.columns,
                offset=state.prefix,
                uniform=state.uniform,
                device=x.device,
            )
        q, *own, u, z = self.in_proj(x).split(self.splits, dim=-1)
        if kv is None:
            kv = self.attention.keys_and_values(own[0], own[1], state, span=span)
        attended = self.attention(q, kv, span=span, weights=weights)
        scanned = self.mamba(u, z, state, span=span)
        out = self.out_proj(self._fuse(attended, scanned))
        state.seen, state.columns = span.end, span.columns + span.length
        state.uniform = span.uniform
        return out, state, kv

    def _fuse(self, attended: Tensor, scanned: Tensor) -> Tensor:
        """The mean of the branches' norms, (b, l, d_inner)."""
        first, second = self.attention_norm, self.mamba_norm
        if is_plain(first, RMSNorm) and is_plain(second, RMSNorm) and first.eps == second.eps:
            return mean_rms_norm(attended, scanned, first.weight, second.weight, first.eps)
        return (first(attended) + second(scanned)) / 2
