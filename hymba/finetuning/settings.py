"""Typed settings of `hymba finetune`: a YAML file and ``key=value`` overrides, as strict as those of `hymba train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hymba.adapters import target_names
from hymba.experiments.settings import (
    OptimizerSettings,
    ScheduleSettings,
    SettingsError,
    apply_override,
    check_optimisation,
    read_yaml,
    settings_from,
)
from hymba.experiments.train import check_generation
from hymba.finetuning.examples import EXAMPLES


@dataclass(frozen=True)
class MethodSettings:
    """What is minimised."""

    name: Literal["sft", "dpo"] = "sft"
    """``sft``: the likelihood of the text; ``dpo``: the likelihood of chosen answers over rejected ones."""
    beta: float = 0.1
    """``dpo``: how far the model may go from the reference; higher is less."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"] = "sigmoid"
    """``dpo``: TRL's ``loss_type``."""
    label_smoothing: float = 0.0
    """``dpo``: with ``loss: robust``, the share of pairs taken to be the wrong way round."""
    precompute_reference: bool = False
    """``dpo``: run the reference once before training and keep its likelihoods instead of a second model."""


@dataclass(frozen=True)
class ModelSettings:
    """The checkpoint to start from."""

    path: str | None = None
    """A folder in the released layout or a hub id; null: the small checkpoint inside the package."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in memory; bfloat16 needs an adapter, which itself is always float32."""


