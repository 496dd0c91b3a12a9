"""The `hymba` command in the tests' own process, and what it has to print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.cli import app


def hymba(*args: object, text: str = "", code: int = 0) -> Any:
    """Run the command in this process, with `text` as stdin."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=text)
    assert result.exit_code == code, result.output
    return result


def error(*args: object, text: str = "", code: int = 2) -> str:
    """The one line that a failing command prints."""
    result = hymba(*args, text=text, code=code)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def expected(folder: Path, prompt: str, **options: Any) -> str:
    """Prompt and continuation as transformers gives them for the prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HymbaForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, pad_token_id=0, **options)[0], skip_special_tokens=True)
