"""`torch.compile`: one graph, the same numbers, and in training few compilations whatever the lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build, gradients, largest, padded_ids, some_ids
from tolerances import FLOAT32, FLOAT64_GRADIENT
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(**fields: Any) -> Any:
    return build(num_hidden_layers=3, kv_reuse_group=[[1, 2]], **fields).train()


def batch(kind: str, length: int) -> dict[str, Any]:
    ids = some_ids(2, length)
    out: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if kind == "packed":
        out["position_ids"] = torch.arange(length).remainder(5).expand_as(ids)
    if kind == "seq_idx":
        out["seq_idx"] = (torch.arange(length) // 4).expand_as(ids).int()
    if kind == "padded":
        out["attention_mask"] = torch.ones_like(ids).index_fill_(1, torch.tensor([0, 1, 5]), 0)
    return out


@pytest.mark.parametrize("kind", ["plain", "packed", "seq_idx", "padded", "no logits"])
def test_training_is_one_graph(kind: str) -> None:
    model = small()
    inputs = batch(kind, 13)
    if kind == "no logits":
        inputs["return_logits"] = False
    model(**inputs).loss.backward()
    expected = gradients(model)
    want = float(model(**inputs).loss.detach())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    assert_same_gradients(gradients(model), expected, FLOAT64_GRADIENT if kind != "no logits" else 1e-6)


def test_lengths_do_not_recompile() -> None:
    """One graph for the first length, one for all others."""
    model = small(dtype=torch.float32)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (13, 17, 21, 9, 33):
        inputs = batch("plain", length)
        loss = compiled(**inputs).loss
        assert float(loss.detach()) == pytest.approx(float(model(**inputs).loss.detach()), rel=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [False, True])
def test_compile_whole(training: bool) -> None:
    """One graph, without a cache: the forward has no host sync and no control flow on values."""
    layers = {"num_hidden_layers": 2, "global_attn_idx": None, "kv_reuse_group": [[0, 1]]}
    model = build(**layers, dtype=torch.float32).train(training)
    ids, mask = padded_ids()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.set_grad_enabled(training):
        found = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
        want = model(ids, attention_mask=mask, labels=ids, use_cache=False)
        assert largest(found.logits, want.logits) <= FLOAT32
        if training:
            found.loss.backward()
            grads = gradients(model)
            want.loss.backward()
            assert_same_gradients(grads, gradients(model), 1e-4)
