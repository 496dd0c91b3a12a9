"""Limits on the values of training settings that their types cannot say."""

from __future__ import annotations

import math
from typing import Any

from hymba.experiments.settings import DataSettings, SettingsError, TextSettings, TrainSettings, check_optimisation
from hymba.experiments.tasks import make_task


def need(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Refuse a setting.

    Raises:
        SettingsError: names key, value and what is allowed.
    """
    if not condition:
        raise SettingsError(f"{key} = {value!r}: {allowed}")


def check_ranges(settings: TrainSettings) -> None:
    """Value limits that a type cannot say.

    Raises:
        SettingsError: names key, value and what is allowed.
    """

    data, run, schedule, optimizer = settings.data, settings.run, settings.schedule, settings.optimizer
    need(0.0 <= data.held_out < 1.0, "data.held_out", data.held_out, "expected 0 <= value < 1")
    need(data.sequence_length >= 2, "data.sequence_length", data.sequence_length, "expected at least 2 tokens")
    _check_text(data, "data")
    _check_sources(data)
    need(
        settings.tokenizer.path is not None or settings.tokenizer.vocab_size >= 260,
        "tokenizer.vocab_size",
        settings.tokenizer.vocab_size,
        "a byte-level vocabulary needs at least 260 entries (256 bytes and the special tokens)",
    )
    for name in (
        "steps",
        "batch_size",
        "gradient_accumulation",
        "log_every",
        "save_every",
        "keep_checkpoints",
    ):
        need(getattr(run, name) >= 1, f"run.{name}", getattr(run, name), "expected at least 1")
    for name in ("threads", "evaluate_every", "evaluate_bytes", "seed"):
        need(getattr(run, name) >= 0, f"run.{name}", getattr(run, name), "expected 0 or more")
    check_optimisation(optimizer, schedule, need)
    need(run.init_from is None or bool(run.init_from), "run.init_from", run.init_from, "name a folder, or null")
    need(
        run.tokens_per_step is None or run.tokens_per_step >= 1,
        "run.tokens_per_step",
        run.tokens_per_step,
        "expected at least 1",
    )
    need(
        run.tokens_per_step is None or run.gradient_accumulation == 1,
        "run.gradient_accumulation",
        run.gradient_accumulation,
        "it follows from run.tokens_per_step; leave one of the two out",
    )
    if data.task is not None:
        make_task(**{"name": None, **data.task})
    _check_phases(settings)


def _check_text(text: TextSettings, key: str) -> None:
    paths = list(text.paths)
    need(text.source != "files" or bool(paths), f"{key}.paths", paths, "name at least one file or folder")
    named = text.source != "datasets" or bool(text.dataset)
    need(named, f"{key}.dataset", text.dataset, "name a dataset or its folder")


def _check_sources(data: DataSettings) -> None:
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        key = f"data.sources[{i}]"
        plain = source.name.replace("-", "").replace("_", "").isalnum()
        need(plain, f"{key}.name", source.name, "expected a name of letters, digits, - and _")
        need(names.count(source.name) == 1, f"{key}.name", source.name, "expected another name for each source")
        _check_text(source, key)
        _check_weight(f"{key}.weight", source.weight)
    if data.sources:
        total = sum(source.weight for source in data.sources)
        need(total > 0, "data.sources", names, "at least one needs a weight of more than 0")
        alone = (data.source, data.paths, data.dataset) == ("stdlib", (), None)
        need(alone, "data.source", data.source, "data.sources take its place; leave source, paths and dataset out")
    need(data.task is None or not data.sources, "data.sources", names, "a run on data.task reads no text")


def _check_weight(key: str, weight: float) -> None:
    need(math.isfinite(weight) and weight >= 0, key, weight, "expected 0 or more")


def _check_phases(settings: TrainSettings) -> None:
    steps, before, names = settings.run.steps, 0, [source.name for source in settings.data.sources]
    seen: set[str] = set()
    for i, phase in enumerate(settings.phases):
        key = f"phases[{i}]"
        need(bool(phase.name) and phase.name not in seen, f"{key}.name", phase.name, "expected a name of its own")
        seen.add(phase.name)
        need(0.0 < phase.start < 1.0, f"{key}.start", phase.start, "expected a share of run.steps between 0 and 1")
        first = phase_start(phase.start, steps)
        need(
            before < first < steps,
            f"{key}.start",
            phase.start,
            f"that is step {first} of {steps}; expected later than the phase before (step {before}) and before the end",
        )
        before = first
        length, rows = phase.sequence_length, phase.batch_size
        need(length is None or length >= 2, f"{key}.sequence_length", length, "expected at least 2 tokens")
        need(rows is None or rows >= 1, f"{key}.batch_size", rows, "expected at least 1")
        _check_phase_task(settings.data.task, phase.task, key)
        if settings.data.task is not None:
            unread = phase.weights is None and length is None
            need(unread, key, phase.name, "a phase of data.task takes weights and sequence_length from `task` alone")
        if phase.weights is not None:
            for name, weight in phase.weights.items():
                known = ", ".join(names) or "none: name them in data.sources"
                need(name in names, f"{key}.weights", name, f"the sources are {known}")
                _check_weight(f"{key}.weights.{name}", weight)
            need(sum(phase.weights.values()) > 0, f"{key}.weights", phase.weights, "at least one of more than 0")


def _check_phase_task(task: dict[str, Any] | None, changed: dict[str, Any], key: str) -> None:
    if not changed:
        return
    need(task is not None, f"{key}.task", changed, "it changes parameters of data.task, and there is none")
    assert task is not None
    name = changed.get("name", task["name"])
    need(name == task["name"], f"{key}.task.name", name, f"expected data.task.name, {task['name']}, or nothing")
    has, expected = make_task(**{**task, **changed}).vocab_size, make_task(**task).vocab_size
    advice = f"its {has} tokens have to be the {expected} of data.task; leave the vocabulary out"
    need(has == expected, f"{key}.task", changed, advice)


def phase_start(share: float, steps: int) -> int:
    """The steps before a phase that begins after a share of ``steps``."""
    return round(share * steps)
