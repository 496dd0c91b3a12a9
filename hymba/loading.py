"""`from_pretrained` and `save_pretrained` in the released layout, with the checks of `hymba.hub` around them."""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hymba import hub
from hymba.config import HymbaConfig, nearest


@dataclass(frozen=True)
class _Files:
    """The checkpoint that is being loaded, as its headers describe it.

    Attributes:
        cls: the class that loads it. headers: header of each file.
        dtypes: dtype of each tensor by our names, when parameters keep them.
    """

    cls: type
    headers: Mapping[Path, dict[str, dict[str, Any]]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor, by our names."""
        entries = [item for header in self.headers.values() for item in header.items()]
        return {hub.our_name(name): hub.torch_dtype(entry["dtype"]) for name, entry in entries}


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
            ConfigError: a configuration that cannot be built, or an unknown keyword.
        """
        config = kwargs.get("config")
        plain = kwargs.get("state_dict") is None and not kwargs.get("gguf_file")
        files: _Files | None = None
        if pretrained_model_name_or_path is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            location = {name: kwargs[name] for name in names if kwargs.get(name) not in (None, False, "")}
            if not isinstance(config, HymbaConfig):
                fields = set(HymbaConfig.__dataclass_fields__) - {"dtype"}
                overrides = {k: v for k, v in kwargs.items() if k in fields}
                config = HymbaConfig.from_pretrained(config or pretrained_model_name_or_path, **location, **overrides)
            cls._check_keywords(kwargs)
            quantised = getattr(config, "quantization_config", None) is not None
            folder = hub.resolve_folder(pretrained_model_name_or_path, **location) if plain and not quantised else None
            if folder is not None and not os.path.isfile(folder / "adapter_config.json"):
                paths = hub.weight_files(folder, variant=kwargs.get("variant"))
                files = _Files(cls, headers={path: hub.read_header(path) for path in paths})
                if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"):
                    files = replace(files, dtypes=files.tensor_dtypes())
                    widest = functools.reduce(torch.promote_types, files.dtypes.values()) if files.dtypes else None
                    kwargs.pop("torch_dtype", None)
                    kwargs["dtype"] = widest
        token = _FILES.set(files)
        try:
            model, *rest = _as_tuple(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))  # type: ignore[misc]
        finally:
            _FILES.reset(token)
        hub.scan_for_nan(model)
        generation = getattr(model, "generation_config", None)
        if generation is not None and generation.use_cache is False:
            # The release's file says so, and with it every step would recompute the whole sequence.
            generation.use_cache = True
        return (model, *rest) if rest else model

    def post_init(self) -> None:
        """Hold the model that is being built for a checkpoint to its files, before a tensor is allocated.

        Parameters get the dtype that they have in the file; `config.json` may name another.
        """
        files = _FILES.get()
        if files is not None:
            if type(self) is files.cls:
                self._check_files(files.headers)
            for name, parameter in self.named_parameters() if files.dtypes else ():  # type: ignore[attr-defined]
                dtype = files.dtypes.get(name, files.dtypes.get(f"model.{name}"))
                if dtype is not None and parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def _check_keywords(cls, kwargs: dict[str, Any]) -> None:
        """Refuse keywords that neither the configuration nor transformers knows."""
        from transformers import PreTrainedModel

        source = inspect.getsource(PreTrainedModel.from_pretrained)
        known = set(HymbaConfig.__dataclass_fields__) | set(_LOADER_KEYWORDS)
        for key in kwargs:
            # A keyword of a newer transformers stands in its source as a string.
            if key not in known and f'"{key}"' not in source and not key.startswith("_"):
                raise TypeError(f"from_pretrained() got an unexpected keyword argument {key!r}.{nearest(key, known)}")

    def _check_files(self, headers: Mapping[Path, dict[str, dict[str, Any]]]) -> None:
        """Raise a CheckpointError unless the files hold exactly this model (or, for a bare model, one with a head)."""
        whole = hasattr(self, "lm_head")
        expected = hub.expected_tensors(self, prefix="" if whole else "model.")  # type: ignore[arg-type]
        optional = set()
        if not whole or self.config.tie_word_embeddings:  # type: ignore[attr-defined]
            expected.pop("lm_head.weight", None)
            optional.add("lm_head.weight")
        if not any(name.startswith("model.") for header in headers.values() for name in header):
            # A bare HymbaModel was saved: its names lack the prefix.
            expected = {name.removeprefix("model."): shape for name, shape in expected.items()}
        hub.check_checkpoint(headers, expected, optional=optional)


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
