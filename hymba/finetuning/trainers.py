"""TRL's trainers for SFT and DPO, with this library's checkpoints, loss record, optimizer and schedule."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hymba.adapters import target_names
from hymba.experiments.settings import SettingsError
from hymba.experiments.trainer import RecordedTrainer, common_arguments
from hymba.finetuning.data import Examples
from hymba.finetuning.rows import MESSAGES, TEXT, DataError
from hymba.finetuning.settings import FinetuneSettings
from hymba.finetuning.templates import has_markers
from hymba.model import HymbaForCausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_config(settings: FinetuneSettings, model: HymbaForCausalLM) -> LoraConfig | None:
    """PEFT's configuration of the adapter, or None when every weight is trained.

    Raises:
        SettingsError: a target that the model does not have.
    """
    adapter = settings.adapter
    if adapter.kind == "none":
        return None
    from peft import LoraConfig

    targets = target_names(adapter.target_modules)
    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if adapter.target_modules and (missing := [name for name in targets if name not in present]):
        raise SettingsError(
            f"adapter.target_modules = {list(adapter.target_modules)!r}: the model has no linear layer "
            f"{', '.join(map(repr, missing))}; allowed: {', '.join(sorted(present - {'lm_head'}))}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_dora=adapter.kind == "dora",
        use_rslora=adapter.rank_stabilised,
    )


def _arguments(settings: FinetuneSettings, output: Path) -> dict[str, Any]:
    """Training arguments that both methods have; the model's own activation checkpointing is set elsewhere."""
    run = settings.run
    return common_arguments(run, settings.optimizer, output) | dict(
        max_steps=run.steps or -1,
        num_train_epochs=run.epochs,
        gradient_accumulation_steps=run.gradient_accumulation,
        gradient_checkpointing=False,
        max_length=settings.data.max_length,
    )


class _Silent:
    """What TRL's trainers do besides training; stands before them among the base classes."""

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: it would be written into the output folder, in place."""


class _Finetuner(RecordedTrainer):
    """What both trainers have of ours; stands after TRL's, whose methods call these."""

    _total_train_tokens: int
    _tokens_before = 0

    def resume(self, checkpoint: Path | None) -> None:
        """Train from a complete checkpoint, or from the start; a finished run's checkpoint is only loaded.

        Trainer looks at the limit of steps after a step, and would take one more in an epoch that is not over.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self.state = state
                self._load_from_checkpoint(str(checkpoint))
                return
        super().resume(checkpoint)

    def tokens_since(self, step: int) -> int:
        tokens, self._tokens_before = self._total_train_tokens - self._tokens_before, self._total_train_tokens
        return tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Counted since this process started, which is not what a resumed run's reader expects.
        logs.pop("num_tokens", None)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model in the released layout, or the adapter alone."""
        folder = str(self.output) if output_dir is None else output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options = {"save_embedding_layers": False} if self.settings.adapter.kind != "none" else {}
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # pragma: gpu
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.model if model is None else model
        if self.settings.adapter.kind == "none":
            saved = HymbaForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            target.load_state_dict(saved.state_dict())
            return
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(target, load_file(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS))


