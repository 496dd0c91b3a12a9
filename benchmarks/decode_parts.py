"""The memory-bound kernels of a decode step, attention over the cache and the state update, by tile shape.

    python -m benchmarks.decode_parts --rows 1 32 128

Checks each variant against a float32 reference first and prints no number for one that fails. The floors are keys and
values read once, and states read and written once, over a measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import copy_bandwidth, graph_times, report
from hymba.nn import rope_tables
from hymba.nn.rope import apply_rope
from hymba.nn.state import slot_positions
from hymba.ops.attention import attention_ref
from hymba.ops.masks import Visibility
from hymba.ops.triton import decode_mamba
from hymba.ops.triton.decode_attention import decode_attention

TOLERANCE = 2e-2
"""||got - want|| / ||want|| in bfloat16."""

ATTENTION = {
    1: [*itertools.product((64, 128), (4,), (2,), (8, 16)), (128, 8, 2, 16)],
    32: list(itertools.product((64, 128), (4, 8), (2,), (4, 16))),
    128: list(itertools.product((64, 128), (4, 8), (2,), (2, 4))),
}
"""Keys at a time, warps, stages, most stretches."""
STATES = [(16, 32, 8), (16, 32, 4), (16, 16, 4), (8, 32, 4), (16, 64, 8)]
"""Rows, channels, warps."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def attention_case(rows: int, slots: int, window: int | None) -> tuple[Callable[..., Tensor], Tensor, int]:
    """The call by tiles, what it should give, and the bytes of its keys and values."""
    h, kv, d, e, prefix = 25, 5, 64, 128, 128
    q, k, v = random(rows, h * d), random(rows, kv * d), random(rows, kv * e)
    keys, values = random(rows, slots, kv, d), random(rows, slots, kv, e)
    pk, pv = random(1, prefix, kv, d), random(1, prefix, kv, e)
    position = torch.full((rows,), slots - 1, device="cuda")
    cos, sin = (t[0] for t in rope_tables(torch.arange(slots, device="cuda")[None] + prefix, head_dim=d, base=1e4))
    count = torch.zeros(rows * kv, dtype=torch.int32, device="cuda")

    def run(tiles: tuple[int, int, int, int] | None = None) -> Tensor:
        return decode_attention(
            q, k, v, keys=keys, values=values, position=position, cos=cos, sin=sin, window=window, count=count,
            prefix_k=pk, prefix_v=pv, tiles=tiles,
        )  # fmt: skip

    run()
    few = min(rows, 2)
    at = position[:few, None]
    rotated = apply_rope(q[:few].unflatten(1, (h, d))[:, None], cos[at], sin[at])
    mask = Visibility(at, slot_positions(position[:few] + 1, slots), window, prefix).dense()
    all_keys, all_values = (torch.cat([p.expand(few, -1, -1, -1), c[:few]], 1) for p, c in ((pk, keys), (pv, values)))
    want = attention_ref(rotated, all_keys, all_values, mask)[0][:, 0].float()
    return run, want, (rows * slots + prefix) * kv * (d + e) * 2


def state_case(rows: int) -> tuple[Callable[[], Tensor], int]:
    width, n, rank = 3200, 16, 100
    named: dict[str, Any] = {
        "dt_weight": random(width, rank), "dt_bias": random(width) - 4, "A_log": torch.rand(width, n, device="cuda"),
        "D": random(width), "dt_norm": random(rank), "b_norm": random(n), "c_norm": random(n),
        "ssm_state": torch.randn(rows, width, n, device="cuda"), "eps": 1e-6, "out": random(rows, width),
        "valid": torch.ones(rows, dtype=torch.bool, device="cuda"),
    }  # fmt: skip
    u, z, low = random(rows, width), random(rows, width), random(rows, rank + 2 * n)
    conv = (random(width, 4), random(width), random(1, 3, width)) if rows == 1 else None
    return lambda: decode_mamba.mamba_step(u, z, low, conv=conv, **named), 2 * rows * width * n * 4


def show(name: str, floor: float, results: list[tuple[float, Any]]) -> None:
    results.sort(key=lambda r: r[0])
    best = ", ".join(f"{variant} {seconds * 1e6:.1f}" for seconds, variant in results[:6])
    print(f"{name}: floor {floor * 1e6:.1f} us; {best}; worst {results[-1][0] * 1e6:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", choices=list(ATTENTION), default=list(ATTENTION))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.decode_parts needs a CUDA device")
    bandwidth = copy_bandwidth()
    rows_out: list[dict[str, Any]] = []
    for rows in arguments.rows:
        for slots, window in ((1025, 1024), (8256, None)):
            run, want, size = attention_case(rows, slots, window)
            results: list[tuple[float, Any]] = []
            for tiles in (None, *ATTENTION[rows]):
                error = ((run(tiles)[: len(want)].float() - want).norm() / want.norm()).item()
                if not error < TOLERANCE:
                    sys.exit(f"attention of {rows} rows, {tiles}: relative error {error:.1e}; no number")
                timed = graph_times(lambda run=run, tiles=tiles: run(tiles), inner=8, repeats=6)
                results.append((statistics.median(timed), tiles or "default"))
            rows_out += [
                {"part": "attention", "rows": rows, "slots": slots, "tiles": t, "us": s * 1e6} for s, t in results
            ]
            show(f"attention {rows:3d} rows {slots} slots", size / bandwidth, results)
        run_state, size = state_case(rows)
        results = []
        for shape in STATES if rows > 1 else ["one row"]:
            if rows > 1:
                decode_mamba.MANY = shape
            results.append((statistics.median(graph_times(run_state, inner=8, repeats=6)), shape))
        rows_out += [{"part": "state", "rows": rows, "tiles": t, "us": s * 1e6} for s, t in results]
        show(f"state update {rows:3d} rows", size / bandwidth, results)
    report("decode_parts", rows_out, bandwidth=bandwidth)


if __name__ == "__main__":
    main()