@dataclass(frozen=True)
class DataSettings:
    """The examples: conversations, prompts with completions, texts or, for DPO, prompts with two answers."""

    source: Literal["files", "datasets", "example"] = "files"
    paths: tuple[str, ...] = ()
    """``files``: .json and .jsonl files, or folders that are searched for them."""
    held_out_paths: tuple[str, ...] = ()
    """``files``: kept for measuring; without them ``held_out`` of ``paths`` is."""
    dataset: str | None = None
    """``datasets``: a hub id or local folder that ``datasets.load_dataset`` or ``load_from_disk`` takes."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    held_out_split: str | None = None
    """``datasets``: kept for measuring; without it ``held_out`` of ``dataset_split`` is."""
    example: Literal["arithmetic", "comments"] = "arithmetic"
    """``example``: which of :mod:`hymba.finetuning.examples`."""
    rows: int = 0
    """The first so many examples; 0: all."""
    held_out: float = 0.02
    """Share of the examples kept for measuring, drawn by a hash of what they say."""
    max_length: int = 1024
    """Tokens of a row; longer examples lose their end."""
    packing: Literal["none", "bfd", "bfd_split"] = "none"
    """``bfd``: several examples fill one row, each starting from the meta state; ``bfd_split`` goes on with a long one
    in another row instead of cutting it (for texts)."""
    loss: Literal["auto", "answers", "all"] = "auto"
    """What is learned: ``answers`` (the assistant's turns, completions) or ``all`` tokens. ``auto``: answers, and texts
    whole."""
    chat_template: str = "auto"
    """``auto``: the tokenizer's own or, where it has none, the released one; ``released``; or a Jinja file."""


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA or DoRA on the projections; the rest of the model stays as it is."""

    kind: Literal["none", "lora", "dora"] = "none"
    """``none``: every weight of the model is trained."""
    rank: int = 16
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    """Names of linear layers, ours (``x_proj``) or the release's (``x_proj.0``); empty: every projection."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead."""


@dataclass(frozen=True)
class RunSettings:
    """For how long it runs, on what, and where it is written."""

    output: str = "runs/finetune"
    epochs: float = 1.0
    steps: int = 0
    """Optimizer steps; 0: as ``epochs`` says."""
    batch_size: int = 8
    """Rows per device and forward pass (for DPO, pairs)."""
    gradient_accumulation: int = 1
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: autocast."""
    device: Literal["auto", "cpu"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """Of ``HymbaModel.set_activation_checkpointing``; ``full`` is TRL's default."""
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    """Steps between measurements of the held-out loss (for DPO, preference accuracy); 0: only before and after."""
    tensorboard: bool = True
    resume: Literal["auto", "never"] = "auto"

    @property
    def checkpointing(self) -> str:
        """The policy of activation checkpointing."""
        return self.activation_checkpointing


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured on held-out examples before and after."""

    rows: int = 256
    """The first so many held-out examples, for the loss or the preferences; 0: all."""
    generate: int = 0
    """The first so many are answered greedily and compared with the expected answers."""
    max_new_tokens: int = 128
    batch_size: int = 16


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerSettings):
    """AdamW, with the paper's learning rate of supervised fine-tuning (DPO: 3e-6)."""

    learning_rate: float = 5e-5
    weight_decay: float = 0.0


@dataclass(frozen=True)
class FinetuneSchedule(ScheduleSettings):
    """Cosine to zero after a short warm-up."""

    warmup: float = 0.03
    decay: float = 0.97
    floor: float = 0.0
    shape: Literal["linear", "cosine", "sqrt"] = "cosine"


@dataclass(frozen=True)
class ExportSettings:
    """The folders written at the end: a checkpoint in the released layout and, with an adapter, that alone."""

    folder: str = "final"
    """Relative to ``run.output``, or absolute."""
    adapter_folder: str = "adapter"
    merge: bool = True
    """Write the checkpoint with the adapter merged into it; without, only the adapter."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    generation: dict[str, Any] = field(default_factory=dict)
    """What ``generate`` does with the checkpoint by default, and in the measurements: fields of GenerationConfig."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything ``hymba finetune`` reads; the fields are the sections of the YAML file."""

    method: MethodSettings = field(default_factory=MethodSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    schedule: FinetuneSchedule = field(default_factory=FinetuneSchedule)
    run: RunSettings = field(default_factory=RunSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as YAML or JSON write them."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }


def load_settings(path: str | Path, overrides: Iterable[str] = ()) -> FinetuneSettings:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, values in YAML), check everything.

    Raises:
        FileNotFoundError: the file does not exist.
        SettingsError: invalid YAML, an unknown key (with the nearest name), a wrong type or value.
    """
    path = Path(path)
    raw = read_yaml(path)
    for section, values in raw.items():
        for key in values if isinstance(values, dict) else ():
            _refuse_liger(f"{section}.{key}")
    for override in overrides:
        _refuse_liger(override.partition("=")[0])
        apply_override(raw, override, FinetuneSettings)
    settings = settings_from(FinetuneSettings, raw, where=str(path))
    check_settings(settings)
    return settings


def _refuse_liger(key: str) -> None:
    if "liger" in key:
        raise SettingsError(
            f"{key}: Liger has no kernels for this architecture; leave it out: the library's own kernels are used "
            "wherever they run, and the loss never holds the logits of a whole batch"
        )


def check_settings(settings: FinetuneSettings) -> None:
    """Value limits that a type cannot say.

    Raises:
        SettingsError: names key, value and what is allowed.
    """

    def need(condition: bool, key: str, value: Any, allowed: str) -> None:
        if not condition:
            raise SettingsError(f"{key} = {value!r}: {allowed}")

    method, model, data, adapter = settings.method, settings.model, settings.data, settings.adapter
    need(method.beta > 0, "method.beta", method.beta, "expected more than 0")
    need(0 <= method.label_smoothing < 0.5, "method.label_smoothing", method.label_smoothing, "expected 0 to below 0.5")
    need(
        not method.label_smoothing or method.loss == "robust",
        "method.label_smoothing",
        method.label_smoothing,
        "is read with method.loss: robust; expected 0",
    )
    need(
        model.dtype == "float32" or adapter.kind != "none",
        "model.dtype",
        model.dtype,
        "training every weight needs 'float32' (run.precision: bfloat16 computes in bfloat16); "
        "bfloat16 is for adapters",
    )
    need(data.source != "files" or bool(data.paths), "data.paths", list(data.paths), "name at least one file or folder")
    need(data.source != "datasets" or bool(data.dataset), "data.dataset", data.dataset, "name a dataset or its folder")
    if data.source == "example":
        made = EXAMPLES[data.example].method
        need(made == method.name, "data.example", data.example, f"is for method.name: {made}, not {method.name}")
    need(0 <= data.held_out < 1, "data.held_out", data.held_out, "expected 0 <= value < 1")
    need(data.max_length >= 2, "data.max_length", data.max_length, "expected at least 2 tokens")
    need(
        data.packing == "none" or method.name == "sft",
        "data.packing",
        data.packing,
        "DPO has no packing in TRL; expected 'none'",
    )
    need(adapter.rank >= 1, "adapter.rank", adapter.rank, "expected at least 1")
    need(adapter.alpha > 0, "adapter.alpha", adapter.alpha, "expected more than 0")
    need(0 <= adapter.dropout < 1, "adapter.dropout", adapter.dropout, "expected 0 <= value < 1")
    for name in target_names(adapter.target_modules):
        need(
            name not in ("lm_head", "embed_tokens"),
            "adapter.target_modules",
            list(adapter.target_modules),
            "TRL's losses read the head's weight directly; expected projections of the layers",
        )
    _check_run(settings, need)
    check_generation(settings.export.generation)


def _check_run(settings: FinetuneSettings, need: Any) -> None:
    run, optimizer, schedule, evaluate = settings.run, settings.optimizer, settings.schedule, settings.evaluate
    need(run.epochs > 0 or run.steps > 0, "run.epochs", run.epochs, "expected more than 0")
    for name in ("batch_size", "gradient_accumulation", "log_every", "save_every", "keep_checkpoints"):
        need(getattr(run, name) >= 1, f"run.{name}", getattr(run, name), "expected at least 1")
    for name in ("steps", "threads", "seed", "evaluate_every"):
        need(getattr(run, name) >= 0, f"run.{name}", getattr(run, name), "expected 0 or more")
    for name in ("rows", "generate"):
        need(getattr(evaluate, name) >= 0, f"evaluate.{name}", getattr(evaluate, name), "expected 0 or more")
    for name in ("max_new_tokens", "batch_size"):
        need(getattr(evaluate, name) >= 1, f"evaluate.{name}", getattr(evaluate, name), "expected at least 1")
    need(settings.data.rows >= 0, "data.rows", settings.data.rows, "expected 0 or more")
    check_optimisation(optimizer, schedule, need)
    for name in ("folder", "adapter_folder"):
        value = getattr(settings.export, name)
        need(bool(value) and not value.startswith("checkpoint-"), f"export.{name}", value, "expected a folder's name")
    need(settings.export.folder != settings.export.adapter_folder, "export.adapter_folder",
         settings.export.adapter_folder, "expected another folder than export.folder")  # fmt: skip
