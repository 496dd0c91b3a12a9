"""The notebook runs from top to bottom; what it shows was printed by the cells that it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from code_blocks import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps instead of a minute's; the kernel is this Python, and sees its environment.
    monkeypatch.setenv("NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("NOTEBOOK_SEEDS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = "".join(map(printed, notebook.cells))
    for name in ("usual ViT", "attention", "Mamba", "hybrid"):
        assert re.search(rf"^{name} +held-out accuracy \d+\.\d%", text, re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_shows_a_whole_run(path: Path) -> None:
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data"}
    assert all(output.name == "stdout" for cell in code for output in cell.outputs if output.output_type == "stream")
    assert str(ROOT) not in path.read_text("utf-8")


def test_the_models_of_the_notebook_are_of_one_size() -> None:
    shown = "".join(printed(cell) for cell in nbformat.read(NOTEBOOKS[0], as_version=4).cells)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) parameters", shown)]
    assert len(sizes) == 4 and max(sizes) / min(sizes) < 1.02
