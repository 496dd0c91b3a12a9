"""Which implementation serves an op: the one place that knows what exists, what was refused and why, what is forced.

Every op lists its implementations in order of preference. For one call, ``resolve`` takes the first that is usable
on this machine and serves these tensors. A choice can be forced, strongest first: the op's ``backend=`` argument,
``with use_backend(...)``, the environment variable ``HYMBA_BACKEND``. The last two take a name for every op that has
it ("torch"), or single ops ("selective_scan=torch,causal_conv1d=triton").
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import causal_conv1d as conv_package
from .adapters import flash_attention, mamba_ssm
from .masks import Visibility

ENV = "HYMBA_BACKEND"


class BackendError(RuntimeError):
    """A forced backend cannot serve: not usable on this machine, or not for these tensors."""


@dataclass(frozen=True)
class Call:
    """What a choice depends on: the activations and, for the scan, A (its states), else the conv weight (its taps).

    The rest is None where the call has none. For attention, x is the queries and weight the values, and no_kernel says
    why our kernels cannot take its arguments.
    """

    x: Tensor
    weight: Tensor
    initial_state: Tensor | None = None
    seq_idx: Tensor | None = None
    no_kernel: str | None = None
    visibility: Visibility | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Choice:
    """An implementation's name, and whether it must serve or may hand over."""

    name: str
    forced: bool


@dataclass(frozen=True)
class Row:
    """One line of ``available()``; version is that of the package that the backend comes from, None without it."""

    op: str
    backend: str
    usable: bool
    reason: str
    version: str | None = None


@dataclass(frozen=True)
class _Backend:
    """probe and serves return None, or the reason why not; without automatic it is only used when forced."""

    probe: Callable[[], str | None] = lambda: None
    serves: Callable[[Call], str | None] = lambda call: None
    automatic: Callable[[Call], bool] = lambda call: True
    package: str = "torch"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@torch.compiler.assume_constant_result
def _probe_triton() -> str | None:
    return _triton_refusal(_interpreted())


