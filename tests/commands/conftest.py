"""Checkpoints that the tests of commands share, and only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import byte_tokenizer, llama_tokenizer, tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "bytes", byte_tokenizer())


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", llama_tokenizer())
