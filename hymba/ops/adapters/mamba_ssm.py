"""The selective scan of mamba-ssm (its extension `selective_scan_cuda`) and its decode step, behind our contract.

Their scan starts from zeros, gives the final state no gradient and knows no lengths. As it is, it serves calls that
want none of this ("plain"). For the others three exact additions ("framed", in float32):

- n steps in front load the initial state. Step j has step size 2**-60, input h0[:, j] * 2**60 and B = e_j: the decay
  exp(2**-60 A) is 1 in float32, the product is h0[:, j] bit for bit.
- n steps behind read the final state: step size 0, C = e_j, gate 1. Their outputs are thrown away; the gradient of the
  final state goes in as the gradient of theirs.
- A padded step has step size 0, which leaves the state alone.

The softplus is then outside the kernel, because no value before it gives a step size of 0.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import adapters
from .._checks import no_autocast
from ..scan_inputs import ScanInputs

if TYPE_CHECKING:
    from ..backend import Call

PACKAGE = "mamba_ssm"
EXTENSION = "selective_scan_cuda"
UPDATE = "mamba_ssm.ops.triton.selective_state_update"

_TINY = 2.0**-60
_MAX_STATES = 256
# Steps that the kernel keeps one state for, for its backward.
_KERNEL_CHUNK = 2048


@torch.compiler.assume_constant_result
def probe_scan() -> str | None:
    return adapters.refusal(PACKAGE, EXTENSION)


@torch.compiler.assume_constant_result
def probe_update() -> str | None:
    return adapters.refusal(PACKAGE, EXTENSION, UPDATE)


def serves_scan(call: Call) -> str | None:
    if call.seq_idx is not None:
        return "it has no documents within a row (seq_idx)"
    if call.x.numel() == 0:
        return "x is empty"
    if call.weight.shape[1] > _MAX_STATES:
        return f"it takes up to {_MAX_STATES} states, A has {call.weight.shape[1]}"
    return serves_update(call)


def serves_update(call: Call) -> str | None:
    if call.x.device.type != adapters.DEVICE:
        return f"the tensors are on {call.x.device.type!r}"
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {call.x.dtype}; it takes float32, bfloat16 and float16"
    if call.weight.is_complex():
        return "A is complex"
    return None


class _Arguments(NamedTuple):
    """What the kernel takes, channels before steps: u, delta, z (b, d, l), A (d, n), B and C (b, 1, n, l)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool


def _is_plain(inputs: ScanInputs) -> bool:
    one_dtype = all(v is None or v.dtype == inputs.x.dtype for v in (inputs.dt, inputs.B, inputs.C, inputs.z))
    return inputs.initial_state is None and inputs.lengths is None and one_dtype


def _steps_last(v: Tensor) -> Tensor:
    return v.transpose(1, 2).contiguous()


def _plain(inputs: ScanInputs) -> _Arguments:
    x, dt, A, B, C, D, z, bias = inputs[:8]
    return _Arguments(
        u=_steps_last(x),
        delta=_steps_last(dt),
        A=A.float().contiguous(),
        B=_steps_last(B)[:, None],
        C=_steps_last(C)[:, None],
        D=None if D is None else D.float().contiguous(),
        z=None if z is None else _steps_last(z),
        bias=None if bias is None else bias.float().contiguous(),
        softplus=True,
    )


class _Frame:
    """The sequence with n steps in front when there is an initial state, and n behind."""

    def __init__(self, inputs: ScanInputs) -> None:
        self.inputs = inputs
        (b, l, d), n = inputs.x.shape, inputs.A.shape[1]
        self.b, self.d, self.n = b, d, n
        self.front = 0 if inputs.initial_state is None else n
        self.total = self.front + l + n
        self.text = slice(self.front, self.front + l)
        self.pad = None
        if inputs.lengths is not None:
            self.pad = torch.arange(l, device=inputs.x.device) >= inputs.lengths[:, None]

    def _place(self, v: Tensor) -> Tensor:
        """(b, l, c) as (b, c, total) float32, zero in the frame and on padded steps."""
        out = v.new_zeros(self.b, v.shape[2], self.total, dtype=torch.float32)
        out[:, :, self.text] = v.transpose(1, 2)
        if self.pad is not None:
            out[:, :, self.text].masked_fill_(self.pad[:, None], 0.0)
        return out

    def before_softplus(self) -> Tensor:
        """(b, l, d) float32."""
        dt, bias = self.inputs.dt.float(), self.inputs.dt_bias
        return dt if bias is None else dt + bias.float()

    def arguments(self) -> _Arguments:
        inputs, front, n = self.inputs, self.front, self.n
        u, delta = self._place(inputs.x), self._place(F.softplus(self.before_softplus()))
        B, C = self._place(inputs.B), self._place(inputs.C)
        z = None if inputs.z is None else self._place(inputs.z)
        one = torch.eye(n, device=u.device)
        if inputs.initial_state is not None:
            delta[:, :, :front] = _TINY
            u[:, :, :front] = inputs.initial_state / _TINY
            B[:, :, :front] = one
        C[:, :, self.text.stop :] = one
        if z is not None:
            z[:, :, self.text.stop :] = 1.0
        D = None if inputs.D is None else inputs.D.float().contiguous()
        return _Arguments(u, delta, inputs.A.float().contiguous(), B[:, None], C[:, None], D, z, None, False)

    def gradient_of_outputs(self, dy: Tensor | None, dfinal: Tensor | None) -> Tensor:
        """(b, d, total) from dy (b, l, d) and dfinal (b, d, n)."""
        like = self.inputs.x
        dout = like.new_zeros(self.b, self.d, self.total, dtype=torch.float32) if dy is None else self._place(dy)
        if dfinal is not None:
            gate = 1.0 if self.inputs.z is None else F.silu(torch.ones((), device=like.device))
            dout[:, :, self.text.stop :] = dfinal / gate
        return dout


