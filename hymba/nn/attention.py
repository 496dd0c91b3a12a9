"""The attention heads of a mixer, without projections: they share the mixer's input and output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from hymba.nn.norm import HeadNorm
from hymba.nn.rope import apply_rope, rope_tables
from hymba.nn.state import KVState, LayerState, Span
from hymba.ops.attention import attention
from hymba.ops.masks import Visibility


class Collected:
    """Receives attention weights. Not a list: those who move arguments between devices copy lists."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


@dataclass
class SharedKV:
    """Keys and values that a layer attends to, as it hands them to the layers that borrow them.

    Attributes:
        k: (b, s, kv_heads, head_dim), rotated. v: (b, s, kv_heads, v_head_dim).
        visibility: which query sees which key.
        prefix_k, prefix_v: meta keys and values (b or 1, m, ...), or `None`.
    """

    k: Tensor
    v: Tensor
    visibility: Visibility
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None

    def apart(self) -> SharedKV:
        """The same with memory of its own for the values, which are views of a whole projection's output."""
        return replace(self, v=self.v.contiguous())

    def to(self, device: torch.device | str, *_: object, **__: object) -> SharedKV:
        """The same on another device (a borrowing layer may live on one)."""
        if self.k.device == torch.device(device):
            return self
        return SharedKV(
            k=self.k.to(device),
            v=self.v.to(device),
            visibility=self.visibility.to(device),
            prefix_k=None if self.prefix_k is None else self.prefix_k.to(device),
            prefix_v=None if self.prefix_v is None else self.prefix_v.to(device),
        )


class AttentionHeads(nn.Module):
    """Grouped-query attention heads with rotary positions, a window and meta tokens in front.

    Takes projected queries, keys and values. Its output is the attention branch before fusion
    (`M_attn X` of the paper's section 2.1, without an output projection of its own).

    Args:
        num_heads, num_kv_heads: query heads and key/value heads.
        head_dim, v_head_dim: width of query/key heads and of value heads.
        window: past positions visible besides the query's own and the meta tokens; `None` for all.
        rope_base: base of the rotary frequencies.
        qk_norm: `"none"`, `"rms"` or `"perhead-rms"`, applied before the rotation.
        dropout: probability of dropping an attention weight in training.
        eps: of the query/key norms.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        window: int | None = None,
        rope_base: float = 10000.0,
        qk_norm: str | None = "none",
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads}: allowed: divisors of num_heads={num_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.window, self.rope_base, self.dropout = window, rope_base, dropout
        self.implementation = "sdpa"
        self.q_norm = self.k_norm = None
        if qk_norm not in ("none", None):
            self.q_norm = HeadNorm(qk_norm, num_heads=num_heads, head_dim=head_dim, eps=eps)
            # A borrowing layer has one too, as in the released files, and never uses it.
            self.k_norm = HeadNorm(qk_norm, num_heads=num_kv_heads, head_dim=head_dim, eps=eps)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def k_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def v_width(self) -> int:
        return self.num_kv_heads * self.v_head_dim

    @property
    def out_width(self) -> int:
        return self.num_heads * self.v_head_dim

    def _rope(self, span: Span) -> tuple[Tensor, Tensor]:
        return span.memo(
            ("rope", self.head_dim, self.rope_base),
            lambda: rope_tables(span.positions + span.offset, head_dim=self.head_dim, base=self.rope_base),
        )

    def keys_and_values(self, k: Tensor, v: Tensor, state: LayerState | None, *, span: Span) -> SharedKV:
        """What the queries of this layer, and of the layers that borrow from it, attend to.

        Args:
            k: (b, l, num_kv_heads * head_dim). v: (b, l, num_kv_heads * v_head_dim).
            state: filled in with the new keys and values; `None` forgets them.
            span: where the tokens stand.
        """
        k = rearrange(k, "b l (h d) -> b l h d", h=self.num_kv_heads)
        v = rearrange(v, "b l (h e) -> b l h e", h=self.num_kv_heads)
        if self.k_norm is not None:
            k = self.k_norm(k)
        k = apply_rope(k, *self._rope(span))
        prefix_k = prefix_v = None
        prefix = 0
        if state is not None:
            prefix_k, prefix_v, prefix = state.prefix_k, state.prefix_v, state.prefix
            if state.kv is None:
                state.kv = KVState(window=None if span.in_prefix else self.window)
            k, v, seen = state.kv.extend(k, v, span, prefix=prefix)
        else:
            seen = span.visibility(self.window, prefix=0)
        return SharedKV(k, v, seen, prefix_k, prefix_v)

    def forward(self, q: Tensor, kv: SharedKV, *, span: Span, weights: Collected | None = None) -> Tensor:
        """Attend.

        Args:
            q: (b, l, num_heads * head_dim) projected queries.
            kv: from `keys_and_values` of this layer or of the one that it borrows from.
            span: where the tokens stand.
            weights: receives the attention weights (b, heads, l, m + s), float32.

        Returns:
            (b, l, num_heads * v_head_dim).
        """
        q = rearrange(q, "b l (h d) -> b l h d", h=self.num_heads)
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = apply_rope(q, *self._rope(span))
        out, attended = attention(
            q,
            kv.k,
            kv.v,
            kv.visibility,
            prefix_k=kv.prefix_k,
            prefix_v=kv.prefix_v,
            dropout=self.dropout if self.training else 0.0,
            need_weights=weights is not None,
            implementation=self.implementation,
        )
        if weights is not None and attended is not None:
            weights.tensors.append(attended)
        return out

    def extra_repr(self) -> str:
        window = "global" if self.window is None else f"window={self.window}"
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}/{self.v_head_dim}, {window}"
