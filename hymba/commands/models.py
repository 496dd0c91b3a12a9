"""From `--model`, `--dtype` and `--device` to a configuration, a model and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba.commands.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba.config import HymbaConfig
    from hymba.model import HymbaForCausalLM

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(name: str | None) -> str:
    """The folder or hub id that `--model` means; without one the checkpoint inside the package.

    Raises:
        UsageError: neither a folder with a configuration nor a name that a hub repository could have.
    """
    if name is None:
        folder = Path(str(files("hymba"))) / "assets" / "default"
        if not (folder / "config.json").is_file():
            raise UsageError(
                "this installation has no checkpoint inside; name one: --model FOLDER or --model OWNER/NAME"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise UsageError(
                    f"--model {name}: an adapter, not a model; hymba merge {name} --output FOLDER makes one of it and "
                    "its base"
                )
            raise UsageError(f"--model {name}: the folder has no config.json; give a checkpoint's folder")
        return str(path)
    if path.exists():
        raise UsageError(f"--model {name}: a file; give the folder that it is in")
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"--model {name}: no such folder; allowed: a folder, or a hub id like nvidia/Hymba-1.5B-Base")
    return name


def load_config(name: str, *, revision: str | None = None) -> HymbaConfig:
    """The configuration of a folder or hub id; no weights are read or fetched.

    Raises:
        UsageError: it cannot be found or read, or belongs to another kind of model.
        ConfigError: one that cannot be built.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import PreTrainedConfig

    from hymba.config import HymbaConfig

    # Every retry without a network would be a warning of its own; the error at the end says it once.
    hub_logging.set_verbosity_error()

    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise UsageError(f"{name}/config.json cannot be read: {_first_line(error)}") from error
        raise UsageError(
            f"--model {name}: no such folder, and as a hub id it cannot be fetched: {_first_line(error)}"
        ) from error
    kind = fields.get("model_type")
    if kind != "hymba":
        raise UsageError(f"--model {name}: its config.json says model_type={kind!r}; allowed: 'hymba'")
    return HymbaConfig.from_dict(fields)


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[HymbaForCausalLM, PreTrainedTokenizerBase]:
    """The model, in evaluation mode on its device, and its tokenizer.

    Args:
        quantization: `"int8"` or `"int4"`: round the large weights while they are read (`hymba.quantization`).

    Raises:
        UsageError: a device that is not there or lacks the dtype, a folder without a tokenizer, a checkpoint that is
            quantised already.
        QuantizationError: weights that cannot be quantised so, or not run on this device.
        MemoryEstimateError: weights that will not fit on the device.
        ConfigError, CheckpointError: files that do not make a model.
    """
    from transformers.utils import logging

    from hymba.model import HymbaForCausalLM
    from hymba.quantization import method

    config, where, dtype, keywords = plan(
        name, dtype=dtype, device=device, revision=revision, quantization=quantization
    )
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name, revision=revision)
    if method(config) is not None:
        keywords["device_map"] = {"": where}
    if revision is not None:
        keywords["revision"] = revision
    model = HymbaForCausalLM.from_pretrained(name, dtype=dtype, **keywords)
    return model.eval() if "device_map" in keywords else model.to(where).eval(), tokenizer


