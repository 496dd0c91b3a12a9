"""Prefill throughput, last logits only, and one long prompt taken in chunks of bounded memory.

    python -m benchmarks.prefill                                # 8 x 8k, then one prompt of 128k
    python -m benchmarks.prefill --batch 1 --length 2048 8192 --long 0
    python -m benchmarks.prefill --device cpu --length 128 --long 256 --chunk 64

Checks first, past the window, that a prefill in one piece and one in chunks give what plain PyTorch gives; prints no
number when that fails. The long prompt's cost per token is compared with the same way of working at 8k.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import measure, peak_bytes, report, spread
from benchmarks.models import add_model_arguments, build, check_against_plain, hymba_config, needs_device, random_ids
from benchmarks.roofline import measured_ceilings, prefill
from hymba import HymbaCache
from hymba.memory import generation_bytes


@torch.no_grad()
def one_piece(model: Any, ids: Tensor) -> Tensor:
    """Logits (b, vocab) of the last token, from a prompt taken in at once."""
    cache = HymbaCache(model.config, max_length=ids.shape[1])
    return model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, chunk: int) -> Tensor:
    """The same, `chunk` tokens at a time."""
    cache = HymbaCache(model.config, max_length=ids.shape[1])
    for part in ids.split(chunk, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1]


@torch.no_grad()
def _whole(model: Any, ids: Tensor) -> list[Tensor]:
    return [model(ids, use_cache=False).logits[:, -1]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--length", type=int, nargs="+", default=[8192])
    parser.add_argument("--long", type=int, default=131072, help="tokens of the long prompt; 0 leaves it out")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the long prompt at a time")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(arguments)
    needs_device(args.device)
    device, toy = args.device, args.toy or args.device == "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    errors = [
        check_against_plain(run, device=device, dtype=dtype, toy=toy, reference=_whole)
        for run in (lambda m, ids: [one_piece(m, ids)], lambda m, ids: [in_chunks(m, ids, 37 if toy else 512)])
    ]
    config = hymba_config(args.layers, toy=toy)
    model = build(config, device=device, dtype=dtype)
    ceilings = measured_ceilings(device)
    rows: list[dict[str, Any]] = []

    def add(kind: str, batch: int, length: int, chunk: int, repeats: int) -> dict[str, Any]:
        ids = random_ids(batch, length, config.vocab_size, device)
        run = (lambda: one_piece(model, ids)) if chunk >= length else (lambda: in_chunks(model, ids, chunk))
        run()
        with peak_bytes(device) as peak:
            seconds = spread(measure(run, device, warmup=1, repeats=repeats))
        row: dict[str, Any] = {"kind": kind, "batch": batch, "length": length, "chunk": min(chunk, length)}
        row |= {"seconds": seconds, "tokens_per_s": batch * length / seconds["median"], "peak_bytes": peak.value}
        line = f"{kind:9} {batch:3d} x {length:6d}: {row['tokens_per_s']:9,.0f} tok/s, {1e3 * seconds['median']:.1f} ms"
        line += f" ({1e3 * seconds['p10']:.1f} to {1e3 * seconds['p90']:.1f}), peak {peak.value / 2**30:.2f} GiB "
        need = generation_bytes(config, batch=batch, prompt=length, length=length, dtype=name, static=True, chunk=chunk)
        row["estimated_bytes"] = need.total
        line += f"(estimated {need.total / 2**30:.2f})"
        if ceilings is not None:
            moved, operations = prefill(config, batch, length, name)
            row["floor_s"] = ceilings.floor(moved, operations)
            row["share_of_floor"] = row["floor_s"] / seconds["median"]
            line += f", floor {1e3 * row['floor_s']:.1f} ms, {row['share_of_floor']:.0%}"
        print(line, flush=True)
        rows.append(row)
        return row

    for length in args.length:
        for batch in args.batch:
            add("prefill", batch, length, length, args.repeats)
    facts: dict[str, Any] = {}
    if args.long:
        short = min(args.length)
        per_token = [
            add("in chunks", 1, length, args.chunk, repeats)["seconds"]["median"] / length
            for length, repeats in ((short, args.repeats), (args.long, max(1, args.repeats // 5)))
        ]
        facts["long_over_short_per_token"] = per_token[1] / per_token[0]
        print(f"cost per token at {args.long} over that at {short}: {facts['long_over_short_per_token']:.2f}")
    if ceilings is not None:
        facts |= ceilings.to_dict()
    report("prefill", rows, model="hymba", dtype=name, layers=len(config.layers), errors=errors, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
