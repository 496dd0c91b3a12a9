"""What the manual is made of besides its pages. `make docs` builds it, which is a part of `make check`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from code_blocks import ROOT

SCRIPT = ROOT / "scripts" / "manual.py"


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_manual", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / ".mkdocs.yml").read_text("utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in text]
    assert not missing, f"no line in nav of .mkdocs.yml: {', '.join(missing)}"
    assert yaml.safe_load(text)["theme"]["font"] is False


def test_the_modules_of_the_reference_exist(manual: ModuleType) -> None:
    for name in manual.REFERENCE:
        assert importlib.import_module(name).__doc__, name


def test_marks_are_taken_off(manual: ModuleType) -> None:
    page = '```sh no-run="needs a GPU"\nls\n```\n   ```yaml title="a.yaml" no-run="why"\n   a: 1\n   ```\nno-run="x"\n'
    assert manual.without_marks(page) == '```sh\nls\n```\n   ```yaml title="a.yaml"\n   a: 1\n   ```\nno-run="x"\n'


def test_the_front_page_links_from_where_it_stands(manual: ModuleType) -> None:
    assert manual.front_page("[a](docs/gpu.md) `docs/gpu.md` [b](https://docs/)") == (
        "[a](gpu.md) `docs/gpu.md` [b](https://docs/)"
    )


def test_a_notebook_becomes_a_page(manual: ModuleType, tmp_path: Path) -> None:
    printed = {"output_type": "stream", "text": ["3\n"]}
    drawn = {"output_type": "display_data", "data": {"image/png": "AAA\nB", "text/plain": ["<Figure>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1 + 2)"], "outputs": [printed, drawn]},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert manual.notebook_page(path) == (
        "# Title\ntext\n\n```python\nprint(1 + 2)\n```\n\n```text\n3\n```\n\n"
        "![output](data:image/png;base64,AAAB)\n\n[The notebook](book.ipynb)\n"
    )


def test_a_page_that_asks_another_server_is_refused(manual: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    assert manual.on_post_page('<a href="https://x.y">', page, None)
    with pytest.raises(PluginError, match=r"a\.md fetches https://x\.y/z\.js"):
        manual.on_post_page('<script async src="https://x.y/z.js">', page, None)