def plan(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[HymbaConfig, str, str, dict[str, Any]]:
    """Configuration, device, dtype and further arguments that `load` would load with, found out before it does.

    Raises:
        As `load`, but for tokenizer and weights, which are not read.
    """
    where = _device(device)
    # Found out before gigabytes of weights are read.
    config = load_config(name, revision=revision)
    dtype = _dtype_there(dtype, config, where)
    keywords: dict[str, Any] = {}
    if quantization is not None:
        dtype, keywords = _quantised(str(quantization), config, dtype, where)
    _check_weights_fit(name, config, dtype, where, quantization)
    return config, where, dtype, keywords


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        folder = Path(name)
        why = "" if folder.is_dir() and not list(folder.glob("token*")) else f" ({_first_line(error)})"
        raise UsageError(
            f"--model {name}: no tokenizer can be loaded from it{why}; needed: tokenizer.json and tokenizer_config.json"
        ) from error


def _quantised(kind: str, config: HymbaConfig, dtype: str, device: str) -> tuple[str, dict[str, Any]]:
    """The dtype around quantised weights, and what `from_pretrained` has to be told.

    Raises:
        UsageError: the checkpoint is quantised already, torchao is missing.
    """
    from hymba.commands.terminal import note
    from hymba.quantization import method, quantization_config

    if (present := method(config)) is not None:
        raise UsageError(
            f"--quantization {kind}: the checkpoint's weights are quantised already ({present}); leave the option out"
        )
    try:
        settings = quantization_config(kind, config=config, device=device)
    except ImportError as error:
        raise UsageError(f"--quantization {kind}: {str(error).partition(': ')[2]}") from error
    file = str(config.dtype or "float32").removeprefix("torch.")
    if kind == "int4" and dtype == "auto" and file != "bfloat16":
        note("int4 weights are quick beside bfloat16 activations only: running in bfloat16 (--dtype says otherwise)")
        dtype = "bfloat16"
    return dtype, {"quantization_config": settings, "device_map": {"": device}}


@contextmanager
def packed(model: HymbaForCausalLM, wanted: bool) -> Iterator[None]:
    """`--prepack`: linear layers read packed copies inside the scope.

    Raises:
        UsageError: there is nothing to pack. Where this machine cannot pack, a warning says so instead.
    """
    if not wanted:
        yield
        return
    from hymba.ops.prepack import prepacked_linears

    with prepacked_linears(model) as report:
        if not report.layers and report.reason is None:
            dtype = str(model.dtype).removeprefix("torch.")
            raise UsageError(
                f"--prepack: the weights are {dtype} on {model.device.type}; it packs bfloat16 and float16 on the CPU "
                "(--dtype bfloat16 --device cpu)"
            )
        yield


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: allowed: auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: {_no_device()}; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: this machine has none; use auto or cpu")
    return name


def _no_device() -> str:
    """Why there is no such CUDA device."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if count := torch.cuda.device_count():
        return f"this machine has {count} CUDA device{'s' if count > 1 else ''}, numbered from 0"
    return "this machine has no CUDA device that PyTorch can use (nvidia-smi shows what the driver sees)"


def _dtype_there(dtype: str, config: HymbaConfig, device: str) -> str:
    """The dtype to load in; on a GPU without bfloat16, float32 in its place when it was not asked for.

    Raises:
        UsageError: bfloat16 was asked for on a GPU without it.
    """
    import torch

    from hymba.commands.terminal import note

    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return dtype
    file = str(config.dtype or "").removeprefix("torch.")
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16"
    if dtype == "bfloat16":
        raise UsageError(f"--dtype bfloat16: {gpu}; allowed there: float32, float16")
    if dtype == "auto" and file == "bfloat16":
        note(f"{gpu}: running in float32; --dtype float16 takes half the memory")
        return "float32"
    return dtype


def _check_weights_fit(name: str, config: HymbaConfig, dtype: str, device: str, quantization: str | None) -> None:
    from hymba import cost, hub, memory
    from hymba.quantization import method

    kind = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    # Of files that are quantised already, what they hold; else as they will be.
    # int4 has a scale and a zero point of 16 bits for every 32 codes; what is kept is small beside the rest.
    width = {"int8": 1.0, "int4": 0.625}.get(quantization or "", cost.DTYPE_BYTES.get(kind, 4))
    stored = hub.stored_bytes(name) if method(config) is not None else None
    size = cost.parameters(config).total * width if stored is None else stored
    free = memory.free_bytes(device)
    if free is not None and size > free and memory.enabled():
        smaller = "" if width <= 2 else " --dtype bfloat16 takes half;"
        raise memory.MemoryEstimateError(
            f"the weights need {size / 2**30:.1f} GiB in {quantization or kind} and {device} has "
            f"{free / 2**30:.1f} GiB free;{smaller} --device cpu needs none of it ({memory.ENV}=off tries anyway)"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