def build_trainer(
    settings: FinetuneSettings,
    model: HymbaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    examples: Examples,
    *,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """A TRL trainer with the examples encoded; its ``eval_dataset`` has those held out.

    Args:
        model: in the dtype to train in. It is changed: adapters are put into it.
        template: the chat template for training.

    Raises:
        SettingsError: ``data.loss`` that the examples or the template do not go with, or an unknown target module.
        DataError: no example has a token left to learn within ``data.max_length``.
    """
    # A copy: what is saved with the model has the template for use, and the padding side that it came with.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    pad_ids = model.config.pad_token_id, model.generation_config.pad_token_id
    model.set_activation_checkpointing(settings.run.checkpointing)
    common: dict[str, Any] = {
        "train_dataset": examples.train,
        "eval_dataset": examples.held_out if len(examples.held_out) else None,
        "processing_class": tokenizer,
        "peft_config": adapter_config(settings, model),
        "callbacks": callbacks,
    }
    make = _sft if settings.method.name == "sft" else _dpo
    try:
        trainer = make(settings, model, examples, output, common)
    except StopIteration as error:
        raise _nothing_left(settings, examples) from error
    if not len(trainer.train_dataset):
        raise _nothing_left(settings, examples)
    # TRL sets them to what it pads with, which is no matter of the checkpoint's.
    model.config.pad_token_id, model.generation_config.pad_token_id = pad_ids
    # Progress and reports are callbacks of ours; transformers' printer would show every entry twice.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _nothing_left(settings: FinetuneSettings, examples: Examples) -> DataError:
    return DataError(
        f"data.max_length = {settings.data.max_length}: none of the {len(examples.train)} examples has a token to "
        "learn within it; give a larger one"
    )


def _sft(
    settings: FinetuneSettings, model: HymbaForCausalLM, examples: Examples, output: Path, common: dict[str, Any]
) -> Any:
    from trl import SFTConfig, SFTTrainer

    class Trainer(_Silent, SFTTrainer, _Finetuner):
        def __init__(self, **arguments: Any) -> None:
            self._record(settings, output)
            arguments["callbacks"] = [self.meter, *arguments["callbacks"]]
            super().__init__(**arguments)

    data = settings.data
    answers = data.loss != "all" and examples.form != TEXT
    if data.loss == "answers" and examples.form == TEXT:
        raise SettingsError("data.loss = 'answers': the examples are texts without answers; allowed: auto, all")
    if answers and examples.form == MESSAGES:
        common["processing_class"].chat_template = _marked(common["processing_class"])
    arguments = SFTConfig(
        **_arguments(settings, output),
        packing=data.packing != "none",
        packing_strategy="bfd" if data.packing == "none" else data.packing,
        eval_packing=False,
        completion_only_loss=answers and examples.form != MESSAGES,
        assistant_only_loss=answers and examples.form == MESSAGES,
    )
    with _quiet():
        return Trainer(model=model, args=arguments, **common)


def _marked(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template if it marks answers, or what TRL knows in its place.

    Raises:
        SettingsError: it has no markers, and TRL does not know it.
    """
    from trl.chat_template_utils import get_training_chat_template

    template = tokenizer.chat_template
    if has_markers(template):
        return template
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise SettingsError(
            "data.chat_template: the template does not mark what the assistant says with {% generation %}, as "
            "data.loss: answers needs; give one that does, use data.chat_template=released, or data.loss=all"
        ) from error
    assert isinstance(found, str)
    return found


class _quiet(logging.Filter):
    """Leaves out TRL's warning that end-of-turn tokens are not learned: the end of the conversation is."""

    _begins = "The chat template does not include the assistant turn's end-of-turn token"

    def filter(self, record: logging.LogRecord) -> bool:
        return self._begins not in record.getMessage()

    def __enter__(self) -> None:
        logging.getLogger("trl.trainer.sft_trainer").addFilter(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("trl.trainer.sft_trainer").removeFilter(self)


def _dpo(
    settings: FinetuneSettings, model: HymbaForCausalLM, examples: Examples, output: Path, common: dict[str, Any]
) -> Any:
    from trl import DPOConfig, DPOTrainer

    class Trainer(_Silent, DPOTrainer, _Finetuner):
        def __init__(self, **arguments: Any) -> None:
            self._record(settings, output)
            arguments["callbacks"] = [self.meter, *arguments["callbacks"]]
            super().__init__(**arguments)

    method = settings.method
    arguments = DPOConfig(
        **_arguments(settings, output),
        beta=method.beta,
        loss_type=[method.loss],
        label_smoothing=method.label_smoothing,
        precompute_ref_log_probs=method.precompute_reference,
    )
    reference = None
    if settings.adapter.kind == "none" and not method.precompute_reference:
        # The model as it is now; with an adapter the reference is the model without it.
        reference = copy.deepcopy(model).requires_grad_(False)
    return Trainer(model=model, ref_model=reference, args=arguments, **common)
