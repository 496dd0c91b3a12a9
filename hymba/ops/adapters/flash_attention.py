"""flash-attn 2 and 4 behind our attention: a whole sequence of own keys, with meta keys in front of them.

Causal layers take one call: with the meta keys in front, the kernels' causal mask (aligned at the last key) is ours.
Windowed layers take two, the text under the window and the meta keys without a mask, merged by their log-sum-exps.
flash-attn 2 wants values as wide as queries: wider ones go as slices, each a call of its own.

Backward needs no more than the kernels' own: with the merged output and log-sum-exp in place of their own they
recompute the merged probabilities, and what slices of the values and parts of the keys send back adds up.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import adapters

if TYPE_CHECKING:
    from ..backend import Call

PACKAGE = "flash_attn"
INTERFACE_2 = "flash_attn.flash_attn_interface"
INTERFACE_4 = "flash_attn.cute.interface"

GENERATIONS = {"flash_attn": 2, "flash_attn_4": 4}
"""Backends by name."""

_MAX_WIDTH = {2: 256, 4: 128}


@torch.compiler.assume_constant_result
def probe_2() -> str | None:
    return adapters.refusal(PACKAGE, "flash_attn_2_cuda", INTERFACE_2)


@torch.compiler.assume_constant_result
def probe_4() -> str | None:
    return adapters.refusal(PACKAGE, INTERFACE_4)


def serves_2(call: Call) -> str | None:
    d, e = call.x.shape[-1], call.weight.shape[-1]
    if e % d:
        return f"values are {e} wide; it takes multiples of the queries' width, {d}"
    return _serves(call, 2)


def serves_4(call: Call) -> str | None:
    return _serves(call, 4)


def _serves(call: Call, generation: int) -> str | None:
    q, seen = call.x, call.visibility
    if q.device.type != adapters.DEVICE:
        return f"the tensors are on {q.device.type!r}"
    if q.dtype not in (torch.bfloat16, torch.float16) or call.weight.dtype != q.dtype:
        return f"queries and values are {q.dtype} and {call.weight.dtype}; it takes one of bfloat16 and float16"
    widths = (q.shape[-1], call.weight.shape[-1]) if generation == 4 else (q.shape[-1],)
    for width in widths:
        if width % 8 or width > _MAX_WIDTH[generation]:
            return f"a head is {width} wide; it takes multiples of 8 up to {_MAX_WIDTH[generation]}"
    if call.dropout:
        return f"dropout={call.dropout}: the parts of one row would drop differently"
    if seen is None or seen.start is None:
        return "the order of the keys is unknown (Visibility.start)"
    if seen.own_keys != 0:
        return "it has no keys from a cache"
    if seen.query_document is not None:
        return "it has no documents within a row"
    return None


class _Part(NamedTuple):
    """One call's keys (b, s, k, d), values (b, s, k, e) and mask; a window of None is open."""

    k: Tensor
    v: Tensor
    causal: bool
    window: int | None


def _parts(k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, window: int | None) -> list[_Part]:
    """The calls that make up one attention, text first."""
    if window is not None and window >= k.shape[1] - 1:
        window = None
    if prefix_k is None or prefix_v is None:
        return [_Part(k, v, True, window)]
    rows = (k.shape[0], -1, -1, -1)
    prefix_k, prefix_v = prefix_k.to(k.dtype).expand(rows), prefix_v.to(v.dtype).expand(rows)
    if window is None:
        return [_Part(torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1), True, None)]
    return [_Part(k, v, True, window), _Part(prefix_k, prefix_v, False, None)]


def _slices(width: int, v: Tensor, generation: int) -> Iterator[slice]:
    """Slices of the values' width that one call takes."""
    size = width if generation == 2 else v.shape[-1]
    return (slice(at, at + size) for at in range(0, v.shape[-1], size))


def _forward(q: Tensor, part: _Part, generation: int) -> tuple[Tensor, Tensor]:
    """out (b, l, h, e) and log-sum-exp (b, h, l) of one part."""
    scale = 1 / math.sqrt(q.shape[-1])
    if generation == 4:
        interface = importlib.import_module(INTERFACE_4)
        out, lse, *_ = interface._flash_attn_fwd(
            q, part.k, part.v, softmax_scale=scale, causal=part.causal, window_size_left=part.window,
            window_size_right=None if part.window is None else 0, return_lse=True,
        )  # fmt: skip
        return out, lse
    interface = importlib.import_module(INTERFACE_2)
    outs = []
    for cut in _slices(q.shape[-1], part.v, generation):
        out, lse, *_ = interface._flash_attn_forward(
            q, part.k, part.v[..., cut], 0.0, scale, part.causal, *_window_2(part), 0.0, None, False
        )
        outs.append(out)
    return torch.cat(outs, -1), lse


