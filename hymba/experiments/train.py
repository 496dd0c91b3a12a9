"""``hymba train``: from a settings file to a checkpoint folder in the released layout.

The output folder holds ``settings.yaml``, ``plan.json``, ``corpus.json``, ``tokenizer/``, ``log.jsonl``,
``tensorboard/``, ``checkpoint-<step>/`` and, at the end, the exported folder. A run on a synthetic task (``data.task``)
has neither corpus nor tokenizer; it ends with ``results.json``, the task's measurement on held-out rows. Running the
same command again goes on from the last complete checkpoint, on the same or another number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

# From the package, not from its modules: that registers the released names, by which checkpoints are saved.
from hymba import HymbaConfig, HymbaForCausalLM
from hymba.config import nearest
from hymba.experiments import checkpoints
from hymba.experiments.bits import Bits, bits_per_byte
from hymba.experiments.callbacks import HeldOut, Progress, StopOnSignal, TensorBoard
from hymba.experiments.material import Material, gather, held_out_measure
from hymba.experiments.phases import PLAN_NAME, Phase, check_plan, digest, plan_phases, write_plan
from hymba.experiments.processes import first_decides, is_first, together, uses_gpu, wait, world_size
from hymba.experiments.resuming import DEALT, FREE, find_resume_point
from hymba.experiments.settings import SettingsError, TrainSettings, load_settings
from hymba.experiments.tasks import Task
from hymba.experiments.trainer import HymbaTrainer
from hymba.experiments.versions import versions_of
from hymba.memory import MemoryBytes, check_fits, training_bytes

RECORD_NAME = "training.json"
RESULTS_NAME = "results.json"
DAMAGED = "damaged checkpoint: "
"""Starts the line that is printed for a checkpoint which cannot be resumed from."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: ``finished``, or ``interrupted`` by a signal after saving ``checkpoint``."""

    status: str
    step: int
    output: Path
    checkpoint: Path | None
    exported: Path | None
    bits_per_byte: float | None
    parameters: int
    passes: float
    """Over the corpus; 0 for a task, whose rows are all new."""
    rows: str
    """Hash of the rows and their order (:func:`hymba.experiments.phases.digest`)."""
    results: dict[str, Any] | None = None
    """Of a finished run on a task: what its ``evaluate`` returned."""


def main(config_path: str | Path, overrides: Iterable[str] = ()) -> TrainResult:
    """Run or resume a training described by a YAML file and ``key=value`` overrides.

    Started by torchrun or accelerate, all processes train together; the first one writes.

    Returns:
        A :class:`TrainResult`. After Ctrl-C its status is ``interrupted`` and the same command resumes.

    Raises:
        SettingsError, hymba.config.ConfigError: the settings; raised before anything is written.
        CorpusError: the corpus is missing, empty or not text.
        hymba.memory.MemoryEstimateError: a step that will not fit on the GPU.
        hymba.experiments.ablation.plan.AblationError: another process is at work in the output folder.
        OutputError: the output folder cannot take the run's files; complete checkpoints survive.
    """
    settings = load_settings(config_path, overrides)
    if settings.run.init_from is None:
        HymbaConfig(**settings.model)
    check_generation(settings.export.generation)
    phases = plan_phases(settings, world_size())
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    torch.manual_seed(settings.run.seed)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as scope:
        scope.enter_context(together(cpu=not uses_gpu(settings.run.device)))
        return _run(settings, phases, scope)


