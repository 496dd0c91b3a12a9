"""`hymba analyze`: texts, files, figures, one-line errors."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint
from typer.testing import CliRunner

from hymba.analysis import AnalysisError, Result, texts, write
from hymba.cli import app
from hymba.experiments.corpus import Document

ANALYSES = ["entropy", "attention-split", "erf", "importance", "meta-tokens", "magnitude"]


def hymba(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "bytes", byte_tokenizer())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"num_memory_tokens": 0, "num_hidden_layers": 1, "global_attn_idx": [0], "kv_reuse_group": None}
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", byte_tokenizer(), **fields)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "hills.txt"
    path.write_text("The hills were green, and the river ran between them. " * 6)
    return path


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_writes_numbers_and_figure(
    name: str, folder: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    # One layer: every head of every layer is one more run.
    folder = plain if name == "importance" else folder
    options = ["--heads"] if name == "importance" else ["--compare", plain] if name == "erf" else []
    done = hymba(
        "analyze", name, text, "--model", folder, "--length", 40, "--samples", 2, "--output", out, "--json", *options
    )
    found = json.loads(done.stdout)
    assert found == json.loads((out / f"{name}.json").read_text())
    assert found["analysis"] == name and found["domains"] == ["hills"] and found["tokens_per_sample"] == 40
    with (out / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"]) > 0 and list(rows[0]) == list(found["rows"][0])
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / f"{name}.svg").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{name}.{kind}" for kind in "csv json png svg".split()
    )


def test_without_matplotlib_the_numbers_are_written(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hymba.analysis.figures", raising=False)
    done = hymba("analyze", "magnitude", text, "--model", folder, "--length", 20, "--output", tmp_path / "out")
    assert done.stderr == "note: no figure: matplotlib is not installed; pip install 'hymba[plots]' brings it\n"
    assert "written:" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["magnitude.csv", "magnitude.json"]


def test_entropy_against_another_checkpoint(folder: Path, plain: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["analyze", "entropy", text, "--model", folder, "--length", 20, "-o", tmp_path, "--json"]
    found = json.loads(hymba(*arguments, "--without", plain).stdout)
    assert found["without"] == str(plain)
    assert "has meta tokens itself" in hymba(*arguments, "--without", folder, code=2).stderr


def test_errors_are_one_line(folder: Path, plain: Path, text: Path, tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"\x00\xff\xfe")
    empty.write_text(" \n")
    for arguments, part in (
        (["entropy", tmp_path / "none.txt"], "none.txt does not exist"),
        (["entropy", binary], "is not text"),
        (["erf", empty], "has no text"),
        (["erf", text, "--length", 1], "--length 1"),
        (["erf", text, "--compare", folder], "it is there already"),
        (["meta-tokens", text, "--layer", 9], "layer=9: allowed: 0 to 3"),
        (["entropie"], "entropie"),
    ):
        more = [] if arguments[0] == "entropie" else ["--model", folder, "-o", tmp_path / "out"]
        done = hymba("analyze", *arguments, *more, code=2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and part in line, line
    assert "no meta tokens" in hymba("analyze", "meta-tokens", text, "--model", plain, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hymba.analysis.report.csv.DictWriter", fail)
    with pytest.raises(OSError, match="disk full"):
        write(Result("x", [{"a": 1}], {}), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "old")]


# Texts.


def test_samples_take_every_document_once_before_any_twice() -> None:
    tokenizer = byte_tokenizer()
    domain = {"d": [Document("a", "x" * 50), Document("b", "y" * 7), Document("c", "z" * 30)]}
    found = texts.samples(tokenizer, domain, length=11, count=5)
    assert [(sample.name, sample.tokens) for sample in found] == [("a", 11), ("c", 11), ("a", 11), ("c", 11), ("a", 11)]
    assert all(int(sample.ids[0, 0]) == tokenizer.bos_token_id for sample in found)
    # Whole pieces first, then the longest of the rest.
    found = texts.samples(tokenizer, {"d": domain["d"][1:2]}, length=11, count=5)
    assert [(sample.name, sample.tokens) for sample in found] == [("b", 8)]
    with pytest.raises(AnalysisError, match="at least 2 tokens"):
        texts.samples(tokenizer, domain, length=1, count=1)
    with pytest.raises(AnalysisError, match="fewer than 2 tokens"):
        texts.samples(tokenizer, {"d": [Document("a", "")]}, length=9, count=1)


def test_domains(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.md").write_text(name)
    found = texts.documents([tmp_path / "a", tmp_path / "b" / "x.md", tmp_path / "a" / "x.md"])
    assert {name: [d.text for d in group] for name, group in found.items()} == {"a": ["a"], "x": ["b"], "a/x": ["a"]}


def test_domains_without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""Talk."""\nimport os\n\ndef f():\n    "More talk."\n\nx = 1  # why\n'
    monkeypatch.setattr(texts, "held_out", lambda: [Document("m.py", source), Document("t.py", "{% not python %}")])
    found = texts.default_domains()
    assert [d.text for d in found["prose"]] == ["Talk.\n\nMore talk."]
    assert [d.text for d in found["code"]] == ["import os\n\ndef f():\n    pass\nx = 1"]
    line = found["sums"][0].text.splitlines()[0]
    left, right = line.split(" = ")
    assert eval(left) == int(right)
    assert found == texts.default_domains()
