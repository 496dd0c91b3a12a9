"""Selective scan (Mamba-1): the public function, its reference, the decode step.

Letters: b rows, l steps, d channels, n states per channel.
Per row and channel, with dt_t = softplus(dt_t + dt_bias):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          h_{-1} = initial_state
    y_t = (C_t . h_t + D x_t) * silu(z_t)

State, A, D and the arithmetic are float32 (float64 when x is float64), whatever dtype the activations have.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_lengths, check_seq_idx, check_shape, compute_dtype, document_starts, no_autocast
from .adapters import mamba_ssm
from .scan_inputs import ScanInputs
from .scan_op import OP, run_scan

UPDATE = "selective_state_update"


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the scan over whole sequences.

    Args:
        x, dt, z: (b, l, d), float32 or bfloat16 (float64 for gradient checks). dt is the value before softplus.
        A: (d, n), negative. B, C: (b, l, n). D, dt_bias: (d,).
        initial_state: (b, d, n) or (1, d, n) shared by all rows; None is zeros.
        lengths: (b,) integers. Steps t >= lengths[row] leave the state alone and give y = 0.
        seq_idx: (b, l) int32, a packed row: where it changes, the state goes back to initial_state.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Returns:
        y (b, l, d) in x.dtype, and the state after the last step (b, d, n) in float32. Both carry gradients to
        every floating input; a shared initial state gets the sum over rows, and over documents when packed.

    Raises:
        ValueError: a shape that does not fit, or a forced backend that is not known.
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    _check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx)
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx)
    choice = _backend.resolve(OP, backend, _backend.Call(x, A, initial_state, seq_idx))
    if choice.name == "reference":
        return selective_scan_ref(*inputs)
    if choice.name == "mamba_ssm":
        try:
            return mamba_ssm.scan(inputs)
        except Exception as error:
            _backend.kernel_failed(OP, choice.name, error, was_forced=choice.forced)
            choice = _backend.Choice("torch", False)
    return run_scan(inputs, choice.name, choice.forced)


def _check_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, length, channels)")
    b, l, d = x.shape
    if A.dim() != 2 or A.shape[0] != d:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected ({d}, states)")
    n = A.shape[1]
    check_shape("dt", dt, (b, l, d))
    check_shape("B", B, (b, l, n))
    check_shape("C", C, (b, l, n))
    for name, value, shape in (("z", z, (b, l, d)), ("D", D, (d,)), ("dt_bias", dt_bias, (d,))):
        if value is not None:
            check_shape(name, value, shape)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (b, d, n), (1, d, n))
    check_lengths(lengths, b)
    check_seq_idx(seq_idx, b, l)


def selective_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain time loop, differentiated by autograd: the oracle for every other version.

    Arguments and results are those of `selective_scan`.
    """
    b, l, d = x.shape
    ct = compute_dtype(x)
    with no_autocast(x):
        xf, A_, B_, C_ = x.to(ct), A.to(ct), B.to(ct), C.to(ct)
        step = dt.to(ct) if dt_bias is None else dt.to(ct) + dt_bias.to(ct)
        step = F.softplus(step)
        real = None if lengths is None else torch.arange(l, device=x.device) < lengths[:, None]
        if real is not None:
            step = step * real[..., None]
        h0 = x.new_zeros(b, d, A.shape[1], dtype=ct) if initial_state is None else initial_state.to(ct)
        h0 = h0.expand(b, d, A.shape[1])
        decay = torch.exp(step[..., None] * A_)
        drive = (step * xf)[..., None] * B_[:, :, None]
        # Indexing [:, t] in the loop would make autograd pad every slice's gradient to full length: quadratic.
        starts = None if seq_idx is None else document_starts(seq_idx, lengths).unbind(1)
        h, ys = h0, []
        for t, (a_t, b_t, c_t) in enumerate(zip(decay.unbind(1), drive.unbind(1), C_.unbind(1), strict=True)):
            if starts is not None:
                h = torch.where(starts[t][:, None, None], h0, h)
            h = a_t * h + b_t
            ys.append(torch.einsum("bdn,bn->bd", h, c_t))
        y = torch.stack(ys, 1) if ys else xf
        if D is not None:
            y = y + D.to(ct) * xf
        if z is not None:
            y = y * F.silu(z.to(ct))
        if real is not None:
            y = torch.where(real[..., None], y, 0.0)
        return y.to(x.dtype), h.clone() if h is h0 else h


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One decode step; ``state`` (b, d, n) float32 is updated in place.

    Args:
        x, dt, z: (b, d). B, C: (b, n). A (d, n), D and dt_bias (d,) as in ``selective_scan``.
        valid: (b,) bool; a False row keeps its state and gives y = 0.

    Returns:
        y (b, d) in x.dtype.
    """
    b, d, n = state.shape
    for name, value, shape in (
        ("x", x, (b, d)),
        ("dt", dt, (b, d)),
        ("A", A, (d, n)),
        ("B", B, (b, n)),
        ("C", C, (b, n)),
    ):
        check_shape(name, value, shape)
    choice = _backend.resolve(UPDATE, backend, _backend.Call(x, A))
    if _backend.wants_kernel(UPDATE, choice.name, choice.forced):
        try:
            if choice.name == "mamba_ssm":
                return mamba_ssm.state_update(state, x, dt, A, B, C, D, z, dt_bias, valid)
            from .triton import decode

            return decode.state_update(state, x, dt, A, B, C, D, z, dt_bias, valid)
        except Exception as error:
            _backend.kernel_failed(UPDATE, choice.name, error, was_forced=choice.forced)
    return state_update_torch(state, x, dt, A, B, C, D, z, dt_bias, valid)


def state_update_torch(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``selective_state_update`` in plain PyTorch operations."""
    ct = compute_dtype(x)
    xf = x.to(ct)
    step = F.softplus(dt.to(ct) if dt_bias is None else dt.to(ct) + dt_bias.to(ct))
    # exp2 is vectorised everywhere; the state is read and written twice, in place and without temporaries.
    decay = torch.mul((step * math.log2(math.e))[..., None], A.to(ct)).exp2_()
    new = state.to(ct) if valid is None else state.to(ct, copy=True)
    new = new.mul_(decay).baddbmm_((step * xf)[..., None], B.to(ct)[:, None])
    y = torch.bmm(new, C.to(ct)[..., None]).squeeze(-1)
    if D is not None:
        y = y + D.to(ct) * xf
    if z is not None:
        y = y * F.silu(z.to(ct))
    if valid is not None:
        new = torch.where(valid[:, None, None], new, state)
        y = torch.where(valid[:, None], y, 0.0)
    if new is not state:
        state.copy_(new)
    return y.to(x.dtype)
