"""Attention of many queries as one custom op: what autograd, ``torch.compile`` and activation checkpointing see.

The op takes where the keys lie instead of a mask, and the name of the implementation, chosen outside. Both keep the
output and the log-sum-exp for backward, so a kernel that does not build can hand over to PyTorch inside the op.

Letters as in `hymba.ops.attention`; m meta keys. Relative positions count from the call's first query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from ._checks import compute_dtype, no_autocast
from ._register import opaque

OP = "attention"
# Queries of a block in PyTorch's stead of the kernel.
_QUERY_BLOCK = 256
_LOG2_E = 1.4426950408889634


class Sources(NamedTuple):
    """What an attention call reads.

    Attributes:
        q: (b, l, h, d). k: (b, s, k, d). v: (b, s, k, e).
        prefix_k, prefix_v: (b or 1, m, k, d) and (b or 1, m, k, e), seen by every query, or `None`.
        start: (b or 1,) integers, text tokens of each row before the first query; `None` when own_keys is 0.
        low, high: (b or 1, l) int32 of packed rows: the first key that a query sees, and the query behind the last
            one that sees a key. They take the window's place; both or neither.
        window: past positions visible; `None` for all.
        own_keys: as in `Visibility`: the row of k where the queries' own keys start, behind a ring of that many
            slots; `None` when all keys are slots that hold the own keys already.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    start: Tensor | None
    low: Tensor | None
    high: Tensor | None
    window: int | None
    own_keys: int | None

    @property
    def slots(self) -> int:
        """Size of the ring or buffer among the keys."""
        return self.own_keys or self.k.shape[1]


def padded_rows(rows: int) -> int:
    """Room per key head for one number per row: whole tiles, so that kernels read aligned and past the end."""
    return -(-rows // 256) * 256


def run_attention(sources: Sources, kernel: str, forced: bool) -> Tensor:
    """Output (b, l, h * e) in `v.dtype` by implementation ``kernel``."""
    *tensors, window, own = sources
    return _attention(*tensors, -1 if window is None else window, -1 if own is None else own, kernel, forced)[0]


def run_one_query(sources: Sources, kernel: str, forced: bool) -> Tensor:
    """The same without a derivative for one query per row over slots that hold its key already (own_keys `None`)."""
    q, k, v, prefix_k, prefix_v, start, _, _, window, _ = sources
    assert start is not None
    return _one_query(q, k, v, prefix_k, prefix_v, start, -1 if window is None else window, kernel, forced)


def _one_query_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], 1, q.shape[2] * v.shape[3])


@opaque("attention_of_one_query", _one_query_fake)
def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    start: Tensor,
    window: int,
    kernel: str,
    forced: bool,
) -> Tensor:
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton.decode_attention import decode_attention

            count = torch.zeros(q.shape[0] * k.shape[2], dtype=torch.int32, device=q.device)
            return decode_attention(
                q.flatten(1), None, None, keys=k, values=v, position=start, cos=None, sin=None,
                window=None if window == -1 else window, count=count, prefix_k=prefix_k, prefix_v=prefix_v,
            )[:, None]  # fmt: skip
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return forward(_sources(q, k, v, prefix_k, prefix_v, start, None, None, window, -1))[0]


def _sources(*arguments: Tensor | int | None) -> Sources:
    *tensors, window, own = arguments
    return Sources(*tensors, None if window == -1 else window, None if own == -1 else own)  # type: ignore[call-arg, arg-type]


@torch.library.custom_op("hymba::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    start: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    window: int,
    own_keys: int,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor]:
    sources = _sources(q, k, v, prefix_k, prefix_v, start, low, high, window, own_keys)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import attention

            return attention.forward(sources)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return forward(sources)


