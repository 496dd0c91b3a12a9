"""`hymba generate`: what it prints and writes, batches, ends of an answer, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.running import error, expected, hymba
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.cli import app
from hymba.commands import errors


def test_generate_prints_what_the_model_says(folder: Path, llama: Path) -> None:
    for where, prompt in ((folder, "def "), (llama, "Hello")):
        result = hymba("generate", prompt, "-m", where, "--max-new-tokens", 12, "--stats")
        assert result.stdout == expected(where, prompt, max_new_tokens=12) + "\n"
        assert "12 tokens in" in result.stderr


def test_generate_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hymba.commands.generate.say", said.append)
    hymba("generate", "def ", "-m", folder, "--max-new-tokens", 9, "--repetition-penalty", 1.5)
    assert said[0] == "def "
    assert len(said) > 9
    whole = expected(folder, "def ", max_new_tokens=9, repetition_penalty=1.5)
    assert "".join(said) == whole + "\n"


def test_generate_reads_stdin_and_can_leave_the_prompt_out(folder: Path) -> None:
    whole = hymba("generate", "-", "-m", folder, "--max-new-tokens", 5, text="a\nb").stdout
    alone = hymba("generate", "a\nb", "-m", folder, "--max-new-tokens", 5, "--no-return-full-text").stdout
    assert whole == "a\nb" + alone


def test_sampling_is_seeded_and_switched_on_by_its_options(folder: Path) -> None:
    args = ["generate", "a", "-m", folder, "--max-new-tokens", 16]
    first, again, other = (hymba(*args, "--temperature", 5, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert first != hymba(*args).stdout
    assert "top_k=3 would do nothing" in error(*args, "--no-do-sample", "--top-k", 3)
    assert "greedy decoding has one continuation" in error(*args, "--num-return-sequences", 2)
    assert "allowed: up to --num-beams 2" in error(*args, "--num-return-sequences", 3, "--num-beams", 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def \n\n  \na much longer line than the others\r\nb")
    return path


@pytest.mark.parametrize("options", [[], ["--cache-implementation", "static"], ["--num-beams", 2]])
def test_a_batch_gives_every_prompt_what_it_gets_alone(folder: Path, prompts: Path, options: list[Any]) -> None:
    args = ["-m", folder, "--max-new-tokens", 20, *options]
    batch = hymba("generate", "--prompts-file", prompts, "--batch-size", 2, "--json", *args)
    rows = [json.loads(line) for line in batch.stdout.splitlines()]
    assert [row["line"] for row in rows] == [1, 4, 5]
    assert [row["prompt"] for row in rows] == ["def ", "a much longer line than the others", "b"]
    for row in rows:
        alone = hymba("generate", row["prompt"], "--json", *args)
        assert json.loads(alone.stdout) == {**row, "line": 1}
        assert row["tokens"] == 20
        assert row["finish_reason"] == "length"


def test_a_batch_as_text(folder: Path, prompts: Path) -> None:
    result = hymba("generate", "--prompts-file", prompts, "-m", folder, "--max-new-tokens", 3)
    whole = "".join(f"==> {n} <==\n{expected(folder, p, max_new_tokens=3)}\n" for n, p in
                    ((1, "def "), (4, "a much longer line than the others"), (5, "b")))  # fmt: skip
    assert result.stdout == whole


def test_several_continuations_of_one_prompt(folder: Path) -> None:
    args = ["generate", "a", "-m", folder, "--max-new-tokens", 4, "--num-return-sequences", 3]
    result = hymba(*args, "--temperature", 3, "--seed", 0)
    assert [line for line in result.stdout.splitlines() if line.startswith("==>")] == [
        "==> 1.1 <==",
        "==> 1.2 <==",
        "==> 1.3 <==",
    ]
    rows = hymba(*args, "--num-beams", 3, "--json").stdout.splitlines()
    assert [json.loads(row)["sequence"] for row in rows] == [0, 1, 2]


def test_an_end_token_ends_a_row_and_is_not_text(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: Any, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        new = torch.full((len(ids), 4), 300 % self.config.vocab_size)
        new[:, 0] = 40
        new[1:, 1] = 0
        return torch.cat([ids, new], dim=1)

    monkeypatch.setattr(HymbaForCausalLM, "generate", ending)
    result = hymba("generate", "--prompts-file", prompts, "-m", folder, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["tokens"], row["finish_reason"]) for row in rows] == [(4, "length"), (1, "eos"), (1, "eos")]


@pytest.mark.parametrize("options", [[], ["--num-beams", 2]])
def test_stop_strings(folder: Path, prompts: Path, options: list[Any]) -> None:
    args = ["-m", folder, "--max-new-tokens", 20, "--no-return-full-text", *options]
    whole = hymba("generate", "def ", *args).stdout
    stop = whole[1:3]  # of two tokens, so that it is completed, not only said
    at = whole.index(stop) + 2
    result = hymba("generate", "def ", *args, "--stop-strings", "never said", "--stop-strings", stop)
    assert result.stdout.removesuffix("\n") == whole[:at]
    batch = hymba("generate", "--prompts-file", prompts, "--json", *args, "--stop-strings", stop)
    for row in map(json.loads, batch.stdout.splitlines()):
        alone = json.loads(hymba("generate", row["prompt"], "--json", *args, "--stop-strings", stop).stdout)
        assert alone == {**row, "line": 1}
        assert (row["finish_reason"] == "stop") == (stop in row["text"]) == row["text"].endswith(stop)
        assert row["finish_reason"] == "stop" or row["tokens"] == 20
    assert "a stop string needs at least one character" in error("generate", "a", "-m", folder, "--stop-strings", "")


def test_an_output_file_is_written_at_the_end_or_not_at_all(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    args = ["generate", "--prompts-file", prompts, "-m", folder, "--max-new-tokens", 2, "--json"]
    assert hymba(*args, "--output-file", out).stdout == ""
    written = out.read_text()
    assert len(written.splitlines()) == 3
    calls = iter(range(9))
    generate = HymbaForCausalLM.generate

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls):
            raise RuntimeError("out of memory")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(HymbaForCausalLM, "generate", failing)
    line = error(*args, "--output-file", out, "--batch-size", 1, code=1)
    assert line == "RuntimeError: out of memory (run again with --debug to see where)"
    assert out.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    assert "there is no folder" in error(*args, "--output-file", tmp_path / "no" / "out")
    assert "a folder" in error(*args, "--output-file", tmp_path)


def test_prompt_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    assert f"--prompts-file {path}: cannot be read: No such file" in error("generate", "--prompts-file", path)
    assert "Is a directory" in error("generate", "--prompts-file", tmp_path)
    path.write_text("\n \n")
    assert "no prompt in it; one prompt a line" in error("generate", "--prompts-file", path)
    path.write_bytes(b"ab\xff\n")
    assert "not UTF-8 text (byte 2)" in error("generate", "--prompts-file", path)
    assert "no prompt in it" in error("generate", "--prompts-file", "-", text="\n")


def test_ctrl_c_and_debug(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    args = ["generate", "def ", "-m", folder]
    with monkeypatch.context() as patch:
        patch.setattr(HymbaForCausalLM, "generate", interrupted)
        assert hymba(*args, code=errors.INTERRUPTED).stdout == "def \n"
    result = CliRunner().invoke(app, [*map(str, args), "--top-k", "1", "--no-do-sample", "--debug"])
    assert isinstance(result.exception, ValueError)
    # Behind -- it is a prompt like any other.
    assert hymba("generate", "-m", folder, "--max-new-tokens", 1, "--", "--debug").stdout.startswith("--debug")
