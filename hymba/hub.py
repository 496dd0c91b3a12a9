"""Checkpoints on disk: the released tensor names and ours, checks before loading, Auto-class registration.

The name table is exact in both directions. transformers' loader gets it as renamings; the checks here read only the
headers of the files, so that a wrong checkpoint is refused before a tensor is allocated.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# (released, ours): parts of names. No part occurs in another's result, so both directions are plain replacement.
NAMES: tuple[tuple[str, str], ...] = (
    ("memory_tokens", "meta_tokens.weight"),
    ("final_layernorm", "final_norm"),
    ("input_layernorm", "input_norm"),
    ("pre_moe_layernorm", "ffn_norm"),
    ("moe.experts.0.", "mlp."),
    ("mamba.in_proj", "mixer.in_proj"),
    ("mamba.out_proj", "mixer.out_proj"),
    ("mamba.pre_avg_layernorm1", "mixer.attention_norm"),
    ("mamba.pre_avg_layernorm2", "mixer.mamba_norm"),
    ("mamba.self_attn.q_norm", "mixer.attention.q_norm"),
    ("mamba.self_attn.k_norm", "mixer.attention.k_norm"),
    ("mamba.conv1d", "mixer.mamba.conv1d"),
    ("mamba.x_proj.0", "mixer.mamba.x_proj"),
    ("mamba.dt_proj.0.weight", "mixer.mamba.dt_proj.weight"),
    ("mamba.dt_proj.0.bias", "mixer.mamba.dt_bias"),
    ("mamba.A_log.0", "mixer.mamba.A_log"),
    ("mamba.D.0", "mixer.mamba.D"),
    ("mamba.dt_layernorm", "mixer.mamba.dt_norm"),
    ("mamba.B_layernorm", "mixer.mamba.B_norm"),
    ("mamba.C_layernorm", "mixer.mamba.C_norm"),
)


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        at = name.find(old)
        # Parts start at a component, so that `mamba.` never matches the inside of a translated name.
        if at == 0 or (at > 0 and name[at - 1] == "." and not name[:at].endswith("mixer.")):
            return name[:at] + new + name[at + len(old) :]
    return name


def our_name(released: str) -> str:
    """Our parameter name for a tensor of a released file."""
    return _translate(released, NAMES)


def released_name(ours: str) -> str:
    """The released file's tensor name for one of our parameters."""
    return _translate(ours, [(new, old) for old, new in NAMES])


class CheckpointError(ValueError):
    """Files that do not hold this model; the message names file, tensor, expected and actual."""


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for a safetensors dtype of a model weight.

    Raises:
        CheckpointError: a dtype that weights have only where they are quantised.
    """
    if name not in _DTYPES:
        raise CheckpointError(
            f"weights of dtype {name} need a quantization_config; allowed without: {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
                "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes, shapes and offsets of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: a truncated file or a header that cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors header; download it again")
        (length,) = struct.unpack("<Q", head)
        if length > 100_000_000 or 8 + length > size:
            raise CheckpointError(
                f"{path}: corrupt header (it claims {length} bytes of a file of {size}); download the file again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: corrupt header ({error}); download the file again") from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        kind = "truncated" if size < expected else "too long"
        raise CheckpointError(f"{path}: {kind}: expected {expected} bytes, found {size}; download the file again")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        count = 1
        for extent in entry["shape"]:
            count *= extent
        width = _DTYPE_BYTES.get(entry["dtype"])
        if width is not None and end - begin != count * width:
            raise CheckpointError(
                f"{path}: tensor {name}: expected {count * width} bytes for {entry['shape']} in {entry['dtype']}, "
                f"found {end - begin}"
            )
    return header


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint folder: a single file, or the shards that the index names.

    Raises:
        CheckpointError: no weights, pickled weights only, a missing shard, a broken index.
    """
    suffix = f".{variant}" if variant else ""
    single = folder / f"model{suffix}.safetensors"
    index = folder / f"model.safetensors.index{suffix}.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a shard index ({error})") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(shards)} shards named in {index.name} are missing: "
                f"{', '.join(missing)}"
            )
        return [folder / shard for shard in shards]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{folder}: found only pickled weights ({', '.join(pickles)}), which can run code when opened and are "
            "refused. Convert them once: python scripts/bin_to_safetensors.py FOLDER"
        )
    raise CheckpointError(f"{folder}: no {single.name} and no {index.name}")


# What quantisers write beside or in place of a weight: torchao, then bitsandbytes.
_SIDE_TENSORS = (
    re.compile(r"\._(weight|bias)_(?:act_(?:pre|quant)_)?(?:qdata|scale|zero_point|scale_and_zero|per_tensor_scale)$"),
    re.compile(r"\.(weight)\.(?:nested_)?(?:absmax|quant_map|quant_state\..*)$"),
    re.compile(r"\.(?:SCB|weight_format)()$"),
)


def stored_bytes(folder: str | os.PathLike[str]) -> int | None:
    """Bytes of all tensors in the files of a checkpoint folder, by their headers; `None` where there are no weights.

    Raises:
        CheckpointError: a truncated file, a missing shard.
    """
    path = Path(folder)
    if not any(path.glob("model*.safetensors*")):
        return None
    entries = [entry for file in weight_files(path) for entry in read_header(file).values()]
    return sum(int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]) for entry in entries)


