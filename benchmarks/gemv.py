"""The products of a decode step of one row: time and bandwidth of each, by block shape.

    python -m benchmarks.gemv                 # the shapes of the release, under a CUDA graph

Each launch follows another one, as in a step, so that what overlaps there overlaps here. Checks each shape against
float64 first and prints no number for one that fails. The floor is the weights' bytes over a measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import copy_bandwidth, graph_times, report
from hymba.ops.triton.gemv import gemv

CASES = {
    "in_proj": (8960, 1600, "norm"),
    "out_proj": (1600, 3200, "merge"),
    "gate_up": (5504, 1600, "gate"),
    "down": (1600, 5504, "add"),
    "head": (32001, 1600, "norm"),
    "x_proj": (132, 3200, "conv"),
}
"""Output features, depth and surroundings of each product of the released shape."""

TOLERANCE = 1e-2
"""||got - want|| / ||want|| in bfloat16."""

BLOCKS = {
    1600: ((4, 4, 0), (8, 4, 0), (2, 4, 4), (4, 4, 4), (4, 4, 5), (2, 4, 6), (4, 8, 3), (2, 2, 8), (8, 8, 2)),
    3200: ((4, 8, 0), (4, 4, 0), (2, 4, 4), (2, 8, 3), (1, 4, 4), (1, 4, 6), (2, 4, 6)),
    5504: ((2, 8, 0), (2, 4, 0), (1, 4, 4), (1, 8, 3), (1, 4, 6), (2, 8, 2), (1, 8, 4)),
}
"""Output features of a block, warps, and programs per multiprocessor (0: one block each), by depth."""


def surroundings(kind: str, n: int, k: int, x: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    norm = torch.rand(k, device="cuda", dtype=torch.bfloat16)
    if kind == "conv":
        taps = torch.randn(k, 4, device="cuda", dtype=torch.bfloat16)
        return {"conv": (taps, norm, torch.randn(1, 3, k, device="cuda", dtype=torch.bfloat16)), "early": True}
    return {
        "norm": {"norm": norm},
        "merge": {"norm": norm, "merge": (torch.randn_like(x), norm), "add_to": out, "early": True},
        "gate": {"norm": norm, "gate": torch.randn(n, k, device="cuda", dtype=torch.bfloat16)},
        "add": {"add_to": out},
    }[kind]


def plain_error(n: int, k: int) -> float:
    x, weight = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((1, k), (n, k)))
    want = x.double() @ weight.double().T
    return ((gemv(x, weight).double() - want).norm() / want.norm()).item()


def chain(
    x: torch.Tensor, weights: list[torch.Tensor], extras: list[dict[str, Any]], blocks: tuple[int, int, int] | None
) -> Callable[[], None]:
    def run() -> None:
        for weight, extra in zip(weights, extras, strict=True):
            gemv(x, weight, blocks=blocks, **extra)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gemv needs a CUDA device")
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for name in arguments.case:
        n, k, kind = CASES[name]
        if not (error := plain_error(n, k)) < TOLERANCE:
            sys.exit(f"{name}: relative error {error:.1e}; no number")
        size = n * k * 2 * (2 if kind == "gate" else 1)
        copies = max(4, int(3e8 // size))
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        out = torch.zeros(1, n, device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        extras = [surroundings(kind, n, k, x, out) for _ in range(copies)]
        for blocks in (*(BLOCKS[k] if n > 256 else ((1, 4, 0), (1, 8, 0), (2, 8, 0))), None):
            seconds = statistics.median(graph_times(chain(x, weights, extras, blocks), repeats=8)) / copies
            floor = size / bandwidth * 1e6
            rows.append({"case": name, "blocks": blocks or "default", "us": seconds * 1e6, "floor_us": floor})
        best = sorted((row for row in rows if row["case"] == name), key=lambda row: row["us"])
        print(
            f"{name:9s} floor {size / bandwidth * 1e6:5.2f} us: "
            + ", ".join(f"{row['blocks']} {row['us']:.2f}" for row in best),
            flush=True,
        )
    report("gemv", rows, bandwidth=bandwidth)


if __name__ == "__main__":
    main()