def _window_2(part: _Part) -> tuple[int, int]:
    return (-1, -1) if part.window is None else (part.window, 0)


def _backward(
    dout: Tensor, q: Tensor, part: _Part, out: Tensor, lse: Tensor, generation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv that go through one part, given the merged out and lse."""
    scale = 1 / math.sqrt(q.shape[-1])
    if generation == 4:
        interface = importlib.import_module(INTERFACE_4)
        dq, dk, dv, *_ = interface._flash_attn_bwd(
            q, part.k, part.v, out, dout, lse, softmax_scale=scale, causal=part.causal, window_size_left=part.window,
            window_size_right=None if part.window is None else 0,
        )  # fmt: skip
        return dq, dk, dv
    interface = importlib.import_module(INTERFACE_2)
    total_q = total_k = None
    dvs = []
    for cut in _slices(q.shape[-1], part.v, generation):
        dq, dk, dv = (v.new_empty(v.shape) for v in (q, part.k, part.v[..., cut]))
        interface._flash_attn_backward(
            dout[..., cut].contiguous(), q, part.k, part.v[..., cut], out[..., cut].contiguous(), lse, dq, dk, dv,
            0.0, scale, part.causal, *_window_2(part), 0.0, None, torch.are_deterministic_algorithms_enabled(), None,
        )  # fmt: skip
        # Slices are halves of a sum: added in float32, so that only the result is rounded.
        total_q = dq.float() if total_q is None else total_q + dq
        total_k = dk.float() if total_k is None else total_k + dk
        dvs.append(dv)
    assert total_q is not None
    assert total_k is not None
    return total_q, total_k, torch.cat(dvs, -1)


@torch.library.custom_op("hymba::flash_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
    generation: int,
) -> tuple[Tensor, Tensor]:
    """out (b, l, h, e) in v.dtype and log-sum-exp (b, h, l) in float32."""
    found = [_forward(q, part, generation) for part in _parts(k, v, prefix_k, prefix_v, window)]
    if len(found) == 1:
        out, lse = found[0]
        return out.contiguous(), lse.contiguous()
    lse = torch.logsumexp(torch.stack([lse for _, lse in found]), 0)
    shares = ((part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in found)
    merged = sum(share * out.float() for share, (out, _) in zip(shares, found, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(v.dtype, memory_format=torch.contiguous_format), lse


@_attention.register_fake
def _(q, k, v, prefix_k, prefix_v, window, generation):  # type: ignore[no-untyped-def]
    b, l, h, _ = q.shape
    return v.new_empty(b, l, h, v.shape[-1]), q.new_empty(b, h, l, dtype=torch.float32)


@torch.library.custom_op("hymba::flash_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    generation: int,
) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v; empty where the input is None."""
    dout = dout.to(out.dtype).contiguous()
    parts = _parts(k, v, prefix_k, prefix_v, window)
    found = [_backward(dout, q, part, out, lse, generation) for part in parts]
    dq = found[0][0] if len(found) == 1 else found[0][0].float() + found[1][0]
    dk, dv = found[0][1:]
    if prefix_k is None or prefix_v is None:
        none = q.new_empty(0)
        return [dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.contiguous(), none, none.clone()]
    if len(found) == 2:
        dpk, dpv = found[1][1:]
    else:
        p = prefix_k.shape[1]
        dpk, dk, dpv, dv = dk[:, :p], dk[:, p:], dv[:, :p], dv[:, p:]
    return [
        g.sum_to_size(to.shape).to(to.dtype).contiguous()
        for g, to in ((dq, q), (dk, k), (dv, v), (dpk.float(), prefix_k), (dpv.float(), prefix_v))
    ]


@_attention_backward.register_fake
def _(dout, q, k, v, prefix_k, prefix_v, *_):  # type: ignore[no-untyped-def]
    return [
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (q, k, v, prefix_k, prefix_v)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window, ctx.generation = inputs
    ctx.save_for_backward(*tensors, *output)


def _through(ctx, dout, _):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    grads = _attention_backward(dout, *tensors, ctx.window, ctx.generation)
    return (*(g if t is not None else None for g, t in zip(grads, tensors[:5], strict=True)), None, None)


_attention.register_autograd(_through, setup_context=_setup_context)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
    backend: str,
) -> Tensor:
    """``hymba.ops.attention`` over [prefix | own keys], causal: (b, l, h * e) in v.dtype."""
    return _attention(q, k, v, prefix_k, prefix_v, window, GENERATIONS[backend])[0].flatten(2)
