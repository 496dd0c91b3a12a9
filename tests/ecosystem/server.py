"""`hymba serve` on a thread, OpenAI's own client for it, and answers without a server to compare with."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import llama_tokenizer, tiny_checkpoint
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.chat import Conversation, generation_settings
from hymba.cli import app
from hymba.commands import serve as command

if not all(map(find_spec, command._NEEDED)):
    pytest.skip("needs the extra serve", allow_module_level=True)

import openai
import uvicorn

CONTEXT = 320
NAME = "tiny"


@dataclass
class Served:
    """A running server, and what it serves, to compare with."""

    port: int
    model: HymbaForCausalLM
    tokenizer: Any
    client: openai.OpenAI

    def chat(self, text: str = "Hello", **options: Any) -> Any:
        options = {"max_tokens": 12, **options}
        return self.client.chat.completions.create(model=NAME, messages=turn(text), **options)

    def post(self, path: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


def turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def content(answer: Any) -> str:
    return answer.choices[0].message.content


def joined(stream: Any) -> str:
    """The text of a streamed chat."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def error_of(call: Callable[[], Any], kind: type[openai.APIStatusError]) -> dict[str, Any]:
    with pytest.raises(kind) as raised:
        call()
    return raised.value.body


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Served]:
    """`hymba serve` itself, on a thread, with a tiny checkpoint that is written into `folder`."""
    tiny_checkpoint(folder, llama_tokenizer(), max_position_embeddings=CONTEXT, orig_max_position_embeddings=CONTEXT)
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        load, server = command.load, uvicorn.Server
        patch.setattr(command, "load", lambda *a, **k: made.append(load(*a, **k)) or made[-1])
        patch.setattr(uvicorn, "Server", lambda config: made.append(server(config)) or made[-1])
        thread = threading.Thread(
            target=lambda: CliRunner().invoke(app, ["serve", str(folder), "--port", str(port), "--device", "cpu"]),
            daemon=True,
        )
        thread.start()
        until(lambda: len(made) == 2 and made[1].started, seconds=60)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        yield Served(port, *made[0], client)
        made[1].should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def alone(served: Served, text: str, tokens: int = 12, **options: Any) -> str:
    """The answer of a conversation without a server."""
    chat = Conversation(served.model, served.tokenizer, **options)
    settings = generation_settings(served.model, served.tokenizer, do_sample=False, max_new_tokens=tokens)
    pieces: list[str] = []
    chat.send(text, settings=settings, on_text=pieces.append)
    return "".join(pieces)