def _run(settings: TrainSettings, phases: list[Phase], scope: contextlib.ExitStack) -> TrainResult:
    # Ablations know trainings, so an import at the top would go in a circle.
    from hymba.experiments.ablation.lock import Locks

    output = Path(settings.run.output).expanduser()
    say: Callable[[str], None] = print if is_first() else _silent

    def begin() -> Path | None:
        locks = Locks([lock_of(output)], advice=" or choose another run.output")
        if not output.parent.is_dir():
            checkpoints.check_output(output, needed=0)
        for line in scope.enter_context(locks).stale:
            say(line)
        checkpoints.check_output(output, needed=0)
        checkpoints.clear_leftovers(output)
        planned = (output / PLAN_NAME).is_file()
        found = find_resume_point(settings, output, free=FREE | DEALT if planned else FREE)
        if found is not None:
            check_plan(phases, output, world_size())
        for line in checkpoints.discard_damaged(output):
            say(f"{DAMAGED}{line}; going on from {found.name if found else 'the start'}")
        return found

    checkpoint = first_decides(begin)
    material = gather(settings, phases, checkpoint=checkpoint, output=output, say=say)
    model: HymbaForCausalLM | None = build_model(settings, material.tokenizer, material.task)
    assert model is not None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained_on = sum(phase.steps * phase.tokens_per_step for phase in phases)
    say(f"model: {parameters:,} parameters; {settings.run.steps:,} steps, {trained_on:,} tokens, {material.described}")
    for phase in phases:
        check_phase(phase, model)
        check_device(phase.settings, model, phase.length)
    describe(phases, say)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    else:
        first_decides(lambda: prepare_output(settings, phases, output, material, parameters))

    step = 0 if checkpoint is None else checkpoints.checkpoint_step(checkpoint) or 0
    stop = StopOnSignal()
    with stop:
        for i, phase in enumerate(phases):
            if step >= phase.end:
                continue
            if i:
                model = build_model(phase.settings, material.tokenizer, material.task)
            assert model is not None
            step = train_phase(phase, model, material, i, output=output, checkpoint=checkpoint, stop=stop)
            # The next phase has a model and moments of its own.
            model = None
            gc.collect()
            if step < phase.end or stop.agreed():
                break
            checkpoint = output / f"checkpoint-{step}"
    wait()
    saved = checkpoints.complete_checkpoints(output)
    last = saved[-1] if saved else None
    common: dict[str, Any] = {
        "step": step, "output": output, "checkpoint": last, "parameters": parameters, "passes": material.passes,
        "rows": digest(material.rows),
    }  # fmt: skip
    if step < settings.run.steps:
        say(f"stopped at step {step}; saved {last}; the same command goes on from there")
        return TrainResult("interrupted", exported=None, bits_per_byte=None, **common)
    exported = output / settings.export.folder
    bits: float | None = None
    results: dict[str, Any] | None = None
    if is_first():
        assert last is not None
        measured = export(phases[-1].settings, settings, material, last, exported)
        shown = ""
        if isinstance(measured, Bits):
            bits = measured.per_byte
            shown = f"; held-out bits per byte: {bits:.4f}"
        elif measured is not None:
            results = measured
            shown = f"; held-out accuracy: {results['accuracy']:.4f}"
            record = {
                "task": phases[-1].settings.data.task,
                "seed": settings.run.seed,
                "step": step,
                "results": results,
            }
            with checkpoints.write_failures(output):
                checkpoints.write_text(output / RESULTS_NAME, json.dumps(record, indent=1) + "\n")
        say(f"exported: {exported}{shown}")
    return TrainResult("finished", exported=exported, bits_per_byte=bits, results=results, **common)


def lock_of(output: Path) -> Path:
    """The lock of a run: beside its folder, so that a refused run leaves nothing in it."""
    return output.with_name(f"{output.name}.lock")


def train_phase(
    phase: Phase,
    model: HymbaForCausalLM,
    material: Material,
    number: int,
    *,
    output: Path,
    checkpoint: Path | None,
    stop: StopOnSignal,
) -> int:
    """Train to the end of a phase, or until a signal; returns the step that was reached, which is saved."""
    run = phase.settings.run
    trainer = HymbaTrainer(
        model,
        phase,
        material.rows[number],
        output=output,
        tokenizer=material.tokenizer,
        callbacks=[Progress(run.steps), stop],
    )
    if run.tensorboard:
        trainer.add_callback(TensorBoard(output / "tensorboard"))
    if run.evaluate_every:
        measured_by = held_out_measure(phase.settings, material, trainer.model)
        if measured_by is not None:
            name, measure = measured_by
            trainer.add_callback(
                HeldOut(run.evaluate_every, trainer.meter.paused()(measure), trainer.log, name, run.steps)
            )
    trainer.resume(checkpoint)
    step: int = trainer.state.global_step
    trainer.accelerator.free_memory()
    return step


