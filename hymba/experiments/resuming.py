"""Whether the run in a folder can go on: the same settings, the same text, a checkpoint that is whole."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, Protocol

import yaml

from hymba.experiments import checkpoints
from hymba.experiments.corpus import Corpus
from hymba.experiments.settings import SettingsError, TrainSettings

# Settings that a resumed run may change, because no loss depends on them; those of `export` are free as well.
FREE = frozenset(
    "run.output run.threads run.log_every run.save_every run.keep_checkpoints run.evaluate_every run.evaluate_bytes "
    "run.tensorboard run.resume run.activation_checkpointing run.gradient_checkpointing run.distributed run.reshard "
    "run.compile run.cuda_graph phases.activation_checkpointing".split()
)
DEALT = frozenset("run.batch_size run.gradient_accumulation run.tokens_per_step phases.batch_size".split())
"""How the rows of a step are dealt out, which a run may change as long as its plan says how many they are."""


class Resumable(Protocol):
    """Settings of any run that can be resumed."""

    @property
    def run(self) -> Any:
        """With ``output`` and ``resume``."""

    def to_dict(self) -> dict[str, Any]:
        """The sections, as they are written to ``settings.yaml``."""


def find_resume_point(settings: Resumable, output: Path, *, free: frozenset[str] = FREE) -> Path | None:
    """The last checkpoint under ``output`` that is whole, if the run there was started with the same settings.

    ``free``: dotted settings that may differ, besides those of ``export``.

    Raises:
        SettingsError: the folder holds another run, or ``run.resume`` forbids going on; names what differs.
    """
    found = checkpoints.complete_checkpoints(output)
    if not found:
        return None
    if settings.run.resume == "never":
        raise SettingsError(
            f"run.resume = 'never': {output} already has {found[-1].name}; choose another run.output or delete it"
        )
    try:
        before = yaml.safe_load((output / "settings.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{output}: has checkpoints but no readable settings.yaml: {error}") from error
    different = changed_settings(before, settings.to_dict(), free=free)
    if different:
        raise SettingsError(
            f"run.output = {settings.run.output!r}: holds a run with other settings: {'; '.join(different)}; "
            "use the same settings to resume, or choose another run.output"
        )
    return next((path for path in reversed(found) if checkpoints.damage(path) is None), None)


def changed_settings(before: dict[str, Any], now: dict[str, Any], *, free: frozenset[str] = FREE) -> list[str]:
    """``section.key: old -> new`` for every setting that a resumed run must not change.

    Args:
        before, now: the sections of a training's settings, or of another kind of run's; what an earlier version did
            not write has the training's default.
        free: dotted settings that may differ, besides those of ``export``.
    """
    default = TrainSettings().to_dict()
    changes = []
    for section, values in now.items():
        if isinstance(values, list):
            old, new = (
                [{k: v for k, v in item.items() if f"{section}.{k}" not in free} for item in given.get(section) or []]
                for given in (before, now)
            )
            changes += [] if old == new else [f"{section}: {old!r} -> {new!r}"]
            continue
        written = before.get(section) or {}
        for key in sorted(set(written) | set(values)):
            name = f"{section}.{key}"
            missing = default.get(section, {}).get(key)
            old, new = (given.get(key, missing) for given in (written, values))
            if section != "export" and name not in free and old != new:
                changes.append(f"{name}: {old!r} -> {new!r}")
    return changes


def check_corpus(corpus: Corpus, output: Path) -> None:
    """Refuse to resume on other text than the run was started with.

    Raises:
        SettingsError: names both hashes and Python versions.
    """
    path = output / "corpus.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["sha256"] != corpus.digest():
        raise SettingsError(
            f"{path}: the corpus has changed since this run was started (sha256 {before['sha256'][:12]} with Python "
            f"{before['python']}, now {corpus.digest()[:12]} with {platform.python_version()}); "
            "choose another run.output"
        )