@functools.cache
def _triton_refusal(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if torch.version.hip is not None:
        return "written for NVIDIA devices, this is ROCm"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        return f"it needs compute capability 8.0 or newer, a device here has {oldest[0]}.{oldest[1]}"
    return None


def _triton_serves(call: Call) -> str | None:
    x = call.x
    if not x.is_cuda and not _interpreted():
        return f"the tensors are on {x.device.type!r}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    if x.numel() == 0:
        return "x is empty"
    return None


def _triton_conv_serves(call: Call) -> str | None:
    if call.weight.shape[1] > 4:
        return f"it takes up to 4 taps, the weight has {call.weight.shape[1]}"
    return _triton_serves(call)


def _triton_attention_serves(call: Call) -> str | None:
    return call.no_kernel or _triton_serves(call)


def _on_gpu(call: Call) -> bool:
    return call.x.is_cuda


def _many_on_gpu(call: Call) -> bool:
    """One query per row fills no tile, and its dense mask is small."""
    return call.x.is_cuda and call.x.shape[1] > 1


_REFERENCE = _Backend(automatic=lambda call: False)
_TORCH = _Backend()
_TRITON = _Backend(_probe_triton, _triton_serves, _on_gpu, "triton")
# What a compiler fuses with its neighbours by itself.
_TRITON_FUSED = _Backend(
    _probe_triton, _triton_serves, lambda call: call.x.is_cuda and not torch.compiler.is_compiling(), "triton"
)
_TRITON_CONV = _Backend(_probe_triton, _triton_conv_serves, _on_gpu, "triton")
_TRITON_ATTENTION = _Backend(_probe_triton, _triton_attention_serves, _many_on_gpu, "triton")
# The packages stand behind Triton: used by themselves where it is missing or does not serve.
_MAMBA_SCAN = _Backend(mamba_ssm.probe_scan, mamba_ssm.serves_scan, _on_gpu, "mamba-ssm")
_MAMBA_STEP = _Backend(mamba_ssm.probe_update, mamba_ssm.serves_update, _on_gpu, "mamba-ssm")
_CONV = _Backend(conv_package.probe, conv_package.serves, _on_gpu, "causal-conv1d")
_CONV_STEP = _Backend(conv_package.probe, conv_package.serves_update, _on_gpu, "causal-conv1d")
_FLASH_2 = _Backend(flash_attention.probe_2, flash_attention.serves_2, _many_on_gpu, "flash-attn")
_FLASH_4 = _Backend(flash_attention.probe_4, flash_attention.serves_4, _many_on_gpu, "flash-attn-4")

_TABLE: dict[str, dict[str, _Backend]] = {
    "selective_scan": {"triton": _TRITON, "mamba_ssm": _MAMBA_SCAN, "torch": _TORCH, "reference": _REFERENCE},
    "selective_state_update": {"triton": _TRITON, "mamba_ssm": _MAMBA_STEP, "torch": _TORCH},
    "ssd_scan": {"triton": _TRITON, "torch": _TORCH, "reference": _REFERENCE},
    "ssd_state_update": {"triton": _TRITON, "torch": _TORCH},
    "causal_conv1d": {"triton": _TRITON_CONV, "causal_conv1d": _CONV, "torch": _TORCH, "reference": _REFERENCE},
    "causal_conv1d_update": {"triton": _TRITON, "causal_conv1d": _CONV_STEP, "torch": _TORCH},
    "attention": {
        "triton": _TRITON_ATTENTION,
        "flash_attn_4": _FLASH_4,
        "flash_attn": _FLASH_2,
        "torch": _TORCH,
        "reference": _REFERENCE,
    },
    "rms_norm": {"triton": _TRITON_FUSED, "torch": _TORCH},
    "gate": {"triton": _TRITON_FUSED, "torch": _TORCH},
    "rope": {"triton": _TRITON_FUSED, "torch": _TORCH},
    "linear_cross_entropy": {"triton": _TRITON, "torch": _TORCH},
}
_FORCED: dict[str, str] = {}
_FAILED: dict[tuple[str, str], str] = {}


def forced(op: str, requested: str = "auto") -> str | None:
    """The backend that the caller, the context or the environment forces for this op, or None."""
    if requested != "auto":
        return requested
    if op in _FORCED:
        return _FORCED[op]
    value = os.environ.get(ENV, "")
    return _parse(value, ENV).get(op) if value not in ("", "auto") else None


def resolve(op: str, requested: str, call: Call) -> Choice:
    """The implementation that serves this call.

    Raises:
        ValueError: a name that this op does not have.
        BackendError: a forced implementation that cannot serve, with the reason.
    """
    table = _TABLE[op]
    name = forced(op, requested)
    if name is not None:
        if name not in table:
            raise ValueError(f"backend={name!r} for {op}; allowed: 'auto', {', '.join(map(repr, table))}")
        reason = _refusal(op, name) or table[name].serves(call)
        if reason:
            raise BackendError(f"{op}: backend={name!r} is forced and cannot serve: {reason}. Use 'auto'.")
        return Choice(name, True)
    for name, entry in table.items():
        if entry.automatic(call) and _refusal(op, name) is None and entry.serves(call) is None:
            return Choice(name, False)
    raise BackendError(f"{op}: no implementation serves this call")


def _refusal(op: str, name: str) -> str | None:
    """Why this machine cannot use it, or None."""
    return _FAILED.get((op, name)) or _TABLE[op][name].probe()


def wants_kernel(op: str, name: str, was_forced: bool) -> bool:
    """Whether to try a kernel: chosen, and not known to fail (what compiled code chose may be old)."""
    return name not in ("torch", "reference") and (was_forced or (op, name) not in _FAILED)


def kernel_failed(op: str, name: str, error: Exception, *, was_forced: bool) -> None:
    """A kernel did not build or launch: raise when it was forced, else warn once and leave it out from now on.

    Running out of memory and errors of the device itself are not the kernel's and go up as they are.

    Raises:
        BackendError: the kernel was forced.
    """
    device_errors = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    if isinstance(error, device_errors):
        raise error
    lines = str(error).strip().splitlines() or ["no message"]
    reason = f"{type(error).__name__}: {lines[0]}"
    if was_forced:
        raise BackendError(f"{op}: backend={name!r} is forced and failed: {reason}") from error
    if (op, name) not in _FAILED:
        _FAILED[op, name] = f"failed here: {reason}"
        warnings.warn(f"{op}: the {name} kernel failed ({reason}); PyTorch takes its place", stacklevel=3)


def available() -> list[Row]:
    """Every op and implementation, usable or why not. A usable one may still refuse single calls."""
    return [
        Row(op, name, (why := _refusal(op, name)) is None, why or "", _version(entry.package))
        for op, table in _TABLE.items()
        for name, entry in table.items()
    ]


def _version(package: str) -> str | None:
    if package == "torch":
        # It names the build too, "+cpu" or "+cu130", which the installed metadata may leave out.
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def use_backend(name: str | None = None, /, **ops: str) -> Iterator[None]:
    """Force implementations inside a ``with``: ``use_backend("torch")``, ``use_backend(selective_scan="triton")``.

    Process-wide, not per thread: compiled code reads it too, and recompiles when it changes.
    """
    global _FORCED
    spec = ",".join(([name] if name else []) + [f"{op}={value}" for op, value in ops.items()])
    before, _FORCED = _FORCED, {**_FORCED, **_parse(spec, "use_backend")}
    try:
        yield
    finally:
        _FORCED = before


def _parse(spec: str, source: str) -> dict[str, str]:
    """'torch' or 'op=name,...' as {op: name}. A bare name counts for the ops that have it."""
    out: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        op, eq, name = part.partition("=")
        if eq:
            if op not in _TABLE or name not in _TABLE[op]:
                known = f"{op} has {', '.join(_TABLE[op])}" if op in _TABLE else f"ops are {', '.join(_TABLE)}"
                raise ValueError(f"{source}: {part!r} is unknown; {known}")
            out[op] = name
        else:
            having = [o for o, table in _TABLE.items() if part in table]
            if not having:
                names = sorted({n for table in _TABLE.values() for n in table})
                raise ValueError(f"{source}: no op has a backend {part!r}; allowed: {', '.join(names)}")
            out.update(dict.fromkeys(having, part))
    return out
