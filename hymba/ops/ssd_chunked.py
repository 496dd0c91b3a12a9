"""The scan of Mamba-2 in PyTorch operations, with its backward written out. Runs anywhere, never waits for a device.

Inside a chunk of c steps the scan is a masked product, `(decay * C B^T) (dt x)`; between chunks it is a recurrence of
states. Blocks of several chunks are computed together and hold all buffers, so memory beyond inputs and outputs does
not grow with the length. Letters as in ``ops.ssd``; k chunks per block, r = h / g heads per group. Inside a block:

    x, y (b, k, g, c, r, p)    dt, decays (b, k, g, c, r)    B, C (b, k, g, c, n)    states (b, k, g, n, r, p)

so that what meets a state is one product of width r p per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, document_starts, no_autocast
from .ssd_inputs import SsdInputs

CHUNK = 64
_AT_ONCE = 1 << 21
"""Numbers in a buffer of decays between steps, c for each step and head."""


def stride(rows: int) -> int:
    """Steps per block, a multiple of CHUNK; rows: b h.

    States are kept for backward once per block. At four chunks they take up half of what x does with 128 states, and
    the buffers of a block four times what x does there.
    """
    for chunks in (16, 8):
        if chunks * rows * CHUNK * CHUNK <= _AT_ONCE:
            return chunks * CHUNK
    return 4 * CHUNK


@dataclass
class _Block:
    """One block's inputs and decays. Without documents, `other` is None; without padded steps, `pad` is.

    Attributes:
        s, e: its steps. x, B, C: inputs, zero where padded. raw, dt: (b, k, g, c, r) before and after softplus.
        reach: (c, c) or (b, k, 1, c, c), one where a step and an earlier one (or itself) are of one document.
        between: (b, k, g, r, c, c) decay from step to step, zero outside of `reach`.
        start: (b, k, g, c, r) decay from the state before the chunk; zero behind the start of a document.
        other: the same from the initial state; zero before the start of a document.
        end: (b, k, g, c, r) decay to the end of the chunk; zero in documents that end before.
    """

    s: int
    e: int
    x: Tensor
    B: Tensor
    C: Tensor
    raw: Tensor
    dt: Tensor
    pad: Tensor | None
    reach: Tensor
    between: Tensor
    start: Tensor
    other: Tensor | None
    end: Tensor

    def states(self, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        """From the state h (b, g, n, r, p) before the block: states before each chunk, and the one behind the last."""
        b, k, g, _, r, p = self.x.shape
        drive = ((self.end * self.dt)[..., None] * self.x).flatten(4)
        own = (self.B.transpose(3, 4) @ drive).view(b, k, g, -1, r, p)
        before = torch.empty_like(own)
        for i in range(k):
            before[:, i] = h
            h = self.start[:, i, :, -1, None, :, None] * h + own[:, i]
            if self.other is not None:
                h = h.addcmul_(self.other[:, i, :, -1, None, :, None], h0)
        return before, h

    def from_states(self, before: Tensor, h0: Tensor) -> Tensor:
        """What the states before each chunk give to y, (b, k, g, c, r, p)."""
        out = (self.C @ before.flatten(4)).view(self.x.shape) * self.start[..., None]
        if self.other is not None:
            out += (self.C @ h0[:, None].flatten(4)).view(self.x.shape) * self.other[..., None]
        return out


class _Blocks:
    """Cuts the inputs into blocks; what forward and backward share."""

    def __init__(self, inputs: SsdInputs, stride: int) -> None:
        x, self.dt, A, self.B, self.C, D, dt_bias, initial_state, lengths, seq_idx = inputs
        self.x = x
        self.b, self.l, self.h, self.p = x.shape
        self.g, self.n = self.B.shape[2:]
        self.r = self.h // self.g
        self.ct = compute_dtype(x)
        # Long sums of log decays are subtracted from each other: in float32, digits of what is left would be lost.
        self.wide = self.ct if x.device.type == "mps" else torch.float64
        self.c = min(CHUNK, self.l)
        self.A = A.to(self.ct).view(self.g, 1, self.r)
        self.bias = None if dt_bias is None else dt_bias.to(self.ct)
        self.D = None if D is None else D.to(self.ct).view(self.g, 1, self.r, 1)
        self.h0 = x.new_zeros(self.b, self.g, self.n, self.r, self.p, dtype=self.ct)
        if initial_state is not None:
            self.h0 = self.inside(initial_state.to(self.ct)).expand_as(self.h0).contiguous()
        self.pad = None
        if lengths is not None:
            self.pad = torch.arange(self.l, device=x.device) >= lengths[:, None]
        self.starts = None if seq_idx is None else document_starts(seq_idx, lengths)
        self.restarts = initial_state is not None
        ones = torch.ones(self.c, self.c, dtype=torch.bool, device=x.device)
        self.triangle = ones.tril()

    def inside(self, state: Tensor) -> Tensor:
        """(b, h, p, n) -> (b, g, n, r, p)."""
        return state.unflatten(1, (self.g, self.r)).permute(0, 1, 4, 2, 3)

    def outside(self, state: Tensor) -> Tensor:
        """(b, g, n, r, p) -> (b, h, p, n), contiguous."""
        return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()

    def chunks(self, v: Tensor) -> Tensor:
        """(b, steps, ...) -> (b, k, c, ...), zeros (False) behind the last step."""
        steps = v.shape[1]
        missing = -steps % self.c
        if missing:
            v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing))
        return v.unflatten(1, (-1, self.c))

    def take(self, v: Tensor, s: int, e: int) -> Tensor:
        """(b, l, g or h, w) -> (b, k, g, c, w or r w) in compute dtype, zero where padded."""
        v = v[:, s:e].to(self.ct)
        if self.pad is not None:
            v = v.masked_fill(self.pad[:, s:e, None, None], 0.0)
        return self.chunks(v.unflatten(2, (self.g, -1)).flatten(3)).transpose(2, 3).contiguous()

    def give(self, v: Tensor, out: Tensor, s: int, e: int) -> None:
        """The way back: write (b, k, g, c, ...) to out[:, s:e] (b, e - s, ...)."""
        v = v.transpose(2, 3).flatten(1, 2)[:, : e - s]
        out[:, s:e] = v.reshape(v.shape[0], e - s, *out.shape[2:])

    def heads(self, v: Tensor, s: int, e: int) -> Tensor:
        """`take` of a tensor like x: (b, k, g, c, r, p)."""
        return self.take(v, s, e).unflatten(-1, (self.r, self.p))

    def block(self, s: int, e: int) -> _Block:
        raw = self.dt[:, s:e].to(self.ct)
        if self.bias is not None:
            raw = raw + self.bias
        pad = None if self.pad is None else self.pad[:, s:e, None]
        dt = F.softplus(raw)
        if pad is not None:
            dt = dt.masked_fill(pad, 0.0)
        dt = self.chunks(dt).unflatten(3, (self.g, self.r)).transpose(2, 3).contiguous()
        reach, first, last = self.triangle, None, None
        if self.starts is not None:
            document = self.chunks(self.starts[:, s:e]).cumsum(2)
            reach = (reach & (document[..., None] == document[:, :, None]))[:, :, None]
            first, last = ((document == end)[:, :, None, :, None] for end in (0, document[:, :, -1:]))
        # Logarithms to the base 2: exp2 is vectorised everywhere, exp goes to a slow path on some CPUs.
        rate = (dt * (self.A * math.log2(math.e))).to(self.wide)
        # (b, k, g, c, r): the sum over the steps of the chunk, from the start of the document, up to this one.
        log = reach.to(self.wide) @ rate
        start, end = log.exp2().to(self.ct), (log[:, :, :, -1:] - log).exp2().to(self.ct)
        other = None
        if first is not None and last is not None:
            other = start.masked_fill(first, 0.0) if self.restarts else None
            start, end = start.masked_fill(~first, 0.0), end.masked_fill(~last, 0.0)
        log = log.transpose(3, 4)
        between = torch.empty(*log.shape, self.c, dtype=self.ct, device=log.device)
        torch.sub(log[..., :, None], log[..., None, :], out=between).exp2_()
        if self.starts is None:
            between.tril_()
        else:
            between.masked_fill_(~reach[:, :, :, None], 0.0)
        x, B, C = self.heads(self.x, s, e), self.take(self.B, s, e), self.take(self.C, s, e)
        return _Block(s, e, x, B, C, raw, dt, pad, reach, between, start, other, end)


def forward(inputs: SsdInputs, stride: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, h, p, n), and the state before each block (blocks, b, g, n, r, p), empty unless save."""
    x = inputs.x
    with no_autocast(x):
        bs = _Blocks(inputs, stride)
        h = bs.h0.clone()
        states = h.new_empty(-(-bs.l // stride) if save else 0, *h.shape)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for s in range(0, bs.l, stride):
            if save:
                states[s // stride] = h
            block = bs.block(s, min(s + stride, bs.l))
            before, h = block.states(h, bs.h0)
            out = block.from_states(before, bs.h0)
            mixing = block.between.mul_((block.C @ block.B.transpose(3, 4))[:, :, :, None])
            out += (mixing @ (block.dt[..., None] * block.x).transpose(3, 4)).transpose(3, 4)
            if bs.D is not None:
                out.addcmul_(bs.D, block.x)
            bs.give(out, y, block.s, block.e)
        return y, bs.outside(h), states


def backward(dy: Tensor | None, dfinal: Tensor | None, inputs: SsdInputs, states: Tensor, stride: int) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias, initial_state in that order; empty where the input is None."""
    x, dt, A, B, C, D, dt_bias, initial_state, _, _ = inputs
    with no_autocast(x):
        bs = _Blocks(inputs, stride)
        ct = bs.ct
        dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
        dA, dD, dbias = (x.new_zeros(bs.h, dtype=ct) for _ in range(3))
        dh0 = torch.zeros_like(bs.h0)
        carry = torch.zeros_like(bs.h0) if dfinal is None else bs.inside(dfinal.to(ct)).contiguous()
        for s in range((bs.l - 1) // stride * stride, -1, -stride):
            block = bs.block(s, min(s + stride, bs.l))
            e, k = block.e, block.x.shape[1]
            gy = torch.zeros_like(block.x) if dy is None else bs.heads(dy, s, e)
            before, _ = block.states(states[s // stride], bs.h0)
            drive = block.dt[..., None] * block.x

            # after: what the chunks behind ask of the state at the end of each chunk.
            asked = (block.C.transpose(3, 4) @ (gy * block.start[..., None]).flatten(4)).view(before.shape)
            after = torch.empty_like(before)
            for i in range(k - 1, -1, -1):
                after[:, i] = carry
                carry = (block.start[:, i, :, -1, None, :, None] * carry).add_(asked[:, i])
            through = after * before * block.start[:, :, :, -1, None, :, None]
            gC = (gy * block.start[..., None]).flatten(4) @ before.flatten(4).transpose(3, 4)
            if block.other is not None:
                again = gy * block.other[..., None]
                dh0 += (block.C.transpose(3, 4) @ again.flatten(4)).view(before.shape).sum(1)
                last = block.other[:, :, :, -1, None, :, None] * after
                dh0 += last.sum(1)
                through += last * bs.h0[:, None]
                gC += again.flatten(4) @ bs.h0[:, None].flatten(4).transpose(3, 4)

            # Inside the chunks. glog is the gradient of the summed log decays. A pair of steps counts at both of its
            # ends, and cancels for the steps before both: exactly, because the same numbers are added up in float64.
            gyh, driveh = gy.transpose(3, 4).contiguous(), drive.transpose(3, 4).contiguous()
            scores = (block.C @ block.B.transpose(3, 4))[:, :, :, None]
            mixing = block.between * scores
            gdrive = (mixing.transpose(4, 5) @ gyh).transpose(3, 4)
            gmixing = gyh @ driveh.transpose(4, 5)
            gscores = (gmixing * block.between).sum(3)
            pairs = gmixing.mul_(mixing)
            glog = (pairs.sum(5, dtype=bs.wide) - pairs.sum(4, dtype=bs.wide)).transpose(3, 4)
            gC += gscores @ block.B
            gB = gscores.transpose(3, 4) @ block.C

            # Between the chunks.
            gB += (drive * block.end[..., None]).flatten(4) @ after.flatten(4).transpose(3, 4)
            gend = (block.B @ after.flatten(4)).view(block.x.shape) * block.end[..., None]
            gdrive = gdrive + gend
            left = (gend * drive).sum(5)
            glog = glog + (gy * block.from_states(before, bs.h0)).sum(5) - left
            glog[:, :, :, -1] += left.sum(3, dtype=bs.wide) + through.sum((3, 5))

            grate = (block.reach.to(bs.wide).transpose(-1, -2) @ glog).to(ct)
            gdt = (gdrive * block.x).sum(5).addcmul_(grate, bs.A)
            dA += (grate * block.dt).sum((0, 1, 3)).flatten()
            gx = gdrive * block.dt[..., None]
            if bs.D is not None:
                gx.addcmul_(gy, bs.D)
                dD += (gy * block.x).sum((0, 1, 3, 5)).flatten()
            flat = gdt.transpose(2, 3).flatten(1, 2)[:, : e - s].flatten(2) * torch.sigmoid(block.raw)
            if block.pad is not None:
                flat = flat.masked_fill(block.pad, 0.0)
            dbias += flat.sum((0, 1))
            ddt[:, s:e] = flat
            for gradient, out in ((gx, dx), (gB, dB), (gC, dC)):
                bs.give(gradient, out, s, e)
        dh0 += carry
        none = x.new_empty(0)
        d_initial = none
        if initial_state is not None:
            d_initial = bs.outside(dh0.sum_to_size(initial_state.shape[0], *dh0.shape[1:])).to(initial_state.dtype)
        return [
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            none.clone() if D is None else dD.to(D.dtype),
            none.clone() if dt_bias is None else dbias.to(dt_bias.dtype),
            d_initial,
        ]