@_attention.register_fake
def _(q, k, v, prefix_k, prefix_v, start, low, high, window, own_keys, kernel, forced):  # type: ignore[no-untyped-def]
    (b, l, h, _), (heads, e) = q.shape, v.shape[2:]
    return v.new_empty(b, l, h * e), q.new_empty(b, heads, padded_rows(l * (h // heads)), dtype=compute_dtype(q))


@torch.library.custom_op("hymba::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    start: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    window: int,
    own_keys: int,
    kernel: str,
    forced: bool,
) -> list[Tensor]:
    """Gradients of the five floating inputs in order; empty where the input is None."""
    sources = _sources(q, k, v, prefix_k, prefix_v, start, low, high, window, own_keys)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import attention_backward

            return attention_backward.backward(sources, out, lse, dout)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return backward(sources, out, lse, dout)


@_attention_backward.register_fake
def _(dout, out, lse, q, k, v, prefix_k, prefix_v, *_):  # type: ignore[no-untyped-def]
    return [
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, prefix_k, prefix_v)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window, ctx.own_keys, ctx.kernel, ctx.forced = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):  # type: ignore[no-untyped-def]
    out, lse, *tensors = ctx.saved_tensors
    grads = _attention_backward(dout, out, lse, *tensors, ctx.window, ctx.own_keys, ctx.kernel, ctx.forced)
    floats = [g if t is not None else None for g, t in zip(grads, tensors[:5], strict=True)]
    return (*floats, None, None, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)


def relative_keys(s: Sources) -> Tensor:
    """(b or 1, s) relative positions of the keys; `l` for slots that no query may see."""
    l, keys = s.q.shape[1], s.k.shape[1]
    row = torch.arange(keys, device=s.q.device)[None]
    if s.own_keys == 0:
        return row
    assert s.start is not None
    start = s.start[:, None].long()
    if s.own_keys is None and s.window is None:
        return row - start
    written = start + (l if s.own_keys is None else 0)
    back = torch.remainder(written - 1 - row, s.slots)
    held = torch.where(back < written, written - 1 - back - start, l)
    return held if s.own_keys is None else torch.where(row >= s.slots, row - s.slots, held)


def _block(s: Sources, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries first..last as (b, k, g, i, d), all keys and values, and (b or 1, i, m + s) whether they are seen."""
    ct, groups = compute_dtype(s.q), s.q.shape[2] // s.k.shape[2]
    query = torch.arange(first, last, device=s.q.device)[None, :, None]
    key = relative_keys(s)[:, None]
    seen = key <= query
    if s.low is not None:
        seen = seen & (key >= s.low[:, first:last, None])
    elif s.window is not None:
        seen = seen & (query - key <= s.window)
    k, v = s.k, s.v
    if s.prefix_k is not None and s.prefix_v is not None:
        shape = (k.shape[0], -1, -1, -1)
        k = torch.cat([s.prefix_k.expand(shape), k], dim=1)
        v = torch.cat([s.prefix_v.expand(shape), v], dim=1)
        seen = torch.nn.functional.pad(seen, (s.prefix_k.shape[1], 0), value=True)
    q = s.q[:, first:last].to(ct).unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)
    return q, k.to(ct), v.to(ct), seen


def forward(s: Sources) -> tuple[Tensor, Tensor]:
    """What the kernel gives, in PyTorch: output and log2 of the sum of exponentials (b, k, padded_rows(l g))."""
    (b, l, h, d), heads = s.q.shape, s.k.shape[2]
    groups = h // heads
    outs = []
    lse = s.q.new_zeros(b, heads, padded_rows(l * groups), dtype=compute_dtype(s.q))
    with no_autocast(s.q):
        for first in range(0, l, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, l)
            q, k, v, seen = _block(s, first, last)
            scores = (torch.einsum("bkgid,bskd->bkgis", q, k) * d**-0.5).masked_fill(~seen[:, None, None], -1e30)
            total = scores.logsumexp(-1, keepdim=True)
            out = torch.einsum("bkgis,bske->bikge", (scores - total).exp(), v)
            outs.append(out.flatten(2))
            lse[:, :, first * groups : last * groups] = total[..., 0].transpose(2, 3).flatten(2) * _LOG2_E
    return torch.cat(outs, 1).to(s.v.dtype), lse


def backward(s: Sources, out: Tensor, lse: Tensor, dout: Tensor) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v, in PyTorch; empty for a prefix that is `None`."""
    l, d, heads = s.q.shape[1], s.q.shape[3], s.k.shape[2]
    groups, ct = s.q.shape[2] // heads, compute_dtype(s.q)
    m = 0 if s.prefix_k is None else s.prefix_k.shape[1]
    dq = torch.empty(s.q.shape, dtype=s.q.dtype, device=s.q.device)
    dk = s.k.new_zeros(s.k.shape[0], m + s.k.shape[1], *s.k.shape[2:], dtype=ct)
    dv = s.v.new_zeros(s.v.shape[0], m + s.v.shape[1], *s.v.shape[2:], dtype=ct)

    def heads_first(x: Tensor) -> Tensor:
        return x.to(ct).unflatten(2, (heads, groups, -1)).permute(0, 2, 3, 1, 4)

    with no_autocast(s.q):
        for first in range(0, l, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, l)
            q, k, v, seen = _block(s, first, last)
            total = lse[:, :, first * groups : last * groups].unflatten(2, (-1, groups)).transpose(2, 3) / _LOG2_E
            scores = torch.einsum("bkgid,bskd->bkgis", q, k) * d**-0.5
            weights = (scores - total[..., None]).exp().masked_fill(~seen[:, None, None], 0)
            grad = heads_first(dout[:, first:last])
            delta = (grad * heads_first(out[:, first:last])).sum(-1, keepdim=True)
            dv += torch.einsum("bkgis,bkgie->bske", weights, grad)
            change = weights * (torch.einsum("bkgie,bske->bkgis", grad, v) - delta) * d**-0.5
            dk += torch.einsum("bkgis,bkgid->bskd", change, q)
            dq[:, first:last] = torch.einsum("bkgis,bskd->bikgd", change, k).flatten(2, 3)
    own = [dk[:, m:].to(s.k.dtype), dv[:, m:].to(s.v.dtype)]
    if s.prefix_k is None or s.prefix_v is None:
        return [dq, *own, dq.new_empty(0), dq.new_empty(0)]
    shared = s.prefix_k.shape[0] == 1
    parts = [(x.sum(0, keepdim=True) if shared else x).to(s.k.dtype) for x in (dk[:, :m], dv[:, :m])]
    return [dq, *(x.contiguous() for x in own), *(x.contiguous() for x in parts)]
