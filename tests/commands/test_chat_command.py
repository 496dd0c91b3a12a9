"""`hymba chat`: pipes, terminals, its commands, and what it hands on to the conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands.running import error, hymba

from hymba import HymbaConfig
from hymba.commands import chat as chat_command
from hymba.commands import errors


def test_a_piped_conversation(llama: Path) -> None:
    result = hymba("chat", "-m", llama, "--max-new-tokens", 6, "--stats", text="hi\n\n  more \n")
    assert len(result.stdout.splitlines()) >= 2
    first, second = (line for line in result.stderr.splitlines() if "tokens/s" in line)
    held = [int(line.split(" in the conversation")[0].split()[-1]) for line in (first, second)]
    assert held[0] < held[1]
    assert result.stderr.count("(cut after 6 tokens; --max-new-tokens allows more)") == 2
    assert result.stdout == hymba("chat", "hi", "-m", llama, "--max-new-tokens", 6, text="more").stdout


def test_chat_commands(llama: Path) -> None:
    args = ["chat", "-m", llama, "--max-new-tokens", 5]
    said = hymba(*args, text="hi\n/reset\nhi\n/quit\nnever\n")
    half = len(said.stdout) // 2
    assert said.stdout[:half] == said.stdout[half:]
    assert "(a new conversation)" in said.stderr
    assert "/reset" in hymba(*args, text="/help").stderr
    result = hymba(*args, text="/rest", code=2)
    assert "/rest is not a command. Did you mean '/reset'?" in result.stderr
    assert "the tool turn is empty" in hymba(*args, text="/tool", code=2).stderr


class Recorder:
    """Stands in for a conversation and writes down what it is asked."""

    made: list[Any]

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options, self.sent, self.resets, self.ids = options, [], 0, []
        self.cache = SimpleNamespace(nbytes=lambda: 0)
        self.made.append(self)

    def send(self, content: str, *, role: str, on_text: Any, settings: Any) -> Any:
        self.sent.append((role, content))
        self.settings = settings
        if content == "stop":
            return SimpleNamespace(finish="interrupted", tokens=[1], prompt_tokens=1)
        for piece in (" ", " ok", " then"):
            on_text(piece)
        return SimpleNamespace(finish="end", tokens=[1], prompt_tokens=1)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    Recorder.made = []
    monkeypatch.setattr("hymba.chat.Conversation", Recorder)
    return Recorder.made


def test_chat_hands_on_system_tools_contexts_and_settings(llama: Path, tmp_path: Path, recorder: list[Any]) -> None:
    tools, texts, text, template = (tmp_path / n for n in ("tools.json", "texts.json", "text.md", "t.jinja"))
    tools.write_text('[{"name": "add"}]')
    texts.write_text('["one", "two"]')
    text.write_text("three\n")
    template.write_text("{{ messages }}")
    args = ["chat", "first", "-m", llama, "--system", "Be brief.", "--tools", tools, "--chat-template", template]
    hymba(*args, "--contexts", texts, "--contexts", text, text="//path\n/tool 42\nlast\n")
    (chat,) = recorder
    assert chat.options == {
        "system": "Be brief.",
        "tools": [{"name": "add"}],
        "contexts": ["one", "two", "three\n"],
        "chat_template": "{{ messages }}",
        "max_length": None,
    }
    assert chat.sent == [("user", "first"), ("user", "/path"), ("tool", "42"), ("user", "last")]
    assert (chat.settings.do_sample, chat.settings.max_new_tokens) == (False, 256)
    hymba("chat", "x", "-m", llama, "--cache-implementation", "static", "--top-p", 0.5)
    assert recorder[1].options["max_length"] == HymbaConfig.from_pretrained(llama).max_position_embeddings
    assert recorder[1].settings.do_sample


def test_files_that_chat_cannot_use(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert f"--tools {path}: cannot be read: No such file" in error("chat", "-m", llama, "--tools", path)
    for content in ("[", "{}", "[]", '["x"]'):
        path.write_text(content)
        assert f"--tools {path}: " in error("chat", "-m", llama, "--tools", path)
    for content in ("{}", '[""]', "[1]"):
        path.write_text(content)
        assert f"--contexts {path}: allowed: a JSON list of texts" in error("chat", "-m", llama, "--contexts", path)
    text = tmp_path / "file.txt"
    text.write_text(" ")
    assert f"--contexts {text}: empty" in error("chat", "-m", llama, "--contexts", text)
    text.write_bytes(b"\xff")
    assert "not UTF-8 text (byte 0)" in error("chat", "-m", llama, "--chat-template", text)


def test_a_terminal_goes_on_after_errors_and_interrupts(
    recorder: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = iter(["hi", "/nope", KeyboardInterrupt, "", "stop", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def typed(_: str) -> str:
        line = next(script)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    chat = Recorder()
    chat_command._talk(chat, None, "first", stats=True)
    assert [content for _, content in chat.sent] == ["first", "hi", "stop"]
    shown = capsys.readouterr()
    # The space that a tokenizer puts before a first word is no part of the answer.
    assert "\nok then\n" in shown.out
    assert "> first" in shown.out
    assert "/nope is not a command" in shown.err
    assert "(Ctrl-C again, Ctrl-D or /quit to leave)" in shown.err
    assert "(interrupted; what was said stays)" in shown.err


def test_an_interrupted_pipe_ends(recorder: list[Any], llama: Path) -> None:
    hymba("chat", "stop", "-m", llama, text="never\n", code=errors.INTERRUPTED)
    assert recorder[0].sent == [("user", "stop")]
