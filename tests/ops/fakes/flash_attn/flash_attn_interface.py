"""The two functions of flash-attn 2 that its autograd function calls, in plain PyTorch."""

from __future__ import annotations

import torch
from flash_reference import backward, forward


def _check(q, k, v):
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert k.shape[:3] == v.shape[:3]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def _open(window):
    return None if window < 0 else window


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    _check(q, k, v)
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
    out, lse = forward(q, k, v, softmax_scale, causal, _open(window_size_left), _open(window_size_right))
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    _check(q, k, v)
    assert dout.shape == out.shape == q.shape
    assert dout.stride(-1) == out.stride(-1) == 1
    assert all(t.is_contiguous() for t in (dq, dk, dv))
    assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
    left, right = _open(window_size_left), _open(window_size_right)
    found = backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, left, right)
    for target, value in zip((dq, dk, dv), found, strict=True):
        target.copy_(value)
    return torch.empty(0)
