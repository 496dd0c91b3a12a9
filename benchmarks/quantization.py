"""Loss, tokens/s and memory of a checkpoint in float32, bfloat16, int8 and int4.

    python -m benchmarks.quantization                           # the embedded checkpoint
    python -m benchmarks.quantization --model FOLDER --variants bfloat16 int8 int4
    python -m benchmarks.quantization --parts                   # loss with one kind of weight quantised at a time

Every variant is loaded in a process of its own, so that the memory is its own. A step over a cache is first held to
the forward pass over the same text; a variant whose logits differ by more than rounding prints no number. The loss is
bits per byte on the held-out files of the checkpoint's corpus (hymba/experiments/bits.py), and left out for folders
without a training record, random weights for instance.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import report
from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.quantization import KINDS, quantization_config
from hymba.quantization import report as weights

DEFAULT = Path(str(files("hymba"))) / "assets" / "default"
VARIANTS = ("float32", "bfloat16", *KINDS)
PARTS = {
    "in_proj": r"in_proj$",
    "out_proj": r"out_proj$",
    "x_proj": r"x_proj$",
    "dt_proj": r"dt_proj$",
    "gate_proj and up_proj": r"(gate|up)_proj$",
    "down_proj": r"down_proj$",
    "embeddings and head": r"(embed_tokens|lm_head)$",
    "in_proj, out_proj and MLP": r"(in|out|gate|up|down)_proj$",
    "every linear layer": r"_proj$",
}
DRIFT = 0.05
"""Largest ||step - forward|| / ||forward|| of logits: bfloat16 sums in two orders. A wrong state is off by 1."""


def load(folder: Path, variant: str, *, device: str, dtype: str) -> HymbaForCausalLM:
    """A checkpoint as one variant; `dtype` is what surrounds quantised weights."""
    keywords: dict[str, Any] = {"dtype": dtype if variant in KINDS else variant, "device_map": {"": device}}
    if variant in KINDS:
        config = HymbaConfig.from_pretrained(folder)
        keywords["quantization_config"] = quantization_config(variant, config=config, device=device)
    return HymbaForCausalLM.from_pretrained(folder, **keywords).eval()


@torch.no_grad()
def drift(model: HymbaForCausalLM, length: int) -> float:
    """How far the logits of steps over a cache are from those of one forward pass, relative."""
    ids = _ids(model, length)
    whole = model(ids, use_cache=False).logits.float()
    cache = HymbaCache(model.config)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits.float() for i in range(length)]
    return float((torch.cat(steps, dim=1) - whole).norm() / whole.norm())


def _ids(model: HymbaForCausalLM, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(model.device)


@torch.no_grad()
def speed(model: HymbaForCausalLM, *, prompt: int, tokens: int, clock: str) -> dict[str, float]:
    """Tokens/s at batch 1: of a prompt taken in at once, and of greedy steps behind it."""
    ids = _ids(model, prompt)

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if clock == "processor" else time.perf_counter()

    with model.frozen_meta_state():
        model(ids, use_cache=False, logits_to_keep=1)
        cache = HymbaCache(model.config)
        started = now()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        prefilled = now()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        first = now()
        for _ in range(tokens):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        ended = now()
    return {"prefill_tokens_per_s": prompt / (prefilled - started), "tokens_per_s": tokens / (ended - first)}


def loss(model: HymbaForCausalLM, folder: Path, files: int | None) -> float | None:
    """Bits per byte on the held-out files of the checkpoint's corpus; `None` without a training record."""
    from transformers import AutoTokenizer

    from hymba.experiments.bits import bits_per_byte
    from hymba.experiments.corpus import load_corpus
    from hymba.experiments.settings import DataSettings, settings_from
    from hymba.experiments.train import RECORD_NAME

    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    record = json.loads(path.read_text("utf-8"))
    settings = settings_from(DataSettings, record["settings"]["data"], where=str(path))
    documents = load_corpus(settings).held_out[:files]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return bits_per_byte(model, tokenizer, documents, context=settings.sequence_length).per_byte


