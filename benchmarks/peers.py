"""Hymba beside Llama-3.2-1B, Llama-3.2-3B and Falcon-H1-1.5B, in one process on one device.

    python -m benchmarks.peers
    python -m benchmarks.peers --peers llama-3.2-3b --work decode prefill
    python -m benchmarks.peers --device cpu

Random weights of the published shapes. Each peer decodes on a static cache in the faster of two settings, with the
forward pass as it stands and compiled, both, beyond what `generate` does, captured as a CUDA graph, so that no Python
is timed. Prefill returns the last logits; training is forward and backward with bfloat16 parameters. A batch is halved
until it fits; peers decode at half of what fits as well, since the largest batch need not be their fastest. Each
peer's step is held to its own forward pass first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common import graph_times, machine, measure, peak_bytes, report, spread
from benchmarks.models import (
    add_model_arguments,
    build,
    check_against_plain,
    distance,
    hymba_config,
    needs_device,
    random_ids,
)
from benchmarks.peer_models import PARAMETERS, PEERS, PeerStep, cache_bytes, peer_class, peer_config
from benchmarks.prefill import one_piece
from benchmarks.roofline import measured_ceilings
from benchmarks.train import loss_and_gradients
from hymba import HymbaCache, cost
from hymba.decoding import DecodeStep, why_not_fused

WORK = ("decode", "prefill", "train")
SHAPES = {"decode": ((1, 1024), (128, 8192)), "prefill": ((8, 8192),), "train": ((2, 8192),)}
TOY_SHAPES = {"decode": ((1, 32), (4, 64)), "prefill": ((2, 64),), "train": ((2, 32),)}
ROOM = 64
TOLERANCE = 0.05
"""Relative difference of bfloat16 logits between a compiled step and the forward pass, in the 2-norm."""
_DEVICE_ERRORS = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


class TookTooLongError(BaseException):
    """A peer's time is up. Not an Exception: compilers wrap those in their own."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TookTooLongError` inside when it takes longer; a limit around it goes on."""

    def stop(*_: object) -> None:
        raise TookTooLongError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    started, left = time.monotonic(), signal.alarm(seconds)
    if left:
        signal.alarm(min(seconds, left))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.alarm(max(1, round(left - (time.monotonic() - started))))


def clear(device: str) -> None:
    """Give back memory and compiled code of what ran before."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def time_step(run: Callable[[], None], device: str, rewind: Callable[[], None]) -> dict[str, float]:
    """Seconds of a step: replayed as a graph on a GPU."""
    if device == "cuda":
        return spread(graph_times(run, repeats=16))
    rewind()
    return spread(measure(run, device, warmup=1, repeats=3))


def hymba_step(model: Any, rows: int, length: int) -> DecodeStep:
    """A decode step on a static cache filled with random states of `length` tokens."""
    cache = HymbaCache(model.config, max_length=length + ROOM)
    with torch.no_grad():
        model(torch.full((rows, 4), 5, device=model.device), past_key_values=cache, logits_to_keep=1)
    for state in cache.layers:
        for tensor in (state.conv, state.ssm, *(() if state.kv is None else (state.kv.keys, state.kv.values))):
            assert tensor is not None
            tensor.normal_(std=0.1)
    cache.columns = length
    assert cache.seen is not None
    cache.seen = cache.seen.expand(rows).clone().fill_(length)
    return DecodeStep(model, cache, fused=model.device.type == "cuda" and why_not_fused(model) is None)


def time_peer(model: Any, batch: int, length: int, device: str, compile_limit: int) -> dict[str, Any]:
    """Seconds of a peer's step in its faster setting: as it stands, and compiled when that does not take too long."""
    found: dict[str, dict[str, float]] = {}
    step = PeerStep(model, batch, length, ROOM)
    step.fill()
    for setting in ("static cache", "static cache, compiled"):
        if setting.endswith("compiled"):
            if device != "cuda" or not compile_limit:
                break
            step.compile()
        try:
            with time_limit(compile_limit) if setting.endswith("compiled") else contextlib.nullcontext():
                step.run()
                if batch == 1:
                    error = check_peer(model, step)
                    if not error < TOLERANCE:
                        raise RuntimeError(f"{setting}: step and forward pass differ by {error:.3f}; no number")
        except TookTooLongError:
            print(f"{setting}: not compiled within {compile_limit} s", flush=True)
            break
        step.rewind()
        found[setting] = time_step(step.run, device, step.rewind)
        step.rewind()
    best = min(found, key=lambda setting: found[setting]["median"])
    return {
        "seconds": found[best],
        "tokens_per_s": batch / found[best]["median"],
        "setting": f"{best}, one graph" if device == "cuda" else best,
        "settings_ms": {setting: 1e3 * seconds["median"] for setting, seconds in found.items()},
        "cache_bytes": cache_bytes(step.cache),
    }


