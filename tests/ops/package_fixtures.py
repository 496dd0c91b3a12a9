"""The optional packages for their adapters' tests: the real ones on a GPU, else stand-ins with the same signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.ops import adapters, backend

FAKES = Path(__file__).parent / "fakes"
NAMES = (
    "selective_scan_cuda mamba_ssm causal_conv1d_cuda causal_conv1d flash_attn flash_attn_2_cuda "
    "autograd_apart flash_reference"
).split()


def real(extension: str) -> bool:
    """Whether the package itself can be tested here."""
    return torch.cuda.is_available() and adapters.importlib.util.find_spec(extension) is not None


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins be what is installed, and their tensors on the CPU what the kernels take."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in NAMES:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setattr(adapters, "DEVICE", "cpu")


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory of what was refused or failed, before and after."""
    monkeypatch.setattr(backend, "_FAILED", {})
    monkeypatch.delenv(backend.ENV, raising=False)
    adapters.refusal.cache_clear()


def forget() -> None:
    adapters.refusal.cache_clear()
    for name in [*sys.modules]:
        if name.partition(".")[0] in NAMES and str(FAKES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def on(device: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with its tensors moved to `device`, and its results back."""

    def move(value: Any, to: str) -> Any:
        return value.to(to) if isinstance(value, Tensor) else value

    def run(*positional: Any, **named: Any) -> Any:
        got = op(*(move(v, device) for v in positional), **{k: move(v, device) for k, v in named.items()})
        return tuple(move(v, "cpu") for v in got) if isinstance(got, tuple) else move(got, "cpu")

    return run
