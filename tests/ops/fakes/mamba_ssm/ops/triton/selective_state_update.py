"""mamba-ssm's decode step in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    if D is None or dt_bias is None:
        raise TypeError("Value after * must be an iterable, not int")  # as the package does
    assert state_batch_indices is None
    dt = dt.float() + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    drive = (dt * x.float())[..., None] * B.float()[:, None]
    state.copy_(state * torch.exp(dt[..., None] * A) + drive)
    y = (state * C.float()[:, None]).sum(-1) + x.float() * D.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)
