"""`from_pretrained` and `save_pretrained` in the released layout, with the checks of `hymba.hub` around them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import modeling_utils
from transformers.utils.loading_report import LoadStateDictInfo

from hymba import hub, quantization, saving
from hymba.config import KEYS_REPORTED, HymbaConfig, check_attention_implementation, nearest

_on_hub_mount = getattr(modeling_utils, "_is_on_hf_mount", lambda path: False)


class _Files:
    """The checkpoint that is being loaded, as its headers describe it.

    Args:
        cls: the class that loads it. headers: header of each file.
        keep_dtypes: parameters get the dtype that they have in the file.
        renamed: the caller has a name table of their own.
        quantised: a quantiser has written the files.
    """

    def __init__(
        self,
        cls: type,
        headers: Mapping[Path, dict[str, dict[str, Any]]],
        *,
        keep_dtypes: bool,
        renamed: bool,
        quantised: bool,
    ) -> None:
        self.cls, self.headers, self.quantised = cls, headers, quantised
        self.keep_dtypes, self.renamed = keep_dtypes and not quantised, renamed
        entries = [item for header in headers.values() for item in header.items()]
        self.codes = {hub.our_name(name): entry["dtype"] for name, entry in entries}
        # A bare HymbaModel was saved: its names lack the prefix.
        self.bare = not any(name.startswith("model.") for name in self.codes)

    def name_of(self, parameter: str, model: nn.Module) -> str:
        """The name in the files (in our terms) of a parameter of a model, whole or bare."""
        whole = is_whole(model)
        if whole != self.bare:
            return parameter
        return parameter.removeprefix("model.") if whole else f"model.{parameter}"

    def dtype_of(self, parameter: str, model: nn.Module) -> torch.dtype | None:
        """Dtype of a parameter in the files; `None` when they lack it."""
        code = self.codes.get(self.name_of(parameter, model))
        return None if code is None else hub.torch_dtype(code)

    def fit(self, model: nn.Module, paths: Iterable[str], load_config: Any) -> bool:
        """Whether every parameter takes its tensor as it stands: on the CPU, in one piece, in the file's dtype."""
        device_map = load_config.device_map or {}
        return (
            not self.renamed
            and {Path(path).name for path in paths} == {path.name for path in self.headers}
            and load_config.hf_quantizer is None
            and load_config.device_mesh is None
            and not load_config.disable_mmap
            and all(str(device) == "cpu" for device in device_map.values())
            # Mapped files count as memory in use on Windows, and can hang on a mounted hub.
            and sys.platform != "win32"
            and not any(map(_on_hub_mount, self.headers))
            and all(
                parameter.is_meta and self.dtype_of(name, model) in (None, parameter.dtype)
                for name, parameter in model.named_parameters(remove_duplicate=False)
            )
        )


def is_whole(model: nn.Module) -> bool:
    """Whether a model has its head, so that its names start with `model.`."""
    return hasattr(model, "lm_head")


_FILES: contextvars.ContextVar[_Files | None] = contextvars.ContextVar("files", default=None)


