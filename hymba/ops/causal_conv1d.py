"""Depthwise causal convolution with state: reference, PyTorch version with its own backward, decode step.

Letters: b rows, l steps, d channels, k taps. Per row and channel

    pre_t = bias + sum_i w[k-1-i] x_{t-i}       y_t = silu(pre_t)

where x_{-1}, x_{-2}, ... come from the state: the k - 1 inputs before the first, oldest first. In a packed row
the inputs before each document's first step come from the state too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_lengths, check_seq_idx, check_shape, compute_dtype, document_starts, no_autocast
from .adapters import causal_conv1d as package
from .recompute import note

OP = "causal_conv1d"
UPDATE = "causal_conv1d_update"
ACTIVATIONS = ("silu", None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve whole sequences.

    Args:
        x: (b, l, d). weight: (d, k). bias: (d,).
        initial_state: (b, k-1, d), or (1, k-1, d) shared by all rows: the inputs before the first; None is zeros.
        lengths: (b,) integers. Steps t >= lengths[row] give y = 0 and do not enter the final state.
        seq_idx: (b, l) int32, a packed row: taps that would cross a document's start read initial_state.
        activation: "silu" or None.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Returns:
        y (b, l, d) and the last k-1 real inputs (b, k-1, d), reaching back into initial_state; both in x.dtype and
        both carrying gradients to every floating input.

    Raises:
        ValueError: a shape that does not fit, an unknown activation.
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, length, channels)")
    b, l, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({d}, taps)")
    k = weight.shape[1]
    if bias is not None:
        check_shape("bias", bias, (d,))
    if initial_state is not None:
        check_shape("initial_state", initial_state, (b, k - 1, d), (1, k - 1, d))
    check_lengths(lengths, b)
    check_seq_idx(seq_idx, b, l)
    _check_activation(activation)
    choice = _backend.resolve(OP, backend, _backend.Call(x, weight, initial_state, seq_idx))
    arguments = (x, weight, bias, initial_state, lengths, seq_idx)
    if choice.name == "reference":
        return causal_conv1d_ref(*arguments, activation)
    constants = (activation == "silu", choice.name, choice.forced)
    y, final = _conv(*arguments, *constants)
    return note(y, _output, *arguments, *constants), final


def _output(*arguments: Any) -> Tensor:
    return _conv(*arguments)[0]


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")


def _document_offsets(b: int, l: int, lengths: Tensor | None, seq_idx: Tensor | None, device: torch.device) -> Tensor:
    """(b, l) int64: how many steps of the same document lie before each step."""
    t = torch.arange(l, device=device).expand(b, l)
    if seq_idx is None:
        return t
    return t - torch.where(document_starts(seq_idx, lengths), t, 0).cummax(1).values


def _window_index(offset: Tensor, lengths: Tensor | None, k: int) -> Tensor:
    """Where the final state comes from: (b, k-1) indices into cat(initial_state, x) along time, oldest first."""
    b, l = offset.shape
    age = torch.arange(k - 2, -1, -1, device=offset.device)  # 0 is the newest input
    last = (torch.full((b, 1), l, device=offset.device) if lengths is None else lengths.long()[:, None].clamp(0, l)) - 1
    if l == 0:
        return (k - 2 - age).expand(b, k - 1)
    seen = torch.where(last >= 0, offset.gather(1, last.clamp_min(0)) + 1, 0)
    return torch.where(age < seen, k - 1 + last - age, k - 2 - (age - seen))


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Tap by tap through a gather, differentiated by autograd: the oracle for every other version.

    Arguments and results are those of `causal_conv1d`.
    """
    b, l, d = x.shape
    k = weight.shape[1]
    ct = compute_dtype(x)
    h0 = x.new_zeros(1, k - 1, d) if initial_state is None else initial_state
    padded = torch.cat([h0.to(ct).expand(b, k - 1, d), x.to(ct)], 1)
    offset = _document_offsets(b, l, lengths, seq_idx, x.device)
    t = torch.arange(l, device=x.device)
    y = x.new_zeros(b, l, d, dtype=ct)
    for i in range(k):
        index = torch.where(offset >= i, k - 1 + t - i, k - 1 - i + offset)
        y = y + weight[:, k - 1 - i].to(ct) * padded.gather(1, index[..., None].expand(b, l, d))
    if bias is not None:
        y = y + bias.to(ct)
    if activation == "silu":
        y = F.silu(y)
    if lengths is not None:
        y = torch.where((t < lengths[:, None])[..., None], y, 0.0)
    index = _window_index(offset, lengths, k)[..., None].expand(b, k - 1, d)
    return y.to(x.dtype), padded.gather(1, index).to(x.dtype)


