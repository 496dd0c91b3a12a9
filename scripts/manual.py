"""Pages of the manual that are made: what mkdocs calls while it builds (`make docs`).

The README is the front page, notebooks become pages, every public module gets a page of its docstrings, and the marks
that the tests read (docs/contributing.md) are taken off the fences.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Each page of the reference, in the order of the navigation.
REFERENCE: tuple[str, ...] = (
    "hymba",
    "hymba.nn",
    "hymba.ops",
    "hymba.ops.backend",
    "hymba.ops.masks",
    "hymba.config",
    "hymba.layout",
    "hymba.cache",
    "hymba.generation",
    "hymba.chat",
    "hymba.cost",
    "hymba.memory",
    "hymba.hub",
    "hymba.adapters",
    "hymba.quantization",
    "hymba.conversion",
    "hymba.experiments.settings",
    "hymba.experiments.train",
    "hymba.experiments.tasks",
    "hymba.experiments.tasks.base",
    "hymba.experiments.ablation.settings",
    "hymba.experiments.ablation.command",
    "hymba.eval",
    "hymba.eval.run",
    "hymba.eval.presets",
    "hymba.eval.harness",
    "hymba.analysis",
    "hymba.analysis.architecture",
    "hymba.finetuning",
    "hymba.finetuning.settings",
    "hymba.finetuning.templates",
    "hymba.finetuning.merge",
    "hymba.serving.app",
)

_MARK = re.compile(r'^(?P<fence> *(?:`{3,}|~{3,}) *[\w+-]*.*?) +no-run(?:="[^"]*")?', re.M)

_FETCHED = re.compile(r'<(?:script|img|iframe|source)[^>]* src="(https?://[^"]+)|<link[^>]* href="(https?://[^"]+)')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] = [{module: f"api/{module}.md"} for module in REFERENCE]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(name: str, content: str) -> None:
        files.append(File.generated(config, name, content=content))

    add("index.md", front_page((ROOT / "README.md").read_text("utf-8")))
    for module in REFERENCE:
        add(f"api/{module}.md", f"# {module}\n\n::: {module}\n    options: {{show_root_heading: false}}\n")
    for path in sorted((ROOT / "docs").glob("notebooks/*.ipynb")):
        add(f"notebooks/{path.stem}.md", notebook_page(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return without_marks(markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page for which a browser would ask another server."""
    if fetched := ["".join(match) for match in _FETCHED.findall(output)]:
        raise PluginError(f"{page.file.src_uri} fetches {', '.join(fetched)}: put the file into docs/")
    return output


def without_marks(markdown: str) -> str:
    """The page with fences as the highlighter knows them."""
    return _MARK.sub(r"\g<fence>", markdown)


def front_page(readme: str) -> str:
    """The README with its links seen from docs/."""
    return re.sub(r"\]\(docs/", "](", readme)


def notebook_page(path: Path) -> str:
    """The cells of a notebook, with what they printed and drew, and a link to the notebook itself."""
    parts: list[str] = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _shown(output))]
    return "\n\n".join([*parts, f"[The notebook]({path.name})"]) + "\n"


def _shown(output: dict[str, Any]) -> str | None:
    """An output in Markdown: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text") or data.get("text/plain") or "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else None