class CheckpointMixin:
    """Strict loading for `PreTrainedModel` subclasses; stands before it among the base classes."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """`PreTrainedModel.from_pretrained` of a folder or hub id in the released layout.

        Fields of the configuration given as keywords replace the file's (`sliding_window=`, `global_attn_idx=`), to
        change the architecture over trained weights.

        Raises:
            CheckpointError: missing, unknown, mis-shaped or truncated tensors, a missing shard, pickled weights.
            QuantizationError: weights that this machine cannot quantise as asked, or quantised ones that it cannot run.
            ImportError: the package that quantised the weights is not installed.
            ConfigError: a configuration that cannot be built, or an unknown keyword.
        """
        check_attention_implementation(kwargs.get("attn_implementation"))
        config = kwargs.get("config")
        plain = kwargs.get("state_dict") is None and not kwargs.get("gguf_file")
        files: _Files | None = None
        if pretrained_model_name_or_path is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            location = {name: kwargs[name] for name in names if kwargs.get(name) not in (None, False, "")}
            _finish_save(pretrained_model_name_or_path, kwargs.get("subfolder"))
            if not isinstance(config, HymbaConfig):
                fields = set(HymbaConfig.__dataclass_fields__) - {"dtype"}
                overrides = {k: v for k, v in kwargs.items() if k in fields}
                with _naming(config or pretrained_model_name_or_path):
                    config = HymbaConfig.from_pretrained(
                        config or pretrained_model_name_or_path, **location, **overrides
                    )
            cls._check_keywords(kwargs)
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = quantization.completed(kwargs["quantization_config"])
            method = quantization.method(config)
            quantization.require(method)
            with _naming(pretrained_model_name_or_path):
                own = plain and method in (None, *quantization.BACKENDS)
                folder = hub.resolve_folder(pretrained_model_name_or_path, **location) if own else None
            if folder is not None and not os.path.isfile(folder / "adapter_config.json"):
                paths = hub.weight_files(folder, variant=kwargs.get("variant"))
                files = _Files(
                    cls,
                    {path: hub.read_header(path) for path in paths},
                    keep_dtypes=kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"),
                    renamed=kwargs.get("key_mapping") is not None,
                    quantised=method is not None,
                )
                if files.keep_dtypes and files.codes:
                    kwargs.pop("torch_dtype", None)
                    kwargs["dtype"] = functools.reduce(torch.promote_types, map(hub.torch_dtype, files.codes.values()))
        token, reported = _FILES.set(files), KEYS_REPORTED.set(True)
        try:
            model, *rest = _as_tuple(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))  # type: ignore[misc]
        finally:
            _FILES.reset(token)
            KEYS_REPORTED.reset(reported)
        if getattr(model, "hf_quantizer", None) is not None:
            quantization.settle(model)
        hub.scan_for_nan(model)
        generation = getattr(model, "generation_config", None)
        if generation is not None and generation.use_cache is False:
            # The release's file says so, and with it every step would recompute the whole sequence.
            generation.use_cache = True
        return (model, *rest) if rest else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained` with the released names, all or nothing (`hymba.saving`).

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: it cannot be written, or the disk is full; the checkpoint that it held is as it was.
        """
        if kwargs.get("distributed_checkpoint"):
            # Every process writes a part of one checkpoint, at its own pace.
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with quantization.saveable(self), saving.replacing(save_directory) as writing:
            super().save_pretrained(writing, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: code of an installed package is not copied beside checkpoints. See `hymba.conversion`."""

    def post_init(self) -> None:
        """Hold the model that is being built for a checkpoint to its files, before a tensor is allocated.

        Parameters get the dtype that they have in the file; `config.json` may name another.
        """
        files = _FILES.get()
        if files is not None and type(self) is files.cls:
            self._check_files(files)
            for name, parameter in self.named_parameters() if files.keep_dtypes else ():  # type: ignore[attr-defined]
                dtype = files.dtype_of(name, self)  # type: ignore[arg-type]
                if dtype is not None and parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' step from files to parameters; in the plain case without its machinery.

        For 611 tensors that machinery (a thread pool, regular expressions compiled per tensor, conversions) takes as
        long as reading three gigabytes. When every tensor becomes a parameter as it stands (the files were held to
        the model already), the mapped files are assigned directly, which copies nothing.
        """
        files = _FILES.get()
        usual = state_dict is None and not args and not kwargs
        if files is None or not usual or not files.fit(model, checkpoint_files, load_config):
            return super()._load_pretrained_model(  # type: ignore[misc]
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )
        tensors = {hub.our_name(name): tensor for path in checkpoint_files for name, tensor in load_file(path).items()}
        missing = set()
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                tensor = tensors.pop(files.name_of(name, model), None)
                if tensor is None:
                    missing.add(name)
                    continue
                loaded = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                # Without the mark the parameter would be initialised again.
                loaded._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(module, name.rpartition(".")[2], loaded)
        return LoadStateDictInfo(
            missing_keys=missing,
            unexpected_keys=set(tensors),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        ), None

    @classmethod
    def _check_keywords(cls, kwargs: dict[str, Any]) -> None:
        """Refuse keywords that neither the configuration nor transformers knows."""
        from transformers import PreTrainedModel

        known = set(HymbaConfig.__dataclass_fields__) | set(_LOADER_KEYWORDS)
        for key in kwargs:
            if key in known or key.startswith("_"):
                continue
            # A keyword of a newer transformers stands in its source as a string.
            if f'"{key}"' not in inspect.getsource(PreTrainedModel.from_pretrained):
                raise TypeError(f"from_pretrained() got an unexpected keyword argument {key!r}.{nearest(key, known)}")

    def _check_files(self, files: _Files) -> None:
        """Raise a CheckpointError unless the files hold exactly this model (or, for a bare model, one with a head)."""
        whole = is_whole(self)  # type: ignore[arg-type]
        expected = hub.expected_tensors(self, prefix="" if whole else "model.")  # type: ignore[arg-type]
        optional = set()
        if not whole or self.config.tie_word_embeddings:  # type: ignore[attr-defined]
            expected.pop("lm_head.weight", None)
            optional.add("lm_head.weight")
        if files.bare:
            expected = {name.removeprefix("model."): shape for name, shape in expected.items()}
        hub.check_checkpoint(files.headers, expected, optional=optional, quantised=files.quantised)


def _finish_save(name_or_path: str | os.PathLike[str], subfolder: str | None) -> None:
    """Complete a save that was interrupted while its files moved into place."""
    folder = Path(name_or_path, subfolder or "")
    if folder.is_dir():
        try:
            saving.finish(folder)
        except OSError as error:
            raise hub.CheckpointError(
                f"{folder} holds a save that was interrupted when it was complete but for moving its files, and they "
                f"cannot be moved now ({error}); make the folder writable and load it again"
            ) from error


@contextlib.contextmanager
def _naming(name_or_path: Any) -> Iterator[None]:
    """Put the repository or folder into errors that leave it out, as those of a hub that cannot be reached do."""
    try:
        yield
    except OSError as error:
        if str(name_or_path) in str(error):
            raise
        raise OSError(f"{name_or_path}: {error}") from error


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


_LOADER_KEYWORDS = (
    "config cache_dir ignore_mismatched_sizes force_download local_files_only token revision use_safetensors "
    "weights_only subfolder variant state_dict dtype torch_dtype device_map max_memory offload_folder offload_buffers "
    "offload_state_dict load_in_8bit load_in_4bit quantization_config attn_implementation experts_implementation "
    "trust_remote_code code_revision output_loading_info from_tf from_flax mirror resume_download proxies "
    "use_auth_token tp_plan tp_size device_mesh distributed_config use_kernels kernel_config key_mapping gguf_file "
    "adapter_kwargs adapter_name generation_config low_cpu_mem_usage output_attentions output_hidden_states "
    "name_or_path allow_all_kernels fusion_config"
).split()
