"""``hymba finetune``: from a settings file to an adapter and a checkpoint folder in the released layout.

The output folder holds ``settings.yaml``, ``data.json``, ``before.json`` (the measurements of the model as it was),
``log.jsonl``, ``tensorboard/``, ``checkpoint-<step>/`` and, at the end, the adapter's folder, the exported checkpoint
and ``results.json``. Running the same command again goes on from the last complete checkpoint.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

# From the package, not from its modules: that registers the released names, by which checkpoints are saved.
from hymba import HymbaConfig, HymbaForCausalLM, quantization
from hymba.experiments import checkpoints
from hymba.experiments.ablation.lock import Locks
from hymba.experiments.callbacks import HeldOut, Progress, StopOnSignal, TensorBoard
from hymba.experiments.processes import uses_gpu
from hymba.experiments.settings import SettingsError
from hymba.experiments.train import DAMAGED, RESULTS_NAME, find_resume_point
from hymba.experiments.versions import versions_of
from hymba.finetuning import measure
from hymba.finetuning.data import Examples, load_examples
from hymba.finetuning.merge import merge_adapter, write_checkpoint
from hymba.finetuning.settings import FinetuneSettings, load_settings
from hymba.finetuning.templates import choose_templates
from hymba.finetuning.trainers import build_trainer

BEFORE_NAME, DATA_NAME, LOCK_NAME = "before.json", "data.json", "lock.json"
# Settings that a resumed run may change, because no loss depends on them; those of `export` are free as well.
_FREE_ON_RESUME = frozenset(
    "run.output run.threads run.log_every run.save_every run.keep_checkpoints run.evaluate_every run.tensorboard "
    "run.resume run.activation_checkpointing evaluate.batch_size".split()
)
_SHOWN = {
    "loss": ("loss", ".4f"),
    "token_accuracy": ("token accuracy", ".3f"),
    "preference_accuracy": ("preferred the chosen answer", ".3f"),
    "reward_accuracy": ("reward accuracy", ".3f"),
    "reward_margin": ("reward margin", ".3f"),
    "exact_answers": ("exact answers", ".3f"),
    "chosen_answers": ("answers like the chosen one", ".3f"),
}


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended: ``finished``, or ``interrupted`` by a signal after saving ``checkpoint``.

    Attributes:
        exported: the checkpoint folder; None with ``export.merge: false`` and an adapter.
        adapter: the adapter's folder, if there is one.
        before, after: measurements on held-out examples.
    """

    status: str
    step: int
    output: Path
    checkpoint: Path | None
    exported: Path | None
    adapter: Path | None
    before: dict[str, float]
    after: dict[str, float]
    trained: int
    """Parameters that were trained."""


def require_packages() -> None:
    """Refuse to start without TRL, PEFT and datasets.

    Raises:
        ImportError: names those missing and what installs them.
    """
    missing = [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]
    if missing:
        raise ImportError(f"fine-tuning needs {', '.join(missing)}: pip install 'hymba[finetune]'")


def main(config_path: str | Path, overrides: Iterable[str] = ()) -> FinetuneResult:
    """Run or resume the fine-tuning described by a YAML file and ``key=value`` overrides.

    Returns:
        A :class:`FinetuneResult`. After Ctrl-C its status is ``interrupted`` and the same command resumes.

    Raises:
        SettingsError: the settings, or an output folder with another run; raised before anything is written.
        DataError: the examples.
        ImportError: TRL, PEFT or datasets is missing.
        hymba.experiments.ablation.plan.AblationError: another process is at work in the output folder.
        OutputError: the output folder cannot take the run's files; complete checkpoints survive.
    """
    settings = load_settings(config_path, overrides)
    require_packages()
    import datasets

    output = Path(settings.run.output).expanduser()
    first = int(os.environ.get("RANK", "0")) == 0
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    torch.manual_seed(settings.run.seed)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    say: Callable[..., None] = print if first else _silent
    if first:
        checkpoints.check_output(output, needed=0)
    lock: AbstractContextManager[Any] = (
        Locks([output / LOCK_NAME], advice=" or choose another run.output") if first else nullcontext()
    )
    with lock, warnings.catch_warnings():
        # Of names that transformers and TRL will drop, which is their affair.
        warnings.simplefilter("ignore", FutureWarning)
        return _run(settings, output, first, say)