def parameter_of(name: str) -> str:
    """The released name of the parameter that a tensor of a quantised file belongs to."""
    for pattern in _SIDE_TENSORS:
        if match := pattern.search(name):
            name = f"{name[: match.start()]}.{match[1] or 'weight'}"
            break
    # Renaming spares side tensors of the few weights that it knows by their full names.
    return released_name(our_name(name))


def check_checkpoint(
    headers: Mapping[Path, dict[str, dict[str, Any]]],
    expected: dict[str, torch.Size],
    *,
    optional: Iterable[str] = (),
    quantised: bool = False,
) -> None:
    """Compare what the files hold with what the model needs, by their headers alone.

    Args:
        headers: what `read_header` gave for each safetensors file.
        expected: released name to shape, for every parameter of the model.
        optional: names that may be there and are not read (`lm_head.weight` for the bare model), or may be missing
            (tied weights).
        quantised: a quantiser has written the files. Its tensors stand for the parameter that they belong to, and
            only the shapes of parameters that it left alone are compared.

    Raises:
        CheckpointError: missing, unknown or mis-shaped tensors.
    """
    optional = set(optional)
    found: dict[str, tuple[Path, list[int] | None]] = {
        name: (path, entry["shape"]) for path, header in headers.items() for name, entry in header.items()
    }
    if quantised:
        codes = {name for header in headers.values() for name, entry in header.items() if entry["dtype"] not in _DTYPES}
        found = {
            parameter_of(name): (path, None if name in codes or parameter_of(name) != name else shape)
            for name, (path, shape) in sorted(found.items())
        }
    problems = []
    for name, shape in expected.items():
        if name in found:
            path, actual = found[name]
            if actual is not None and list(shape) != list(actual):
                problems.append(f"{name} in {path.name}: expected shape {list(shape)}, found {list(actual)}")
        elif name not in optional:
            problems.append(f"{name}: missing, expected shape {list(shape)}")
    problems += [
        f"{name} in {path.name}: not a tensor of this model (shape {shape})"
        for name, (path, shape) in found.items()
        if name not in expected and name not in optional
    ]
    if problems:
        where = ", ".join(sorted({str(path.parent) for path, _ in found.values()}))
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"checkpoint {where} does not fit its config.json: " + "; ".join(problems[:8]) + more)


def expected_tensors(model: nn.Module, *, prefix: str = "") -> dict[str, torch.Size]:
    """Released name to shape for every tensor that a file of this model holds."""
    return {released_name(prefix + name): tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}


def holds_nan(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor, of any shape, holds a NaN."""
    # A sum with a NaN in it is NaN. It is one pass at memory speed without a temporary; `amax` takes three times as
    # long in bfloat16. Infinities of both signs have a NaN sum as well, so a suspicion is looked at again.
    return bool(tensor.sum().isnan()) and bool(tensor.isnan().any())


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors that a tensor consists of: itself, or the codes and scales of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor.detach()


def nan_tensors(model: nn.Module) -> list[str]:
    """Names (as in the file) of parameters that hold a NaN."""
    return [
        released_name(name)
        for name, tensor in model.named_parameters()
        if any(part.is_floating_point() and not part.is_meta and holds_nan(part) for part in plain_tensors(tensor))
    ]


def scan_for_nan(model: nn.Module) -> list[str]:
    """`nan_tensors`, with one warning that names them."""
    bad = nan_tensors(model)
    if bad:
        logger.warning(f"the checkpoint holds NaN in {len(bad)} tensors: {', '.join(bad)}")
    return bad


def resolve_folder(name_or_path: str | os.PathLike[str], **hub: Any) -> Path | None:
    """The folder with a checkpoint's files: as given, or in the hub's cache once transformers has put it there."""
    path = Path(name_or_path)
    if path.is_dir():
        return path / hub["subfolder"] if hub.get("subfolder") else path
    from transformers.utils import cached_file

    names = ["model.safetensors", "model.safetensors.index.json"]
    for file in names:
        found = cached_file(
            str(name_or_path),
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is None:
            continue
        if file.endswith(".json"):
            for shard in sorted(set(json.loads(Path(found).read_text())["weight_map"].values())):
                cached_file(str(name_or_path), shard, **hub)
        return Path(found).parent
    return None


def register(config_class: Any, base_class: Any, language_model_class: Any) -> None:
    """Make the Auto classes, `pipeline` and `transformers serve` know these classes; called by `import hymba`.

    A registered class wins over `auto_map`, so that remote code of a checkpoint is never asked for or run.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    AutoConfig.register("hymba", config_class, exist_ok=True)
    AutoModel.register(config_class, base_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, language_model_class, exist_ok=True)
    renamings = [WeightRenaming(re.escape(old), new) for old, new in NAMES]
    register_checkpoint_conversion_mapping("hymba", renamings, overwrite=True)
    # `transformers serve` looks the architecture up as an attribute of the package.
    for cls in (config_class, base_class, language_model_class):
        setattr(transformers, cls.__name__, cls)
