"""Training throughput: forward and backward as the reference was measured, and the full step.

    python -m benchmarks.train                                  # 2 x 8k and 8 x 2k, both ways
    python -m benchmarks.train --shape 2x8192 --way backward --compile
    python -m benchmarks.train --shape 2x8192 --policy none selective full
    python -m benchmarks.train --shape 2x8192 --way backward --call graph
    python -m benchmarks.train --device cpu --shape 2x64

`backward`: bfloat16 parameters, forward with loss and backward, no optimizer. `step`: float32 parameters, bfloat16
autocast, fused AdamW. On a GPU `backward` is called both ways: eagerly, as the reference was measured, where the host
launches every kernel, and captured once as a CUDA graph and replayed, with no Python in it.

Checks the loss and every gradient on a few layers against plain PyTorch first; prints no number when that fails. The
floor is three times the forward's operations over the measured matrix rate.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import graph_times, measure, peak_bytes, report, spread
from benchmarks.models import add_model_arguments, build, check_against_plain, hymba_config, needs_device, random_ids
from benchmarks.roofline import measured_ceilings, train
from hymba.memory import POLICIES, training_bytes

WAYS = ("backward", "step")
CALLS = ("eager", "graph")


def loss_and_gradients(model: Any, ids: Tensor) -> list[Tensor]:
    """The loss, then the gradient of every parameter that has one."""
    model.train()
    model.use_fused_loss()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def step_function(model: Any, ids: Tensor, way: str, device: str) -> Callable[[], None]:
    """One training step of a way, without anything that reads from the device."""
    if way == "backward":

        def run() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        return run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run_step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run_step


def captures(device: str, way: str) -> bool:
    """Whether a step of that way can be one CUDA graph here."""
    return device == "cuda" and way == "backward"


def free() -> None:
    """Give back what the allocator keeps: a graph has a pool of its own."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--shape", nargs="+", default=["2x8192", "8x2048"], metavar="BxL", help="rows x tokens")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument(
        "--call", nargs="+", choices=CALLS, default=list(CALLS), help="graph: on a GPU, and of the way backward alone"
    )
    parser.add_argument(
        "--loss", choices=("fused", "logits"), default="fused", help="without the logits of all tokens, or with them"
    )
    parser.add_argument(
        "--policy", nargs="+", choices=POLICIES, default=["none"], help="activations kept for backward; several in turn"
    )
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args(arguments)
    needs_device(args.device)
    calls = {way: [call for call in args.call if call == "eager" or captures(args.device, way)] for way in args.way}
    if not any(calls.values()):
        parser.error("--call graph: needs a GPU and --way backward (the step's optimizer is not captured)")
    try:
        shapes = [(int(rows), int(length)) for rows, length in (shape.split("x") for shape in args.shape)]
    except ValueError:
        parser.error(f"--shape {' '.join(args.shape)}: written as 2x8192, rows x tokens")
    device, toy = args.device, args.toy or args.device == "cpu"
    errors = check_against_plain(
        loss_and_gradients, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32, toy=toy
    )
    config = hymba_config(args.layers, toy=toy)
    ceilings = measured_ceilings(device)
    rows: list[dict[str, Any]] = []
    for way in args.way:
        dtype = torch.bfloat16 if way == "backward" else torch.float32
        model = build(config, device=device, dtype=dtype).train()
        model.use_fused_loss(args.loss == "fused")
        called = torch.compile(model) if args.compile else model
        for policy, (batch, length), call in itertools.product(args.policy, shapes, calls[way]):
            model.set_activation_checkpointing(policy)
            ids = random_ids(batch, length, config.vocab_size, device)
            run = step_function(called, ids, way, device)
            row: dict[str, Any] = {"way": way, "batch": batch, "length": length, "loss": args.loss}
            row |= {"policy": policy, "compile": args.compile, "call": call}
            try:
                run()
                with peak_bytes(device) as peak:
                    if call == "graph":
                        seconds = spread(graph_times(run, repeats=args.repeats))
                    else:
                        seconds = spread(measure(run, device, warmup=2, repeats=args.repeats))
            except torch.OutOfMemoryError:
                rows.append(row | {"out_of_memory": True})
                print(f"{way:8} {call:5} {policy:9} {batch} x {length}: out of memory", flush=True)
                continue
            finally:
                model.zero_grad(set_to_none=True)
                free()
            row |= {"seconds": seconds, "tokens_per_s": batch * length / seconds["median"], "peak_bytes": peak.value}
            row["estimated_bytes"] = training_bytes(
                config, batch=batch, length=length, parameter_dtype=dtype, optimizer=way == "step",
                checkpointing=policy, fused_loss=args.loss == "fused",
            ).total  # fmt: skip
            line = f"{way:8} {call:5} {policy:9} {batch} x {length}: {row['tokens_per_s']:8,.0f} tok/s, "
            line += f"{1e3 * seconds['median']:.1f} ms ({1e3 * seconds['p10']:.1f} to {1e3 * seconds['p90']:.1f}), "
            line += f"peak {peak.value / 2**30:.2f} GiB "
            line += f"(estimated {row['estimated_bytes'] / 2**30:.2f})"
            if ceilings is not None:
                row["floor_s"] = ceilings.floor(*train(config, batch, length))
                row["share_of_floor"] = row["floor_s"] / seconds["median"]
                line += f", floor {1e3 * row['floor_s']:.1f} ms, {row['share_of_floor']:.0%}"
            print(line, flush=True)
            rows.append(row)
        del model, called, run
        free()
    facts = {} if ceilings is None else ceilings.to_dict()
    report("train", rows, model="hymba", layers=len(config.layers), errors=errors, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
