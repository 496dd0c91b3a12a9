"""Rotation of heads: a program takes some tokens with all their heads and loads their angles once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, on_device

_TILE = 64 if INTERPRETED else 4096


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, l, sxb, sxl, sxh, scb, scl, HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Program (tokens, row). HP and DP are heads and half a head's width, rounded up to powers of two."""
    r = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    h = tl.arange(0, HP)[None, :, None]
    i = tl.arange(0, DP)[None, None, :]
    angle = r * scb + t * scl + i
    c = tl.load(cos + angle, mask=(t < l) & (i < HALF), other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=(t < l) & (i < HALF), other=0.0).to(tl.float32)
    if BACK:
        s = -s
    m = (t < l) & (h < HEADS) & (i < HALF)
    at = x + r * sxb + t.to(tl.int64) * sxl + h * sxh + i
    a = tl.load(at, mask=m, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=m, other=0.0).to(tl.float32)
    to = y + ((r * l + t) * HEADS + h) * (2 * HALF) + i
    tl.store(to, (a * c - b * s).to(y.dtype.element_ty), mask=m)
    tl.store(to + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=m)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """The heads (b, l, h, d) turned by their angles, or turned back; contiguous."""
    b, l, heads, width = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    half = width // 2
    hp, dp = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    tokens = max(1, _TILE // (hp * dp))
    with on_device(x):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _rotate_kernel[(triton.cdiv(l, tokens), b)](
            x, cos, sin, y, l, x.stride(0), x.stride(1), x.stride(2), 0 if cos.shape[0] == 1 else cos.stride(0),
            cos.stride(1), HEADS=heads, HALF=half, TOKENS=tokens, HP=hp, DP=dp, BACK=back,
        )  # fmt: skip
    return y