def _run(settings: FinetuneSettings, output: Path, first: bool, say: Callable[..., None]) -> FinetuneResult:
    if first:
        checkpoints.clear_leftovers(output)
    checkpoint = find_resume_point(settings, output, free=_FREE_ON_RESUME)
    for line in checkpoints.discard_damaged(output) if first else ():
        say(f"{DAMAGED}{line}; going on from {checkpoint.name if checkpoint else 'the start'}")
    examples = load_examples(settings.data, settings.method.name)
    record = {"sha256": examples.digest(), "train": len(examples.train), "held_out": len(examples.held_out)}
    if checkpoint is not None:
        check_data(record, output)
    say(
        f"data: {examples.description}: {len(examples.train):,} to train on, {len(examples.held_out):,} held out "
        f"({examples.form})"
    )
    model, tokenizer = load_start(settings)
    template, training = choose_templates(tokenizer, settings.data.chat_template)
    if examples.conversational or tokenizer.chat_template is not None:
        tokenizer.chat_template = template
    check_precision(settings, model)
    asked = measure.questions(examples, tokenizer, count=settings.evaluate.generate)
    stop = StopOnSignal()
    trainer = build_trainer(settings, model, tokenizer, training, examples, output=output, callbacks=[Progress(), stop])
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(
        f"model: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, {trained:,} of them trained; "
        f"{len(trainer.train_dataset):,} rows"
    )
    measurer = Measurer(settings, trainer, tokenizer, asked)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    elif first:
        checkpoints.check_output(output, needed=_needed_bytes(settings, model, trained))
        with checkpoints.write_failures(output):
            checkpoints.write_text(output / "settings.yaml", yaml.safe_dump(settings.to_dict(), sort_keys=False))
            checkpoints.write_text(output / DATA_NAME, json.dumps(record, indent=1) + "\n")
    before = _before(measurer, output, first, fresh=checkpoint is None)
    if settings.run.tensorboard:
        trainer.add_callback(TensorBoard(output / "tensorboard"))
    if settings.run.evaluate_every and trainer.eval_dataset is not None:
        name, follow = measurer.followed()
        trainer.add_callback(HeldOut(settings.run.evaluate_every, trainer.meter.paused()(follow), trainer.log, name))
    with stop:
        trainer.resume(checkpoint)
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    step, saved = trainer.state.global_step, checkpoints.complete_checkpoints(output)
    common: dict[str, Any] = {
        "step": step, "output": output, "checkpoint": saved[-1] if saved else None, "trained": trained,
        "before": before.figures,
    }  # fmt: skip
    if step < trainer.state.max_steps:
        say(f"stopped at step {step}; saved {common['checkpoint']}; the same command goes on from there")
        return FinetuneResult("interrupted", exported=None, adapter=None, after={}, **common)
    adapter = exported = None
    after: dict[str, float] = {}
    if first:
        adapter, exported = export(settings, trainer, tokenizer, common["checkpoint"], output)
        written = trainer.model
        if exported is not None:
            written = HymbaForCausalLM.from_pretrained(exported, dtype=torch.float32).to(trainer.model.device)
        after = measurer.measure(written, before.reference).figures
        _report(settings, output, step, examples, before.figures, after, len(asked), say)
        for folder, kind in ((adapter, "adapter"), (exported, "exported")):
            if folder is not None:
                say(f"{kind}: {folder}")
    return FinetuneResult("finished", exported=exported, adapter=adapter, after=after, **common)


