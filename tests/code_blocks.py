"""The code blocks of the manual: found in the pages, and run the way that their reader would run them.

The rule that pages keep is in docs/contributing.md.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CPU_SECONDS, SECONDS = 90, 900
"""After which a block counts as hanging: of work, and of time, in which it may have waited for a busy machine."""

# Extra arguments that make a command small: what is tested is that it runs as it is written. The last value of a
# setting or option that stands twice counts.
SHORTER: dict[str, str] = {
    "hymba train": (
        "run.steps=2 run.batch_size=2 run.evaluate_bytes=2000 data.source=files data.paths=[README.md] "
        "data.sequence_length=32 data.held_out=0 export.evaluate=false tokenizer.vocab_size=300 run.tensorboard=false"
    ),
    "hymba finetune": (
        "run.steps=1 run.batch_size=1 data.rows=60 evaluate.rows=1 evaluate.generate=1 evaluate.max_new_tokens=2 "
        "run.tensorboard=false"
    ),
    "hymba ablate": "--check",
    "hymba analyze": "--length 24 --samples 1",
    "hymba eval": "--limit 1",
    "hymba generate": "--max-new-tokens 4",
}

# Files that the pages take for granted.
FILES: dict[str, str] = {
    "mytext.txt": "The quick brown fox jumps over the lazy dog, again and again and again.\n" * 40,
}

OUTPUT = {"text", "output", "console", "mermaid", "markdown"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})[ ]*(?P<language>[\w+-]*)[ ]*(?P<info>.*)$")
_OPTION = re.compile(r'([\w-]+)(?:="([^"]*)")?')
_ALLOWED = {"title", "no-run", "hl_lines", "linenums"}


@dataclass(frozen=True)
class Block:
    """A fenced block: `place` is "page:line", `options` what its fence says behind the language."""

    place: str
    language: str
    options: dict[str, str | None]
    code: str

    def fault(self) -> str | None:
        """What is wrong with the marking."""
        if unknown := set(self.options) - _ALLOWED:
            return f"{self.place}: {', '.join(sorted(unknown))}: allowed on a fence: {', '.join(sorted(_ALLOWED))}"
        if "no-run" in self.options and not (self.options["no-run"] or "").strip():
            return f'{self.place}: no-run needs its reason: no-run="needs a GPU"'
        if not self.language:
            return f"{self.place}: a block without a language; output is `text`"
        if self.language not in RUNNERS and self.language not in OUTPUT and "no-run" not in self.options:
            return f"{self.place}: nothing runs {self.language!r}; run are {', '.join(RUNNERS)}"
        return None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order; indented ones are dedented."""
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    at = 0
    while at < len(lines):
        start = _FENCE.match(lines[at])
        at += 1
        if start is None:
            continue
        first, close = at, re.compile(rf"^ *{start['fence'][0]}{{{len(start['fence'])},}} *$")
        while at < len(lines) and not close.match(lines[at]):
            at += 1
        if at == len(lines):
            raise ValueError(f"{page.name}:{first}: the block has no end")
        options = {key: value if equals else None for key, equals, value in _options(start["info"])}
        code = textwrap.dedent("\n".join(lines[first:at])) + "\n"
        found.append(Block(f"{page.name}:{first}", start["language"], options, code))
        at += 1
    return found


def _options(info: str) -> Iterator[tuple[str, bool, str]]:
    for match in _OPTION.finditer(info):
        yield match[1], match[2] is not None, match[2] or ""


