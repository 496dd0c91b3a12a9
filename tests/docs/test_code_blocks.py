"""Every code block of the README and the manual runs; the rule is in docs/contributing.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import code_blocks
import pytest
from code_blocks import COMMANDS, ROOT, Block, Page, blocks, commands, config_kind, shortened
from tiny_checkpoint import llama_tokenizer, tiny_checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RELEASED = ("nvidia/Hymba-1.5B-Base", "nvidia/Hymba-1.5B-Instruct")


@pytest.fixture(scope="module", autouse=True)
def released(tmp_path_factory: pytest.TempPathFactory, hub_stand_in: Callable[[str, Path], None]) -> None:
    """The released names mean a tiny checkpoint with a tokenizer of the same kind."""
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = tiny_checkpoint(tmp_path_factory.mktemp("released") / "checkpoint", tokenizer)
    for name in RELEASED:
        hub_stand_in(name, folder)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    for left_out in Page(path, tmp_path).run(monkeypatch):
        record_property("not_run", left_out)


# What tables and sentences name exists.

_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def named_commands(path: Path) -> list[list[str]]:
    """Commands in code spans, and those of blocks that are marked not to run."""
    text = path.read_text("utf-8")
    spans = [span for span in _SPAN.findall(text) if span.split()[0] in {*COMMANDS, "pytest"}]
    marked = [
        line
        for block in blocks(path)
        if block.language in {"sh", "bash"} and "no-run" in block.options
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    return [words for line in [*spans, *marked] if len(words := line.split()) > 1]


def fault_of(words: list[str]) -> str | None:
    """What a command names that does not exist."""
    from hymba.cli import app

    command, *rest = words
    if command == "hymba":
        known = {info.name or info.callback.__name__ for info in app.registered_commands}
        known |= {group.name for group in app.registered_groups}
        names = [name for name in rest[0].split("|") if re.fullmatch(r"[a-z][a-z-]*", name)]
        return next((f"hymba has no command {name!r}" for name in names if name not in known), None)
    if command == "python" and rest[0] == "-m" and rest[1].partition(".")[0] in ("benchmarks", "scripts"):
        file = ROOT / (rest[1].replace(".", "/") + ".py")
        return None if file.is_file() else f"there is no {file.relative_to(ROOT)}"
    if command in ("python", "pytest"):
        paths = [word.partition("::")[0] for word in rest if re.match(r"(scripts|tests|benchmarks|configs)/", word)]
        return next((f"there is no {name}" for name in paths if not (ROOT / name).exists()), None)
    return None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_that_a_page_names_exist(path: Path) -> None:
    faults = [f"{' '.join(words)}: {fault}" for words in named_commands(path) if (fault := fault_of(words))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_links_to_exist(path: Path) -> None:
    prose = re.sub(r"^( *)(`{3,}).*?^ *\2`* *$", "", path.read_text("utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", _SPAN.sub("", prose))
    missing = [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (path.parent / t).exists()]
    # Pages that the build makes: the README under the name of the front page, notebooks, and the reference.
    made = re.compile(r"(?:.*/)?(?:index\.md|notebooks/\w+\.md|api/[\w.]+\.md)$")
    assert not [target for target in missing if not made.match(target)]


# The rule itself.


def page(tmp_path: Path, text: str) -> Page:
    path = tmp_path / "page.md"
    path.write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    return Page(path, folder)


def test_blocks_share_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
```python
x = 1
```

1. A list:
   ```yaml title="configs/mine.yaml"
   num_memory_tokens: 64
   ```

```python
from pathlib import Path
assert x == 1 and Path("configs/mine.yaml").read_text() == "num_memory_tokens: 64\\n"
```

```sh no-run="needs a GPU"
exit 1
```

```sh
for x in a b; do echo $x >>words.txt; done
test $(wc -l <words.txt) = 2 && python -c "import code_blocks" && command -v hymba
```
"""
    assert page(tmp_path, text).run(monkeypatch) == ["page.md:16: needs a GPU"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\nassert False\n```", r"page\.md:1 \(python\)"),
        ("```sh no-run\nexit 1\n```", "page.md:1: no-run needs its reason"),
        ("```sh norun='x'\nexit 1\n```", "norun, x: allowed on a fence"),
        ("```\nhymba\n```", "a block without a language"),
        ("```ruby\nputs\n```", "nothing runs 'ruby'"),
        ("```sh\nfalse | cat\n```", r"page\.md:1 \(sh\)"),
        ("```sh\nhymba inspect --no-such-option\n```", r"page\.md:1 \(sh\)"),
        ("```sh\nmake coffee\n```", r"page\.md:1 \(sh\)"),
        ("```sh\npip install '.[coffee]'\n```", r"page\.md:1 \(sh\)"),
        ("```yaml\nhidden_size: 63\n```", r"page\.md:1 \(yaml\)"),
        ("```yaml\nmodel: {}\nrun: {stepps: 3}\n```", r"page\.md:1 \(yaml\)"),
        ("```json\n{,}\n```", r"page\.md:1 \(json\)"),
    ],
)
def test_a_wrong_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        page(tmp_path, block).run(monkeypatch)


def test_a_block_that_hangs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_blocks, "CPU_SECONDS", 0.1)
    text = "```python\ntry:\n    while True: pass\nexcept TimeoutError:\n    raise SystemExit(1)\n```"
    with pytest.raises(AssertionError) as caught:
        page(tmp_path, text).run(monkeypatch)
    assert "not done in 0.1 s of work" in str(caught.value.__cause__)


def test_lines_and_their_words() -> None:
    code = "hymba generate 'a > b' \\\n  --seed 2  # a comment\n\npip install '.[cuda]'\nhymba env | head\nls\n"
    assert list(commands(code)) == [
        ["hymba", "generate", "a > b", "--seed", "2"], ["pip", "install", ".[cuda]"], None, None,
    ]  # fmt: skip
    assert shortened(["train", "x.yaml"])[2].startswith("run.steps=")
    assert shortened(["train", "--help"]) == ["train", "--help"]


def test_fences_of_other_lengths(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text('````markdown\n```python\n1 / 0\n```\n````\n~~~sh title="a.sh"\nls\n~~~\n')
    assert blocks(path) == [
        Block("page.md:1", "markdown", {}, "```python\n1 / 0\n```\n"),
        Block("page.md:6", "sh", {"title": "a.sh"}, "ls\n"),
    ]
    path.write_text("text\n```python\n")
    with pytest.raises(ValueError, match=r"page\.md:2: the block has no end"):
        blocks(path)


def test_kinds_of_yaml() -> None:
    assert config_kind({"base": {}, "variants": {}}) == "ablation"
    assert config_kind({"model": "m.yaml", "run": {}}) == "train"
    assert config_kind({"method": {"name": "dpo"}, "model": {}, "run": {}}) == "finetune"
    assert config_kind({"hidden_size": 8}) == "model"
    assert config_kind({"model.sliding_window": 16}) is config_kind([1]) is None