def load_start(settings: FinetuneSettings) -> tuple[HymbaForCausalLM, PreTrainedTokenizerBase]:
    """The model to start from, in ``model.dtype``, and its tokenizer.

    Raises:
        SettingsError: a folder that is not there, has no tokenizer, or quantised weights.
    """
    name = settings.model.path or str(files("hymba") / "assets" / "default")
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise SettingsError(f"model.path = {name!r}: no such folder; give a checkpoint's folder or a hub id")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise SettingsError(
            f"model.path = {name!r}: an adapter, not a checkpoint; merge it first: hymba merge {name} --output FOLDER"
        )
    name = str(folder) if folder.is_dir() else name
    keywords = {} if settings.model.revision is None else {"revision": settings.model.revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **keywords)
    except (OSError, ValueError) as error:
        raise SettingsError(f"model.path = {name!r}: no tokenizer can be loaded from it: {error}") from error
    config = HymbaConfig.from_pretrained(name, **keywords)
    if (quantised := quantization.method(config)) is not None:
        raise SettingsError(
            f"model.path = {settings.model.path!r}: its weights are quantised ({quantised}), which are not trained "
            "here; give the checkpoint that they were made from"
        )
    dtype = getattr(torch, settings.model.dtype)
    model = HymbaForCausalLM.from_pretrained(name, config=config, dtype=dtype, **keywords)
    model.config.use_cache = True
    return model, tokenizer


def check_precision(settings: FinetuneSettings, model: HymbaForCausalLM) -> None:
    """Refuse bfloat16 on a GPU without it, before anything is written.

    Raises:
        SettingsError: names the GPU and what is allowed there.
    """
    run = settings.run
    if not uses_gpu(run.device):
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # pragma: gpu
    if torch.cuda.get_device_capability(device) < (8, 0):  # pragma: gpu
        for key, value in (("run.precision", run.precision), ("model.dtype", settings.model.dtype)):
            if value == "bfloat16":
                name = torch.cuda.get_device_name(device)
                raise SettingsError(f"{key} = 'bfloat16': {name} has none; allowed there: 'float32'")


def check_data(record: dict[str, Any], output: Path) -> None:
    """Refuse to resume on other examples than the run was started with.

    Raises:
        SettingsError: names both hashes.
    """
    path = output / DATA_NAME
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["sha256"] != record["sha256"]:
        raise SettingsError(
            f"{path}: the examples have changed since this run was started (sha256 {before['sha256']}, now "
            f"{record['sha256']}); choose another run.output"
        )


def export(
    settings: FinetuneSettings, trainer: Any, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, output: Path
) -> tuple[Path | None, Path | None]:
    """Write the adapter and the checkpoint from what was saved last; the folders that were written."""
    chosen = settings.export
    folder = output / chosen.folder
    if settings.adapter.kind == "none":
        model = HymbaForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, chosen.dtype))
        write_checkpoint(model, tokenizer, folder, generation=chosen.generation)
        return None, folder
    adapter = output / chosen.adapter_folder
    with checkpoints.written_folder(adapter, sealed=False) as staging:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(staging), save_embedding_layers=False)
        tokenizer.save_pretrained(str(staging))
    if not chosen.merge:
        return adapter, None
    merge_adapter(adapter, folder, dtype=chosen.dtype, tokenizer=tokenizer, generation=chosen.generation)
    return adapter, folder


@dataclass(frozen=True)
class Measured:
    """Figures of a model on held-out examples and, of preferences, the likelihoods that they are made from."""

    figures: dict[str, float]
    reference: list[list[float]] | None = None


