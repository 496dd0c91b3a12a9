"""What `hymba serve` is made of, without a server: its gate, its names, and what the model refuses it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ecosystem.server import NAME
from tiny_checkpoint import llama_tokenizer, tiny_model

from hymba.commands import serve as command
from hymba.inputs import InputError


def test_a_server_that_ends_cancels_what_it_does() -> None:
    from hymba.serving.app import Gate

    events: list[str] = []

    async def endless(*_: Any) -> None:
        try:
            events.append("begun")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def receive() -> dict[str, Any]:
        if "read" in events:
            await asyncio.sleep(60)
        events.append("read")
        return {"type": "http.request", "body": b"{}"}

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        task = asyncio.ensure_future(Gate(endless, NAME)(scope, receive, None))
        while "begun" not in events:
            await asyncio.sleep(0)
        task.cancel()
        await task
        await asyncio.sleep(0)

    asyncio.run(run())
    assert events == ["read", "begun", "cancelled"]


def test_names() -> None:
    assert command._name(None) == "hymba"
    assert command._name("nvidia/Hymba-1.5B-Base") == "nvidia/Hymba-1.5B-Base"


def test_continuous_batching_is_refused_by_the_model_too() -> None:
    with pytest.raises(InputError, match="no place for"):
        tiny_model(llama_tokenizer()).generate_batch(inputs=[[5, 6]])
