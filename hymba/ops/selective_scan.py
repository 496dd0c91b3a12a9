"""Selective scan (Mamba-1): reference, chunked PyTorch version with its own backward, decode step, dispatcher.

Letters: b rows, l steps, d channels, n states per channel, c steps per chunk, k chunks.
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

OP = "selective_scan"


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
    call = _backend.Call(x, initial_state=initial_state is not None, lengths=lengths is not None,
                         seq_idx=seq_idx is not None, sizes={"n": A.shape[1]})
    run = _backend.resolve(OP, backend, call)
    return run(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx)


def _check_arguments(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None,
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
    """The plain time loop, differentiated by autograd: the oracle for every other version. Same contract."""
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


def chunk_size(state_numel: int) -> int:
    """Steps per chunk for a state of that many numbers: a few MB per buffer, so that a chunk stays in cache."""
    for c in (64, 32, 16):
        if c * state_numel <= 3 << 19:
            return c
    return 8


def scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The chunked version as one custom op (what ``backend="torch"`` runs). Same contract as ``selective_scan``."""
    c = chunk_size(x.shape[0] * A.shape[0] * A.shape[1])
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, _ = _scan_op(*tensors, lengths, seq_idx, c, save)
    return y, final


class _Chunks:
    """What forward and backward share: the inputs in compute dtype, one time-major chunk at a time.

    Chunks are (c, b, n, d): with channels innermost every broadcast is a full-width vector loop (with the 16
    states innermost, PyTorch's elementwise loops run 16 numbers at a time), and one step is one contiguous block.
    """

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None,
                 initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None) -> None:
        self.b, self.l, self.d = x.shape
        self.n = A.shape[1]
        self.ct = compute_dtype(x)
        self.x, self.dt, self.B = x, dt, B
        self.At = A.to(self.ct).t().contiguous()
        self.At2 = self.At * math.log2(math.e)  # exp2 is vectorised everywhere, exp goes to a slow path on some CPUs
        self.bias = None if dt_bias is None else dt_bias.to(self.ct)
        if initial_state is None:
            self.h0 = x.new_zeros(self.b, self.n, self.d, dtype=self.ct)
        else:
            h0 = initial_state.to(self.ct).transpose(1, 2)
            self.h0 = h0.expand(self.b, self.n, self.d).contiguous()
        self.pad = None
        if lengths is not None:
            self.pad = torch.arange(self.l, device=x.device)[:, None] >= lengths
        self.resets: dict[int, Tensor] = {}
        if seq_idx is not None:
            starts = document_starts(seq_idx, lengths)
            for t in starts.any(0).nonzero().flatten().tolist():
                self.resets[t] = starts[:, t].nonzero().flatten()

    def take(self, v: Tensor, s: int, e: int) -> Tensor:
        """(b, l, w) -> (e - s, b, w), compute dtype, contiguous, padded steps zero."""
        out = v[:, s:e].transpose(0, 1).to(self.ct).contiguous()
        return out if self.pad is None else out.masked_fill(self.pad[s:e, :, None], 0.0)

    def steps(self, s: int, e: int) -> tuple[Tensor, Tensor]:
        """dt before and after softplus, (c, b, d). A padded step has dt = 0 after it: decay 1, drive 0."""
        raw = self.dt[:, s:e].transpose(0, 1).to(self.ct).contiguous()
        if self.bias is not None:
            raw = raw + self.bias
        dt = F.softplus(raw)
        if self.pad is not None:
            dt.masked_fill_(self.pad[s:e, :, None], 0.0)
        return raw, dt

    def run(self, h: Tensor, dt: Tensor, dtx: Tensor, B: Tensor, s: int, decay: Tensor, hs: Tensor) -> None:
        """Fill decay and hs (c, b, n, d) with exp(dt A) and the states after each step, starting from h."""
        torch.mul(dt.unsqueeze(2), self.At2, out=decay).exp2_()
        torch.mul(dtx.unsqueeze(2), B.unsqueeze(3), out=hs)
        for i in range(hs.shape[0]):
            h = self.before(h, s + i)
            h = hs[i].addcmul_(decay[i], h)

    def before(self, h: Tensor, t: int) -> Tensor:
        """The state that step t starts from: h, with the initial state in rows where a document starts at t."""
        rows = self.resets.get(t)
        return h if rows is None else h.index_copy(0, rows, self.h0[rows])


