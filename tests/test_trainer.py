"""Training as transformers' users do it: checkpointing, dropout, autocast, frozen parts, Trainer and its collators."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build, gradients, largest, padded_ids, relative, some_ids
from tolerances import FLOAT64_GRADIENT
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hymba import HymbaCache, HymbaForCausalLM


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_gradient_checkpointing(kind: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of the name, which is the one that 5.17 has
    model = build(attention_dropout=0.0).train()
    ids, mask = padded_ids()
    extra: dict[str, Any] = {"labels": ids}
    if kind == "padded":
        extra["attention_mask"] = mask
    if kind == "packed":
        extra["position_ids"] = torch.arange(ids.shape[1]).remainder(5).expand_as(ids)
    model(ids, **extra).loss.backward()
    expected = gradients(model)
    seen = []
    hooks = [layer.mixer.register_forward_hook(lambda *_: seen.append(1)) for layer in model.model.layers]
    model.gradient_checkpointing_enable()
    model(ids, **extra).loss.backward()
    assert_same_gradients(gradients(model), expected, FLOAT64_GRADIENT)
    # The meta tokens once, the text twice.
    assert len(seen) == 3 * model.config.num_hidden_layers
    # A cache is written once, although the layers run twice.
    out = model(ids, use_cache=True, **{k: v for k, v in extra.items() if k != "position_ids"})
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == ids.shape[1]
    found = gradients(model)
    if kind != "packed":
        assert_same_gradients(found, expected, FLOAT64_GRADIENT)
    for hook in hooks:
        hook.remove()
    model.gradient_checkpointing_disable()
    seen.clear()
    model.gradient_checkpointing_enable(every_n_layers=2)
    hooks = [layer.mixer.register_forward_hook(lambda *_: seen.append(1)) for layer in model.model.layers]
    model(ids, **extra).loss.backward()
    assert_same_gradients(gradients(model), expected, FLOAT64_GRADIENT)
    assert len(seen) == 2.5 * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_dropout_is_for_training() -> None:
    model = build(attention_dropout=0.5)
    ids = some_ids(1, 20)
    want = build()(ids).logits
    assert torch.equal(model(ids).logits, want)
    model.train()
    assert largest(model(ids).logits, want) > 1e-3


def test_autocast() -> None:
    """bfloat16 products on float32 parameters; the scan, the norms and the states stay in float32."""
    model = build(dtype=torch.float32)
    ids, mask = padded_ids()
    want = model(ids, attention_mask=mask, labels=ids)
    want.loss.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert float(out.loss) == pytest.approx(float(want.loss), rel=0.02)
    found = gradients(model)
    assert all(g.dtype == torch.float32 for g in found.values())
    scale = torch.cat([g.flatten() for g in expected.values()])
    assert relative(torch.cat([found[n].flatten() for n in expected]), scale) < 0.1
    assert all(state.ssm.dtype == torch.float32 for state in out.past_key_values.layers)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = HymbaCache(model.config)
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
        whole = model(ids, use_cache=False).logits
        generated = model.generate(ids[:1], max_new_tokens=3)
    assert generated.shape == (1, 16)
    scale = float(whole.std())
    assert largest(torch.cat(parts, dim=1) / scale, whole / scale) < 0.12


def test_frozen_parts_train_the_rest() -> None:
    """Soft prompts: only the meta tokens learn."""
    model = build(dtype=torch.float32).train()
    model.requires_grad_(False)
    model.model.meta_tokens.requires_grad_(True)
    ids = some_ids(2, 9)
    before = float(model(ids, labels=ids).loss)
    optimizer = torch.optim.Adam([model.model.meta_tokens.weight], lr=0.05)
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < before - 0.05


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index].tolist(), "labels": self.rows[index].tolist()}


def _arguments(folder: Path, **extra: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, seed=1, **extra,
    )  # fmt: skip


def test_trainer(tmp_path: Path) -> None:
    """Trains, evaluates and saves; gradient accumulation gives the loss of the whole batch."""
    rows = _Rows([some_ids(1, 12, seed=n)[0] for n in range(8)])

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    losses = []
    for accumulate in (1, 2):
        model = build(dtype=torch.float32)
        trainer = Trainer(
            model, _arguments(tmp_path, gradient_accumulation_steps=accumulate, gradient_checkpointing=accumulate == 2),
            train_dataset=rows, eval_dataset=rows, data_collator=collate,
        )  # fmt: skip
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged[-1] < logged[0]
        losses.append(logged[0])
        assert trainer.evaluate()["eval_loss"] < logged[0]
    assert losses[0] == pytest.approx(losses[1], rel=0.5)
    trainer.save_model(str(tmp_path / "final"))
    again = HymbaForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in again.named_parameters())


def test_trainer_with_the_padding_free_collator(tmp_path: Path) -> None:
    """What transformers' own collator sends gives the loss and gradient of the documents apart."""
    rows = [some_ids(1, n, seed=n)[0] for n in (7, 12, 3, 9)]
    items = [_Rows(rows)[i] for i in range(4)]
    model = build().train()
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        batch = DataCollatorWithFlattening(**options)(items)
        assert batch["input_ids"].shape == (1, 31)
        model(**batch, num_items_in_batch=27).loss.backward()
        found = gradients(model)
        for row in rows:
            model(row[None], labels=row[None], num_items_in_batch=27).loss.backward()
        # Loss and logits are float32.
        assert_same_gradients(found, gradients(model), 1e-5)
    trainer = Trainer(
        build(dtype=torch.float32), _arguments(tmp_path), train_dataset=_Rows(rows),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    )  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]
