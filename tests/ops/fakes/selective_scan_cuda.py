"""The functions of mamba-ssm's extension in plain PyTorch, as strict about layouts and dtypes as the extension is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from autograd_apart import gradients

CHUNK = 2048


def _check(u, delta, A, B, C, D, z, delta_bias):
    batch, dim, length = u.shape
    states = A.shape[1]
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert A.dtype == torch.float32
    assert A.shape == (dim, states)
    for steps_last, shape in ((delta, u.shape), (z, u.shape), *((v, (batch, 1, states, length)) for v in (B, C))):
        if steps_last is not None:
            assert steps_last.shape == shape
            assert steps_last.dtype == u.dtype
            assert steps_last.stride(-1) == 1 or length == 1
    for parameter in (D, delta_bias):
        if parameter is not None:
            assert parameter.shape == (dim,)
            assert parameter.dtype == torch.float32
            assert parameter.stride(-1) == 1


def _loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    u, delta, B, C = u.float(), delta.float(), B[:, 0].float(), C[:, 0].float()
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h, ys, states = u.new_zeros(u.shape[0], *A.shape), [], []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
        if (t + 1) % CHUNK == 0 or t + 1 == u.shape[2]:
            states.append(torch.stack([torch.ones_like(h), h], -1).flatten(-2))
    out = torch.stack(ys, -1)
    if D is not None:
        out = out + D[:, None] * u
    return out, torch.stack(states, 2), out if z is None else out * F.silu(z.float())


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check(u, delta, A, B, C, D, z, delta_bias)
    with torch.no_grad():
        out, states, gated = _loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert torch.isfinite(out).all()
    return [out.to(u.dtype), states, *([] if z is None else [gated.to(u.dtype)])]


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    _check(u, delta, A, B, C, D, z, delta_bias)
    assert dz is None
    assert not recompute_out_z
    assert dout.shape == u.shape
    assert dout.dtype == u.dtype
    assert dout.stride(-1) == 1 or u.shape[2] == 1
    want_out, want_x, *_ = fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    torch.testing.assert_close(x, want_x)
    if z is not None:
        torch.testing.assert_close(out, want_out)

    def gated(u, delta, A, B, C, D, delta_bias, z):
        return _loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[2]

    grads = gradients(gated, (u, delta, A, B, C, D, delta_bias, z), dout)
    return grads[: 7 if z is None else 8]
