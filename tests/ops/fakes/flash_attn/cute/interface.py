"""The two functions of flash-attn 4 that its autograd function calls, in plain PyTorch."""

from __future__ import annotations

import torch
from flash_reference import backward, forward


def _check(q, k, v):
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == k.shape[-1] <= 128
    assert v.shape[-1] <= 128
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0


def _flash_attn_fwd(
    q, k, v, qv=None, *, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None,
    return_lse=False,
):  # fmt: skip
    _check(q, k, v)
    assert qv is None
    out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right)
    return out, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None,
):  # fmt: skip
    _check(q, k, v)
    assert softcap == 0.0
    assert dout.shape == out.shape
    return backward(dout, q, k, v, out, lse, softmax_scale, causal, window_size_left, window_size_right)
