"""Grouped-query attention with value heads wider than query heads.

Letters: b batch, l queries, s keys, h query heads, k key/value heads, g = h / k queries per key head,
d query/key width, e value width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops import backend as backends
from hymba.ops._checks import no_autocast
from hymba.ops.adapters import flash_attention
from hymba.ops.attention_op import OP, Sources, run_attention, run_one_query
from hymba.ops.masks import Visibility

# Queries per block when the score matrix of all queries would be larger than this many entries per head.
_QUERY_BLOCK = 512
_SCORES_AT_ONCE = 1 << 20


def attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(d)) v` in float32, the oracle of every other path.

    Args:
        q: (b, l, h, d). k: (b, s, k, d). v: (b, s, k, e).
        mask: (b or 1, l, s) bool, True where a key is seen. A query that sees no key gets the mean of all values.
        dropout: probability with which an attention weight is dropped.

    Returns:
        output (b, l, h * e) in `v.dtype`, weights (b, h, l, s) in float32.
    """
    groups = q.shape[2] // k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(compute).unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)
    scores = torch.einsum("bkgld,bskd->bkgls", queries, k.to(compute)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(compute).min)
    weights = scores.softmax(dim=-1)
    dropped = F.dropout(weights, dropout) if dropout else weights
    out = torch.einsum("bkgls,bske->bkgle", dropped, v.to(compute))
    out = out.permute(0, 3, 1, 2, 4).flatten(2).to(v.dtype)
    return out, weights.flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """The same through `scaled_dot_product_attention`; returns (b, l, h * e)."""
    length = q.shape[1]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if length == 1:
        # The g queries of a key head stand as rows of one product, so that keys and values are not repeated.
        queries = q[:, 0].unflatten(1, (k.shape[2], -1))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None], dropout_p=dropout)
        return out.flatten(1)[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask[:, None], dropout_p=dropout, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> Tensor:
    """The reference for one query per row, reading keys and values once; returns (b, 1, h * e) in `v.dtype`.

    SDPA has no fused kernel on CPUs for values wider than keys, and its decomposition scales and masks copies of the
    keys; the prefix is not joined to them either.
    """
    groups = q.shape[2] // k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)

    def heads_first(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        # Products over several rows and strided heads would copy again.
        return x.to(compute) if x.shape[0] == 1 else torch.empty(x.shape, dtype=compute, device=x.device).copy_(x)

    with no_autocast(q):
        queries = q[:, 0].to(compute).unflatten(1, (-1, groups))
        parts = [(k, v)] if prefix_k is None or prefix_v is None else [(prefix_k, prefix_v), (k, v)]
        scores = torch.cat([queries @ heads_first(keys).transpose(2, 3) for keys, _ in parts], dim=-1)
        scores = (scores / math.sqrt(q.shape[-1])).masked_fill_(~mask[:, None], torch.finfo(compute).min)
        weights = scores.softmax(dim=-1).split([keys.shape[1] for keys, _ in parts], dim=-1)
        out = sum(w @ heads_first(values) for w, (_, values) in zip(weights, parts, strict=True))
    return out.flatten(1)[:, None].to(v.dtype)


def _sources(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> Sources:
    low, high = (None, None) if seen.query_document is None else seen.bounds()
    start = None if seen.own_keys == 0 else seen.start
    if prefix_k is not None and prefix_v is not None:
        prefix_k, prefix_v = prefix_k.to(k.dtype), prefix_v.to(v.dtype)
    return Sources(q, k, v, prefix_k, prefix_v, start, low, high, seen.window, seen.own_keys)


def _no_kernel(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, dropout: float) -> str | None:
    """Why no kernel takes these arguments, or None."""
    for width in (q.shape[-1], v.shape[-1]):
        if width not in (16, 32, 64, 128, 256):
            return f"a head is {width} wide; it takes powers of two from 16 to 256"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}; it takes one dtype"
    if dropout:
        return f"dropout={dropout}; it has none"
    if seen.start is None:
        return "the order of the keys is unknown (Visibility.start)"
    if seen.query_document is not None and seen.own_keys != 0:
        return "documents of packed rows with keys from a cache"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    implementation: str = "sdpa",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention over [prefix | keys] with the mask that `visibility` describes.

    Args:
        q: (b, l, h, d), rotated. k: (b, s, k, d), rotated. v: (b, s, k, e).
        visibility: positions of queries and keys, window, documents.
        prefix_k, prefix_v: (b or 1, p, k, d) and (b or 1, p, k, e), keys that every query sees (meta tokens).
        dropout: probability of dropping an attention weight.
        need_weights: also return the weights; always through the reference.
        implementation: `"sdpa"` or `"eager"` (the reference).
        backend: "auto", or a name from `hymba.ops.backend.available()` that must serve this call; "torch" is SDPA.

    Returns:
        output (b, l, h * e) in `v.dtype`, weights (b, h, l, p + s) in float32 or `None`.

    Raises:
        ValueError: an implementation or a forced backend that is not known.
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"implementation={implementation!r}: allowed: 'sdpa', 'eager'")
    reference = need_weights or implementation == "eager"
    if not reference:
        no_kernel = _no_kernel(q, k, v, visibility, dropout)
        call = backends.Call(q, v, no_kernel=no_kernel, visibility=visibility, dropout=dropout)
        choice = backends.resolve(OP, backend, call)
        if choice.name == "triton":
            one = q.shape[1] == 1 and visibility.own_keys is None and not torch.is_grad_enabled()
            run = run_one_query if one else run_attention
            return run(_sources(q, k, v, visibility, prefix_k, prefix_v), choice.name, choice.forced), None
        if choice.name in flash_attention.GENERATIONS:
            try:
                keys = (k.to(q.dtype), v, prefix_k, prefix_v)
                return flash_attention.attention(q, *keys, visibility.window, choice.name), None
            except Exception as error:
                backends.kernel_failed(OP, choice.name, error, was_forced=choice.forced)
        reference = choice.name == "reference"

    if q.shape[1] == 1 and q.device.type == "cpu" and not reference and not dropout:
        return _one_query(q, k, v, visibility.dense(), prefix_k, prefix_v), None

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        if prefix_k is not None and prefix_v is not None:
            shape = (queries.shape[0], -1, -1, -1)
            keys = torch.cat([prefix_k.to(keys.dtype).expand(shape), keys], dim=1)
            values = torch.cat([prefix_v.to(values.dtype).expand(shape), values], dim=1)
        if reference:
            return attention_ref(queries, keys, values, mask, dropout=dropout)
        return _sdpa(queries, keys, values, mask, dropout), None

    length, own = q.shape[1], visibility.own_keys
    if need_weights or own is None or length * k.shape[1] <= _SCORES_AT_ONCE:
        out, weights = attend(q, k, v, visibility.dense())
        return out, weights if need_weights else None

    # Long inputs: some queries at a time, each block with the keys that it can see at most.
    blocks = []
    for first in range(0, length, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, length)
        oldest = 0 if visibility.window is None or own else max(0, first - visibility.window)
        cut = slice(oldest, own + last)
        blocks.append(attend(q[:, first:last], k[:, cut], v[:, cut], visibility.block(first, last, cut))[0])
    return torch.cat(blocks, dim=1), None