class Measurer:
    """Measures models on the held-out examples of a run."""

    def __init__(
        self,
        settings: FinetuneSettings,
        trainer: Any,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[measure.Question],
    ) -> None:
        self.settings, self.trainer, self.tokenizer, self.asked = settings, trainer, tokenizer, asked
        rows = trainer.eval_dataset
        limit = settings.evaluate.rows
        self.rows = None if rows is None else rows.select(range(min(limit or len(rows), len(rows))))

    def measure(self, model: Any, reference: list[list[float]] | None = None) -> Measured:
        """``reference``: likelihoods of the model that the rewards are against; by default of this one."""
        evaluate = self.settings.evaluate
        figures: dict[str, float] = {}
        scores = None
        if self.rows is not None and len(self.rows):
            if self.settings.method.name == "sft":
                figures = measure.held_out_loss(model, self.rows, batch_size=evaluate.batch_size)
            else:
                found = self._scores(model)
                scores = found.tolist()
                against = found if reference is None else torch.tensor(reference, dtype=torch.float64)
                figures = measure.preferences(found, against, beta=self.settings.method.beta)
        if self.asked:
            given = measure.answers(
                model,
                self.tokenizer,
                self.asked,
                max_new_tokens=evaluate.max_new_tokens,
                batch_size=evaluate.batch_size,
                generation=self.settings.export.generation,
            )
            figures |= measure.judge(self.asked, given)
        return Measured(figures, scores)

    def followed(self) -> tuple[str, Callable[[], float]]:
        """Name and measurement of the figure that a run follows while it trains."""
        model, batch_size = self.trainer.model, self.settings.evaluate.batch_size

        def loss() -> float:
            return measure.held_out_loss(model, self.rows, batch_size=batch_size)["loss"]

        def preferred() -> float:
            scores = self._scores(model)
            return float((scores[:, 0] > scores[:, 1]).double().mean())

        return ("held_out_loss", loss) if self.settings.method.name == "sft" else ("preference_accuracy", preferred)

    def _scores(self, model: Any) -> torch.Tensor:
        return measure.preference_scores(
            model,
            self.rows,
            max_length=self.settings.data.max_length,
            batch_size=self.settings.evaluate.batch_size,
        )


def _before(measurer: Measurer, output: Path, first: bool, *, fresh: bool) -> Measured:
    """What the model did before the run: measured when it starts, read when it goes on."""
    path = output / BEFORE_NAME
    if not first:
        return Measured({})
    if not fresh:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return Measured(saved["figures"], saved["reference"])
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(f"{path}: not readable, and the run cannot go on without it: {error}") from error
    measured = measurer.measure(measurer.trainer.model)
    with checkpoints.write_failures(output):
        record = {"figures": measured.figures, "reference": measured.reference}
        checkpoints.write_text(path, json.dumps(record) + "\n")
    return measured


def _report(
    settings: FinetuneSettings,
    output: Path,
    step: int,
    examples: Examples,
    before: dict[str, float],
    after: dict[str, float],
    asked: int,
    say: Callable[..., None],
) -> None:
    """Print the table of both measurements and write ``results.json``."""
    results = {
        "method": settings.method.name,
        "step": step,
        "seed": settings.run.seed,
        "examples": {"train": len(examples.train), "held_out": len(examples.held_out), "answered": asked},
        "before": before,
        "after": after,
        "versions": versions_of("hymba", "torch", "transformers", "trl", "peft"),
        "settings": settings.to_dict(),
    }
    with checkpoints.write_failures(output):
        checkpoints.write_text(output / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    for line in table(before, after):
        say(line)


def table(before: dict[str, float], after: dict[str, float]) -> Iterator[str]:
    """Lines of a table with both measurements; nothing where nothing was measured."""
    if not after:
        return
    yield f"{'held out':<28}{'before':>10}{'after':>10}"
    for name, (title, form) in _SHOWN.items():
        if name in after:
            yield f"{title:<28}{before[name]:>10{form}}{after[name]:>10{form}}"


def _needed_bytes(settings: FinetuneSettings, model: HymbaForCausalLM, trained: int) -> int:
    """Space for the checkpoints kept and the one being written, each with two moments, and for the export."""
    total = sum(parameter.numel() for parameter in model.parameters())
    exported = total * (4 if settings.export.dtype == "float32" else 2)
    return trained * 12 * (settings.run.keep_checkpoints + 1) + exported + (8 << 20)


def _silent(*_: object) -> None:
    """Stands for print in all processes but the first."""
