"""`transformers.Trainer` with complete-or-absent checkpoints, an exact loss record, and our layout on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from hymba.experiments import checkpoints
from hymba.experiments.callbacks import Meter
from hymba.experiments.optimization import build_optimizer, build_scheduler
from hymba.experiments.packing import Rows, collate
from hymba.experiments.settings import TrainSettings
from hymba.model import HymbaForCausalLM

LOG_NAME = "log.jsonl"
_PENDING = "pending_losses_{process}.json"


def training_arguments(settings: TrainSettings, output: Path) -> TrainingArguments:
    """The part of the settings that transformers' Trainer reads. It reports to nobody and rotates nothing itself."""
    run = settings.run
    return TrainingArguments(
        output_dir=str(output),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=settings.optimizer.learning_rate,
        max_grad_norm=settings.optimizer.clip_norm,
        bf16=run.precision == "bfloat16",
        use_cpu=run.device == "cpu",
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=run.save_every,
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and run.device != "cpu",
        label_names=["labels"],
        ddp_find_unused_parameters=False,
    )


class RecordedTrainer(Trainer):
    """What every trainer here adds to transformers': complete-or-absent checkpoints, an exact record of the losses.

    A checkpoint is a folder in the released layout (fp32) with the states of optimizer, schedule and random
    generators. It appears under its name only when all of it is on the disk. ``log.jsonl`` in the output folder holds
    one JSON object per log entry; the mean losses in it do not depend on where a run was interrupted.
    """

    # Trainer's own attributes, whose types are out of a type checker's sight.
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    control: TrainerControl
    _timed_from = 0

    def _record(self, settings: Any, output: Path) -> None:
        """Called before ``Trainer`` is initialised. settings: with ``optimizer``, ``schedule`` and ``run`` sections."""
        self.settings, self.output, self.meter = settings, output, Meter()
        self._pending: list[Tensor] = []

    def resume(self, checkpoint: Path | None) -> None:
        """Train from a complete checkpoint, or from the start."""
        truncate_log(self.output / LOG_NAME, 0 if checkpoint is None else checkpoints.checkpoint_step(checkpoint))
        if checkpoint is not None:
            self._read_pending(checkpoint)
        with checkpoints.write_failures(self.output):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.settings.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = build_scheduler(optimizer, self.settings.schedule, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # The loss record.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # Kept as tensors: reading them here would make an accelerator wait at every step.
        self._pending.append(loss.detach().float())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record an entry: the exact mean loss since the last one, tokens/s, and whatever else ``logs`` holds."""
        if "train_runtime" in logs:
            # Trainer's closing summary: it repeats the entries and counts only this process' steps.
            return
        if "loss" in logs:
            losses, self._pending = self._pending, []
            total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
            if self.args.world_size > 1:
                total = self.accelerator.gather(total).mean()
            steps = len(losses) / self.args.gradient_accumulation_steps
            logs["loss"] = float(total) / steps
            seconds = self.meter.take()
            tokens = self.tokens_since(self._timed_from)
            if seconds > 0 and tokens is not None:
                logs["tokens_per_second"] = tokens / seconds
            self._timed_from = self.state.global_step
        entry = {"step": self.state.global_step, **logs}
        self.state.log_history.append(entry)
        if self.is_world_process_zero():
            with (self.output / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        due = self.control.should_log
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if "loss" not in logs:
            # The handler takes any entry for the periodic one, which would then be left out.
            self.control.should_log = due

    def tokens_since(self, step: int) -> int | None:
        """Tokens of the steps after ``step``, over all devices; None where nobody counts them."""
        return None

    def _read_pending(self, checkpoint: Path) -> None:
        """Losses of steps after the last log entry before the checkpoint: they belong to the next entry's mean."""
        step = checkpoints.checkpoint_step(checkpoint)
        self._timed_from = 0 if step is None else step
        path = checkpoint / _PENDING.format(process=self.args.process_index)
        if path.is_file():
            self._pending = [torch.tensor(loss) for loss in json.loads(path.read_text(encoding="utf-8"))]

    # Checkpoints.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write everything under a temporary name, then rename; then delete the checkpoints beyond those kept."""
        main = self.is_world_process_zero()
        target = self.output / f"checkpoint-{self.state.global_step}"
        if checkpoints.is_complete(target):
            return
        with checkpoints.written_folder(target, main=main, wait=self.accelerator.wait_for_everyone) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            losses = json.dumps([float(loss) for loss in self._pending])
            (folder / _PENDING.format(process=self.args.process_index)).write_text(losses, encoding="utf-8")
            if main:
                self.state.stateful_callbacks["TrainerControl"] = self.control.state()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if main:
            checkpoints.rotate(self.output, self.settings.run.keep_checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and configuration in the released layout, the tokenizer if there is one; no pickled arguments."""
        folder = str(self.output) if output_dir is None else output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


class HymbaTrainer(RecordedTrainer):
    """Trains on :class:`Rows`, whose order is the order of training."""

    def __init__(
        self,
        model: HymbaForCausalLM,
        settings: TrainSettings,
        rows: Rows,
        *,
        output: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._record(settings, output)
        self._row_length = rows.length
        model.set_activation_checkpointing(settings.run.checkpointing)
        # The logits of a batch are most of a step's peak, and nothing here reads them.
        model.use_fused_loss(settings.run.device != "cpu" and torch.cuda.is_available())
        super().__init__(
            model=model,
            args=training_arguments(settings, output),
            train_dataset=rows,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[self.meter, *callbacks],
        )
        # Progress and reports are callbacks of ours; transformers' printer would show every entry twice.
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(rows, Rows)
        return SequentialSampler(rows)

    def tokens_since(self, step: int) -> int:
        return (self.state.global_step - step) * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all devices."""
        run = self.settings.run
        return run.batch_size * run.gradient_accumulation * self.args.world_size * self._row_length

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Read weights back through the released names; Trainer would take the file's names for the model's."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # pragma: gpu
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.model if model is None else model
        saved = HymbaForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        target.load_state_dict(saved.state_dict())


def truncate_log(path: Path, step: int | None) -> None:
    """Drop log entries beyond ``step``: the run is about to make them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= (step or 0):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            # A process killed while writing leaves half a line, which is beyond any checkpoint.
            break
    checkpoints.write_text(path, "".join(line + "\n" for line in kept))
