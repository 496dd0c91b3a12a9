"""Training steps as CUDA graphs against the same steps called kernel by kernel, through the commands' own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from gpu.on_gpu import needs_gpu
from helpers import losses_of
from tolerances import PARALLEL

from hymba.experiments.train import main

pytestmark = needs_gpu

MODEL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_memory_tokens": 16, "sliding_window": 32, "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]], "rope_type": "default", "max_position_embeddings": 512,
}  # fmt: skip
RECALL = {"task": {"name": "mqar", "pairs": [2, 4], "length": 96, "vocabulary": 64, "test_rows": 8}}


def trained(folder: Path, data: dict[str, Any], **run: Any) -> list[tuple[int, float, float, float]]:
    settings = {"steps": 8, "batch_size": 4, "log_every": 1, "evaluate_every": 3, "tensorboard": False, **run}
    raw = {"model": MODEL, "data": data, "tokenizer": {"vocab_size": 300}, "run": {"output": str(folder), **settings}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return losses_of(main(path).output)


@pytest.mark.parametrize(
    ("data", "run"),
    [
        ("recall", {}),
        ("recall", {"gradient_accumulation": 2}),
        ("recall", {"activation_checkpointing": "selective"}),
        ("recall", {"activation_checkpointing": "full"}),
        ("recall", {"compile": True}),
        ("recall", {"precision": "bfloat16"}),
        ("packed", {}),
        ("stream", {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_losses_are_those_of_plain_steps(tmp_path: Path, data: str, run: dict[str, Any]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * (3 + i), encoding="utf-8")
    words = {"source": "files", "paths": [str(text)], "held_out": 0.2, "sequence_length": 96, "layout": data}
    chosen = RECALL if data == "recall" else words
    plain = trained(tmp_path / "plain", chosen, **run)
    replayed = trained(tmp_path / "replayed", chosen, cuda_graph=True, **run)
    assert len(plain) == 8
    for one, other in zip(replayed, plain, strict=True):
        assert one == pytest.approx(other, rel=PARALLEL)
