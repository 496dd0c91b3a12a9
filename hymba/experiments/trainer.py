"""`transformers.Trainer` with complete-or-absent checkpoints, an exact loss record, and our layout on disk."""

from __future__ import annotations

import json
import os
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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from hymba.experiments import captured, checkpoints, sharding
from hymba.experiments.callbacks import Meter
from hymba.experiments.captured import Batch, CapturedStep
from hymba.experiments.optimization import build_optimizer, build_scheduler
from hymba.experiments.packing import Rows, collate
from hymba.experiments.phases import Phase
from hymba.experiments.processes import uses_gpu
from hymba.model import HymbaForCausalLM

LOG_NAME = "log.jsonl"
_PENDING = "pending_losses.json"
_TARGETS = "num_items_in_batch"
"""transformers' name for the number of targets of an optimizer step."""


def common_arguments(run: Any, optimizer: Any, output: Path) -> dict[str, Any]:
    """What every training here tells transformers' Trainer, which reports to nobody and rotates nothing itself.

    Args:
        run, optimizer: those sections of a training's or a fine-tuning's settings.
        output: the run's folder.
    """
    on_gpu = uses_gpu(run.device)
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": run.batch_size,
        "learning_rate": optimizer.learning_rate,
        "max_grad_norm": optimizer.clip_norm,
        "bf16": run.precision == "bfloat16",
        "use_cpu": run.device == "cpu",
        "logging_steps": run.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": run.save_every,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        "dataloader_pin_memory": on_gpu,
        # The next rows are made while the device is at work on these.
        "accelerator_config": {"non_blocking": on_gpu},
        "ddp_find_unused_parameters": False,
    }


def training_arguments(phase: Phase, output: Path) -> TrainingArguments:
    """The part of the settings that transformers' Trainer reads."""
    settings, run = phase.settings, phase.settings.run
    # accelerate launch leaves an answer of its own here, and the settings are the only ones asked.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if run.precision == "bfloat16" else "no"
    return TrainingArguments(
        **common_arguments(run, settings.optimizer, output),
        max_steps=phase.end,
        gradient_accumulation_steps=phase.accumulation,
        remove_unused_columns=False,
        label_names=["labels"],
    )


