"""Cache memory: what is measured over what `hymba.cost` says, and against Llama-3.2-3B at the same length.

    python -m benchmarks.cache                      # 8k, batch 1 and 8
    python -m benchmarks.cache --device cpu

Measured twice: the bytes of all tensors that a cache holds after a prefill, and on a GPU the bytes asked of the
allocator that are still there (a view would keep more than it shows; anything forgotten elsewhere would be seen). What
the allocator adds by rounding, up to 1 MiB to a tensor, is printed beside them. Convolution inputs and the float32 SSM
state are counted. The peer's cache is a real static cache of transformers of the published shape, with room for the
same number of tokens. The check is the point of this benchmark: measured over computed must be within 2%.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.common import report
from benchmarks.models import add_model_arguments, build, hymba_config, needs_device, random_ids
from benchmarks.peer_models import cache_bytes as peer_cache_bytes
from benchmarks.peer_models import peer_config
from hymba import HymbaCache, cost

WITHIN = 0.02
"""Largest relative difference of measured bytes from computed ones."""


def in_use(device: str) -> tuple[int, int]:
    """Bytes asked of the device's allocator and bytes that it gave out for them; zeros on a CPU."""
    gc.collect()
    if device != "cuda":
        return 0, 0
    statistics = torch.cuda.memory_stats()
    return statistics["requested_bytes.all.current"], statistics["allocated_bytes.all.current"]


def held_by(make: Callable[[], Any], device: str) -> tuple[Any, int, int]:
    """What `make` returns, the bytes asked for it that are still in use, and what the allocator gave out for them."""
    before = in_use(device)
    made = make()
    after = in_use(device)
    return made, after[0] - before[0], after[1] - before[1]


def peer_cache(batch: int, length: int, device: str, dtype: torch.dtype, *, toy: bool) -> Any:
    """An allocated static cache of Llama-3.2-3B."""
    config = peer_config("llama-3.2-3b", toy=toy)
    cache = StaticCache(config=config, max_cache_len=length)
    keys = torch.zeros(batch, config.num_key_value_heads, 1, config.head_dim, device=device, dtype=dtype)
    for layer in cache.layers:
        layer.lazy_initialization(keys, keys)
    return cache


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, nargs="+", default=[8192])
    args = parser.parse_args(arguments)
    needs_device(args.device)
    device, toy = args.device, args.toy or args.device == "cpu"
    dtype = torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    config = hymba_config(args.layers, toy=toy)
    model = build(config, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    failed = False
    for length in args.length:
        for batch in args.batch:
            peer, _, peer_allocated = held_by(
                lambda b=batch, n=length: peer_cache(b, n, device, dtype, toy=toy), device
            )
            peer_bytes = peer_cache_bytes(peer)
            del peer
            for static in (False, True):

                def fill(static: bool = static, batch: int = batch, length: int = length) -> HymbaCache:
                    cache = HymbaCache(config, max_length=length if static else None)
                    ids = random_ids(batch, length, config.vocab_size, device)
                    with torch.no_grad():
                        for part in ids.split(2048, dim=1) if static else (ids,):
                            model(part, past_key_values=cache, logits_to_keep=1)
                    return cache

                # The first fill also allocates what kernels and libraries keep for themselves.
                fill()
                cache, asked, given = held_by(fill, device)
                computed = cost.cache_bytes(config, length, batch=batch, dtype=name, static=static).total
                measured = cache.nbytes()
                row = {"batch": batch, "length": length, "static": static, "computed_bytes": computed}
                row |= {
                    "measured_bytes": measured,
                    "requested_bytes": asked,
                    "allocated_bytes": given,
                    "measured_over_computed": measured / computed,
                }
                row |= {"llama_3b_bytes": peer_bytes, "llama_3b_allocated": peer_allocated}
                row["llama_3b_over_this"] = peer_bytes / measured
                rows.append(row)
                worst = max(abs(b / computed - 1) for b in (measured, asked or measured))
                failed |= worst > WITHIN
                print(
                    f"{batch:3d} x {length:6d} {'static' if static else 'dynamic':7}: "
                    f"{measured / 2**20:9.2f} MiB in tensors, {asked / 2**20:9.2f} MiB asked for "
                    f"({given / 2**20:.2f} with rounding), "
                    f"computed {computed / 2**20:9.2f} MiB ({'WRONG, ' if worst > WITHIN else ''}off by {worst:.2%}); "
                    f"Llama-3.2-3B {peer_bytes / 2**20:9.2f} MiB, {row['llama_3b_over_this']:.2f}x",
                    flush=True,
                )
                del cache
    report("cache", rows, dtype=name, layers=len(config.layers), parameters=cost.parameters(config).total)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
