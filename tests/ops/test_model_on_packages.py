"""A whole model served by the optional packages gives what PyTorch gives: padded batches, gradients, decoding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import build, pad, some_ids, through_cache
from ops import package_fixtures as packages

from hymba import HymbaCache
from hymba.ops import BackendError, use_backend

FLOAT32 = 1e-4
MAMBA = {
    "selective_scan": "mamba_ssm",
    "selective_state_update": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    packages.fresh(monkeypatch)
    packages.stand_in(monkeypatch)
    yield
    packages.forget()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-6))


def test_a_padded_batch_and_its_gradients() -> None:
    model = build(dtype=torch.float32)
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (17, 6)])
    labels = ids.masked_fill(mask == 0, -100)

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = model(ids, attention_mask=mask, labels=labels)
        return out.logits[mask != 0], torch.autograd.grad(out.loss, list(model.parameters()))

    want, want_gradients = run()
    with use_backend(**MAMBA):
        got, gradients = run()
    assert relative(got, want) < FLOAT32
    assert all(relative(g, w) < FLOAT32 for g, w in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("room", [None, 40])
def test_chunks_and_steps_on_a_cache(room: int | None) -> None:
    model = build(dtype=torch.float32)
    ids = some_ids(2, 24)
    with torch.no_grad():
        want = model(ids).logits
    with use_backend(**MAMBA):
        got = through_cache(model, ids, [9, 1, 4, *[1] * 10], cache=HymbaCache(model.config, max_length=room))
    assert relative(got, want) < FLOAT32


def test_packed_documents_are_refused_by_name() -> None:
    model = build(dtype=torch.float32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for op, reason in (("selective_scan", "no documents within a row"), ("causal_conv1d", "start from zeros")):
        with use_backend(**{op: MAMBA[op]}), pytest.raises(BackendError, match=reason):
            model(some_ids(1, 7), position_ids=positions)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4"])
def test_flash_attention(name: str) -> None:
    fields = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = build(dtype=torch.bfloat16, **fields)
    exact = build(dtype=torch.float64, **fields)
    ids = some_ids(2, 21)
    want = exact(ids, labels=ids)
    wanted = torch.autograd.grad(want.loss, list(exact.parameters()))
    with use_backend(attention="torch"):
        usual = model(ids, labels=ids)
        usual_gradients = torch.autograd.grad(usual.loss, list(model.parameters()))
    with use_backend(attention=name):
        # The meta tokens' own pass and the text's: both are sequences without a cache.
        got = model(ids, labels=ids)
        gradients = torch.autograd.grad(got.loss, list(model.parameters()))
    # As far from float64 as PyTorch's attention in bfloat16 is.
    assert relative(got.logits, want.logits) < 1.5 * relative(usual.logits, want.logits)
    errors = [[relative(a, w) for a, w in zip(g, wanted, strict=True)] for g in (gradients, usual_gradients)]
    assert sum(errors[0]) < 1.5 * sum(errors[1])
