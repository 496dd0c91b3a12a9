"""causal-conv1d (its extension `causal_conv1d_cuda`) behind our contract.

The extension convolves and differentiates y alone, on channels-last tensors as ours are. The final state, which it
cannot give for padded or packed rows, stays with `hymba.ops.causal_conv1d`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters
from .._checks import document_starts

if TYPE_CHECKING:
    from ..backend import Call

PACKAGE = "causal_conv1d"
EXTENSION = "causal_conv1d_cuda"

# Channels that one thread loads at once; the kernel asserts it for channels-last tensors.
_VECTOR = 8


@torch.compiler.assume_constant_result
def probe() -> str | None:
    return adapters.refusal(PACKAGE, EXTENSION)


def serves(call: Call) -> str | None:
    if call.seq_idx is not None and call.initial_state is not None:
        return "its documents within a row (seq_idx) start from zeros, not from the initial state"
    if call.x.shape[-1] % _VECTOR:
        return f"it takes multiples of {_VECTOR} channels, x has {call.x.shape[-1]}"
    if call.x.numel() == 0:
        return "x is empty"
    return serves_update(call)


def serves_update(call: Call) -> str | None:
    x, taps = call.x, call.weight.shape[1]
    if x.device.type != adapters.DEVICE:
        return f"the tensors are on {x.device.type!r}"
    if not 2 <= taps <= 4:
        return f"it takes 2 to 4 taps, the weight has {taps}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    return None


class _Arguments:
    """x (b, d, l) with channels contiguous, and the rest as the extension takes it."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
    ) -> None:
        self.pad = None
        if lengths is not None:
            self.pad = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            x = x.masked_fill(self.pad, 0)
        self.x = channels_last(x)
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous()
        # Documents by number: it joins equal numbers that stand apart, where ours start anew.
        self.documents = None if seq_idx is None else document_starts(seq_idx, lengths).cumsum(1).int()
        self.state = None
        if initial_state is not None:
            self.state = initial_state.to(x.dtype).expand(x.shape[0], -1, -1).contiguous().transpose(1, 2)

    def without_padding(self, y: Tensor) -> Tensor:
        """(b, l, d) with padded steps zero."""
        return y if self.pad is None else y.masked_fill_(self.pad, 0)


def channels_last(v: Tensor) -> Tensor:
    """(b, l, d) as (b, d, l) with contiguous channels, whose other strides the kernel can load by."""
    fits = v.stride(2) == 1 and v.stride(0) % _VECTOR == 0 and v.stride(1) % _VECTOR == 0
    # A single step leaves its stride open, and 1 there would read as the other layout.
    fits = fits and v.stride(1) >= v.shape[2] and v.data_ptr() % 16 == 0
    return (v if fits else v.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    """y (b, l, d) in x.dtype."""
    a = _Arguments(x, weight, bias, initial_state, lengths, seq_idx)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    extension = importlib.import_module(EXTENSION)
    extension.causal_conv1d_fwd(a.x, a.weight, a.bias, a.documents, a.state, y.transpose(1, 2), None, silu)
    return a.without_padding(y)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What y sends back: dx (b, l, d), dweight (d, k), dbias (d,), dinitial (b, k-1, d)."""
    (b, _, d), k = x.shape, weight.shape[1]
    a = _Arguments(x, weight, bias, initial_state, lengths, seq_idx)
    dout = channels_last(dy.to(x.dtype) if a.pad is None else dy.to(x.dtype).masked_fill(a.pad, 0))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros_like(a.weight, dtype=torch.float32)
    dbias = None if a.bias is None else torch.zeros_like(a.bias, dtype=torch.float32)
    dstate = x.new_empty(b, k - 1, d)
    given = None if a.state is None else dstate.transpose(1, 2)
    extension = importlib.import_module(EXTENSION)
    extension.causal_conv1d_bwd(
        a.x, a.weight, a.bias, dout, a.documents, a.state, None, dx.transpose(1, 2), dweight, dbias, given, silu
    )
    none = x.new_zeros(b, k - 1, d, dtype=torch.float32)
    db = dweight.new_zeros(d) if dbias is None else dbias
    return a.without_padding(dx).float(), dweight, db, none if given is None else dstate.float()


@torch.library.custom_op("hymba::causal_conv1d_package_update", mutates_args=("state",))
def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, silu: bool) -> Tensor:
    """``hymba.ops.causal_conv1d_update``; rows that are not valid get their window back."""
    y = torch.empty_like(x)
    # It shifts what it is given in place; a state in another dtype than x goes in as a copy.
    window = state if state.dtype == x.dtype and valid is None else state.to(x.dtype, copy=True)
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    extension = importlib.import_module(EXTENSION)
    extension.causal_conv1d_update(
        x[..., None], window.transpose(1, 2), weight.contiguous(), bias, y[..., None], silu, None, None
    )
    if window is not state:
        state.copy_(window if valid is None else torch.where(valid[:, None, None], window.to(state.dtype), state))
    return y if valid is None else torch.where(valid[:, None], y, 0)


@update.register_fake
def _(state, x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
