"""Small ablations for tests: their settings, and what takes the place of the worker processes."""

from __future__ import annotations

import json

import pytest
import yaml

from hymba.experiments.ablation import command, worker

MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]], "mamba_d_state": 4, "rope_type": "default",
}  # fmt: skip
BASE = {
    "model": MODEL,
    "data": {"source": "files", "patterns": ["*.py"], "held_out": 0.3, "sequence_length": 24},
    "tokenizer": {"vocab_size": 280},
    "run": {
        "steps": 4, "batch_size": 2, "device": "cpu", "threads": 1, "log_every": 1, "save_every": 2,
        "tensorboard": False,
    },
}  # fmt: skip
VARIANTS = {"hymba": None, "no-meta": {"model.num_memory_tokens": 0}, "wide": {"model.intermediate_size": 64}}


class Here:
    """Runs in this process without training; counts the starts, and breaks those that it is told to."""

    def __init__(self, breaks=None):
        self.breaks, self.started, self.threads = breaks or {}, [], []

    def __call__(self, unit, device, threads):
        self.started.append(unit.name)
        self.threads.append(threads)
        error = self.breaks.get(unit.variant)
        if isinstance(error, int):
            return Ended(error)

        def work(folder, record):
            if error is not None:
                raise error
            return made_up(folder, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "work", work)
            return Ended(worker.run(unit.folder))


class Training(Here):
    """Real runs in this process."""

    def __call__(self, unit, device, threads):
        self.started.append(unit.name)
        return Ended(worker.run(unit.folder))


def made_up(folder, unit):
    """What a run leaves, without one: bits per byte are 2 + seed / 10 for any variant."""
    train = folder / "train"
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        (train / name).mkdir(parents=True)
        (train / name / "model.safetensors").touch()
    (train / "final" / "training.json").write_text("{}")
    (train / "log.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.0}\n')
    result = {
        **unit, "metrics": {"bits_per_byte": 2 + unit["seed"] / 10, "train_loss": 5.0}, "tokens_per_second": 100.0,
        "tokens": 192, "rows": f"rows of {unit['seed']}", "seconds": 1.5, "commit": "abc", "device": "none",
        "settings": yaml.safe_load((folder / "config.yaml").read_text()),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return result


class Ended:
    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code


class Endless:
    """A run that goes on until it is told to stop."""

    def __init__(self):
        self.code, self.calls = None, []

    def poll(self):
        return self.code

    def stop(self):
        self.calls.append("stop")
        self.code = worker.INTERRUPTED

    def kill(self):
        self.calls.append("kill")


def ablate(path, *overrides, start=None, **options):
    lines = []
    code = command.main(path, overrides, start=start or Here(), say=lines.append, **options)
    return code, "\n".join(lines)


def table_of(tmp_path):
    return json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
