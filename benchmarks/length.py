"""Throughput and memory against the length of the text, decoding and prefill, up to 128k.

    python -m benchmarks.length
    python -m benchmarks.length --device cpu

Decoding: steady steps on a static cache filled with random states, replayed as a graph. Prefill: one prompt in chunks
on a static cache, last logits only. Both are held to plain PyTorch first, past the window.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import graph_times, measure, peak_bytes, report, spread
from benchmarks.models import add_model_arguments, build, check_against_plain, hymba_config, needs_device, random_ids
from benchmarks.peers import ROOM, hymba_step
from benchmarks.prefill import in_chunks
from benchmarks.roofline import Ceilings, decode, measured_ceilings, prefill
from hymba import HymbaCache
from hymba.decoding import DecodeStep, why_not_fused

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]


@torch.no_grad()
def decoded(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits of the last 8 tokens, taken in one at a time behind the others."""
    prompt = ids.shape[1] - 8
    cache = HymbaCache(model.config, max_length=ids.shape[1])
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(model, cache, fused=ids.is_cuda and why_not_fused(model) is None)
    out = []
    for t in range(prompt, ids.shape[1]):
        step.tokens.copy_(ids[:, t])
        step.run()
        out.append(step.logits.clone())
    return [torch.stack(out, dim=1)]


@torch.no_grad()
def _whole(model: Any, ids: Tensor) -> list[Tensor]:
    return [model(ids, use_cache=False).logits[:, -8:]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--length", type=int, nargs="+", help="default: 1k to 128k, doubling; 32 to 128 for the toy")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows that decode")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens at a time")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    needs_device(args.device)
    device, toy = args.device, args.toy or args.device == "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    lengths = args.length or ([32, 64, 128] if toy else LENGTHS)
    errors = [check_against_plain(decoded, device=device, dtype=dtype, toy=toy, reference=_whole)]
    config = hymba_config(args.layers, toy=toy)
    model = build(config, device=device, dtype=dtype)
    ceilings = measured_ceilings(device)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for batch in args.batch:
            with peak_bytes(device) as peak:
                step = hymba_step(model, batch, length)
                repeats = min(ROOM - 8, 20)
                seconds = spread(
                    graph_times(step.run, repeats=repeats)
                    if device == "cuda"
                    else measure(step.run, device, warmup=1, repeats=args.repeats)
                )
            row: dict[str, Any] = {"kind": "decode", "batch": batch, "length": length, "seconds": seconds}
            row |= {"tokens_per_s": batch / seconds["median"], "peak_bytes": peak.value}
            row["cache_bytes"] = step.cache.nbytes()
            rows.append(row | floors(ceilings, decode(config, batch, length, name), seconds))
            show(rows[-1])
            del step
        ids = random_ids(1, length, config.vocab_size, device)
        with peak_bytes(device) as peak:
            seconds = spread(
                measure(lambda ids=ids: in_chunks(model, ids, args.chunk), device, warmup=1, repeats=args.repeats)
            )
        row = {"kind": "prefill", "batch": 1, "length": length, "chunk": min(args.chunk, length), "seconds": seconds}
        row |= {"tokens_per_s": length / seconds["median"], "peak_bytes": peak.value}
        rows.append(row | floors(ceilings, prefill(config, 1, length, name), seconds))
        show(rows[-1])
    facts = {} if ceilings is None else ceilings.to_dict()
    report("length", rows, model="hymba", dtype=name, layers=len(config.layers), errors=errors, **facts)
    return 0


def floors(ceilings: Ceilings | None, work: tuple[int, int], seconds: dict[str, float]) -> dict[str, float]:
    """The floor of counted (bytes, operations), and the share of it that was reached."""
    if ceilings is None:
        return {}
    floor = ceilings.floor(*work)
    return {"floor_s": floor, "share_of_floor": floor / seconds["median"]}


def show(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    line = f"{row['kind']:8}{row['batch']:3d} x {row['length']:6d}: {row['tokens_per_s']:10,.0f} tok/s"
    line += f" ({1e3 * seconds['p10']:.3f} to {1e3 * seconds['p90']:.3f} ms), peak {row['peak_bytes'] / 2**30:.2f} GiB"
    if "floor_s" in row:
        line += f", floor {1e3 * row['floor_s']:.3f} ms, {row['share_of_floor']:.0%}"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
