"""Imports inside hymba go one way: each room names what it may know, and every import is held to it."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Found without being imported: a wrong arrow may be what breaks the import.
PACKAGE = Path(importlib.util.find_spec("hymba").submodule_search_locations[0])
KERNELS = frozenset({"triton", "mamba_ssm", "selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda", "flash_attn"})


@dataclass(frozen=True)
class Room:
    """A module or folder directly under hymba/, and what its files may import."""

    hymba: frozenset[str]
    packages: frozenset[str] | None = None  # None: any but `refused`
    refused: frozenset[str] = KERNELS


def room(inside: str = "", packages: str | None = None, refused: frozenset[str] = KERNELS) -> Room:
    allowed = None if packages is None else frozenset(packages.split())
    return Room(frozenset(inside.split()), allowed, refused)


NO_TRANSFORMERS = KERNELS | {"transformers"}
CORE = "cache nn ops config layout adapters"
GENERATION = "generation decode_loop decoding fused_decoding inputs memory cost"
MODEL = f"model training loading quantization hub {GENERATION} {CORE}"
ROOMS = {
    "ops": room(packages=" ".join({"torch", *KERNELS})),
    "layout": room(packages=""),
    "nn": room("ops", packages="torch einops"),
    # PEFT only where it has been imported already.
    "adapters": room(packages=""),
    "config": room("adapters layout"),
    "cost": room("config layout", refused=NO_TRANSFORMERS),
    "memory": room("cost config layout", refused=NO_TRANSFORMERS),
    "inputs": room("config layout", refused=NO_TRANSFORMERS),
    "training": room("nn ops"),
    "cache": room("nn ops config layout"),
    "hub": room("config layout"),
    "saving": room(packages=""),
    "quantization": room("hub config layout"),
    "loading": room("hub quantization saving config layout"),
    "decoding": room(f"fused_decoding {CORE}", refused=NO_TRANSFORMERS),
    "fused_decoding": room(CORE, refused=NO_TRANSFORMERS),
    "decode_loop": room(f"decoding {CORE}"),
    "generation": room(f"decode_loop decoding inputs memory cost {CORE}"),
    "model": room(f"training generation decode_loop decoding loading inputs memory cost {CORE}"),
    "chat": room(MODEL),
    "serving": room(f"chat {MODEL}"),
    "experiments": room(f"__init__ {MODEL}"),
    "eval": room(f"__init__ chat experiments {MODEL}"),
    "analysis": room(f"__init__ experiments saving {MODEL}"),
    "conversion": room(f"__init__ experiments {MODEL}"),
    "finetuning": room(f"__init__ chat experiments saving {MODEL}"),
    "commands": room(f"__init__ chat conversion serving experiments eval analysis finetuning {MODEL}"),
    "cli": room(f"__init__ commands {MODEL}"),
    # The package itself gathers the public names and registers the Auto classes.
    "__init__": room(f"_notices {MODEL}"),
    "_notices": room(packages=""),
    "__main__": room("cli"),
}


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports, wherever it stands, relative names made absolute.

    Left out is what stands under `if TYPE_CHECKING:`: an annotation may name what the code does not know.
    """
    parts = module.split(".")
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*above, origin] if origin else above)
            for alias in node.names:
                # `from hymba import ops` names a room only in its last part.
                yield node.lineno, f"{origin}.{alias.name}" if origin == "hymba" else origin
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in {"__import__", "import_module", "importlib.import_module"}:
                yield node.lineno, str(node.args[0].value)


def wrong_arrows(package: Path) -> list[str]:
    """Every import under `package` that ROOMS does not allow, as "file:line: what and what is allowed"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        here = relative.parts[0].removesuffix(".py")
        if here not in ROOMS:
            found.append(f"{relative}: no room '{here}' in {Path(__file__).name}; name what it may import")
            continue
        rules = ROOMS[here]
        names = [package.name, *relative.with_suffix("").parts]
        is_package = names[-1] == "__init__"
        module = ".".join(names[:-1] if is_package else names)
        tree = ast.parse(path.read_text("utf-8"))
        for line, name in dict.fromkeys(imported(tree, module, is_package)):
            top, _, rest = name.partition(".")
            if top == "hymba":
                # A name that is no room is a public name of the package itself.
                target = rest.partition(".")[0]
                target = target if target in ROOMS else "__init__"
                ok = target == here or target in rules.hymba
                allowed = rules.hymba
            elif top in sys.stdlib_module_names:
                continue
            else:
                ok = top not in rules.refused if rules.packages is None else top in rules.packages
                allowed = {f"all but {', '.join(sorted(rules.refused))}"} if rules.packages is None else rules.packages
            if not ok:
                may = ", ".join(sorted(allowed)) or "only the standard library"
                found.append(f"{relative}:{line}: '{here}' must not import {name} (allowed: {may})")
    return found


def test_the_package_has_no_wrong_arrow() -> None:
    wrong = wrong_arrows(PACKAGE)
    assert not wrong, "\n".join(["wrong arrows:", *wrong])


def test_the_rooms_have_an_order() -> None:
    graphlib.TopologicalSorter({name: rules.hymba for name, rules in ROOMS.items()}).prepare()


def test_the_walk_sees_the_package() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} >= {"__init__", "config", "layout"}


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("ops/scan.py", "import hymba.nn.norm", "ops/scan.py:1: 'ops' must not import hymba.nn.norm"),
        ("ops/scan.py", "from ..nn import norm", "'ops' must not import hymba.nn"),
        ("ops/triton/scan.py", "from ...nn.norm import RMSNorm", "'ops' must not import hymba.nn.norm"),
        ("ops/__init__.py", "from .. import nn", "'ops' must not import hymba.nn"),
        ("ops/scan.py", "import einops", "'ops' must not import einops (allowed: causal_conv1d,"),
        ("layout.py", "import torch", "'layout' must not import torch (allowed: only the standard library)"),
        (
            "nn/block.py",
            "\n\ndef f():\n    from hymba import model",
            "nn/block.py:4: 'nn' must not import hymba.model",
        ),
        ("nn/block.py", "import transformers", "'nn' must not import transformers"),
        ("nn/block.py", "import hymba", "'nn' must not import hymba "),
        ("nn/block.py", "from hymba import HymbaConfig", "'nn' must not import hymba.HymbaConfig"),
        ("cost.py", "import transformers", "cost.py:1: 'cost' must not import transformers"),
        ("cost.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers", "cost.py:4: 'cost' must not"),
        (
            "model.py",
            "import_module('mamba_ssm.ops')",
            "'model' must not import mamba_ssm.ops (allowed: all but",
        ),
        ("model.py", "from hymba.experiments import train", "'model' must not import hymba.experiments"),
        ("extra.py", "", "extra.py: no room 'extra'"),
    ],
)
def test_a_planted_wrong_arrow_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    planted = tmp_path / "hymba" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    (found,) = wrong_arrows(tmp_path / "hymba")
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/triton/scan.py", "import torch\nimport triton.language as tl\nfrom ..backend import resolve"),
        ("nn/block.py", "from hymba.ops import selective_scan\nfrom .norm import RMSNorm\nimport einops"),
        ("decoding.py", "if TYPE_CHECKING:\n    from hymba.model import HymbaForCausalLM"),
        ("commands/train.py", "import typer\nfrom hymba.experiments.train import main\nimport hymba.hub"),
        ("__init__.py", "from hymba.config import HymbaConfig\nfrom .model import HymbaModel"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "hymba" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert wrong_arrows(tmp_path / "hymba") == []
