"""What the tests of experiments share: a little text, an ablation's file, and threads as they were."""

from __future__ import annotations

import pytest
import torch
import yaml
from experiments.ablation_runs import BASE, VARIANTS


@pytest.fixture(autouse=True)
def _threads():
    """A run in this process sets as many threads as its settings say."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of ten small Python files."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(10):
        body = f"def function_{i}(x, y):\n    return x * {i} + y\n\n\n" * (2 + i)
        (folder / f"module_{i}.py").write_text(body, encoding="utf-8")
    return folder


@pytest.fixture
def file(text, tmp_path):
    """Writes an ablation's YAML with some keys in place of the usual ones."""

    def write(**keys):
        base = {**BASE, "data": {**BASE["data"], "paths": [str(text)]}}
        output = str(tmp_path / "out")
        whole = {"base": base, "variants": VARIANTS, "tasks": [{"name": "text"}], "run": {"output": output}, **keys}
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        return path

    return write
