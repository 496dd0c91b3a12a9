#!/usr/bin/env python
"""Compares `HymbaForCausalLM.from_pretrained` with `safetensors.torch.load_file` on one checkpoint folder.

    python scripts/random_checkpoint.py /tmp/hymba-random
    python scripts/measure_loading.py /tmp/hymba-random

Every run is a fresh process on a warm page cache, and the two take turns. Both end by reading every byte: load_file
with an integer sum over each tensor, the fastest reading there is; ours with the NaN scan that it always does. Time
is that of the call and the reading, without imports. Memory is the process's peak resident size (VmHWM, or ru_maxrss
where there is no /proc), imports included; pages of a mapped file count while they are mapped, so both sides pay for
the weights once, and a copy of them would show. The last line is JSON. Exit status 1: over a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMITS = {"seconds": 1.5, "bytes": 1.25}


def peak_memory() -> tuple[int, str]:
    """Peak resident bytes of this process, and what says so."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024, "VmHWM"
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), "ru_maxrss"


def load_file(folder: Path) -> Callable[[], object]:
    """The baseline: map the files and sum their bytes, eight at a time."""
    import torch
    from safetensors.torch import load_file

    def run() -> object:
        tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        for tensor in (tensor for file in tensors for tensor in file.values()):
            flat = tensor.reshape(-1).view(torch.uint8)
            wide = flat.numel() // 8 * 8 if flat.data_ptr() % 8 == 0 else 0
            flat[:wide].view(torch.int64).sum()
            flat[wide:].sum()
        return tensors

    return run


def from_pretrained(folder: Path) -> Callable[[], object]:
    """Ours; its NaN scan reads every byte."""
    from transformers.utils import logging

    from hymba import HymbaForCausalLM

    logging.disable_progress_bar()
    return lambda: HymbaForCausalLM.from_pretrained(folder)


WAYS: dict[str, Callable[[Path], Callable[[], object]]] = {"load_file": load_file, "from_pretrained": from_pretrained}


def child(way: str, folder: Path) -> None:
    """One measurement in this process, printed as JSON."""
    run = WAYS[way](folder)
    imported, _ = peak_memory()
    start = time.perf_counter()
    loaded = run()
    seconds = time.perf_counter() - start
    peak, source = peak_memory()
    del loaded
    print(json.dumps({"seconds": seconds, "bytes": peak, "imports": imported, "source": source}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder with safetensors files")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each (7)")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    files = sorted(args.folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"error: {args.folder} has no *.safetensors; make one with scripts/random_checkpoint.py")
    if args.child:
        child(args.child, args.folder)
        return 0

    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    source = ""
    for _ in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, str(args.folder), "--child", way]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(out.splitlines()[-1])
            source = result.pop("source")
            runs[way].append(result)

    size = sum(file.stat().st_size for file in files)
    load = os.getloadavg()
    print(f"{args.folder}: {size:,} bytes, {args.repeats} fresh processes each, medians (range of the times)")
    print(f"{os.cpu_count()} cores, load average {load[0]:.1f}; peak memory is {source}, mapped pages included\n")
    medians = {way: {k: statistics.median(run[k] for run in runs[way]) for k in runs[way][0]} for way in WAYS}
    for way, median in medians.items():
        times = sorted(run["seconds"] for run in runs[way])
        print(f"{way:16} {median['seconds']:7.3f} s  ({times[0]:.3f} to {times[-1]:.3f})   "
              f"peak {median['bytes'] / 1e9:.3f} GB, of which imports {median['imports'] / 1e9:.3f} GB")  # fmt: skip
    ratios = {k: medians["from_pretrained"][k] / medians["load_file"][k] for k in LIMITS}
    print()
    for what, ratio in ratios.items():
        print(f"{'time' if what == 'seconds' else 'memory':8} {ratio:.2f} times load_file (limit {LIMITS[what]})")
    over = [what for what, ratio in ratios.items() if ratio > LIMITS[what]]
    print(json.dumps({"medians": medians, "ratios": ratios, "limits": LIMITS, "within": not over}))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
