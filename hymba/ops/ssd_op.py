"""The scan of Mamba-2 as one op: what autograd, ``torch.compile`` and activation checkpointing see.

The op takes the name of the implementation, chosen outside. Every implementation keeps the same thing for backward,
the state at every ``stride`` steps, so one whose kernel does not build can hand over to PyTorch inside the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, ssd_chunked
from ._checks import compute_dtype
from ._register import differentiable, opaque
from .ssd_inputs import SsdInputs

OP = "ssd_scan"
TRITON_STRIDE = 1024
"""Steps between the states that the kernels keep, a multiple of their chunks: a quarter of x's bytes, 128 states."""


def run_scan(inputs: SsdInputs, kernel: str, forced: bool) -> tuple[Tensor, Tensor]:
    """y and the final state by implementation ``kernel``, "torch" or "triton"."""
    stride = TRITON_STRIDE if kernel == "triton" else ssd_chunked.stride(inputs.x.shape[0] * inputs.x.shape[2])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:8])
    y, final, _ = _scan(*inputs, stride, save, kernel, forced)
    return y, final


def _like(v: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _fake_gradients(dy: Any, dfinal: Any, x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(0) if v is None else _like(v) for v in (x, *rest[:7])]


@opaque("ssd_scan_backward", _fake_gradients)
def _scan_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    stride: int,
    kernel: str,
    forced: bool,
) -> list[Tensor]:
    """Gradients of the eight floating inputs in order; empty where the input is None."""
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, initial_state, lengths, seq_idx)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import ssd_backward

            return ssd_backward.backward(dy, dfinal, inputs, states, stride)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return ssd_chunked.backward(dy, dfinal, inputs, states, stride)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.stride, _, ctx.kernel, ctx.forced = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    grads = _scan_backward(dy, dfinal, *tensors, states, ctx.stride, ctx.kernel, ctx.forced)
    floats = [g if t is not None else None for g, t in zip(grads, tensors[:8], strict=True)]
    return (*floats, None, None, None, None, None, None)


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    stride, save = rest[-4:-2]
    dtype = compute_dtype(x)
    states = x.new_empty(-(-l // stride) if save else 0, b, g, n, h // g, p, dtype=dtype)
    return _like(x), x.new_empty(b, h, p, n, dtype=dtype), states


@differentiable(OP, _fake, _setup, _gradients)
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    stride: int,
    save: bool,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, initial_state, lengths, seq_idx)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import ssd

            return ssd.forward(inputs, stride, save)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return ssd_chunked.forward(inputs, stride, save)
