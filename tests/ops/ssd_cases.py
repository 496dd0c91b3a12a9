"""Random inputs of the Mamba-2 scan, and its plain versions by name."""

from __future__ import annotations

import torch
from ops.op_cases import Case

from hymba.ops import ssd_scan

BY_STEP = ("x", "dt", "B", "C")


def ssd_case(b, l, h, p, g, n, *, states=1, dtype=torch.float64) -> Case:
    """Activations in dtype; parameters and state float32, or float64 with it. Steps spread widely."""
    full = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, dtype=full)

    case = {"x": normal(b, l, h, p), "dt": 2 * normal(b, l, h) - 1, "A": -4 * torch.rand(h, dtype=full)}
    case |= {"B": normal(b, l, g, n), "C": normal(b, l, g, n), "D": normal(h), "dt_bias": normal(h)}
    case |= {"initial_state": normal(states, h, p, n) if states else None}
    return {k: v.to(dtype) if k in BY_STEP else v for k, v in case.items()}


def reference(*positional, **options):
    return ssd_scan(*positional, backend="reference", **options)


def chunked(*positional, **options):
    return ssd_scan(*positional, backend="torch", **options)


def apply(op, case, **options):
    positional = [v for k, v in case.items() if k != "initial_state"]
    return op(*positional, initial_state=case["initial_state"], **options)


def steps(case, s, e):
    return {k: v[:, s:e] if k in BY_STEP else v for k, v in case.items()}
