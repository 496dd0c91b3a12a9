"""What the flash-attn stand-ins share: attention with their masks, and its backward from any output and lse."""

from __future__ import annotations

import torch


def _scores(q, k, scale, causal, left, right):
    """(b, h, l, s) scaled scores, -inf where a key is hidden; masks are aligned at the last key."""
    assert q.shape[2] % k.shape[2] == 0
    k = k.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q.float(), k) * scale
    l, s = scores.shape[-2:]
    distance = torch.arange(l, device=q.device)[:, None] + s - l - torch.arange(s, device=q.device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal or right is not None:
        hidden |= distance < -(right or 0)
    if left is not None:
        hidden |= distance > left
    return scores.masked_fill(hidden, -torch.inf)


def forward(q, k, v, scale, causal, left, right):
    scores = _scores(q, k, scale, causal, left, right)
    lse = scores.logsumexp(-1)
    v = v.float().repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhls,bshe->blhe", (scores - lse[..., None]).exp(), v)
    return out.to(q.dtype), lse


def backward(dout, q, k, v, out, lse, scale, causal, left, right):
    """As the kernels do: probabilities recomputed from the lse that they are given."""
    group = q.shape[2] // k.shape[2]
    p = (_scores(q, k, scale, causal, left, right) - lse[..., None]).exp()
    wide = v.float().repeat_interleave(group, dim=2)
    dp = torch.einsum("blhe,bshe->bhls", dout.float(), wide)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    ds = p * (dp - delta[..., None]) * scale
    dq = torch.einsum("bhls,bshd->blhd", ds, k.float().repeat_interleave(group, dim=2))
    dk = torch.einsum("bhls,blhd->bshd", ds, q.float()).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhls,blhe->bshe", p, dout.float()).unflatten(2, (-1, group)).sum(3)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
