"""A layer: mixer, then MLP, each behind a norm and added to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hymba.nn.attention import Collected, SharedKV
from hymba.nn.hooks import is_plain, product_dtype
from hymba.nn.hybrid import MIXERS
from hymba.nn.mlp import MLP
from hymba.nn.norm import RMSNorm
from hymba.nn.state import LayerState, Span
from hymba.ops.norm import add_rms_norm, rms_norm


class HymbaBlock(nn.Module):
    """`x += mixer(norm(x))`, then `x += mlp(norm(x))` (section 2.2 of the specification).

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP; `None` leaves the MLP out.
        activation: of the MLP, `"silu"` or `"relu2"`.
        eps: of the norms.
        kind: of the mixer, a name of `hymba.nn.MIXERS`.
        **mixer: keyword arguments of the mixer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int | None,
        activation: str = "silu",
        eps: float = 1e-6,
        kind: str = "hybrid",
        **mixer: Any,
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(hidden_size, eps=eps)
        if kind not in MIXERS:
            raise ValueError(f"kind={kind!r}: allowed: {', '.join(map(repr, MIXERS))}")
        self.mixer: Any = MIXERS[kind](hidden_size=hidden_size, eps=eps, **mixer)
        self.ffn_norm = self.mlp = None
        if intermediate_size is not None:
            self.ffn_norm = RMSNorm(hidden_size, eps=eps)
            self.mlp = MLP(hidden_size=hidden_size, intermediate_size=intermediate_size, activation=activation)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        span: Span | None = None,
        kv: SharedKV | None = None,
        weights: Collected | None = None,
    ) -> tuple[Tensor, LayerState, SharedKV | None]:
        """x: (b, l, hidden_size). Arguments and results are those of `HybridHeads.forward`; a mixer without attention
        heads has no keys and values."""
        norm = self.input_norm
        # What the projections behind a norm would cast its output to.
        dtype = product_dtype(x)
        normed = rms_norm(x, norm.weight, norm.eps, dtype=dtype) if is_plain(norm, RMSNorm) else norm(x)
        mixed, state, kv = self.mixer(normed, state, span=span, kv=kv, weights=weights)
        if self.mlp is None or self.ffn_norm is None:
            return x + mixed, state, kv
        norm = self.ffn_norm
        if is_plain(norm, RMSNorm):
            x, normed = add_rms_norm(x, mixed, norm.weight, norm.eps, dtype=dtype)
        else:
            x = x + mixed
            normed = norm(x)
        return x + self.mlp(normed), state, kv
