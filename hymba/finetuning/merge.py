"""An adapter folder and its base become one checkpoint in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hymba import HymbaForCausalLM
from hymba.experiments import checkpoints
from hymba.experiments.settings import SettingsError

ADAPTER_CONFIG = "adapter_config.json"


def adapter_base(adapter: Path) -> str:
    """The checkpoint that an adapter folder says it is for.

    Raises:
        SettingsError: no adapter is there, or it names none.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{adapter}: no adapter: {path.name} cannot be read: {error}") from error
    if not base:
        raise SettingsError(f"{path}: names no base; say which checkpoint the adapter is for: --model FOLDER|HUB-ID")
    return str(base)


def merged_model(adapter: Path, *, base: str | None = None, dtype: str = "auto") -> Any:
    """The base with the adapter in its weights; added up in float32, rounded once.

    ``dtype``: ``auto`` is the base's.

    Raises:
        SettingsError: no adapter is there, its base is not, or it does not fit the base.
        hymba.hub.CheckpointError: files of the base that do not make a model.
    """
    from peft import PeftModel

    name = base or adapter_base(adapter)
    try:
        model = HymbaForCausalLM.from_pretrained(name)
    except OSError as error:
        why = " ".join(str(error).split())
        raise SettingsError(
            f"{name}: the base of {adapter} cannot be loaded ({why}); say where it is: --model FOLDER|HUB-ID"
        ) from error
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        adapted = PeftModel.from_pretrained(model.float(), str(adapter))
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise SettingsError(f"{adapter}: does not fit {name}: {error}") from error
    return merged.to(wanted)


def merge_adapter(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """Write the merged checkpoint with a tokenizer: the one given, the adapter folder's or the base's.

    ``generation``: fields of its GenerationConfig in place of the base's.

    Raises:
        SettingsError: as `merged_model`.
        OutputError: the folder cannot be written; what it held is as it was.
    """
    name = base or adapter_base(adapter)
    model = merged_model(adapter, base=name, dtype=dtype)
    if tokenizer is None:
        own = (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(str(adapter) if own else name, trust_remote_code=False)
    write_checkpoint(model, tokenizer, output, generation=generation)
    return output


def write_checkpoint(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, generation: dict[str, Any] | None = None
) -> None:
    """Weights in the released layout, configuration and tokenizer; the folder appears when all of it is there."""
    model.generation_config.update(**(generation or {}))
    with checkpoints.written_folder(folder, sealed=False) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(str(staging))
