"""The scan of Mamba-2 (state space duality, arXiv 2405.21060): the public function, its reference, the decode step.

Letters: b rows, l steps, h heads of p channels, n states per channel, g groups of h / g heads that share B and C.
Per row and head, with dt_t = softplus(dt_t + dt_bias) and h_t of shape (p, n):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h_{-1} = initial_state
    y_t = h_t C_t + D x_t

Unlike in Mamba-1, the decay is one number per head and step. State, A, D and the arithmetic are float32 (float64 when
x is float64), whatever dtype the activations have. The gate is not part of the scan: Mamba-2 norms behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from ._checks import check_lengths, check_seq_idx, check_shape, compute_dtype, document_starts, no_autocast
from .ssd_inputs import SsdInputs
from .ssd_op import OP, run_scan

UPDATE = "ssd_state_update"


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the scan over whole sequences.

    Args:
        x: (b, l, h, p), float32 or bfloat16 (float64 for gradient checks). dt: (b, l, h), before softplus.
        A: (h,), negative. B, C: (b, l, g, n); head i belongs to group i // (h / g). D, dt_bias: (h,).
        initial_state: (b, h, p, n) or (1, h, p, n) shared by all rows; None is zeros.
        lengths: (b,) integers. Steps t >= lengths[row] leave the state alone and give y = 0.
        seq_idx: (b, l) int32, a packed row: where it changes, the state goes back to initial_state.
        backend: "auto", or a name from ``hymba.ops.backend.available()`` that must serve this call.

    Returns:
        y (b, l, h, p) in x.dtype, and the state after the last step (b, h, p, n) in float32. Both carry gradients to
        every floating input; a shared initial state gets the sum over rows, and over documents when packed.

    Raises:
        ValueError: a shape that does not fit, or a forced backend that is not known.
        hymba.ops.backend.BackendError: a forced backend that cannot serve this call, with the reason.
    """
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, initial_state, lengths, seq_idx)
    _check_arguments(inputs)
    choice = _backend.resolve(OP, backend, _backend.Call(x, A, initial_state, seq_idx))
    if choice.name == "reference":
        return ssd_scan_ref(*inputs)
    return run_scan(inputs, choice.name, choice.forced)


