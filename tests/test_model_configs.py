"""Every architecture in configs/model: it builds, learns a step when tiny, and is as large as its comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.cost import cache_bytes, parameters

FOLDER = Path(__file__).parents[1] / "configs" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))
SAME_SIZE = 0.02
"""Largest relative difference of parameters inside a comparison."""


def fields_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_what_the_costs_say(path: Path) -> None:
    config = HymbaConfig(**fields_of(path))
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(config).total
    assert cache_bytes(config, 8192).total > 0
    _, _, size = path.stem.rpartition("-")
    partner = FOLDER / f"hymba-{size}.yaml"
    if size and partner.exists():
        other = parameters(HymbaConfig(**fields_of(partner))).total
        assert abs(count / other - 1) <= SAME_SIZE
        assert f"{count / 1e6:,.1f} million parameters" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_learns_a_step_at_a_tiny_size(path: Path) -> None:
    fields = fields_of(path)
    heads = fields["num_attention_heads"]
    tiny = {"hidden_size": 4 * heads if heads > 1 else 8, "intermediate_size": 8, "vocab_size": 17}
    if fields.get("num_memory_tokens"):
        tiny["num_memory_tokens"] = 3
    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig(**(fields | tiny), bos_token_id=None, eos_token_id=None, pad_token_id=None))
    ids = torch.randint(0, 17, (2, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_released_shape_is_the_released_one() -> None:
    released = HymbaConfig.from_pretrained(FOLDER / "hymba-1.5b.json")
    ours = HymbaConfig(**fields_of(FOLDER / "hymba-1.5b.yaml"))
    assert ours.layers == released.layers
    assert parameters(ours) == parameters(released)
