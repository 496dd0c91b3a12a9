"""One process, several with DDP and several with FSDP2: the same losses, and what the additional devices bring.

    python scripts/compare_parallel.py                      # two GPUs, or two processes on a CPU
    python scripts/compare_parallel.py --processes 4 --model configs/model/hymba-350m.yaml --length 2048 --batch-size 8

Each way of training is started once with torchrun and does three trainings on the same rows: a small model in float32
whose losses are compared, then the model of `--model` with a constant batch per device (weak scaling) and with a
constant batch over all devices (strong scaling). Efficiency is tokens/s over the number of processes times that of one
process. The last line is JSON; the exit status is 1 when losses differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# As PARALLEL in tests/tolerances.py: gradients are added in another order, and AdamW divides by their size.
TOLERANCE = 2e-4
WAYS = ("one", "ddp", "fsdp2")
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_memory_tokens": 16, "sliding_window": 32, "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]], "mamba_d_state": 8, "rope_type": "default",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of DDP and FSDP2")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    model = ROOT / "configs" / "model" / ("hymba-1.5b.yaml" if on_gpu else "tiny.yaml")
    parser.add_argument("--model", type=Path, default=model, help="YAML file of the model to time")
    parser.add_argument("--length", type=int, default=8192 if on_gpu else 128, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a device")
    parser.add_argument("--steps", type=int, default=12 if on_gpu else 4, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4 if on_gpu else 2, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--no-timing", action="store_true", help="losses only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            found[way] = launch(args, way, Path(folder))
    curves = {way: found[way]["losses"] for way in WAYS}
    apart = {way: difference(curves[way], curves["one"]) for way in WAYS[1:]}
    for way, value in apart.items():
        print(f"losses and gradient norms, {way} against one process: {value:.1e} apart (tolerance {TOLERANCE:.0e})")
    summary: dict[str, Any] = {
        "device": found["one"]["device"], "processes": args.processes, "tolerance": TOLERANCE, "apart": apart,
        "agree": all(value <= TOLERANCE for value in apart.values()),
    }  # fmt: skip
    if not args.no_timing:
        summary |= scaling(args, found)
    print(json.dumps(summary))
    return 0 if summary["agree"] else 1


def scaling(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Print the table; returns its numbers."""
    base = found["one"]["weak"]["tokens_per_second"]
    on = f"{args.batch_size} rows per device, {found['one']['device']}"
    print(f"\n{args.model.stem}, rows of {args.length} tokens, {on}")
    print(f"{'':20}{'tokens/s':>12}{'efficiency':>12}{'peak GiB':>10}")
    print(f"{'one process':20}{base:12,.0f}{'':12}{found['one']['weak']['gib']:10.1f}")
    rates: dict[str, float] = {"one": base}
    efficiency: dict[str, float] = {}
    for way in WAYS[1:]:
        for kind in ("weak", "strong"):
            name, rate = f"{way} {kind}", found[way][kind]["tokens_per_second"]
            rates[name], efficiency[name] = rate, rate / (args.processes * base)
            print(f"{name:20}{rate:12,.0f}{efficiency[name]:12.1%}{found[way][kind]['gib']:10.1f}")
    return {
        "model": args.model.stem, "length": args.length, "batch_size": args.batch_size, "compile": args.compile,
        "tokens_per_second": rates, "efficiency": efficiency,
    }  # fmt: skip


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference; infinite for curves of another length."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(one, other))


def launch(args: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """Start the processes of a way and wait for what the first one reports."""
    processes = 1 if way == "one" else args.processes
    # NVLink's multicast is not to be had on every machine that has NVLink.
    environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1", **os.environ}
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__,
        *sys.argv[1:], "--worker", way, "--folder", str(folder),
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, env=environment | {"PYTHONPATH": python_path}, check=True)
    found: dict[str, Any] = json.loads((folder / f"{way}.json").read_text())
    rates = [f"{kind} {found[kind]['tokens_per_second']:,.0f} tokens/s" for kind in ("weak", "strong") if kind in found]
    took = f"{time.perf_counter() - began:.0f} s"
    print(
        ", ".join([f"{way}: {processes} process(es), {took}", f"last loss {found['losses'][-2]:.6f}", *rates]),
        flush=True,
    )
    return found


