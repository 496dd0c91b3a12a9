"""Every file in configs/ablation and configs/train: loaded, built on the meta device, and stepped once when tiny."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shrunk

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.cost import cache_bytes, parameters
from hymba.experiments.ablation.plan import Plan, make_plan, vocabulary
from hymba.experiments.ablation.settings import load_ablation
from hymba.experiments.phases import plan_phases
from hymba.experiments.settings import load_settings
from hymba.experiments.train import check_phase

CONFIGS = Path(__file__).parents[2] / "configs"
ABLATIONS = sorted((CONFIGS / "ablation").glob("*.yaml"))
TRAININGS = sorted((CONFIGS / "train").glob("*.yaml"))
STEPPED: set[str] = set()
"""Tiny models that have been: many variants differ in widths alone."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread has nothing to do in models this small, and waiting for it takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step(fields: dict[str, Any]) -> None:
    """One training step of the architecture at a tiny size."""
    tiny = shrunk({"num_attention_heads": 25, "num_memory_tokens": 128, "sliding_window": 1024, **fields})
    if (key := json.dumps(tiny, sort_keys=True)) in STEPPED:
        return
    STEPPED.add(key)
    model = HymbaForCausalLM(HymbaConfig(**tiny))
    ids = torch.randint(0, tiny["vocab_size"], (2, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_variant_builds_and_learns_a_step(path: Path) -> None:
    plan = make_plan(load_ablation(path))
    # Parameters are alike, unless the file says that they are not.
    assert plan.warnings() == []
    assert plan.output == Path("runs") / path.stem
    for unit in plan.units:
        if unit.seed != plan.settings.seeds[0]:
            continue
        fields = dict(unit.settings.model)
        fields.setdefault("vocab_size", vocabulary(unit.settings))
        config = HymbaConfig(**fields)
        # The plan counts those of the model built on the meta device.
        shape = plan.shapes[unit.variant, unit.task.name]
        assert shape.parameters == parameters(config).total
        assert shape.cache_bytes == cache_bytes(config, plan.settings.run.cache_length).total
        step(fields)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_training_builds_and_learns_a_step(path: Path) -> None:
    settings = load_settings(path)
    fields = dict(settings.model)
    if "vocab_size" not in fields:
        # The tokenizer of the others may be on the hub.
        fields["vocab_size"] = vocabulary(settings)
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig(**fields))
    for world in (1, 2):
        for phase in plan_phases(settings, world):
            check_phase(phase, model)
    assert sum(p.numel() for p in model.parameters()) == parameters(HymbaConfig(**fields)).total
    step(fields)


def ladder(name: str) -> Plan:
    return make_plan(load_ablation(CONFIGS / "ablation" / f"{name}.yaml"))


@pytest.mark.parametrize("name", ["table1-tiny", "table1-small", "table1-300m"])
def test_the_ladders_have_the_papers_rungs_and_see_the_same_tokens(name: str) -> None:
    plan = ladder(name)
    rungs = ["transformer", "mamba", "sequential", "parallel", "local-global", "kv-sharing", "meta-tokens"]
    assert list(plan.settings.variants) == rungs
    for task in plan.settings.tasks:
        for seed in plan.settings.seeds:
            same = [unit.settings.to_dict() for unit in plan.select(tasks=[task.name], seeds=[seed])]
            assert len(same) == 7
            assert all(
                each["data"] == same[0]["data"] and each["run"]["steps"] == same[0]["run"]["steps"] for each in same
            )
    if name == "table1-small":
        assert len(plan.settings.seeds) >= 3
        assert min(shape.parameters for shape in plan.shapes.values()) >= 10e6
