"""Selective scan in PyTorch operations, chunk by chunk, with its backward written out. Runs anywhere.

Letters as in ``ops.selective_scan``; c steps per chunk, k chunks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, document_starts, no_autocast
from .scan_inputs import ScanInputs


def chunk_size(state_numel: int) -> int:
    """Steps per chunk for a state of that many numbers: a few MB per buffer, so that a chunk stays in cache."""
    for c in (64, 32, 16):
        if c * state_numel <= 3 << 19:
            return c
    return 8


class _Chunks:
    """What forward and backward share: the inputs in compute dtype, one time-major chunk at a time.

    Chunks are (c, b, n, d): with channels innermost every broadcast is a full-width vector loop (with the 16
    states innermost, PyTorch's elementwise loops run 16 numbers at a time), and one step is one contiguous block.
    """

    def __init__(self, inputs: ScanInputs) -> None:
        x, self.dt, A, self.B, _, _, _, dt_bias, initial_state, lengths, seq_idx = inputs
        self.b, self.l, self.d = x.shape
        self.n = A.shape[1]
        self.ct = compute_dtype(x)
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


def forward(inputs: ScanInputs, chunk: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, d, n) and the state at each chunk's start (k, b, n, d), empty unless save."""
    x, _, _, B, C, D, z, *_ = inputs
    with no_autocast(x):
        ck = _Chunks(inputs)
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


def backward(dy: Tensor | None, dfinal: Tensor | None, inputs: ScanInputs, states: Tensor, chunk: int) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state in that order; empty where the input is None."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, _, _ = inputs
    with no_autocast(x):
        ck = _Chunks(inputs)
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
        return [
            dx,
            ddt,
            dA.t().to(A.dtype, memory_format=torch.contiguous_format).contiguous(),
            dB,
            dC,
            none.clone() if D is None else dD.to(D.dtype),
            dz,
            none.clone() if dt_bias is None else dbias.to(dt_bias.dtype),
            d_initial.contiguous(),
        ]
