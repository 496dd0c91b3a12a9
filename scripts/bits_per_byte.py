#!/usr/bin/env python3
"""Bits per byte of a checkpoint on the held-out files of its corpus, beside a Kneser-Ney 5-gram's.

    scripts/bits_per_byte.py [--model FOLDER] [--context N] [--order N] [--skip-ngram]

The corpus is the one that the checkpoint's training.json names, read on this machine. Both models see the same
tokens and predict the same bytes; hymba/experiments/bits.py says how. The 5-gram is trained on the training side.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hymba import HymbaForCausalLM
from hymba.experiments.bits import bits_per_byte
from hymba.experiments.corpus import byte_length, load_corpus
from hymba.experiments.ngram import KneserNey
from hymba.experiments.settings import DataSettings, settings_from
from hymba.experiments.tokenizer import encode_documents
from hymba.experiments.train import RECORD_NAME

DEFAULT = Path(str(files("hymba"))) / "assets" / "default"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT, help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--context", type=int, default=None, help="tokens per window (default: as in training)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype that the weights run in")
    parser.add_argument("--order", type=int, default=5, help="order of the n-gram")
    parser.add_argument("--skip-ngram", action="store_true", help="measure the checkpoint only")
    options = parser.parse_args()

    path = options.model / RECORD_NAME
    if not path.is_file():
        parser.error(f"{path}: no training record; give a folder that `hymba train` exported")
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = settings_from(DataSettings, record["settings"]["data"], where=str(path))
    corpus = load_corpus(settings)
    here = {"sha256": corpus.digest(), "python": platform.python_version(), "held_out": len(corpus.held_out)}
    same = here["sha256"] == record["corpus"]["sha256"]
    print(f"corpus: {corpus.description}, Python {here['python']}, sha256 {here['sha256'][:16]}")
    if not same:
        print(
            f"note: the checkpoint was trained on sha256 {record['corpus']['sha256'][:16]} (Python "
            f"{record['corpus']['python']}); no held-out file was trained on, because the split goes by name"
        )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = HymbaForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
    started = time.perf_counter()
    measured = bits_per_byte(model, tokenizer, corpus.held_out, context=options.context or settings.sequence_length)
    print(
        f"model: {measured.per_byte:.4f} bits per byte: {measured.bits:,.0f} bits for {measured.bytes:,} bytes "
        f"in {measured.documents} files, {measured.tokens:,} tokens, {time.perf_counter() - started:.0f} s"
    )
    result = {"model": asdict(measured) | {"bits_per_byte": measured.per_byte}, "same_corpus": same, **here}

    if not options.skip_ngram:
        started = time.perf_counter()
        # Without the end-of-text token, which is not scored; the beginning-of-text token is the n-gram's padding.
        sides = [
            [ids[1:-1] for ids in encode_documents(tokenizer, [document.text for document in side])]
            for side in (corpus.train, corpus.held_out)
        ]
        ngram = KneserNey(sides[0], vocabulary=len(tokenizer), order=options.order)
        figure = float(ngram.bits(sides[1]).sum()) / sum(byte_length(d.text) for d in corpus.held_out)
        print(f"Kneser-Ney {options.order}-gram: {figure:.4f} bits per byte, {time.perf_counter() - started:.0f} s")
        result["ngram"] = {"order": options.order, "bits_per_byte": figure}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