def describe(phases: list[Phase], say: Callable[[str], None]) -> None:
    """A line on how a step is dealt out, where that is not plain, and one for each phase of several."""
    world = world_size()
    for phase in phases if len(phases) > 1 or world > 1 else ():
        run = phase.settings.run
        mix = ", ".join(f"{name} {weight:g}" for name, weight in phase.weights.items() if weight)
        name = f"phase {phase.name}: steps {phase.start + 1} to {phase.end}; " if len(phases) > 1 else ""
        shared = f"{world} processes ({run.distributed}) x " if world > 1 else ""
        made_of = f"{shared}{run.batch_size} rows x {phase.length:,} tokens x {phase.accumulation} passes"
        say(f"{name}{phase.tokens_per_step:,} tokens per step = {made_of}{f'; {mix}' if mix else ''}")


def build_model(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None, task: Task | None = None
) -> HymbaForCausalLM:
    """A model in fp32: new from ``settings.model``, or from ``run.init_from``; its vocabulary is the tokenizer's or,
    for a task, the task's.

    Raises:
        SettingsError: a vocabulary smaller than that.
        hymba.config.ConfigError: an unknown or impossible ``model`` field.
    """
    fields = dict(settings.model)
    if task is None:
        assert tokenizer is not None
        needed, owner = len(tokenizer), "tokenizer"
    else:
        needed, owner = task.vocab_size, f"task {task.name}"
    if settings.run.init_from is not None:
        model = HymbaForCausalLM.from_pretrained(settings.run.init_from, dtype=torch.float32, **fields)
    else:
        fields.setdefault("vocab_size", needed)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, None if tokenizer is None else getattr(tokenizer, name))
        model = HymbaForCausalLM(HymbaConfig(**fields))
    if model.config.vocab_size < needed:
        raise SettingsError(
            f"model.vocab_size = {model.config.vocab_size}: the {owner} has {needed} tokens; "
            "leave model.vocab_size out or set it to at least that"
        )
    model.config.use_cache = True
    return model.float()


def check_phase(phase: Phase, model: HymbaForCausalLM) -> None:
    """Refuse model fields of a phase that make other tensors than the run's.

    Raises:
        SettingsError: names the first tensor that differs.
        hymba.config.ConfigError: an unknown or impossible field.
    """
    if phase.start == 0:
        return
    with torch.device("meta"):
        fields = {"vocab_size": model.config.vocab_size, **phase.settings.model}
        init_from = phase.settings.run.init_from
        config = HymbaConfig(**fields) if init_from is None else HymbaConfig.from_pretrained(init_from, **fields)
        own = {name: tensor.shape for name, tensor in HymbaForCausalLM(config).state_dict().items()}
    for name, tensor in model.state_dict().items():
        if own.pop(name, None) != tensor.shape:
            own = {name: tensor.shape}
            break
    if own:
        raise SettingsError(
            f"phase {phase.name!r}: its model has other tensors than the run's, such as {next(iter(own))}; allowed in "
            "a phase: fields that change no tensor, such as max_position_embeddings and rope_type"
        )


