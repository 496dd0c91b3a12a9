"""The reference is made of docstrings: every public name has one that says what its user has to know."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from code_blocks import ROOT
from torch import nn

_SHAPE = re.compile(r"\(\w[\w /*+-]*, ?[\w /*+,-]*\)|of any shape|shape")
_SOURCE = re.compile(r"paper|specification|section \d|equation|figure \d|table \d|arXiv", re.I)
# A docstring that hands over to another's: "Arguments and results are those of `selective_scan`."
_HANDED_OVER = re.compile(r"[Aa]rguments(, \w+)*( and (results|\w+))? (are those )?of `|Same contract as")


@cache
def modules() -> tuple[str, ...]:
    tree = ast.parse((ROOT / "scripts" / "manual.py").read_text("utf-8"))
    values = {node.target.id: node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    return ast.literal_eval(values["REFERENCE"])


@cache
def public() -> dict[str, Any]:
    """Every public class and function by its full name."""
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
        for key in getattr(module, "__all__", own):
            value = getattr(module, key)
            if not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{value.__module__}.{key}"] = value
    return found


def callables() -> Iterator[tuple[str, Any]]:
    """Public functions, and the public methods that their classes define or override."""
    for name, value in public().items():
        if inspect.isfunction(value):
            yield name, value
            continue
        for key, method in vars(value).items():
            method = getattr(method, "__func__", method)
            if inspect.isfunction(method) and not key.startswith("_"):
                yield f"{name}.{key}", method


def section(doc: str, title: str) -> str:
    match = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)+)", doc, re.M)
    return match[1] if match else ""


def documented(doc: str) -> list[str]:
    """The parameters that "Args" names; two of a kind may share an entry or a line."""
    entries = re.findall(r"(?:^ {4}|(?<=\. ))(\*{0,2}\w+(?:, \*{0,2}\w+)*):(?= |$)", section(doc, "Args"), re.M)
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")]


def test_every_public_name_has_a_docstring() -> None:
    assert len(public()) > 100
    bare = [name for name, value in public().items() if not (value.__doc__ or "").strip()]
    # What transformers and torch define and we override is described there.
    for name, method in callables():
        owner = public().get(name.rpartition(".")[0])
        inherited = owner and any(hasattr(base, method.__name__) for base in owner.__mro__[1:])
        if not (method.__doc__ or inherited or method.__name__ == "reset_parameters"):
            bare.append(name)
    assert not bare


def test_documented_parameters_exist() -> None:
    wrong = []
    for name, value in [*callables(), *((n, v) for n, v in public().items() if inspect.isclass(v))]:
        try:
            known = inspect.signature(value).parameters
        except ValueError:
            continue
        known = set(known) | set(getattr(value, "__annotations__", {}))
        wrong += [f"{name}: {key}" for key in documented(inspect.cleandoc(value.__doc__ or "")) if key not in known]
    assert not wrong


def test_tensors_have_shapes() -> None:
    wrong = []
    for name, function in callables():
        doc = inspect.getdoc(function) or ""
        inner = name.removeprefix(f"{function.__module__}.")
        if not name.startswith(("hymba.nn.", "hymba.ops.")) or _HANDED_OVER.search(doc):
            continue
        if "." not in inner or inner.endswith(".forward"):
            tensors = [k for k, p in inspect.signature(function).parameters.items() if "Tensor" in str(p.annotation)]
            wrong += [f"{name}: {key}" for key in tensors if not re.search(rf"\b{key}\b", doc) and key != "tensor"]
            wrong += [f"{name}: no shape"] * bool(tensors and not _SHAPE.search(doc))
    assert not wrong


def test_errors_are_named() -> None:
    wrong = []
    for name, value in public().items():
        if (
            not inspect.isfunction(value)
            or "Raises" in (doc := inspect.getdoc(value) or "")
            or _HANDED_OVER.search(doc)
        ):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        wrong += [f"{name} raises {', '.join(ast.unparse(node.exc.func) for node in raised)}"] * bool(raised)
    assert not wrong


def test_blocks_and_ops_name_their_source() -> None:
    wrong = []
    for name, value in public().items():
        if name.startswith(("hymba.nn.", "hymba.ops.s", "hymba.ops.c")) and inspect.isclass(value):
            if not issubclass(value, nn.Module):
                continue
            module = inspect.getdoc(inspect.getmodule(value)) or ""
            wrong += [name] * (not _SOURCE.search((value.__doc__ or "") + module))
    assert not wrong
