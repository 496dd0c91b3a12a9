"""What the benchmarks share: the machine's ceilings, timing with device events, one JSON line last."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def commit() -> str:
    """The commit being measured, `+` for uncommitted changes, or "unknown" outside a checkout.

    HYMBA_COMMIT names it where the checkout's own history is not at hand.
    """
    if named := os.environ.get("HYMBA_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def machine() -> dict[str, str]:
    """Names and versions that a number depends on."""
    out = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
    if torch.cuda.is_available():
        out["device"] = torch.cuda.get_device_name()
        out["cuda"] = str(torch.version.cuda)
    try:
        import triton

        out["triton"] = triton.__version__
    except ImportError:
        pass
    return out


def times(run: Callable[[], Any], *, warmup: int = 3, repeats: int = 20) -> list[float]:
    """Seconds of each repeat, measured with device events."""
    for _ in range(warmup):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def graph_times(run: Callable[[], Any], *, inner: int = 1, repeats: int = 20) -> list[float]:
    """Seconds of one call inside a CUDA graph of `inner` calls: device time without launch cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    return [t / inner for t in times(graph.replay, repeats=repeats)]


def measure(run: Callable[[], Any], device: str, *, warmup: int = 3, repeats: int = 20) -> list[float]:
    """Seconds of each repeat: device events on a GPU, the clock on a CPU."""
    if device == "cuda":
        return times(run, warmup=warmup, repeats=repeats)
    for _ in range(warmup):
        run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


@dataclass
class Peak:
    """The most device memory that was in use inside `peak_bytes`; 0 on a CPU, which is not measured."""

    value: int = 0


@contextlib.contextmanager
def peak_bytes(device: str) -> Iterator[Peak]:
    """The most memory that tensors took up inside, weights included."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if device == "cuda":
        torch.cuda.synchronize()
        peak.value = torch.cuda.max_memory_allocated()


def spread(values: list[float]) -> dict[str, float]:
    """Median with the tenth and ninetieth percentile."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[-1 - len(ordered) // 10],
    }


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Bytes read plus bytes written per second by a large device copy."""
    source = torch.empty(int(gigabytes * 1e9), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(times(lambda: target.copy_(source), repeats=10))


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of a large bf16 matrix product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(times(lambda: a @ b, repeats=10))


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the one JSON line that `benchmarks.report` reads."""
    print(json.dumps({"benchmark": name, **facts, "machine": machine(), "rows": rows}), flush=True)
