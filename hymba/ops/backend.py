"""Which implementation serves an op: the one place that knows what exists, what was refused and why, what is forced.

Every op registers its implementations in order of preference. For one call, ``resolve`` takes the first that is
usable on this machine (its probe) and serves these tensors (its serves). A choice can be forced, strongest first:
the op's ``backend=`` argument, ``with use_backend(...)``, the environment variable ``HYMBA_BACKEND``. The last two
take a name for every op that has it ("torch"), or single ops ("selective_scan=torch,causal_conv1d=triton").
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ENV = "HYMBA_BACKEND"


class BackendError(RuntimeError):
    """A forced backend cannot serve: not usable on this machine, or not for these tensors."""


@dataclass(frozen=True)
class Call:
    """What an op's choice may depend on: the main tensor, which options are in use, sizes."""

    x: Tensor
    initial_state: bool = False
    lengths: bool = False
    seq_idx: bool = False
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of ``available()``."""

    op: str
    backend: str
    usable: bool
    reason: str


@dataclass
class _Entry:
    run: Callable[..., Any]
    probe: Callable[[], str | None] | None
    serves: Callable[[Call], str | None] | None
    auto: bool
    broken: str | None = None
    probed: bool = False
    refused: str | None = None

    def refusal(self) -> str | None:
        """Why this machine cannot use it, or None. Probed once."""
        if self.broken is None and not self.probed:
            self.refused, self.probed = self.probe() if self.probe else None, True
        return self.broken or self.refused


_TABLE: dict[str, dict[str, _Entry]] = {}
_FORCED: dict[str, str] = {}


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    probe: Callable[[], str | None] | None = None,
    serves: Callable[[Call], str | None] | None = None,
    auto: bool = True,
) -> None:
    """Add an implementation. Under auto the ones registered later are tried first; ``auto=False`` is only forced.

    probe: None when this machine can use it, else the reason. serves: the same for one call.
    """
    _TABLE.setdefault(op, {})[name] = _Entry(run, probe, serves, auto)


def forced(op: str, requested: str = "auto") -> str | None:
    """The backend that the caller, the context or the environment forces for this op, or None."""
    if requested != "auto":
        return requested
    if op in _FORCED:
        return _FORCED[op]
    value = os.environ.get(ENV, "")
    return _parse(value, ENV).get(op) if value not in ("", "auto") else None


def resolve(op: str, requested: str, call: Call) -> Callable[..., Any]:
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
        entry = table[name]
        reason = entry.refusal() or (entry.serves(call) if entry.serves else None)
        if reason:
            raise BackendError(f"{op}: backend {name!r} was forced and cannot serve: {reason}. Use backend='auto'.")
        return entry.run
    for entry in reversed(table.values()):
        if entry.auto and entry.refusal() is None and (entry.serves is None or entry.serves(call) is None):
            return entry.run
    reasons = "; ".join(f"{n}: {e.refusal() or (e.serves(call) if e.serves else None)}" for n, e in table.items())
    raise BackendError(f"{op}: no implementation serves this call ({reasons})")


def kernel_failed(op: str, name: str, error: Exception, *, was_forced: bool) -> None:
    """A kernel did not compile or launch: raise when it was forced, else warn once and leave it out from now on."""
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if was_forced:
        raise BackendError(f"{op}: backend {name!r} was forced and failed: {reason}") from error
    entry = _TABLE[op][name]
    if entry.broken is None:
        entry.broken = f"failed here: {reason}"
        warnings.warn(f"{op}: the {name} kernel failed ({reason}); using PyTorch from now on", stacklevel=3)


def available() -> list[Row]:
    """Every op and implementation, usable or why not. A usable one may still refuse single calls."""
    return [
        Row(op, name, entry.refusal() is None, entry.refusal() or ("" if entry.auto else "only when forced"))
        for op, table in _TABLE.items()
        for name, entry in table.items()
    ]


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
            if op not in _TABLE or name not in (*_TABLE[op], "auto"):
                known = f"{op} has {', '.join(_TABLE[op])}" if op in _TABLE else f"ops are {', '.join(_TABLE)}"
                raise ValueError(f"{source}={part!r}: unknown; {known}")
            out[op] = name
        elif part != "auto":
            having = [o for o, table in _TABLE.items() if part in table]
            if not having:
                names = sorted({n for table in _TABLE.values() for n in table})
                raise ValueError(f"{source}={part!r}: no op has such a backend; allowed: auto, {', '.join(names)}")
            out.update(dict.fromkeys(having, part))
    return {op: name for op, name in out.items() if name != "auto"}
