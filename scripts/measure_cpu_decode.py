#!/usr/bin/env python
"""Decoding speed on this machine's CPU, batch 1, as tokens/s and as a share of the memory bandwidth.

    python scripts/random_checkpoint.py /tmp/hymba-random
    python scripts/measure_cpu_decode.py /tmp/hymba-random

Measured plain and with prepacked weights (`hymba.ops.prepack`). The share is the bytes of weights that a token needs
per second, over the bytes read plus written per second by a copy of 1 GiB on all cores; copies run between the rounds
of decoding, so that other jobs on the machine slow both down. First the two ways are held against each other: their
logits may differ by rounding only. The last line is JSON. Exit status 1: less than half of the bandwidth with
prepacked weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from hymba import HymbaCache, HymbaForCausalLM
from hymba.ops.prepack import prepacked_linears

REQUIRED_SHARE = 0.5
COPY_BYTES = 1 << 30
# The largest difference of a logit in standard deviations of the logits: bfloat16 has steps of 1/256, and 32 layers
# add theirs up. A wrong layer gives a difference of several.
ROUNDING = 0.25


def weight_bytes(model: HymbaForCausalLM) -> int:
    """Bytes of parameters that a decode step reads: no meta tokens, and no embeddings but those that are the head."""
    unread = {"model.meta_tokens.weight"}
    if not model.config.tie_word_embeddings:
        unread.add("model.embed_tokens.weight")
    return sum(p.nbytes for name, p in model.named_parameters() if name not in unread)


class Copy:
    """A copy that no cache holds."""

    def __init__(self) -> None:
        # Written once, so that no page is made while the clock runs.
        self.source = torch.ones(COPY_BYTES, dtype=torch.uint8)
        self.target = torch.zeros(COPY_BYTES, dtype=torch.uint8)

    def rate(self) -> float:
        """Bytes read plus written per second."""
        start = time.perf_counter()
        self.target.copy_(self.source)
        return 2 * COPY_BYTES / (time.perf_counter() - start)


def decode(model: HymbaForCausalLM, prompt: Tensor, tokens: Tensor) -> tuple[list[float], Tensor]:
    """Feed tokens one by one behind a prompt; seconds of each step, and the logits (tokens, vocabulary)."""
    cache = HymbaCache(model.config)
    model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    seconds, logits = [], []
    for token in tokens.split(1, dim=1):
        start = time.perf_counter()
        logits.append(model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1])
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cat(logits)


def measure(
    model: HymbaForCausalLM, prompt: Tensor, tokens: Tensor, *, rounds: int, copy: Copy
) -> tuple[dict[str, float], Tensor]:
    """Rounds of decoding between copies; medians, and the logits."""
    steps, rates = [], []
    logits = torch.empty(0)
    for _ in range(rounds):
        rates += [copy.rate() for _ in range(3)]
        seconds, logits = decode(model, prompt, tokens)
        # The first steps pay for the prompt's memory.
        steps += seconds[2:]
        rates += [copy.rate() for _ in range(3)]
    step, rate = statistics.median(steps), statistics.median(rates)
    read = weight_bytes(model) / step
    return {"tokens_per_s": 1 / step, "weights_gb_s": read / 1e9, "copy_gb_s": rate / 1e9, "share": read / rate}, logits


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of the prompt (64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps of a round (32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way (3)")
    args = parser.parse_args(arguments)
    if args.new_tokens < 4:
        raise SystemExit(f"error: --new-tokens {args.new_tokens}: allowed: 4 or more")

    logging.disable_progress_bar()
    model = HymbaForCausalLM.from_pretrained(args.folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, args.prompt_tokens + args.new_tokens), generator=generator)
    prompt, tokens = ids.split([args.prompt_tokens, args.new_tokens], dim=1)
    copy = Copy()
    results: dict[str, dict[str, float]] = {}
    outputs: dict[str, Tensor] = {}
    note = ""
    with torch.inference_mode():
        for way in ("plain", "prepacked"):
            with prepacked_linears(model) if way == "prepacked" else contextlib.nullcontext() as packed:
                if packed is not None:
                    note = packed.reason or f"{packed.layers} layers, {packed.bytes / 1e9:.2f} GB of copies"
                results[way], outputs[way] = measure(model, prompt, tokens, rounds=args.rounds, copy=copy)

    spread = outputs["plain"].std()
    difference = float((outputs["plain"] - outputs["prepacked"]).abs().max() / spread)
    if not difference < ROUNDING:
        print(f"error: logits of the two ways differ by {difference:.3f} standard deviations; allowed: {ROUNDING}")
        return 1
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{args.folder}: {dtype}, {weight_bytes(model):,} bytes of weights a token, batch 1")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; "
          f"prompt of {args.prompt_tokens}, {args.new_tokens} steps, {args.rounds} rounds, medians")  # fmt: skip
    print(f"logits of the two ways differ by at most {difference:.3f} standard deviations; prepacked: {note}\n")
    for way, result in results.items():
        print(f"{way:10} {result['tokens_per_s']:6.2f} tokens/s   {result['weights_gb_s']:5.1f} of "
              f"{result['copy_gb_s']:5.1f} GB/s: {result['share']:.0%} of the bandwidth")  # fmt: skip
    enough = results["prepacked"]["share"] >= REQUIRED_SHARE
    print(json.dumps({**results, "difference": difference, "required_share": REQUIRED_SHARE, "enough": enough}))
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