def resident_bytes() -> dict[str, int]:
    """Memory of this process: now, and at most so far; empty where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return {}
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", lines))
    return {"resident_bytes": 1024 * int(found["VmRSS"]), "peak_resident_bytes": 1024 * int(found["VmHWM"])}


def one(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Everything about one variant."""
    started = time.perf_counter()
    model = load(args.model, variant, device=args.device, dtype=args.dtype)
    row: dict[str, Any] = {"variant": variant, "load_s": time.perf_counter() - started}
    found = weights(model)
    quantised, linear = len(found.quantised), len(found.quantised) + len(found.unquantised)
    row |= {"weight_bytes": found.bytes, "quantised_layers": quantised, "linear_layers": linear}
    row["step_drift"] = drift(model, args.check)
    if not row["step_drift"] < DRIFT:
        raise SystemExit(f"error: {variant}: steps differ from the forward pass by {row['step_drift']:.3g}; no numbers")
    row |= speed(model, prompt=args.prompt, tokens=args.tokens, clock=args.clock)
    row |= resident_bytes() if args.device == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    row["bits_per_byte"] = None if args.skip_loss else loss(model, args.model, args.files)
    return row


def in_own_process(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.quantization", "--model", str(args.model), "--only", variant]
    for name in ("device", "dtype", "prompt", "tokens", "files", "check", "clock"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    command += ["--skip-loss"] if args.skip_loss else []
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, check=False)
    if done.returncode:
        raise SystemExit(f"error: the process of {variant} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# One kind of weight at a time.


def rounded(weight: Tensor, kind: str) -> Tensor:
    """A weight (o, i) rounded to int8 with a scale per row, or int4 with scale and zero point per group."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerRow

    if kind == "int8":
        return Int8Tensor.from_hp(weight, PerRow()).dequantize()
    # Groups as wide as int4's, or the widest that divide the row.
    group = next(size for size in range(32, 0, -1) if weight.shape[1] % size == 0)
    return IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, group), torch.int4, mapping_type=MappingType.ASYMMETRIC
    ).dequantize()


@torch.no_grad()
def parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Loss with one kind of weight rounded and all others in float32."""
    model = HymbaForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    plain = loss(model, args.model, args.files)
    if plain is None:
        raise SystemExit(f"error: --parts measures the loss, and --model {args.model} has no training record")
    rows: list[dict[str, Any]] = [{"part": "none", "parameters": 0, "bits_per_byte": plain}]
    print(f"float32: {plain:.4f} bits per byte\n{'part':28}{'share':>8}{'int8':>10}{'int4':>10}   (more bits per byte)")
    total = sum(parameter.numel() for parameter in model.parameters())
    for part, pattern in PARTS.items():
        chosen = {
            id(module.weight): module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and re.search(pattern, name)
        }
        held = {key: weight.detach().clone() for key, weight in chosen.items()}
        row: dict[str, Any] = {"part": part, "parameters": sum(weight.numel() for weight in chosen.values())}
        for kind in KINDS:
            for key, weight in chosen.items():
                weight.copy_(rounded(held[key], kind))
            row[f"{kind}_more_bits_per_byte"] = (loss(model, args.model, args.files) or 0) - plain
            for key, weight in chosen.items():
                weight.copy_(held[key])
        rows.append(row)
        more = "".join(f"{row[f'{kind}_more_bits_per_byte']:+10.4f}" for kind in KINDS)
        print(f"{part:28}{row['parameters'] / total:8.1%}{more}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the variants."""
    lines = ["| weights | bits per byte | weights, MB | at most resident, MB | decode, tok/s | prefill, tok/s |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        peak = row.get("peak_resident_bytes", row.get("peak_bytes", 0))
        memory = f"{row['weight_bytes'] / 1e6:,.1f} | {peak / 1e6:,.0f}"
        rates = f"{row['tokens_per_s']:.2f} | {row['prefill_tokens_per_s']:.1f}"
        lines.append(f"| {row['variant']} | {bits} | {memory} | {rates} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT, help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="around quantised weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompt", type=int, default=128, help="tokens taken in at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded one by one")
    parser.add_argument("--check", type=int, default=24, help="tokens whose steps are held to the forward pass")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="processor: rates per second of processor time, for one thread on a machine that is busy otherwise",
    )  # fmt: skip
    parser.add_argument("--files", type=int, help="held-out files for the loss (default: all)")
    parser.add_argument("--skip-loss", action="store_true")
    parser.add_argument("--parts", action="store_true", help="loss with one kind of weight quantised at a time")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.model = args.model.resolve()

    if args.only:
        print(json.dumps(one(args, args.only)))
        return 0
    if args.parts:
        report("quantization-parts", parts(args), model=args.model.name)
        return 0
    rows = [in_own_process(args, variant) for variant in args.variants]
    print(table(rows))
    facts = {"prompt": args.prompt, "threads": torch.get_num_threads(), "clock": args.clock}
    report("quantization", rows, model=args.model.name, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
