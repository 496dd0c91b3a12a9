"""TRL's own trainers on the model, with their defaults: no command of ours in between."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from finetune_runs import CONVERSATIONS, PAIRS
from peft import LoraConfig
from tiny_checkpoint import llama_tokenizer, tiny_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hymba.adapters import PROJECTIONS
from hymba.finetuning.templates import training_template

COMMON: dict[str, Any] = dict(
    max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
    logging_steps=1, disable_tqdm=True, max_length=160,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _names_to_be_dropped() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def tokenizer() -> Any:
    made = llama_tokenizer()
    made.pad_token = made.eos_token
    made.chat_template = training_template()
    return made


def test_sft_with_packing_and_default_targets(tmp_path: Path) -> None:
    """Gradient checkpointing is on by TRL's default; packed rows come with positions and boundaries, without a mask."""
    rows = [{"messages": row["messages"]} for row in CONVERSATIONS[1:3]]
    trainer = SFTTrainer(
        tiny_model(tokenizer()),
        args=SFTConfig(str(tmp_path), packing=True, assistant_only_loss=True, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2),
    )
    assert set(trainer.model.peft_config["default"].target_modules) == set(PROJECTIONS)
    assert trainer.args.gradient_checkpointing
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and {"position_ids", "seq_idx", "cu_seq_lens_q"} <= batch.keys()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert trainer.model.get_base_model().model.gradient_checkpointing
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    unmoved = [name for name, old in before.items() if torch.equal(trainer.model.get_parameter(name), old)]
    assert not unmoved


def test_dpo_then_sft_of_the_same_model(tmp_path: Path) -> None:
    """The released configuration's router fields make no mixture of experts of it, however often it is trained."""
    model = tiny_model(tokenizer())
    routed = {name: model.config.to_dict()[name] for name in ("output_router_logits", "router_aux_loss_coef")}
    trainer = DPOTrainer(
        model,
        ref_model=tiny_model(tokenizer()),
        args=DPOConfig(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(PAIRS[:2]),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list([{"text": "Use text"}] * 2),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert not trainer.aux_loss_enabled
    assert {name: model.config.to_dict()[name] for name in routed} == routed
