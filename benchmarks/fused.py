"""The ops around the products, forward and backward, against the bytes that they must move.

    python -m benchmarks.fused                      # the released widths, 65,536 tokens, bf16, on the GPU
    python -m benchmarks.fused --tokens 64 --device cpu --dtype float32

Checks outputs and gradients against plain PyTorch in float64 first; prints no number for an op that fails. The floor:
each input read once and each output written once, over a measured copy bandwidth. The loss's floor are its three
products over a measured matrix rate; x_proj to dt_proj is held to its bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import copy_bandwidth, matrix_rate, measure, report, spread
from hymba.nn.mamba import MambaHeads
from hymba.ops import use_backend
from hymba.ops.gate import swiglu
from hymba.ops.loss import linear_cross_entropy
from hymba.ops.norm import add_rms_norm, mean_rms_norm, rms_norm
from hymba.ops.rope import apply_rope

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""||got - want|| / ||want|| of outputs and gradients against float64."""


@dataclass
class Case:
    """An op, its inputs, and the numbers per token that forward and backward must read or write."""

    name: str
    op: Callable[..., Any]
    inputs: list[Tensor]
    forward: int
    backward: int
    operations: int = 0
    module: torch.nn.Module | None = None


def cases(tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Every op with inputs as the model gives them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    rows = (1, tokens)
    w, v = normal(1600), normal(3200)
    yield Case("norm", lambda x, w: rms_norm(x, w, 1e-6), [normal(*rows, 1600), w], 3200, 4800)
    inputs = [normal(*rows, 1600), normal(*rows, 1600), w]
    yield Case("add and norm", lambda x, r, w: add_rms_norm(x, r, w, 1e-6), inputs, 6400, 6400)
    inputs = [normal(*rows, 3200), normal(*rows, 3200), v, normal(3200)]
    yield Case("mean of two norms", lambda a, b, w, v: mean_rms_norm(a, b, w, v, 1e-6), inputs, 9600, 16000)
    yield Case("swiglu", swiglu, [normal(*rows, 5504), normal(*rows, 5504)], 3 * 5504, 5 * 5504)
    cos, sin = torch.randn(2, 1, tokens, 32, device=device)
    q = normal(*rows, 8960)[..., :1600].unflatten(-1, (25, 64))
    yield Case("rope", lambda q: apply_rope(q, cos, sin), [q], 3200, 3200)
    heads = MambaHeads(d_inner=3200, dt_rank=100).to(device, dtype)
    # Two reads of the branch's input and one write of the step sizes; backward both ways and the weights.
    yield Case("x_proj to dt_proj", heads._scan_inputs, [normal(*rows, 3200)], 6400, 9600, module=heads)
    n = min(tokens, 16384)
    targets = torch.randint(0, 32001, (n,), device=device)
    inputs = [normal(n, 1600), normal(32001, 1600) * 0.02]
    operations = 3 * 2 * n * 1600 * 32001
    yield Case("loss", lambda h, w: linear_cross_entropy(h, w, targets), inputs, 0, 0, operations)


def outputs_and_gradients(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = case.op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def worst(case: Case) -> float:
    """Largest relative error against plain PyTorch in float64."""
    with use_backend("torch"):
        if case.module is not None:
            case.module.double()
        want = outputs_and_gradients(case, [x.double() for x in case.inputs])
        if case.module is not None:
            case.module.to(case.inputs[0].dtype)
    got = outputs_and_gradients(case, case.inputs)
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def time(case: Case, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward; of both together where forward makes the gradients."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]

    def both() -> None:
        torch.autograd.grad(case.op(*leaves), leaves)

    if case.operations:
        return {"both": spread(measure(both, device, repeats=repeats))}
    with torch.no_grad():
        forward = measure(lambda: case.op(*case.inputs), device, repeats=repeats)
    outputs = case.op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(o) for o in outputs]

    def back() -> None:
        torch.autograd.grad(outputs, leaves, weights, retain_graph=True)

    return {"forward": spread(forward), "backward": spread(measure(back, device, repeats=repeats))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs the plain versions", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype)
    size = dtype.itemsize
    on_gpu = args.device == "cuda"
    bandwidth, rate = (copy_bandwidth(), matrix_rate()) if on_gpu else (None, None)
    rows = []
    failed = False
    small = {case.name: worst(case) for case in cases(min(512, args.tokens), dtype, args.device)}
    for case in cases(args.tokens, dtype, args.device):
        error = small[case.name]
        if not error < TOLERANCE[dtype]:
            print(f"{case.name:20} FAILED: relative error {error:.1e}", flush=True)
            failed = True
            continue
        taken = time(case, args.device, args.repeats)
        line = f"{case.name:20} error {error:.1e}"
        for part, seconds in taken.items():
            moved = (case.forward if part == "forward" else case.backward) * args.tokens * size
            floor = None
            if bandwidth is not None and rate is not None:
                floor = case.operations / rate if case.operations else moved / bandwidth
            row = {"op": case.name, "way": part, "seconds": seconds, "relative_error": error}
            rows.append(
                row | ({} if floor is None else {"floor_s": floor, "share_of_floor": floor / seconds["median"]})
            )
            line += f"  {part} {seconds['median'] * 1e3:7.3f} ms"
            line += "" if floor is None else f" ({floor / seconds['median']:.0%} of its floor)"
        print(line, flush=True)
    rates = {} if bandwidth is None else {"copy_bytes_per_s": bandwidth, "matrix_flops_per_s": rate}
    report("fused", rows, tokens=args.tokens, dtype=args.dtype, **rates)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