class RecordedTrainer(Trainer):
    """What every trainer here adds to transformers': complete-or-absent checkpoints, an exact record of the losses.

    A checkpoint is a folder in the released layout (fp32) with the states of optimizer, schedule and random
    generators. It appears under its name only when all of it is on the disk. ``log.jsonl`` in the output folder holds
    one JSON object per log entry; the mean losses in it do not depend on where a run was interrupted. Nothing in a
    checkpoint depends on the number of processes or on how they share the work.
    """

    # Trainer's own attributes, whose types are out of a type checker's sight.
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    control: TrainerControl
    _timed_from = 0
    _sharded: sharding.Sharded | None = None

    def _record(self, settings: Any, output: Path) -> None:
        """Called before ``Trainer`` is initialised. settings: with ``optimizer``, ``schedule`` and ``run`` sections."""
        self.settings, self.output, self.meter = settings, output, Meter()
        # The loss of each step since the last log entry; the last one grows while its step is not done.
        self._pending: list[Tensor] = []
        self._open = False

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
        loss = self._forward_and_backward(*args, **kwargs)
        # Kept as tensors: reading them here would make an accelerator wait at every step.
        part = loss.detach().float()
        if self._open:
            self._pending[-1] = self._pending[-1] + part
        else:
            self._pending.append(part)
        self._open = not self.accelerator.sync_gradients
        return loss

    def _forward_and_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)

    def _step_losses(self) -> Tensor:
        """(steps,) float32 on the CPU: the loss of each step since the last log entry, the mean over all processes."""
        losses = torch.stack([loss.to(self.args.device) for loss in self._pending])
        if self.args.world_size > 1:
            losses = self.accelerator.gather(losses[None]).mean(dim=0)
        return losses.cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record an entry: the exact mean loss since the last one, tokens/s, and whatever else ``logs`` holds."""
        if "train_runtime" in logs:
            # Trainer's closing summary: it repeats the entries and counts only this process' steps.
            return
        if "loss" in logs:
            losses = self._step_losses()
            self._pending = []
            logs["loss"] = float(losses.sum()) / len(losses)
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
        path = checkpoint / _PENDING
        if path.is_file():
            self._pending = [torch.tensor(loss) for loss in json.loads(path.read_text(encoding="utf-8"))]

    # Checkpoints.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write everything under a temporary name, then rename; then delete the checkpoints beyond those kept."""
        main = self.is_world_process_zero()
        target = self.output / f"checkpoint-{self.state.global_step}"
        if checkpoints.is_complete(target):
            return
        with self.meter.paused():
            self._write_checkpoint(target, main)

    def _write_checkpoint(self, target: Path, main: bool) -> None:
        weights = None if self._sharded is None else sharding.model_state(self.model, keep=main)
        optimizer = sharding.optimizer_state(self.model, self._own_optimizer, keep=main)
        losses = self._step_losses().tolist() if self._pending else []
        with checkpoints.written_folder(target, main=main, wait=self.accelerator.wait_for_everyone) as folder:
            if main:
                self._save(str(folder), state_dict=weights)
                torch.save(optimizer, folder / OPTIMIZER_NAME)
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
                (folder / _PENDING).write_text(json.dumps(losses), encoding="utf-8")
                self.state.stateful_callbacks["TrainerControl"] = self.control.state()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._save_rng_state(str(folder))
        if main:
            checkpoints.rotate(self.output, self.settings.run.keep_checkpoints)

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        assert self.optimizer is not None
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        # Mapped: each process reads its share, and the machine holds the file once.
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        sharding.load_optimizer_state(self.model, self._own_optimizer, saved)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and configuration in the released layout, the tokenizer if there is one; no pickled arguments."""
        folder = str(self.output) if output_dir is None else output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


class HymbaTrainer(RecordedTrainer):
    """Trains on the :class:`Rows` of a phase, whose order is the order of training."""

    def __init__(
        self,
        model: HymbaForCausalLM,
        phase: Phase,
        rows: Rows,
        *,
        output: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        settings, self.phase = phase.settings, phase
        self._record(settings, output)
        self._captures = settings.run.cuda_graph and captured.available(settings.run.device)
        self._captured: CapturedStep | None = None
        # A compiler decides by itself what backward makes again, short of whole layers.
        chosen = settings.run.checkpointing
        model.set_activation_checkpointing("none" if settings.run.compile and chosen == "selective" else chosen)
        model.freeze_unused_parameters()
        # The logits of a batch are most of a step's peak, and nothing here reads them.
        model.use_fused_loss(uses_gpu(settings.run.device))
        super().__init__(
            model=model,
            args=training_arguments(phase, output),
            train_dataset=rows,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[self.meter, *callbacks],
        )
        # Progress and reports are callbacks of ours; transformers' printer would show every entry twice.
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            # Before the optimizer is made of the parameters, which sharding replaces.
            self._distribute()
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        # Over the whole run, of which the phase that Trainer knows is a part.
        return super().create_scheduler(self.settings.run.steps, optimizer)

    def _forward_and_backward(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not self._captures:
            return super()._forward_and_backward(model, inputs, num_items_in_batch)
        plain = super()._forward_and_backward

        def step(batch: Batch) -> Tensor:
            inputs = dict(batch)
            return plain(model, inputs, inputs.pop(_TARGETS, None))

        if self._captured is None:
            accumulates = self.phase.accumulation > 1
            self._captured = CapturedStep(step, self.model.parameters(), accumulates=accumulates)
        batch = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:
            batch |= {_TARGETS: torch.as_tensor(num_items_in_batch, device=self.args.device)}
        return self._captured(batch)

    def _distribute(self) -> None:
        run = self.settings.run
        if run.compile:
            for layer in self.model.model.layers:
                # What stands around a layer (hooks of sharding, checkpointing) stays as it is.
                layer.forward = torch.compile(layer.forward)
        if run.distributed == "fsdp2" and self.args.world_size > 1:
            autocast = torch.bfloat16 if run.precision == "bfloat16" else None
            device = torch.device(self.args.device.type)
            self._sharded = sharding.shard(self.model, device, autocast=autocast, reshard=run.reshard)

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, dataloader: Any = None) -> torch.nn.Module:
        """Another object than the model is taken for wrapped already, and not given to DDP."""
        return self._sharded or super()._wrap_model(model, training, dataloader)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        if self._sharded is None:
            return super()._clip_grad_norm(model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        full = getattr(norm, "full_tensor", None)
        return norm if full is None else full()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(rows, Rows)
        return SequentialSampler(rows)

    def tokens_since(self, step: int) -> int:
        return (self.state.global_step - step) * self.phase.tokens_per_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Read weights back through the released names; Trainer would take the file's names for the model's."""
        saved = HymbaForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        (self.model if model is None else model).load_state_dict(saved.state_dict())


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
