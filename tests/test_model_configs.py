"""Every architecture in configs/model: it builds, learns a step when tiny, and is as large as its comparison."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import shrunk

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.cost import cache_bytes, parameters

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))
SAME_SIZE = 0.02
"""Largest relative difference of parameters inside a comparison."""
ARCHITECTURES = {"hymba", "llama", "mamba", "mamba-ffn", "mamba2", "mamba2-ffn", "samba", "sequential"}
SIZES = {"tiny", "125m", "300m", "350m", "1b", "1.5b"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread has nothing to do in models this small, and waiting for it takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fields_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_every_architecture_is_there_at_every_size() -> None:
    # tiny.yaml is the model in the package.
    assert {path.stem for path in FILES} == {f"{name}-{size}" for name in ARCHITECTURES for size in SIZES} | {"tiny"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_what_the_costs_say(path: Path) -> None:
    config = HymbaConfig(**fields_of(path))
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(config).total
    name, _, size = path.stem.rpartition("-")
    if name:
        other = parameters(HymbaConfig(**fields_of(FOLDER / f"hymba-{size}.yaml"))).total
        assert abs(count / other - 1) <= SAME_SIZE
        assert f"{count / 1e6:,.1f} million parameters" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_learns_a_step_and_its_cache_is_as_large_as_the_costs_say_at_a_tiny_size(path: Path) -> None:
    config = HymbaConfig(**shrunk(fields_of(path)))
    torch.manual_seed(0)
    model = HymbaForCausalLM(config)
    ids = torch.randint(0, 17, (2, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    for length, static in ((6, False), (3, False), (6, True)):
        cache = HymbaCache(config, max_length=length if static else None)
        with torch.no_grad():
            model(ids[:, :length], past_key_values=cache)
        expected = cache_bytes(config, length, batch=2, dtype="float32", static=static)
        assert cache.nbytes() == expected.total


def test_the_released_shape_is_the_released_one() -> None:
    released = HymbaConfig.from_pretrained(FOLDER / "hymba-1.5b.json")
    ours = HymbaConfig(**fields_of(FOLDER / "hymba-1.5b.yaml"))
    assert ours.layers == released.layers
    assert parameters(ours) == parameters(released)


def test_the_files_are_those_that_the_script_writes() -> None:
    path = ROOT / "scripts" / "model_configs.py"
    spec = importlib.util.spec_from_file_location("scripts_model_configs", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, script)
        spec.loader.exec_module(script)
        for size in script.SIZES:
            for name, (header, fields) in script.architectures(size).items():
                assert (FOLDER / f"{name}-{size}.yaml").read_text(encoding="utf-8") == script.text(header, fields)
