"""Decode throughput: steady steps on a static cache, replayed as a CUDA graph.

    python -m benchmarks.decode --batch 1 --length 1024

Checks first that a fused step is no further from float32 than the modules are; prints no number when it is. The
roofline counts the bytes that a step must read: all weights once, keys and values of every attending layer, SSM states
read and written.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

from benchmarks.common import copy_bandwidth, graph_times, report, spread
from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.decoding import DecodeStep, why_not_fused

RELEASE = Path(__file__).parent.parent / "configs" / "model" / "hymba-1.5b.json"
WORSE = 1.25
"""How much further from float32 the fused step may be than the modules in the same dtype."""


def model_of_release(dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> HymbaForCausalLM:
    """Random weights of the released shape on the GPU."""
    config = HymbaConfig.from_dict(json.loads(RELEASE.read_text()))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = HymbaForCausalLM(config)
    return model.to(dtype).eval()


def filled(model: HymbaForCausalLM, rows: int, length: int, room: int) -> HymbaCache:
    """A static cache that holds `length` random tokens' worth of state, without the cost of a prefill."""
    cache = HymbaCache(model.config, max_length=length + room)
    with torch.no_grad():
        model(torch.randint(3, 1000, (rows, 4), device="cuda"), past_key_values=cache)
    for state in cache.layers:
        for tensor in (state.conv, state.ssm, *(() if state.kv is None else (state.kv.keys, state.kv.values))):
            assert tensor is not None
            tensor.normal_()
    cache.columns = length
    assert cache.seen is not None
    cache.seen = cache.seen.expand(rows).clone().fill_(length)
    return cache


def step_bytes(model: HymbaForCausalLM, cache: HymbaCache, length: int) -> int:
    """Bytes that one step has to read or write."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    total -= model.model.embed_tokens.weight.numel() * 2 * (0 if model.config.tie_word_embeddings else 1)
    for spec, state, i in zip(model.config.layers, cache.layers, range(len(cache.layers)), strict=True):
        lender = cache.layers[i if spec.kv_from is None else spec.kv_from]
        assert lender.kv is not None and lender.kv.keys is not None and lender.kv.values is not None
        seen = length if spec.window is None else min(length, spec.window + 1)
        rows = lender.kv.keys.shape[0]
        per = sum(t[0, 0].numel() * t.element_size() for t in (lender.kv.keys, lender.kv.values))
        total += rows * seen * per + lender.prefix * per
        for tensor in (state.conv, state.ssm):
            assert tensor is not None
            total += 2 * tensor.numel() * tensor.element_size()
    return total


@torch.no_grad()
def check(model: HymbaForCausalLM, exact: HymbaForCausalLM, rows: int) -> tuple[float, float]:
    """Relative errors of the logits of the modules and of the fused step against the same weights in float32."""
    ids = torch.randint(3, 1000, (rows, 40), device="cuda")
    logits = []
    for which, fused in ((exact, False), (model, False), (model, True)):
        cache = HymbaCache(which.config, max_length=64)
        which(ids[:, :32], past_key_values=cache)
        step = DecodeStep(which, cache, fused=fused)
        for t in range(32, 40):
            step.tokens.copy_(ids[:, t])
            step.run()
        logits.append(step.logits.clone())
    modules, fused_ = (((got - logits[0]).norm() / logits[0].norm()).item() for got in logits[1:])
    return modules, fused_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, nargs="+", default=[1024])
    parser.add_argument("--mode", choices=["auto", "fused", "modules"], default="auto")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.decode needs a CUDA device")
    model = model_of_release()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    exact = copy.deepcopy(model).float()
    checked: set[int] = set()
    rows = []
    for length in arguments.length:
        for batch in arguments.batch:
            fused = why_not_fused(model) is None if arguments.mode == "auto" else arguments.mode == "fused"
            if fused and batch not in checked:
                modules, of_fused = check(model, exact, batch)
                print(f"batch {batch}: relative error against float32: modules {modules:.4f}, fused {of_fused:.4f}")
                if not of_fused <= WORSE * modules:
                    sys.exit(f"the fused step's error may be {WORSE} times the modules'; no number")
                checked.add(batch)
            cache = filled(model, batch, length, 64)
            step = DecodeStep(model, cache, fused=fused)
            measured = spread(graph_times(step.run))
            floor = step_bytes(model, cache, length) / bandwidth
            row = {
                "batch": batch,
                "length": length,
                "mode": "fused" if fused else "modules",
                "step_ms": {k: v * 1e3 for k, v in measured.items()},
                "tokens_per_s": batch / measured["median"],
                "floor_ms": floor * 1e3,
                "share_of_floor": floor / measured["median"],
                "cache_bytes": cache.nbytes(),
            }
            rows.append(row)
            print(
                f"batch {batch:4d} length {length:6d} {row['mode']:8s} {row['tokens_per_s']:9.0f} tok/s, step "
                f"{measured['median'] * 1e3:.3f} ms ({measured['p10'] * 1e3:.3f} to {measured['p90'] * 1e3:.3f}), "
                f"floor {floor * 1e3:.3f} ms, {100 * floor / measured['median']:.0f}%"
            )
            del cache, step
            torch.cuda.empty_cache()
    report("decode", rows, bandwidth=bandwidth)


if __name__ == "__main__":
    main()
