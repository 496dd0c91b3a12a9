"""Random inputs of the sequence ops, and how a test runs one with every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

SCAN_NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
CONV_NAMES = ("x", "weight", "bias", "initial_state")

Case = dict[str, Tensor | None]


def scan_case(b: int, l: int, d: int, n: int, *, states: int = 1, dtype: torch.dtype = torch.float64) -> Case:
    """Activations in dtype; parameters and state float32, or float64 with it. Gates and steps spread widely."""
    full = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=full)

    case: Case = {"x": normal(b, l, d), "dt": 2 * normal(b, l, d) - 1, "A": -4 * torch.rand(d, n, dtype=full)}
    case |= {"B": normal(b, l, n), "C": normal(b, l, n), "D": normal(d), "z": normal(b, l, d)}
    case |= {"dt_bias": normal(d), "initial_state": normal(states, d, n) if states else None}
    return {k: v.to(dtype) if k in ("x", "dt", "B", "C", "z") and v is not None else v for k, v in case.items()}


def conv_case(b: int, l: int, d: int, k: int, *, states: int = 1, dtype: torch.dtype = torch.float64) -> Case:
    full = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.randn(states, k - 1, d, dtype=full).to(dtype) if states else None
    x = torch.randn(b, l, d, dtype=full).to(dtype)
    return {"x": x, "weight": torch.randn(d, k, dtype=full), "bias": torch.randn(d, dtype=full)} | {
        "initial_state": state
    }


def row_options(b: int, l: int) -> Iterator[dict[str, Tensor]]:
    """Without and with lengths (one full, one cut, then empty rows), without and with packed documents."""
    cut = torch.tensor([l, (l + 1) // 2, *([0] * b)][:b])
    every = torch.tensor([3, 11, 1, 7][:b])
    packed = (torch.arange(l) // every[:, None]).int()
    for lengths, seq_idx in product((None, cut), (None, packed)):
        yield {k: v for k, v in (("lengths", lengths), ("seq_idx", seq_idx)) if v is not None}


def with_gradients(op: Callable[..., tuple[Tensor, Tensor]], case: Case, **options: Any) -> dict[str, Tensor]:
    """y, the final state and the gradient of every input under fixed random weights on both outputs."""
    case = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in case.items()}
    positional = [v for k, v in case.items() if k != "initial_state"]
    y, final = op(*positional, initial_state=case["initial_state"], **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device) for v in (y, final)]
    loss = sum((v.double() * w).sum() for v, w in zip((y, final), weights))
    inputs = {k: v for k, v in case.items() if v is not None}
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y.detach(), "final_state": final.detach()} | dict(zip(inputs, gradients))


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest ||got - want|| / ||want|| over the tensors; one that should be zero counts absolutely."""
    assert got.keys() == want.keys()
    errors = []
    for name, value in want.items():
        reference = value.double()
        norm = reference.norm()
        error = (got[name].double() - reference).norm()
        assert torch.isfinite(error), name
        errors.append((error / norm if norm > 0 else error).item())
    return max(errors)
