"""Activation checkpointing and the fused loss: less memory, the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import VOCAB, assert_same_gradients, build, gradients, some_ids
from tolerances import FLOAT64_GRADIENT, LOSS
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hymba.ops import recompute
from hymba.ops.loss import linear_cross_entropy, linear_cross_entropy_ref

KINDS = pytest.mark.parametrize("kind", ["plain", "padded", "packed"])


@pytest.fixture(autouse=True)
def _everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba.ops.recompute._NARROW", 1)


def batch(kind: str) -> dict[str, Any]:
    ids = some_ids(2, 13)
    out: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if kind == "padded":
        out["attention_mask"] = torch.ones_like(ids).index_fill_(1, torch.tensor([0, 1, 5]), 0)
    if kind == "packed":
        out["position_ids"] = torch.arange(13).remainder(5).expand_as(ids)
    return out


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_policies_change_no_number(kind: str, dtype: torch.dtype) -> None:
    inputs = batch(kind)
    model = build(dtype=dtype, mamba_d_conv=4).train()
    found = {}
    for policy in ("none", "selective", "full", "none"):
        model.set_activation_checkpointing(policy)
        loss = model(**inputs).loss
        loss.backward()
        found[policy] = (loss.detach(), gradients(model))
    loss, expected = found["none"]
    for policy, (other, grads) in found.items():
        assert torch.equal(other, loss), policy
        assert grads.keys() == expected.keys()
        assert all(torch.equal(grads[name], expected[name]) for name in expected), policy


def test_selective_under_autocast() -> None:
    inputs = batch("plain")
    model = build(dtype=torch.float32).train()
    found = []
    for policy in ("none", "selective"):
        model.set_activation_checkpointing(policy)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        # Outside of autocast, as PyTorch wants it.
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], 0.0)


@pytest.mark.parametrize("relu2", [False, True])
def test_selective_keeps_less(relu2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    note = recompute._Scope.pack

    def pack(self: Any, tensor: Tensor) -> Any:
        packed = note(self, tensor)
        kept.append((tensor, isinstance(packed, recompute._View)))
        return packed

    monkeypatch.setattr("hymba.ops.recompute._Scope.pack", pack)
    model = build(dtype=torch.float32, mlp_hidden_act="relu2" if relu2 else "silu").train()
    model.set_activation_checkpointing("selective")
    loss = model(**batch("plain")).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {True: 0, False: 0}
    for again in (True, False):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, a in kept if a == again}
        sizes[again] = sum(size for pointer, size in storages.items() if pointer not in own)
    # Norms, products of the MLP, convolutions, step sizes: a good part of what would be kept.
    assert sizes[True] > 0.25 * (sizes[True] + sizes[False])
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert_same_gradients(gradients(model), first, 0.0)


def test_selective_notices_a_changed_weight() -> None:
    model = build(dtype=torch.float32).train()
    model.set_activation_checkpointing("selective")
    loss = model(**batch("plain")).loss
    with torch.no_grad():
        model.model.layers[0].input_norm.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed"):
        loss.backward()


def test_selective_is_for_training() -> None:
    model = build(dtype=torch.float32)
    model.set_activation_checkpointing("selective")
    assert recompute._scope() is None
    want = build(dtype=torch.float32)(**batch("plain"))
    assert torch.equal(model(**batch("plain")).logits, want.logits)


def test_selective_sees_hooks_and_adapters() -> None:
    model = build(dtype=torch.float32).train()
    inputs = batch("plain")
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.set_activation_checkpointing("selective")
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("_norm", "dt_proj", "mlp")):
            module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    model(**inputs).loss.backward()
    assert_same_gradients(gradients(model), expected, 0.0)
    # The meta tokens and the text; the last norm only once.
    assert len(seen) == 2 * 9 * model.config.num_hidden_layers + 1


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="policy='some': allowed: 'none', 'selective', 'full'"):
        build().set_activation_checkpointing("some")


def test_names_of_transformers() -> None:
    """Both names, the old and the new one, switch the full form on and off."""
    model = build()
    for noun in ("gradient", "activation"):
        if not hasattr(model, f"{noun}_checkpointing_enable"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(model, f"{noun}_checkpointing_enable")()
            assert model.model.gradient_checkpointing
            getattr(model, f"{noun}_checkpointing_disable")()
            assert not model.model.gradient_checkpointing


# The loss.


@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_fused_loss(kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba.ops.loss._AT_ONCE_ELSEWHERE", 7 * VOCAB)
    model = build(tie_word_embeddings=tied).train()
    inputs = batch(kind)
    inputs["labels"] = inputs["labels"].index_fill(1, torch.tensor([0, 4]), -100)
    for extra in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}):
        want = model(**inputs, **extra)
        want.loss.backward()
        expected = gradients(model)
        out = model(**inputs, **extra, return_logits=False)
        out.loss.backward()
        assert out.logits is None
        assert want.logits is not None
        assert float(out.loss) == pytest.approx(float(want.loss), rel=LOSS)
        # The plain one goes through float32 logits.
        assert_same_gradients(gradients(model), expected, 1e-6)


def test_fused_loss_with_given_targets_and_kept_positions() -> None:
    model = build().train()
    ids = some_ids(2, 9)
    targets = some_ids(2, 9, seed=3)
    for extra in ({"shift_labels": targets, "labels": ids}, {"labels": ids[:, -4:], "logits_to_keep": 4}):
        want = float(model(ids, **extra).loss)
        assert float(model(ids, **extra, return_logits=False).loss) == pytest.approx(want, rel=LOSS)


def test_logits_are_left_out_in_training_only() -> None:
    model = build(dtype=torch.float32)
    ids = some_ids(2, 9)
    model.use_fused_loss()
    assert model(ids, labels=ids).logits is not None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits is not None
    assert model(ids).logits is not None
    model.use_fused_loss(False)
    assert model(ids, labels=ids).logits is not None


def test_a_head_that_is_not_the_models_own_is_called() -> None:
    model = build(dtype=torch.float32).train()
    ids = some_ids(2, 9)
    want = float(model(ids, labels=ids).loss)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert float(model(ids, labels=ids, return_logits=False).loss) == pytest.approx(want)
    assert calls
    handle.remove()
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.out_features = VOCAB
    assert float(model(ids, labels=ids, return_logits=False).loss) == pytest.approx(want)


def test_a_custom_loss_gets_the_logits() -> None:
    model = build(dtype=torch.float32).train()
    ids = some_ids(2, 9)
    model.loss_function = lambda logits, labels, vocab_size, **_: ForCausalLMLoss(logits, labels, vocab_size) * 2
    want = float(model(ids, labels=ids).loss)
    assert float(model(ids, labels=ids, return_logits=False).loss) == want


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_loss_in_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba.ops.loss._AT_ONCE_ELSEWHERE", rows * 11)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,)).index_fill_(0, torch.tensor([2, 8]), 4)
    want = linear_cross_entropy_ref(hidden, weight, targets, 4)
    got = linear_cross_entropy(hidden, weight, targets, ignore_index=4)
    assert float(got) == pytest.approx(float(want), rel=1e-12)
    expected = torch.autograd.grad(3 * want, [hidden, weight])
    for g, w in zip(torch.autograd.grad(3 * got, [hidden, weight]), expected, strict=True):
        assert torch.allclose(g, w, rtol=FLOAT64_GRADIENT)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    only = linear_cross_entropy(hidden.detach(), weight, targets, ignore_index=4)
    assert torch.allclose(torch.autograd.grad(only, weight)[0] * 3, expected[1])


def test_loss_without_any_target_is_not_a_number_either_way() -> None:
    model = build(dtype=torch.float32).train()
    ids = some_ids(1, 5)
    none = torch.full_like(ids, -100)
    assert model(ids, labels=none).loss.isnan()
    assert model(ids, labels=none, return_logits=False).loss.isnan()


def test_loss_refuses_other_shapes() -> None:
    hidden, weight, targets = torch.randn(3, 5), torch.randn(7, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="expected two matrices"):
        linear_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_cross_entropy(hidden, weight[:, :4], targets)
    with pytest.raises(ValueError, match="targets has shape"):
        linear_cross_entropy(hidden, weight, targets[:2])
