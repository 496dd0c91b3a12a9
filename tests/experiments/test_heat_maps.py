"""Heat maps: one figure for all models and tasks, with its numbers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from hymba.experiments.tasks import make_task
from hymba.experiments.tasks.heat_maps import draw_heat_maps


def guesses(name):
    task = make_task(name, length=24, test_rows=2, test_lengths=[48], **({"pairs": [2]} if name == "mqar" else {}))
    return task.evaluate(lambda input_ids: torch.rand(*input_ids.shape, task.vocab_size))


def test_one_figure_and_its_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    mqar, needle = guesses("mqar"), guesses("needle")
    path = draw_heat_maps({"mqar": {"a": mqar, "b": mqar}, "needle": {"a": needle}}, tmp_path / "new" / "maps.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(path.with_suffix(".json").read_text())
    assert numbers["needle"]["a"]["grid"] == needle["grid"]
    assert numbers["mqar"]["b"]["lengths"] == [24, 48]
    assert set(numbers["needle"]) == {"a"}


def test_refusals(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no result"):
        draw_heat_maps({}, tmp_path / "maps.png")
    with pytest.raises(ValueError, match="b on mqar has no grid"):
        draw_heat_maps({"mqar": {"b": {"accuracy": 1.0}}}, tmp_path / "maps.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hymba\[plots\]"):
        draw_heat_maps({}, tmp_path / "maps.png")