@torch.no_grad()
def check_peer(model: Any, step: PeerStep) -> float:
    """Relative difference of a compiled step behind a prompt from one forward pass; leaves the cache empty."""
    rows = step.tokens.shape[0]
    ids = random_ids(rows, 33, model.config.vocab_size, str(model.device.type))
    step.cache.reset()
    step.prefill(ids[:, :32])
    step.tokens.copy_(ids[:, 32:])
    step.run()
    assert step.logits is not None
    return distance([step.logits.float()], [model(ids, use_cache=False).logits[:, -1].float()])


class Rows:
    """Measurements so far; each is printed when it is made."""

    def __init__(self, device: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.device = device

    def add(self, model: str, work: str, batch: int, length: int, run: Callable[[int], dict[str, Any]]) -> bool:
        """Run at `batch`, halved until it fits, and keep what came out; whether anything did."""
        row: dict[str, Any] = {"model": model, "work": work, "length": length}
        while batch:
            try:
                with peak_bytes(self.device) as peak:
                    found = run(batch)
                row |= {"batch": batch, "peak_bytes": peak.value} | found
                break
            except torch.OutOfMemoryError:
                print(f"{model:15} {work:8} {batch:4d} x {length}: out of memory", flush=True)
                row.setdefault("too_large", []).append(batch)
                batch = batch // 2 if work == "decode" else 0
            except TookTooLongError as error:
                row["error"] = str(error)
                break
            except RuntimeError as error:
                row["error"] = (str(error).strip().splitlines() or ["no message"])[0]
                if any(text in str(error) for text in _DEVICE_ERRORS):
                    row["context_lost"] = True
                break
            finally:
                if not row.get("context_lost"):
                    clear(self.device)
        self.rows.append(row)
        if "tokens_per_s" in row:
            low, high = (1e3 * row["seconds"][p] for p in ("p10", "p90"))
            print(
                f"{model:15} {work:8} {batch:4d} x {length}: {row['tokens_per_s']:10,.0f} tok/s "
                f"({low:.2f} to {high:.2f} ms), peak {row['peak_bytes'] / 2**30:.1f} GiB",
                flush=True,
            )
        else:
            print(f"{model:15} {work:8} {length}: none ({row.get('error', 'out of memory')})", flush=True)
        return "tokens_per_s" in row

    @property
    def context_lost(self) -> bool:
        return any(row.get("context_lost") for row in self.rows)


def run_model(
    rows: Rows,
    name: str,
    model: Any,
    work: list[str],
    *,
    toy: bool,
    repeats: int,
    compile_limit: int,
    single: bool,
    long: bool,
) -> None:
    """All work of one model."""
    device, vocab = rows.device, model.config.vocab_size
    shapes = TOY_SHAPES if toy else SHAPES
    ours = name == "hymba"

    def decode(length: int) -> Callable[[int], dict[str, Any]]:
        def run(batch: int) -> dict[str, Any]:
            if not ours:
                return time_peer(model, batch, length, device, compile_limit if batch == 1 or not single else 0)
            step = hymba_step(model, batch, length)
            seconds = time_step(step.run, device, lambda: None)
            facts = {"cache_bytes": step.cache.nbytes(), "setting": "fused" if step.fused else "modules"}
            return facts | {"seconds": seconds, "tokens_per_s": batch / seconds["median"]}

        return run

    def prefill(length: int) -> Callable[[int], dict[str, Any]]:
        def run(batch: int) -> dict[str, Any]:
            ids = random_ids(batch, length, vocab, device)

            @torch.no_grad()
            def call() -> None:
                if ours:
                    one_piece(model, ids)
                else:
                    model(ids, use_cache=True, logits_to_keep=1)

            seconds = spread(measure(call, device, warmup=1, repeats=repeats))
            return {"seconds": seconds, "tokens_per_s": batch * length / seconds["median"]}

        return run

    def train(length: int) -> Callable[[int], dict[str, Any]]:
        def run(batch: int) -> dict[str, Any]:
            ids = random_ids(batch, length, vocab, device)
            model.train()
            if ours:
                model.use_fused_loss()

            def call() -> None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                model.zero_grad(set_to_none=True)

            try:
                seconds = spread(measure(call, device, warmup=2, repeats=repeats))
            finally:
                model.eval()
                model.zero_grad(set_to_none=True)
            return {"seconds": seconds, "tokens_per_s": batch * length / seconds["median"]}

        return run

    for kind, make in (("decode", decode), ("prefill", prefill), ("train", train)):
        for batch, length in shapes[kind] if kind in work else ():
            if kind == "decode" and batch > 1 and not long:
                continue
            fits = rows.add(name, kind, batch, length, make(length))
            if fits and not ours and kind == "decode" and batch > 1:
                rows.add(name, kind, rows.rows[-1]["batch"] // 2, length, make(length))
            if rows.context_lost:
                return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--limit", type=int, default=170, metavar="SECONDS", help="per model, compilation included")
    parser.add_argument(
        "--compile-limit", type=int, default=80, metavar="SECONDS", help="per compilation of a peer's step; 0: none"
    )
    parser.add_argument(
        "--long", nargs="*", choices=list(PEERS), default=list(PEERS), help="peers that decode at 8k as well"
    )
    parser.add_argument("--compile-single", action="store_true", help="compile the step of batch 1 only")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache for batch 1, no number")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    needs_device(args.device)
    device, toy = args.device, args.toy or args.device == "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.compile_only:
        return compile_steps(args.peers, device, dtype, args.limit, toy=toy)
    machine()
    checks = [lambda m, ids: [one_piece(m, ids)], *([loss_and_gradients] if "train" in args.work else [])]
    for check in checks:
        check_against_plain(check, device=device, dtype=dtype, toy=toy)
    ceilings = measured_ceilings(device)
    rows = Rows(device)
    for name in ("hymba", *args.peers):
        started = time.perf_counter()
        config = hymba_config(args.layers, toy=toy) if name == "hymba" else peer_config(name, toy=toy)
        try:
            with time_limit(args.limit):
                model = build(
                    config, device=device, dtype=dtype, **({} if name == "hymba" else {"cls": peer_class(name)})
                )
                count = sum(p.numel() for p in model.parameters())
                if not toy and not args.layers:
                    expected = cost.parameters(config).total if name == "hymba" else PARAMETERS[name]
                    assert count == expected, f"{name} has {count:,} parameters, published {expected:,}"
                print(f"{name}: {count:,} parameters", flush=True)
                run_model(
                    rows, name, model, args.work, toy=toy, repeats=args.repeats, compile_limit=args.compile_limit,
                    single=args.compile_single, long=name == "hymba" or name in args.long,
                )  # fmt: skip
        except TookTooLongError as error:
            print(f"{name}: {error}", flush=True)
        for row in rows.rows:
            if row["model"] == name:
                row["parameters"] = count
        model = None
        if rows.context_lost:
            print(f"{name}: a kernel broke the device's context; nothing more can run", flush=True)
            break
        clear(device)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    print_ratios(rows.rows)
    report("peers", rows.rows, dtype=str(dtype).removeprefix("torch."), **(ceilings.to_dict() if ceilings else {}))
    return 0


def compile_steps(names: list[str], device: str, dtype: torch.dtype, limit: int, *, toy: bool) -> int:
    """Compile each peer's step of the first decoding shape once."""
    batch, length = (TOY_SHAPES if toy else SHAPES)["decode"][0]
    for name in names:
        started = time.perf_counter()
        model = build(peer_config(name, toy=toy), peer_class(name), device=device, dtype=dtype)
        step = PeerStep(model, batch, length, ROOM)
        step.fill()
        built = time.perf_counter()
        if device == "cuda":
            step.compile()
        try:
            with time_limit(limit):
                step.run()
        except TookTooLongError as error:
            print(f"{name}: {error}", flush=True)
        print(f"{name}: built in {built - started:.0f} s, first step {time.perf_counter() - built:.0f} s", flush=True)
        model = step = None
        clear(device)
    return 0


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Hymba's tokens per second at the largest batch that fits over each peer's, for the same work."""
    ours = {(r["work"], r["length"]): r for r in rows if r["model"] == "hymba" and "tokens_per_s" in r}
    for row in rows:
        mine = ours.get((row["work"], row["length"]))
        if row["model"] != "hymba" and mine and "tokens_per_s" in row:
            row["hymba_over_this"] = mine["tokens_per_s"] / row["tokens_per_s"]
            shape = f"{row['batch']:3d} x {row['length']}"
            line = f"hymba over {row['model']:15} {row['work']:8} {shape}: {row['hymba_over_this']:.2f}x"
            if "cache_bytes" in row:
                row["cache_ratio"] = (row["cache_bytes"] / row["batch"]) / (mine["cache_bytes"] / mine["batch"])
                line += f", {row['cache_ratio']:.2f}x less cache a row"
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
