#!/usr/bin/env python3
"""Training tokens/s of a configuration, and where the time of a step goes.

    scripts/measure_training.py [KEY=VALUE ...] [--config FILE] [--steps N]

Takes the real settings, corpus, tokenizer and rows, and times whole steps (forward, backward, clipping, optimizer) in
memory; nothing is written. The table is of one more step under the profiler. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from hymba.experiments.corpus import load_corpus
from hymba.experiments.optimization import build_optimizer
from hymba.experiments.packing import TokenRows, collate
from hymba.experiments.settings import load_settings
from hymba.experiments.tokenizer import build_tokenizer, encode_documents
from hymba.experiments.train import build_model

TINY = Path(__file__).resolve().parents[1] / "configs" / "train" / "tiny.yaml"
# The first part whose words are in an operation's own name or in one that called it.
PARTS = (
    ("selective scan", ("hymba::selective_scan",)),
    ("causal convolution", ("hymba::causal_conv1d",)),
    ("attention", ("scaled_dot_product", "bmm", "softmax", "Softmax")),
    ("loss", ("cross_entropy", "nll_loss", "NllLoss", "log_softmax", "LogSoftmax")),
    ("optimizer", ("Optimizer.step", "clip_grad", "_foreach")),
    ("projections", ("aten::mm", "addmm", "linear", "aten::matmul", "MmBackward")),
)
OTHER = "norms, gates, rotary, copies"


def part_of(event: Any) -> str:
    """The part of the step that a profiled operation belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for part, words in PARTS:
        # `_softmax` is the attention's, `_log_softmax` the loss's.
        if any(word in name and not (part == "attention" and "og_softmax" in name.replace("LogSoftmax", "log_softmax"))
               for name in names for word in words):  # fmt: skip
            return part
    return OTHER


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=TINY, help="settings file (default: the tiny one)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's")
    parser.add_argument("--steps", type=int, default=10, help="steps to time, after two to warm up")
    options = parser.parse_args()

    settings = load_settings(options.config, options.overrides)
    run = settings.run
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    corpus = load_corpus(settings.data)
    tokenizer = build_tokenizer(settings.tokenizer, (document.text for document in corpus.train))
    model = build_model(settings, tokenizer).train()
    optimizer = build_optimizer(model, settings.optimizer)
    rows = TokenRows(
        encode_documents(tokenizer, [document.text for document in corpus.train]),
        length=settings.data.sequence_length,
        rows=(options.steps + 3) * run.batch_size,
        seed=run.seed,
        layout=settings.data.layout,
    )

    def step(i: int) -> float:
        batch = collate([rows[i * run.batch_size + row] for row in range(run.batch_size)])
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    times = [step(i) for i in range(options.steps + 2)][2:]
    tokens = run.batch_size * settings.data.sequence_length
    speed = tokens / statistics.median(times)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(options.steps + 2)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        spent[part_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {tokens:,} tokens a step, {torch.get_num_threads()} threads, {run.precision}")
    print(f"{speed:,.0f} tokens/s (median of {len(times)} steps; best {tokens / min(times):,.0f})")
    for part, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{microseconds / total:6.1%}  {part}")
    shares = {part: round(microseconds / total, 4) for part, microseconds in spent.items()}
    result = {"tokens_per_second": speed, "threads": torch.get_num_threads(), "parameters": parameters, **shares}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
