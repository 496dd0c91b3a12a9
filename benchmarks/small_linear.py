"""Block shapes for the few-row linear kernels: time and bandwidth of each shape of a decode step.

python -m benchmarks.small_linear
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch

from benchmarks.common import graph_times
from hymba.ops.triton.small_linear import small_linear

CASES = {
    "in_proj": (8960, 1600, "norm"),
    "out_proj": (1600, 3200, "merge"),
    "gate_up": (5504, 1600, "gate"),
    "down": (1600, 5504, "add"),
    "head": (32001, 1600, "norm"),
    "x_proj": (132, 3200, "conv"),
}
"""Output features, depth and surroundings of each product of the released shape."""

SHAPES = {
    1: [b for b in itertools.product((1, 2, 4, 8, 16), (1024, 2048), (4, 8)) if 2048 <= b[0] * b[1] <= 16384],
    16: list(itertools.product((16, 32), (128, 256), (4, 8))),
}


def measure(name: str, rows: int, *, compile_only: bool) -> None:
    """Print the four fastest block shapes of one product."""
    n, k, kind = CASES[name]
    size = n * k * 2 * (2 if kind == "gate" else 1)
    copies = 1 if compile_only else max(2, int(3e8 // size))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    gates = [torch.randn_like(w) for w in weights] if kind == "gate" else [None] * copies
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    norm = torch.rand(k, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(k, 4, device="cuda", dtype=torch.bfloat16)
    window = torch.randn(rows, 3, k, device="cuda", dtype=torch.bfloat16)
    extra: dict[str, Any] = {
        "norm": {"norm": norm},
        "merge": {"norm": norm, "merge": (x, norm), "add_to": out},
        "gate": {"norm": norm},
        "add": {"add_to": out},
        "conv": {"conv": (taps, norm, window)},
    }[kind]
    results = []
    for blocks in SHAPES[rows]:

        def run(blocks: tuple[int, int, int] = blocks) -> None:
            for w, g in zip(weights, gates, strict=True):
                small_linear(x, w, blocks=blocks, gate=g, **extra)

        if compile_only:
            run()
        else:
            results.append((statistics.median(graph_times(run, repeats=8)) / copies, blocks))
    results.sort()
    best = ", ".join(f"{b} {s * 1e6:.2f} us {size / s / 1e12:.2f} TB/s" for s, b in results[:4])
    if not compile_only:
        print(f"rows {rows:2d} {name:9s}: {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--rows", type=int, choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--compile", action="store_true", help="fill the kernel cache only")
    arguments = parser.parse_args()
    for rows in arguments.rows:
        for name in arguments.case:
            measure(name, rows, compile_only=arguments.compile)


if __name__ == "__main__":
    main()