def _kernels() -> tuple:
    extension = importlib.import_module(EXTENSION)
    return extension.fwd, extension.bwd


@torch.library.custom_op("hymba::mamba_ssm_scan", mutates_args=())
def _scan(
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
    framed: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n), and what the kernel's backward wants: its states, y before the gate."""
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths)
    y, states, out = _run(inputs, framed)
    final = states[:, :, -1, 1::2].contiguous()
    if not save:
        states, out = x.new_empty(0, dtype=torch.float32), x.new_empty(0)
    return y.transpose(1, 2).contiguous().to(x.dtype), final, states, out if z is not None else x.new_empty(0)


def _run(inputs: ScanInputs, framed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, d, l), the kernel's states, and its y before the gate, over the frame."""
    forward, _ = _kernels()
    frame = _Frame(inputs) if framed else None
    with no_autocast(inputs.x):
        arguments = _plain(inputs) if frame is None else frame.arguments()
        out, states, *gated = forward(*arguments)
    y = gated[0] if gated else out
    if frame is not None:
        y = y[:, :, frame.text]
        if frame.pad is not None:
            y = y.masked_fill(frame.pad[:, None], 0.0)
    return y, states, out


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, framed, save):  # type: ignore[no-untyped-def]
    (b, l, d), n = x.shape, A.shape[1]
    total = l if not framed else l + n if initial_state is None else l + 2 * n
    states = x.new_empty(b, d, -(-total // _KERNEL_CHUNK), 2 * n, dtype=torch.float32)
    out = x.new_empty(b, d, total, dtype=torch.float32 if framed else x.dtype)
    none = x.new_empty(0)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(b, d, n, dtype=torch.float32)
    return y, final, states if save else none.float(), out if save and z is not None else none


@torch.library.custom_op("hymba::mamba_ssm_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
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
    states: Tensor,
    out: Tensor,
    framed: bool,
) -> list[Tensor]:
    """Gradients of the nine floating inputs in order; empty where the input is None."""
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths)
    if dfinal is not None and not framed:
        # The plain call left nothing to read the final state by: once more, with a frame.
        framed = True
        _, states, out = _run(inputs, framed)
    _, backward = _kernels()
    with no_autocast(x):
        frame = _Frame(inputs) if framed else None
        if frame is None:
            assert dy is not None
            arguments, dout = _plain(inputs), _steps_last(dy.to(x.dtype))
        else:
            arguments, dout = frame.arguments(), frame.gradient_of_outputs(dy, dfinal)
        *most, softplus = arguments
        du, ddelta, dA, dB, dC, dD, dbias, *rest = backward(
            *most, dout, states, out if z is not None else None, None, softplus, False
        )
        dB, dC, dh0 = dB[:, 0], dC[:, 0], None
        dz = rest[0] if z is not None else None
        if frame is not None:
            dh0 = du[:, :, : frame.front] / _TINY if frame.front else None
            du, ddelta, dB, dC = (v[:, :, frame.text] for v in (du, ddelta, dB, dC))
            dz = None if dz is None else dz[:, :, frame.text]
            ddelta = ddelta * torch.sigmoid(frame.before_softplus()).transpose(1, 2)
            if frame.pad is not None:
                ddelta = ddelta.masked_fill(frame.pad[:, None], 0.0)
            dbias = ddelta.sum((0, 2))
    if dh0 is not None and initial_state is not None:
        dh0 = dh0.sum_to_size(initial_state.shape)
    wide = [None if v is None else v.transpose(1, 2) for v in (du, ddelta, dB, dC, dz)]
    grads = (wide[0], wide[1], dA, wide[2], wide[3], dD, wide[4], dbias, dh0)
    return [x.new_empty(0) if v is None else g.to(v.dtype).contiguous() for v, g in zip(inputs[:9], grads, strict=True)]


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_state, *_):  # type: ignore[no-untyped-def]
    return [
        x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
        for v in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.framed, _ = inputs
    ctx.save_for_backward(*tensors, output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, *_):  # type: ignore[no-untyped-def]
    *tensors, states, out = ctx.saved_tensors
    if dy is None and dfinal is None:
        return (None,) * 12
    if dy is None and not ctx.framed:
        dy = torch.zeros_like(tensors[0])
    grads = _scan_backward(dy, dfinal, *tensors, states, out, ctx.framed)
    return (*(g if t is not None else None for g, t in zip(grads, tensors[:9], strict=True)), None, None, None)


_scan.register_autograd(_backward, setup_context=_setup_context)


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """``hymba.ops.selective_scan``: y (b, l, d) in x.dtype and the final state (b, d, n) in float32."""
    framed = not _is_plain(inputs)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:9])
    y, final, *_ = _scan(*inputs[:10], framed, save)
    return y, final


@torch.library.custom_op("hymba::mamba_ssm_state_update", mutates_args=("state",))
def state_update(
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
    """``hymba.ops.selective_state_update``; a row that is not valid takes a step of size 0."""
    if valid is not None:
        row = valid[:, None]
        dt = torch.where(row, dt, -torch.inf)
        x, B, C = torch.where(row, x, 0), torch.where(row, B, 0), torch.where(row, C, 0)
    # It takes no None for these two, whatever its signature says.
    D = A.new_zeros(A.shape[0]) if D is None else D
    dt_bias = A.new_zeros(A.shape[0]) if dt_bias is None else dt_bias
    update = importlib.import_module(UPDATE).selective_state_update
    y = update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return y if valid is None else torch.where(valid[:, None], y, 0)


@state_update.register_fake
def _(state, x, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)