def _check_arguments(inputs: SsdInputs) -> None:
    x, dt, A, B, C, D, dt_bias, initial_state, lengths, seq_idx = inputs
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, length, heads, channels)")
    b, l, h, p = x.shape
    if B.dim() != 4 or tuple(B.shape[:2]) != (b, l):
        raise ValueError(f"B has shape {tuple(B.shape)}; expected ({b}, {l}, groups, states)")
    g, n = B.shape[2:]
    if g == 0 or h % g:
        raise ValueError(f"B has {g} groups; allowed: divisors of the {h} heads")
    check_shape("dt", dt, (b, l, h))
    check_shape("A", A, (h,))
    check_shape("C", C, (b, l, g, n))
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            check_shape(name, value, (h,))
    if initial_state is not None:
        check_shape("initial_state", initial_state, (b, h, p, n), (1, h, p, n))
    check_lengths(lengths, b)
    check_seq_idx(seq_idx, b, l)


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain time loop, differentiated by autograd: the oracle for every other version.

    Arguments and results are those of `ssd_scan`.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    ct = compute_dtype(x)
    with no_autocast(x):
        xf, B_, C_ = x.to(ct), B.to(ct), C.to(ct)
        raw, real = dt.to(ct), None
        if lengths is not None:
            # Before the softplus and behind it: its derivative at what stands in the padding may be no number.
            real = (torch.arange(l, device=x.device) < lengths[:, None])[..., None]
            raw = torch.where(real, raw, 0.0)
            xf, B_, C_ = (torch.where(real[..., None], v, 0.0) for v in (xf, B_, C_))
        step = F.softplus(raw if dt_bias is None else raw + dt_bias.to(ct))
        if real is not None:
            step = torch.where(real, step, 0.0)
        h0 = x.new_zeros(b, h, p, n, dtype=ct) if initial_state is None else initial_state.to(ct)
        h0 = h0.expand(b, h, p, n)
        decay = torch.exp(step * A.to(ct))
        drive = step[..., None] * xf
        B_, C_ = (v.repeat_interleave(h // g, dim=2) for v in (B_, C_))
        # Indexing [:, t] in the loop would make autograd pad every slice's gradient to full length: quadratic.
        starts = None if seq_idx is None else document_starts(seq_idx, lengths).unbind(1)
        state, ys = h0, []
        for t, (a_t, x_t, b_t, c_t) in enumerate(
            zip(decay.unbind(1), drive.unbind(1), B_.unbind(1), C_.unbind(1), strict=True)
        ):
            if starts is not None:
                state = torch.where(starts[t][:, None, None, None], h0, state)
            state = a_t[..., None, None] * state + x_t[..., None] * b_t[:, :, None]
            ys.append(torch.einsum("bhpn,bhn->bhp", state, c_t))
        y = torch.stack(ys, 1) if ys else xf
        if D is not None:
            y = y + D.to(ct)[:, None] * xf
        return y.to(x.dtype), state.clone() if state is h0 else state


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One decode step; ``state`` (b, h, p, n) float32 is updated in place.

    Args:
        x: (b, h, p). dt: (b, h). B, C: (b, g, n). A, D and dt_bias (h,) as in ``ssd_scan``.
        valid: (b,) bool; a False row keeps its state and gives y = 0.

    Returns:
        y (b, h, p) in x.dtype.

    Raises:
        ValueError: a tensor whose shape does not fit the state's.
    """
    b, h, p, n = state.shape
    if B.dim() != 3 or B.shape[1] == 0 or h % B.shape[1]:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected ({b}, a divisor of {h}, {n})")
    g = B.shape[1]
    for name, value, shape in (
        ("x", x, (b, h, p)),
        ("dt", dt, (b, h)),
        ("A", A, (h,)),
        ("B", B, (b, g, n)),
        ("C", C, (b, g, n)),
    ):
        check_shape(name, value, shape)
    choice = _backend.resolve(UPDATE, backend, _backend.Call(x, A))
    if _backend.wants_kernel(UPDATE, choice.name, choice.forced):
        try:
            from .triton import decode

            if choice.forced or decode.takes_state(state):
                return decode.head_state_update(state, x, dt, A, B, C, D, dt_bias, valid)
        except Exception as error:
            _backend.kernel_failed(UPDATE, choice.name, error, was_forced=choice.forced)
    return state_update_torch(state, x, dt, A, B, C, D, dt_bias, valid)


def state_update_torch(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``ssd_state_update`` in plain PyTorch operations; the state is read and written twice, without temporaries."""
    ct = compute_dtype(x)
    b, h, p, n = state.shape
    g = B.shape[1]
    xf, Bf, Cf = x.to(ct), B.to(ct), C.to(ct)
    step = F.softplus(dt.to(ct) if dt_bias is None else dt.to(ct) + dt_bias.to(ct))
    if valid is not None:
        # Decay 1 and drive 0, whatever an absent token's numbers are.
        step = torch.where(valid[:, None], step, 0.0)
        xf, Bf, Cf = (torch.where(valid[:, None, None], v, 0.0) for v in (xf, Bf, Cf))
    new = state.to(ct)
    new.mul_(torch.exp(step * A.to(ct))[..., None, None])
    new.unflatten(1, (g, h // g)).addcmul_((step[..., None] * xf).view(b, g, h // g, p, 1), Bf[:, :, None, None])
    y = torch.bmm(new.reshape(b * g, -1, n), Cf.reshape(b * g, n, 1)).view(b, h, p)
    if D is not None:
        y = y + D.to(ct)[:, None] * xf
    if new is not state:
        state.copy_(new)
    return y.to(x.dtype)