class _Taps:
    """What forward and backward share. Channels stay innermost, so a tap is one multiply-add over the whole row."""

    def __init__(
        self, x: Tensor, weight: Tensor, initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> None:
        self.b, self.l, self.d = x.shape
        self.k = weight.shape[1]
        self.ct = compute_dtype(x)
        self.w = weight.to(self.ct).t().contiguous()
        h0 = x.new_zeros(1, self.k - 1, self.d) if initial_state is None else initial_state
        self.h0 = h0.to(self.ct).expand(self.b, self.k - 1, self.d)
        self.pad = None if lengths is None else torch.arange(self.l, device=x.device) >= lengths[:, None]
        self.offset = _document_offsets(self.b, self.l, lengths, seq_idx, x.device)
        self.packed = seq_idx is not None
        self.x = x.to(self.ct)
        if self.pad is not None:
            self.x = self.x.masked_fill(self.pad[..., None], 0.0)

    def inside(self, i: int) -> Tensor:
        """(b, l - i, 1): 1 where x_{t-i} is of the document of t, for t >= i."""
        return (self.offset[:, i:] >= i).to(self.ct)[..., None]

    def before(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and steps whose input i steps back lies before their document, and its place in the state."""
        if self.packed:
            rows, t = (self.offset < i).nonzero(as_tuple=True)
        else:
            m = min(i, self.l)
            rows = torch.arange(self.b, device=self.x.device).repeat_interleave(m)
            t = torch.arange(m, device=self.x.device).repeat(self.b)
        return rows, t, self.k - 1 - i + self.offset[rows, t]

    def pre(self, bias: Tensor | None) -> Tensor:
        """The convolution before its activation, (b, l, d)."""
        out = self.x * self.w[self.k - 1]
        if bias is not None:
            out += bias.to(self.ct)
        for i in range(1, self.k):
            w = self.w[self.k - 1 - i]
            if i < self.l:
                past = self.x[:, : self.l - i]
                out[:, i:].addcmul_(past * self.inside(i) if self.packed else past, w)
            rows, t, at = self.before(i)
            out.index_put_((rows, t), w * self.h0[rows, at], accumulate=True)
        return out


def _packed_offsets(x: Tensor, lengths: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """``_document_offsets`` as the kernels take them: int32, None when no row is packed."""
    if seq_idx is None:
        return None
    return _document_offsets(x.shape[0], x.shape[1], lengths, seq_idx, x.device).int()


@torch.library.custom_op("hymba::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y and the final state."""
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            if kernel == "causal_conv1d":
                y = package.forward(x, weight, bias, initial_state, lengths, seq_idx, silu)
                return y, _final_window(x, initial_state, lengths, seq_idx, weight.shape[1])
            from .triton import conv

            return conv.forward(x, weight, bias, initial_state, lengths, _packed_offsets(x, lengths, seq_idx), silu)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    with no_autocast(x):
        taps = _Taps(x, weight, initial_state, lengths, seq_idx)
        y = taps.pre(bias)
        if silu:
            F.silu(y, inplace=True)
        if taps.pad is not None:
            y.masked_fill_(taps.pad[..., None], 0.0)
        return y.to(x.dtype), _final_window(x, initial_state, lengths, seq_idx, taps.k)


def _final_window(
    x: Tensor, initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None, k: int
) -> Tensor:
    """The last k - 1 real inputs (b, k-1, d), read from the inputs themselves: nothing to round or to convert."""
    b, l, d = x.shape
    h0 = x.new_zeros(1, k - 1, d) if initial_state is None else initial_state.to(x.dtype)
    h0 = h0.expand(b, -1, -1)
    if l == 0:
        return h0.clone(memory_format=torch.contiguous_format)
    index = _window_index(_document_offsets(b, l, lengths, seq_idx, x.device), lengths, k)
    rows = torch.arange(b, device=x.device)[:, None]
    from_x = x[rows, (index - (k - 1)).clamp_min(0)]
    from_h0 = h0[rows, index.clamp_max(k - 2)]
    final = torch.where((index >= k - 1)[..., None], from_x, from_h0)
    return final.clone(memory_format=torch.contiguous_format)


@_conv.register_fake
def _(x, weight, bias, initial_state, lengths, seq_idx, silu, kernel, forced):  # type: ignore[no-untyped-def]
    b, _, d = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, weight.shape[1] - 1, d)


@torch.library.custom_op("hymba::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    kernel: str,
    forced: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias, initial_state in that order; empty where the input is None."""
    with no_autocast(x):
        (b, l, d), k = x.shape, weight.shape[1]
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dw, db, dh0 = _through_y(dy, x, weight, bias, initial_state, lengths, seq_idx, silu, kernel, forced)
        if dfinal is not None and l > 0:
            index = _window_index(_document_offsets(b, l, lengths, seq_idx, x.device), lengths, k)
            own = (index >= k - 1)[..., None]
            to_x, to_h0 = torch.where(own, dfinal, 0), torch.where(own, 0, dfinal)
            index = index[..., None].expand(b, k - 1, d)
            dx.scatter_add_(1, (index - (k - 1)).clamp_min(0), to_x.to(dx.dtype))
            dh0 = dh0.scatter_add(1, index.clamp_max(k - 2), to_h0.to(dh0.dtype))
        elif dfinal is not None:
            dh0 = dh0 + dfinal
        none = x.new_empty(0)
        return [
            dx.to(x.dtype),
            dw.to(weight.dtype, memory_format=torch.contiguous_format).contiguous(),
            none.clone() if bias is None else db.to(bias.dtype),
            none if initial_state is None else dh0.sum_to_size(initial_state.shape).to(initial_state.dtype),
        ]


def _through_y(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What y alone sends back: dx (b, l, d), dweight (d, k), dbias (d,), dinitial (b, k-1, d)."""
    if _backend.wants_kernel(OP, kernel, forced):
        try:
            if kernel == "causal_conv1d":
                return package.backward(dy, x, weight, bias, initial_state, lengths, seq_idx, silu)
            from .triton import conv

            offset = _packed_offsets(x, lengths, seq_idx)
            return conv.backward(dy, x, weight, bias, initial_state, lengths, offset, silu)
        except Exception as error:
            _backend.kernel_failed(OP, kernel, error, was_forced=forced)
    taps = _Taps(x, weight, initial_state, lengths, seq_idx)
    b, l, d, k = taps.b, taps.l, taps.d, taps.k
    g = dy.to(taps.ct)
    if silu:
        pre = taps.pre(bias)
        sig = torch.sigmoid(pre)
        g = g * sig.addcmul(pre * sig, 1 - sig)
    if taps.pad is not None:
        g = g.masked_fill(taps.pad[..., None], 0.0)
    dx = g * taps.w[k - 1]
    dw = torch.empty_like(taps.w)
    dw[k - 1] = (g * taps.x).sum((0, 1))
    dh0 = x.new_zeros(b, k - 1, d, dtype=taps.ct)
    for i in range(1, k):
        w = taps.w[k - 1 - i]
        rows, t, at = taps.before(i)
        edge = g[rows, t]
        dw[k - 1 - i] = (edge * taps.h0[rows, at]).sum(0)
        dh0.index_put_((rows, at), edge * w, accumulate=True)
        if i < l:
            later = g[:, i:] * taps.inside(i) if taps.packed else g[:, i:]
            dw[k - 1 - i] += (later * taps.x[:, : l - i]).sum((0, 1))
            dx[:, : l - i].addcmul_(later, w)
    return dx, dw.t(), g.sum((0, 1)), dh0


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, *_):  # type: ignore[no-untyped-def]
    return [
        x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
        for v in (x, weight, bias, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu, ctx.kernel, ctx.forced = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    grads = _conv_backward(dy, dfinal, *tensors, ctx.silu, ctx.kernel, ctx.forced)
    return (*(g if t is not None else None for g, t in zip(grads, tensors[:4], strict=True)), *(None,) * 5)


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """One decode step; ``state`` (b, k-1, d), the last inputs, oldest first, is updated in place.

    Args:
        x: (b, d). weight (d, k) and bias (d,) as in ``causal_conv1d``.
        valid: (b,) bool; a False row keeps its state and gives y = 0.

    Returns:
        y (b, d) in x.dtype.
    """
    b, d = x.shape
    check_shape("state", state, (b, weight.shape[1] - 1, d))
    _check_activation(activation)
    choice = _backend.resolve(UPDATE, backend, _backend.Call(x, weight))
    if _backend.wants_kernel(UPDATE, choice.name, choice.forced):
        try:
            if choice.name == "causal_conv1d":
                return package.update(state, x, weight, bias, valid, activation == "silu")
            from .triton import decode

            return decode.conv_update(state, x, weight, bias, valid, activation == "silu")
        except Exception as error:
            _backend.kernel_failed(UPDATE, choice.name, error, was_forced=choice.forced)
    return conv_update_torch(state, x, weight, bias, valid, activation)


def conv_update_torch(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    activation: str | None,
) -> Tensor:
    """``causal_conv1d_update`` in plain PyTorch operations."""
    ct = compute_dtype(x)
    window = torch.cat([state.to(x.dtype), x[:, None]], 1)
    y = (window.to(ct) * weight.to(ct).t()).sum(1)
    if bias is not None:
        y = y + bias.to(ct)
    if activation == "silu":
        y = F.silu(y)
    new = window[:, 1:].to(state.dtype)
    if valid is not None:
        new = torch.where(valid[:, None, None], new, state)
        y = torch.where(valid[:, None], y, 0.0)
    state.copy_(new)
    return y.to(x.dtype)