class Page:
    """One page's folder, names and blocks.

    Args:
        path: the page. folder: an empty one, where its commands run.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        for name in ("configs", "scripts", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "pyproject.toml", "Makefile"):
            shutil.copy(ROOT / name, folder)
        for name, text in FILES.items():
            (folder / name).write_text(text)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Run every block; returns "place: reason" of those that are marked not to run."""
        left_out = []
        for block in blocks(self.path):
            if fault := block.fault():
                raise AssertionError(fault)
            if reason := block.options.get("no-run"):
                left_out.append(f"{block.place}: {reason}")
            elif block.language not in OUTPUT:
                with monkeypatch.context() as patch:
                    patch.chdir(self.folder)
                    patch.syspath_prepend(str(self.folder))
                    patch.setattr(sys, "stdin", io.StringIO(""))
                    self._run(block, patch)
        return left_out

    def _run(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        try:
            with time_limit():
                RUNNERS[block.language](self, block, patch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place} ({block.language}):\n{block.code}") from error
        if title := block.options.get("title"):
            self._write(title, block)

    def _write(self, title: str, block: Block) -> Path:
        target = self.folder / title
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.code)
        return target

    def python(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        exec(compile(block.code, block.place, "exec"), self.names)

    def shell(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        lines = list(commands(block.code))
        if any(words is None for words in lines):
            bash(block.code, self.folder)
            return
        for words in lines:
            assert words is not None
            command(words, patch)

    def yaml(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        from hymba import HymbaConfig
        from hymba.experiments.ablation.plan import make_plan
        from hymba.experiments.ablation.settings import load_ablation
        from hymba.experiments.settings import load_settings
        from hymba.finetuning.settings import load_settings as load_finetuning

        values = yaml.safe_load(block.code)
        kind = config_kind(values)
        # Where relative names of other files are right.
        name = f"{self.path.stem}-{block.place.rpartition(':')[2]}.yaml"
        target = self._write(block.options.get("title") or f"configs/{kind or 'other'}/{name}", block)
        if kind == "ablation":
            make_plan(load_ablation(target))
        elif kind == "train":
            load_settings(target)
        elif kind == "finetune":
            load_finetuning(target)
        elif kind == "model":
            HymbaConfig(**values)

    def json(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        json.loads(block.code)


RUNNERS: dict[str, Callable[[Page, Block, pytest.MonkeyPatch], None]] = {
    "python": Page.python,
    "sh": Page.shell,
    "bash": Page.shell,
    "yaml": Page.yaml,
    "json": Page.json,
}


def config_kind(values: Any) -> str | None:
    """Which of the project's files a YAML block is: `ablation`, `finetune`, `train`, `model`, or none of them."""
    if not isinstance(values, dict):
        return None
    if "variants" in values:
        return "ablation"
    if {"method", "adapter"} & set(values):
        return "finetune"
    if "model" in values and {"data", "run", "optimizer", "schedule"} & set(values):
        return "train"
    return "model" if "hidden_size" in values else None


def commands(code: str) -> Iterator[list[str] | None]:
    """The words of each line; `None` for one that needs a shell."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words = list(lexer)
        if not words:
            continue
        needs_shell = any(set(word) & set("();<>|&$`") for word in words if word not in _quoted(line))
        yield None if needs_shell or words[0] not in COMMANDS else words


def _quoted(line: str) -> set[str]:
    """What stands in single quotes, where no character means anything to a shell."""
    return set(re.findall(r"'([^']*)'", line))


def command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run a command in this process, made smaller by `SHORTER`."""
    COMMANDS[words[0]](words[1:], patch)


def shortened(words: list[str]) -> list[str]:
    """The words of a `hymba` command with the extra ones of `SHORTER`."""
    extra = SHORTER.get(" ".join(["hymba", *words[:1]]), "").split()
    return words if {"--help", "-h"} & set(words) else [*words, *extra]


@contextmanager
def success(words: list[str]) -> Iterator[None]:
    """A program that ends with an exit status ends with 0."""
    try:
        yield
    except SystemExit as done:
        if done.code:
            raise AssertionError(f"exit status {done.code}: {shlex.join(words)}") from done


def _hymba(words: list[str], patch: pytest.MonkeyPatch) -> None:
    from hymba.cli import app

    words = shortened(words)
    patch.setattr(sys, "argv", ["hymba", *words])
    with success(["hymba", *words]):
        app(words)


def _python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["-m", "hymba"]:
        return _hymba(words[2:], patch)
    module = words[0] == "-m"
    name, arguments = (words[1], words[2:]) if module else (words[0], words[1:])
    patch.setattr(sys, "argv", [name, *arguments])
    with success(["python", *words]):
        (runpy.run_module if module else runpy.run_path)(name, run_name="__main__")


def _pip(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Nothing is installed: the extras that are named exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words:
        if match := re.fullmatch(r"(?:\.|hymba)\[(.+)\]", word):
            unknown = set(match[1].split(",")) - set(project["optional-dependencies"])
            assert not unknown, f"pyproject.toml has no extra {', '.join(sorted(unknown))}"


def _make(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """CI runs the targets: here they have to exist."""
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.M))
    wanted = {word for word in words if "=" not in word and not word.startswith("-")}
    assert wanted <= targets, f"the Makefile has no target {', '.join(sorted(wanted - targets))}"


COMMANDS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "hymba": _hymba,
    "python": _python,
    "pip": _pip,
    "make": _make,
}


def bash(code: str, folder: Path) -> None:
    """Run lines with pipes, loops or variables in a shell whose `hymba` and `python` are the tested ones."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    for name, what in {"hymba": "-m hymba", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what} "$@"\n')
        (tools / name).chmod(0o755)
    path = os.pathsep.join(map(str, [*filter(None, sys.path)]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


@contextmanager
def time_limit() -> Iterator[None]:
    """Interrupt what hangs, where the platform has alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    late = []

    def stop(number: int, frame: FrameType | None) -> None:
        late.append(number)
        raise TimeoutError

    timers = [(signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, SECONDS)]
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        if late:
            # A command has turned it into an exit status.
            limits = f"{CPU_SECONDS} s of work or {SECONDS} s"
            raise TimeoutError(f"not done in {limits}: make it smaller, or mark it no-run with the reason")
