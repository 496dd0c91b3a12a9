"""The selective scan as one custom op: what autograd, ``torch.compile`` and activation checkpointing see.

The op takes the name of the implementation, chosen outside. Every implementation keeps the same thing for backward,
the state at every ``chunk`` steps, so one whose kernel does not build can hand over to PyTorch inside the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, scan_chunked
from ._checks import compute_dtype
from .scan_inputs import ScanInputs

OP = "selective_scan"
TRITON_CHUNK = 256


def run_scan(inputs: ScanInputs, kernel: str, forced: bool) -> tuple[Tensor, Tensor]:
    """y and the final state by implementation ``kernel``, "torch" or "triton"."""
    x, A = inputs.x, inputs.A
    chunk = TRITON_CHUNK if kernel == "triton" else scan_chunked.chunk_size(x.shape[0] * A.shape[0] * A.shape[1])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:9])
    y, final, _ = _scan(*inputs, chunk, save, kernel, forced)
    return y, final


@torch.library.custom_op("hymba::selective_scan", mutates_args=())
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
    seq_idx: Tensor | None,
    chunk: int,
    save: bool,
    kernel: str,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import scan_slices

            return scan_slices.forward(inputs, chunk, save)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return scan_chunked.forward(inputs, chunk, save)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx, chunk, save, kernel, forced):  # type: ignore[no-untyped-def]
    (b, l, d), n = x.shape, A.shape[1]
    dtype = compute_dtype(x)
    states = x.new_empty(-(-l // chunk) if save else 0, b, n, d, dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, d, n, dtype=dtype), states


@torch.library.custom_op("hymba::selective_scan_backward", mutates_args=())
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
    seq_idx: Tensor | None,
    states: Tensor,
    chunk: int,
    kernel: str,
    forced: bool,
) -> list[Tensor]:
    """Gradients of the nine floating inputs in order; empty where the input is None."""
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths, seq_idx)
    if backend.wants_kernel(OP, kernel, forced):
        try:
            from .triton import scan_slices

            return scan_slices.backward(dy, dfinal, inputs, states, chunk)
        except Exception as error:
            backend.kernel_failed(OP, kernel, error, was_forced=forced)
    return scan_chunked.backward(dy, dfinal, inputs, states, chunk)


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_state, *_):  # type: ignore[no-untyped-def]
    return [
        x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
        for v in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk, _, ctx.kernel, ctx.forced = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    grads = _scan_backward(dy, dfinal, *tensors, states, ctx.chunk, ctx.kernel, ctx.forced)
    floats = [g if t is not None else None for g, t in zip(grads, tensors[:9], strict=True)]
    return (*floats, None, None, None, None, None, None)


_scan.register_autograd(_backward, setup_context=_setup_context)
