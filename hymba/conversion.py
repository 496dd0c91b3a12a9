"""Checkpoint folders from one dtype, number of files and layout to another: `hymba convert`.

Two layouts hold the same tensors under the released names and the same configuration:

- `released`: for the reference code. `auto_map` links to the code of the released repository.
- `remote-code`: for `trust_remote_code=True` in a process that has never imported this package. `auto_map` points at
  two small files in the folder that import it.

Where no dtype changes, every tensor is the same to the last bit.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba import hub, quantization
from hymba.config import HymbaConfig
from hymba.experiments.checkpoints import OutputError, free_space, written_folder
from hymba.model import HymbaForCausalLM

LAYOUTS = ("released", "remote-code")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

RELEASED_CODE = "nvidia/Hymba-1.5B-Base"
"""The repository whose code reads the released layout."""

BESIDE = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json training.json"
).split()
"""Files that are copied as they are: the tokenizer's, and the record of a training run."""

_MISSING = (
    "this checkpoint's code is the hymba package, which is not installed here: pip install it from its repository, or "
    "load the checkpoint in a process that has it"
)
_THIN_FILES = {
    "configuration_hymba.py": f'''"""The configuration of this checkpoint, from the hymba package."""

try:
    from hymba import HymbaConfig
except ImportError as error:
    raise ImportError("{_MISSING}") from error

__all__ = ["HymbaConfig"]
''',
    "modeling_hymba.py": f'''"""The model of this checkpoint, from the hymba package."""

try:
    from hymba import HymbaForCausalLM, HymbaModel
except ImportError as error:
    raise ImportError("{_MISSING}") from error

__all__ = ["HymbaForCausalLM", "HymbaModel"]
''',
}
_CLASSES = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModel": "modeling_hymba.HymbaModel",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*[KMGT]B")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted as asked; the message says what can."""


@dataclass(frozen=True)
class Converted:
    """What a conversion has written.

    Attributes:
        folder: the new checkpoint. files: its weight files. bytes: of all tensors.
        dtypes: of the tensors, by name, with how many there are. nan: tensors that hold a NaN, as before.
        notes: what a user should know about who can read it.
    """

    folder: Path
    files: tuple[str, ...]
    bytes: int
    dtypes: dict[str, int]
    nan: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    layout: str = "released",
    overwrite: bool = False,
) -> Converted:
    """Write a checkpoint anew.

    Args:
        source: folder in either layout: the release, what `save_pretrained`, `hymba train` or this function wrote.
        output: folder to make. It appears at the end, complete, or not at all.
        dtype: of all tensors: `"float32"`, `"bfloat16"`, `"float16"`; `None` leaves each in its own.
        max_shard_size: such as `"2GB"`: as many files as that takes; `None` is a single one.
        layout: `"released"` or `"remote-code"`.
        overwrite: replace `output`, which has to be a checkpoint folder.

    Raises:
        ConversionError: settings that do not exist, a source that is no plain checkpoint, an output that is in the
            way, values that the dtype cannot hold.
        CheckpointError, ConfigError: a source whose files do not make a model.
        OutputError: the output cannot be written, or the disk is full; nothing is left of it.
    """
    source, output = Path(source), Path(output)
    if layout not in LAYOUTS:
        raise ConversionError(f"layout={layout!r}: allowed: {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r}: allowed: {', '.join(DTYPES)}")
    if max_shard_size is not None and not _SIZE.fullmatch(max_shard_size):
        raise ConversionError(f"max_shard_size={max_shard_size!r}: allowed: a number with KB, MB or GB, such as 2GB")
    config = _check_source(source)
    _check_output(source, output, overwrite)

    model = HymbaForCausalLM.from_pretrained(source, config=config, dtype=dtype or "auto")
    size = quantization.weight_bytes(model)
    _check_space(output, size)
    _check_finite(model, source, dtype)
    with written_folder(output, sealed=False) as staging:
        model.save_pretrained(staging, max_shard_size=max_shard_size or size + (1 << 30))
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        notes = _lay_out(staging, layout)
    headers = [hub.read_header(path) for path in hub.weight_files(output)]
    entries = [entry for header in headers for entry in header.values()]
    names = [str(hub.torch_dtype(entry["dtype"])).removeprefix("torch.") for entry in entries]
    return Converted(
        folder=output,
        files=tuple(path.name for path in hub.weight_files(output)),
        bytes=sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries),
        dtypes={name: names.count(name) for name in sorted(set(names))},
        nan=tuple(hub.nan_tensors(model)),
        notes=tuple(notes),
    )


def _check_source(source: Path) -> HymbaConfig:
    """The configuration of a folder with plain weights."""
    if not source.is_dir():
        raise ConversionError(f"source={str(source)!r}: no such folder; allowed: a checkpoint's folder")
    if (source / "adapter_config.json").is_file() and not list(source.glob("model*.safetensors")):
        raise ConversionError(
            f"source={str(source)!r}: holds an adapter, not a model; merge it into its model first "
            f"(hymba merge {source} --output FOLDER) and convert the result"
        )
    if not (source / "config.json").is_file():
        inside = sorted(path.parent.name for path in source.glob("*/config.json"))
        found = f"; there are checkpoints in it: {', '.join(inside)}" if inside else ""
        raise ConversionError(f"source={str(source)!r}: no config.json in it{found}; allowed: a checkpoint's folder")
    try:
        config = HymbaConfig.from_pretrained(source)
    except OSError as error:
        why = " ".join(str(error).split())
        raise ConversionError(
            f"source={str(source)!r}: its config.json cannot be read ({why}); allowed: a checkpoint's folder"
        ) from error
    if (method := quantization.method(config)) is not None:
        raise ConversionError(
            f"source={str(source)!r}: its weights are quantised ({method}), and what was rounded cannot be undone; "
            "convert the checkpoint that they were made from"
        )
    return config


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    where = f"output={str(output)!r}"
    if output.is_file():
        raise ConversionError(f"{where}: a file; allowed: a folder's name")
    if not output.exists() or not any(output.iterdir()):
        return
    if source.resolve().is_relative_to(output.resolve()):
        raise ConversionError(f"{where}: holds the source; allowed: another folder")
    if not overwrite:
        raise ConversionError(f"{where}: exists and is not empty; allowed: another name, or overwrite (--overwrite)")
    if not (output / "config.json").is_file():
        raise ConversionError(f"{where}: is no checkpoint folder, and is not overwritten; allowed: another name")


def _check_space(output: Path, size: int) -> None:
    folder = next(path for path in output.absolute().parents if path.is_dir())
    if shutil.disk_usage(folder).free < size:
        raise OutputError(
            f"output={str(output)!r}: the weights take {size / 1e6:,.1f} MB and {free_space(folder)}; make room, "
            "choose another folder, or a dtype of 16 bits"
        )


def _check_finite(model: HymbaForCausalLM, source: Path, dtype: str | None) -> None:
    """Refuse float16 for weights beyond its range, which would become infinite."""
    if dtype != "float16":
        return
    infinite = [name for name, parameter in model.named_parameters() if parameter.isinf().any()]
    if not infinite:
        return
    before = HymbaForCausalLM.from_pretrained(source)
    there = dict(before.named_parameters())
    lost = [hub.released_name(name) for name in infinite if not there[name].isinf().any()]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ConversionError(
            f"dtype='float16': {', '.join(lost[:5])}{more} hold values above 65504, the largest that it has; allowed: "
            "bfloat16, float32"
        )


def _lay_out(folder: Path, layout: str) -> list[str]:
    """Add what makes a saved folder one of a layout; returns notes for its user."""
    path = folder / "config.json"
    fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
    notes = []
    if layout == "remote-code":
        fields["auto_map"] = dict(_CLASSES)
        for name, text in _THIN_FILES.items():
            (folder / name).write_text(text, "utf-8")
    elif "layer_pattern" in fields:
        notes.append(
            "config.json has a layer_pattern, which the reference cannot read: this folder loads with the hymba "
            "package only (layout remote-code makes trust_remote_code find it)"
        )
    elif not fields.get("auto_map"):
        fields["auto_map"] = {
            "AutoConfig": f"{RELEASED_CODE}--configuration_hymba.HymbaConfig",
            "AutoModelForCausalLM": f"{RELEASED_CODE}--modeling_hymba.HymbaForCausalLM",
        }
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
    return notes