@torch.library.custom_op("hymba::selective_scan", mutates_args=())
def _scan_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None,
    chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the final state (b, d, n) and the state at each chunk's start (k, b, n, d), empty unless save."""
    with no_autocast(x):
        ck = _Chunks(x, dt, A, B, dt_bias, initial_state, lengths, seq_idx)
        b, l, d, n = ck.b, ck.l, ck.d, ck.n
        states = x.new_empty(-(-l // chunk) if save else 0, b, n, d, dtype=ck.ct)
        decay, hs = (x.new_empty(min(chunk, l), b, n, d, dtype=ck.ct) for _ in range(2))
        Df = None if D is None else D.to(ck.ct)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        h = ck.h0.clone()
        for s in range(0, l, chunk):
            e = min(s + chunk, l)
            if save:
                states[s // chunk] = h
            xc, Bc, Cc = ck.take(x, s, e), ck.take(B, s, e), ck.take(C, s, e)
            _, dtc = ck.steps(s, e)
            ck.run(h, dtc, dtc * xc, Bc, s, decay[: e - s], hs[: e - s])
            out = torch.bmm(Cc.view(-1, 1, n), hs[: e - s].view(-1, n, d)).view(e - s, b, d)
            if Df is not None:
                out.addcmul_(Df, xc)
            if z is not None:
                out *= F.silu(ck.take(z, s, e))
            y[:, s:e] = out.transpose(0, 1)
            h = hs[e - s - 1].clone()
        return y, h.transpose(1, 2).contiguous(), states


@_scan_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx, chunk, save):  # type: ignore[no-untyped-def]
    (b, l, d), n = x.shape, A.shape[1]
    ct = compute_dtype(x)
    states = x.new_empty(-(-l // chunk) if save else 0, b, n, d, dtype=ct)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, d, n, dtype=ct), states


@torch.library.custom_op("hymba::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    lengths: Tensor | None, seq_idx: Tensor | None, states: Tensor, chunk: int,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state in that order; empty where the input is None."""
    with no_autocast(x):
        ck = _Chunks(x, dt, A, B, dt_bias, initial_state, lengths, seq_idx)
        b, l, d, n, ct = ck.b, ck.l, ck.d, ck.n, ck.ct
        dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
        dz = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
        dA, dh0 = x.new_zeros(n, d, dtype=ct), x.new_zeros(b, n, d, dtype=ct)
        dD, dbias = x.new_zeros(d, dtype=ct), x.new_zeros(d, dtype=ct)
        Df = None if D is None else D.to(ct)
        decay, hs, gs = (x.new_empty(min(chunk, l), b, n, d, dtype=ct) for _ in range(3))
        carry = torch.zeros_like(ck.h0) if dfinal is None else dfinal.to(ct).transpose(1, 2).contiguous()
        for s in range((l - 1) // chunk * chunk, -1, -chunk):
            e = min(s + chunk, l)
            c = e - s
            a_, h_, g_ = decay[:c], hs[:c], gs[:c]
            xc, Bc, Cc = ck.take(x, s, e), ck.take(B, s, e), ck.take(C, s, e)
            raw, dtc = ck.steps(s, e)
            dtx = dtc * xc
            h_start = states[s // chunk]
            ck.run(h_start, dtc, dtx, Bc, s, a_, h_)
            gy = x.new_zeros(c, b, d, dtype=ct) if dy is None else ck.take(dy, s, e)
            if z is not None:
                zc = ck.take(z, s, e)
                out = torch.bmm(Cc.view(-1, 1, n), h_.view(-1, n, d)).view(c, b, d)
                if Df is not None:
                    out.addcmul_(Df, xc)
                sig = torch.sigmoid(zc)
                dz[:, s:e] = (gy * out * sig * (1 + zc * (1 - sig))).transpose(0, 1)
                gy = gy * (zc * sig)
            # g_t = dL/dh_t: what y_t asks for, plus what step t + 1 passes down.
            torch.mul(gy.unsqueeze(2), Cc.unsqueeze(3), out=g_)
            for i in range(c - 1, -1, -1):
                g = g_[i].add_(carry) if i == c - 1 else g_[i].addcmul_(a_[i + 1], g_[i + 1])
                rows = ck.resets.get(s + i + 1)
                if rows is not None and i < c - 1:
                    # A document starts at the next step: it passed its gradient to the initial state instead.
                    g[rows] -= a_[i + 1][rows] * g_[i + 1][rows]
            dC[:, s:e] = torch.bmm(gy.view(-1, 1, d), h_.view(-1, n, d).transpose(1, 2)).view(c, b, n).transpose(0, 1)
            dB[:, s:e] = torch.bmm(dtx.view(-1, 1, d), g_.view(-1, n, d).transpose(1, 2)).view(c, b, n).transpose(0, 1)
            ddtx = torch.bmm(Bc.view(-1, 1, n), g_.view(-1, n, d)).view(c, b, d)
            a_.mul_(g_)
            carry = a_[0].clone()
            for t in range(s, e):
                rows = ck.resets.get(t)
                if rows is not None:
                    dh0.index_add_(0, rows, a_[t - s][rows])
                    if t == s:
                        carry[rows] = 0.0
            # From here a_ is dL/d(dt A) = g * decay * (state before the step); g_ is scratch.
            for t in (t for t in range(s + 1, e) if t in ck.resets):
                h_[t - s - 1] = ck.before(h_[t - s - 1], t)
            a_[1:].mul_(h_[:-1])
            a_[0].mul_(ck.before(h_start, s))
            torch.mul(a_, ck.At, out=g_)
            gdt = g_.sum(2).addcmul_(ddtx, xc)
            dA += a_.mul_(dtc.unsqueeze(2)).sum((0, 1))
            gdt *= torch.sigmoid(raw)
            gx = ddtx.mul_(dtc)
            if ck.pad is not None:
                gdt.masked_fill_(ck.pad[s:e, :, None], 0.0)
            if Df is not None:
                gx.addcmul_(gy, Df)
                dD += (gy * xc).sum((0, 1))
            dbias += gdt.sum((0, 1))
            dx[:, s:e] = gx.transpose(0, 1)
            ddt[:, s:e] = gdt.transpose(0, 1)
        dh0 += carry
        none = x.new_empty(0)
        if initial_state is None:
            d_initial = none
        else:
            d_initial = dh0.sum_to_size(initial_state.shape[0], n, d).transpose(1, 2).to(initial_state.dtype)
        return [dx, ddt, dA.t().to(A.dtype, memory_format=torch.contiguous_format).contiguous(), dB, dC,
                none.clone() if D is None else dD.to(D.dtype), dz,
                none.clone() if dt_bias is None else dbias.to(dt_bias.dtype), d_initial.contiguous()]


@_scan_backward_op.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx, states, chunk):  # type: ignore[no-untyped-def]
    return [x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
            for v in (x, dt, A, B, C, D, z, dt_bias, initial_state)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, chunk, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.chunk = chunk
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    grads = _scan_backward_op(dy, dfinal, *tensors, states, ctx.chunk)
    floats = [g if t is not None else None for g, t in zip(grads, tensors[:9], strict=True)]
    return (*floats, None, None, None, None)


_scan_op.register_autograd(_backward, setup_context=_setup_context)


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
    for name, value, shape in (("x", x, (b, d)), ("dt", dt, (b, d)), ("A", A, (d, n)), ("B", B, (b, n)), ("C", C, (b, n))):
        check_shape(name, value, shape)
    run = _backend.resolve("selective_state_update", backend, _backend.Call(x, sizes={"n": n}))
    return run(state, x, dt, A, B, C, D, z, dt_bias, valid)


def state_update_torch(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, valid: Tensor | None,
) -> Tensor:
    """``selective_state_update`` in plain PyTorch operations."""
    ct = compute_dtype(x)
    xf = x.to(ct)
    step = F.softplus(dt.to(ct) if dt_bias is None else dt.to(ct) + dt_bias.to(ct))
    new = torch.exp(step[..., None] * A.to(ct)) * state + (step * xf)[..., None] * B.to(ct)[:, None]
    y = (new * C.to(ct)[:, None]).sum(-1)
    if D is not None:
        y = y + D.to(ct) * xf
    if z is not None:
        y = y * F.silu(z.to(ct))
    if valid is not None:
        new = torch.where(valid[:, None, None], new, state)
        y = torch.where(valid[:, None], y, 0.0)
    state.copy_(new)
    return y.to(x.dtype)


_backend.register(OP, "reference", selective_scan_ref, auto=False)
_backend.register(OP, "torch", scan_chunked)
_backend.register("selective_state_update", "torch", state_update_torch)