def work(args: argparse.Namespace) -> None:
    """Inside a process: the trainings of a way; the first process writes down what came of them."""
    from hymba.experiments.processes import is_first, together, world_size
    from hymba.experiments.settings import read_yaml

    world, on_gpu = world_size(), args.device != "cpu" and torch.cuda.is_available()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "CPU"}
    with together(cpu=not on_gpu):
        rows, steps = 8, 8
        small = {"steps": steps, "batch_size": rows // world, "tokens_per_step": rows * 96, "precision": "float32"}
        report["losses"] = train(args, SMALL, 96, small)["losses"]
        if not args.no_timing:
            model = {"vocab_size": 2048, **read_yaml(args.model)}
            timed = {"steps": args.warmup + args.steps, "precision": "bfloat16" if on_gpu else "float32"}
            per_step = args.batch_size * args.length
            weak = {"batch_size": args.batch_size, "tokens_per_step": per_step * world, "compile": args.compile}
            strong = {"batch_size": max(1, args.batch_size // world), "tokens_per_step": per_step}
            report["weak"] = train(args, model, args.length, timed | weak)
            if world > 1:
                report["strong"] = train(args, model, args.length, timed | weak | strong)
    if is_first():
        (args.folder / f"{args.worker}.json").write_text(json.dumps(report))


def train(args: argparse.Namespace, model: dict[str, Any], length: int, run: dict[str, Any]) -> dict[str, Any]:
    """Train on random rows without saving anything; losses with gradient norms, tokens/s, and the peak of memory."""
    from transformers import TrainerCallback

    from hymba import HymbaConfig, HymbaForCausalLM
    from hymba.experiments.packing import Rows
    from hymba.experiments.phases import plan_phases
    from hymba.experiments.processes import wait, world_size
    from hymba.experiments.settings import train_settings
    from hymba.experiments.trainer import LOG_NAME, HymbaTrainer

    class RandomRows(Rows):
        def __init__(self, rows: int) -> None:
            self.rows, self.length = rows, length

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            # A quarter of the ids, so that there is something to learn.
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(3, model["vocab_size"] // 4, (length,), generator=generator)
            return {"input_ids": ids, "labels": ids.clone()}

    class Unsaved(HymbaTrainer):
        def _save_checkpoint(self, *_: Any) -> None:
            pass

    class Clock(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args_: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (args.warmup, run["steps"]):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                wait()
                self.began, self.seconds = time.perf_counter(), time.perf_counter() - self.began

    output = args.folder / f"{args.worker}-{len(list(args.folder.iterdir()))}-{os.environ['RANK']}"
    output.mkdir()
    run = {
        "distributed": "ddp" if args.worker == "one" else args.worker, "device": args.device, "log_every": 1,
        "save_every": 10**6, "tensorboard": False, **run,
    }  # fmt: skip
    if run["precision"] == "bfloat16":
        # Reading the loss makes the host wait: not in the steps that are timed.
        run["log_every"] = run["steps"]
    settings = train_settings({"data": {"sequence_length": length}, "run": run, "model": model}, where="comparison")
    (phase,) = plan_phases(settings, world_size())
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    # Random numbers for 1.5B parameters take a CPU half a minute.
    with torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu"):
        network = HymbaForCausalLM(HymbaConfig(**model)).float()
    rows = RandomRows(phase.end * phase.rows_per_step)
    trainer = Unsaved(network, phase, rows, output=output, tokenizer=None, callbacks=[clock])
    trainer.resume(None)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    trainer.accelerator.free_memory()
    log = output / LOG_NAME
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "losses": [number for entry in entries for number in (entry["loss"], entry["grad_norm"])],
        "tokens_per_second": (run["steps"] - args.warmup) * phase.tokens_per_step / max(clock.seconds, 1e-9),
        "gib": peak,
    }


if __name__ == "__main__":
    sys.exit(main())
