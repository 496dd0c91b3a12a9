"""A small checkpoint, small data and short runs for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

CONVERSATIONS: list[dict[str, Any]] = [
    {
        "messages": [
            *([{"role": "system", "content": "Be brief."}] if i % 2 else []),
            {"role": "user", "content": f"Use {i}."},
            {"role": "assistant", "content": f"Hello {i} text"},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "extr\n" * (i % 3) + "e"},
        ],
        **({"tools": [{"name": f"f{i}"}], "contexts": ["text"]} if i % 3 == 0 else {}),
    }
    for i in range(12)
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": f"Use {i}.", "chosen": f" Hello text {i}", "rejected": " extr"} for i in range(12)
]
SETTINGS: dict[str, Any] = {
    "data": {"source": "files", "held_out": 0.3, "max_length": 200},
    "optimizer": {"learning_rate": 1e-2},
    "run": {
        "steps": 4, "batch_size": 2, "device": "cpu", "threads": 1, "log_every": 1, "save_every": 2,
        "tensorboard": False, "activation_checkpointing": "none",
    },
    "evaluate": {"generate": 2, "max_new_tokens": 3},
    "export": {"dtype": "float32"},
}  # fmt: skip
LORA = {"kind": "lora", "rank": 2, "dropout": 0.1}
DORA = {"kind": "dora", "rank": 2}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, checkpoint: Path, rows: list[Any], **sections: dict[str, Any]) -> Path:
    """A settings file for a run on rows; ``sections`` go over those of `SETTINGS`."""
    data = write_rows(folder / "rows.jsonl", rows)
    raw = {"model": {"path": str(checkpoint)}, **SETTINGS, "data": {**SETTINGS["data"], "paths": [str(data)]}}
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    path = folder / "finetune.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def losses(output: Path) -> list[tuple[Any, ...]]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e]


def tensors(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)