def check_device(settings: TrainSettings, model: HymbaForCausalLM, length: int | None = None) -> None:
    """Refuse a run that its GPU cannot do, before anything is written or allocated there.

    Args:
        length: tokens of a row; ``data.sequence_length`` by default.

    Raises:
        SettingsError: bfloat16 on a GPU without it.
        hymba.memory.MemoryEstimateError: a step that will not fit.
    """
    run = settings.run
    if not uses_gpu(run.device):
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    capability = torch.cuda.get_device_capability(device)
    if run.precision == "bfloat16" and capability < (8, 0):
        raise SettingsError(
            f"run.precision = 'bfloat16': {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}) has none; allowed there: 'float32'"
        )

    def need(batch: int, length: int) -> MemoryBytes:
        return training_bytes(
            model.config,
            batch=batch,
            length=length,
            compute_dtype=run.precision,
            checkpointing=run.checkpointing,
            fused_loss=True,
            shards=world_size() if run.distributed == "fsdp2" else 1,
        )

    length = length or settings.data.sequence_length
    advice = "" if run.checkpointing == "full" else "run.activation_checkpointing=full takes less"
    check_fits("a training step", need, batch=run.batch_size, length=length, device=device, advice=advice)


def check_generation(fields: dict[str, Any]) -> None:
    """Refuse what transformers' GenerationConfig does not have, which would go into the file unread.

    Raises:
        SettingsError: an unknown field (with the nearest name), or a value that GenerationConfig refuses.
    """
    known = GenerationConfig().to_dict()
    for name in fields:
        if name not in known:
            raise SettingsError(f"export.generation: unknown field {name!r}.{nearest(name, known)}")
    try:
        GenerationConfig(**fields).validate()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"export.generation = {fields!r}: {error}") from error


def prepare_output(
    settings: TrainSettings, phases: list[Phase], output: Path, material: Material, parameters: int
) -> None:
    """Check the space that the run will need, and write down what it is made from."""
    # Weights and two optimizer moments in fp32, for the checkpoints kept and the one being written; the export.
    needed = parameters * 12 * (settings.run.keep_checkpoints + 1) + parameters * 4 + (8 << 20)
    checkpoints.check_output(output, needed)
    with checkpoints.write_failures(output):
        checkpoints.write_text(output / "settings.yaml", yaml.safe_dump(settings.to_dict(), sort_keys=False))
        write_plan(phases, output)
        if material.corpus is not None:
            checkpoints.write_text(output / "corpus.json", json.dumps(material.corpus.record(), indent=1) + "\n")
        if material.tokenizer is not None:
            with checkpoints.written_folder(output / "tokenizer", sealed=False) as folder:
                material.tokenizer.save_pretrained(str(folder))


def export(
    last: TrainSettings, settings: TrainSettings, material: Material, checkpoint: Path, folder: Path
) -> Bits | dict[str, Any] | None:
    """Write the checkpoint's weights in ``export.dtype`` with tokenizer and record; measure what was written.

    ``last``: the settings of the last phase, whose context is measured.

    The measurement runs the exported (rounded) weights in fp32 over every held-out document, or is what the task's
    ``evaluate`` returns.
    """
    corpus, tokenizer, task = material.corpus, material.tokenizer, material.task
    dtype = getattr(torch, settings.export.dtype)
    measured: Bits | dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None
    with checkpoints.written_folder(folder, sealed=False) as staging:
        trained = HymbaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        trained.generation_config.update(**settings.export.generation)
        trained.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        if settings.export.evaluate and (task is not None or (corpus is not None and corpus.held_out)):
            model = HymbaForCausalLM.from_pretrained(staging, dtype=torch.float32)
            if task is not None:
                measured = held_out = task.evaluate(model.to("cuda" if uses_gpu(settings.run.device) else "cpu"))
            else:
                assert corpus is not None and tokenizer is not None
                context = last.data.sequence_length
                measured = bits_per_byte(model, tokenizer, corpus.held_out, context=context)
                held_out = {**asdict(measured), "bits_per_byte": measured.per_byte}
        record = {
            "settings": settings.to_dict(),
            "held_out": held_out,
            "versions": versions_of("hymba", "torch", "transformers", "tokenizers"),
            "corpus": None if corpus is None else corpus.record(),
        }
        (staging / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return measured


def _silent(*_: object) -> None:
    """Stands for print in all processes but the first."""
