"""The functions of causal-conv1d's extension in plain PyTorch, as strict about layouts and dtypes as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from autograd_apart import gradients


def _check(x, weight, bias, seq_idx, initial_states):
    batch, dim, length = x.shape
    width = weight.shape[-1]
    # Channels last is what documents and states ask for.
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert dim % 8 == 0
    assert x.stride(2) % 8 == 0
    assert x.stride(0) % 8 == 0
    assert 2 <= width <= 4
    assert weight.shape == (dim, width)
    if bias is not None:
        assert bias.shape == (dim,)
        assert bias.dtype == weight.dtype
        assert bias.stride(-1) == 1
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length)
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
    if initial_states is not None:
        assert initial_states.shape == (batch, dim, width - 1)
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1


def _convolve(x, weight, bias, seq_idx, initial_states, silu):
    batch, dim, length = x.shape
    width = weight.shape[-1]
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], -1).float()
    y = torch.zeros(batch, dim, length, device=x.device)
    documents = None
    if seq_idx is not None:
        first = seq_idx[:, :1] if initial_states is not None else torch.full_like(seq_idx[:, :1], -1)
        documents = torch.cat([first.expand(-1, width - 1), seq_idx], -1)
    for w in range(width):
        taps = padded[:, :, w : w + length] * weight[:, w, None].float()
        if documents is not None:
            taps = torch.where((documents[:, w : w + length] == seq_idx)[:, None], taps, 0)
        y = y + taps
    if bias is not None:
        y = y + bias.float()[:, None]
    return F.silu(y) if silu else y


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation):
    _check(x, weight, bias, seq_idx, initial_states)
    assert out.shape == x.shape
    assert out.stride(1) == 1
    assert final_states_out is None
    out.copy_(_convolve(x, weight, bias, seq_idx, initial_states, silu_activation))


def causal_conv1d_bwd(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu_activation
):
    _check(x, weight, bias, seq_idx, initial_states)
    assert dout.shape == x.shape
    assert dout.stride(1) == 1
    assert dout.stride(0) % 8 == 0
    assert dout.stride(2) % 8 == 0
    assert dx.dtype == x.dtype
    assert dx.stride(1) == 1
    assert dfinal_states is None
    assert dweight.dtype == torch.float32
    assert (bias is None) == (dbias is None)
    assert (initial_states is None) == (dinitial_states is None)

    def convolved(x, weight, bias, initial_states):
        return _convolve(x, weight, bias, seq_idx, initial_states, silu_activation)

    grads = gradients(convolved, (x, weight, bias, initial_states), dout)
    for target, gradient, adds in zip((dx, dweight, dbias, dinitial_states), grads, (False, True, True, False)):
        if target is not None:
            target.add_(gradient) if adds else target.copy_(gradient)


def causal_conv1d_update(x, conv_state, weight, bias, out, silu_activation, cache_seqlens, conv_state_indices):
    assert x.dim() == 3
    assert conv_state.shape == (*x.shape[:2], weight.shape[1] - 1)
    assert conv_state.dtype == x.dtype == out.dtype
    assert cache_seqlens is None
    assert conv_state_indices is None
    window = torch.cat([conv_state, x], -1)
    out.copy_(_convolve(x, weight, bias, None, conv_state, silu_activation))
    conv_state.copy_(window[:, :, 1:])
