"""`from_pretrained` and `save_pretrained` in the released layout, with the checks of `hymba.hub` around them."""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import types
from collections.abc import Mapping
from typing import Any

import torch

from hymba import hub
from hymba.config import HymbaConfig, nearest

_FILE_DTYPES: contextvars.ContextVar[Mapping[str, torch.dtype]] = contextvars.ContextVar(
    "file_dtypes", default=types.MappingProxyType({})
)
"""Dtype of each tensor of the checkpoint that is being loaded, by our names."""


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
        dtypes: dict[str, torch.dtype] = {}
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
                headers = cls._check_files(folder, config, kwargs.get("variant"))
                if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"):
                    dtypes = {hub.our_name(name): hub.torch_dtype(entry["dtype"]) for name, entry in headers.items()}
                    widest = functools.reduce(torch.promote_types, dtypes.values())
                    kwargs.pop("torch_dtype", None)
                    kwargs["dtype"] = widest
        token = _FILE_DTYPES.set(dtypes)
        try:
            model, *rest = _as_tuple(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))  # type: ignore[misc]
        finally:
            _FILE_DTYPES.reset(token)
        hub.scan_for_nan(model)
        generation = getattr(model, "generation_config", None)
        if generation is not None and generation.use_cache is False:
            # The release's file says so, and with it every step would recompute the whole sequence.
            generation.use_cache = True
        return (model, *rest) if rest else model

    def post_init(self) -> None:
        """Give every parameter the dtype that it has in the file being loaded; `config.json` may name another."""
        dtypes = _FILE_DTYPES.get()
        for name, parameter in self.named_parameters() if dtypes else ():  # type: ignore[attr-defined]
            dtype = dtypes.get(name, dtypes.get(f"model.{name}"))
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

    @classmethod
    def _check_files(cls, folder: Any, config: HymbaConfig, variant: str | None) -> dict[str, Any]:
        from hymba.model import HymbaForCausalLM

        with torch.device("meta"):
            whole = HymbaForCausalLM(config)
        expected = hub.expected_tensors(whole)
        optional = set()
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
            optional.add("lm_head.weight")
        elif cls is not HymbaForCausalLM:
            optional.add("lm_head.weight")
        files = hub.weight_files(folder, variant=variant)
        if not any(name.startswith("model.") for path in files for name in hub.read_header(path)):
            # A bare HymbaModel was saved: its names lack the prefix.
            expected = {name.removeprefix("model."): shape for name, shape in expected.items()}
        return hub.check_checkpoint(files, expected, optional=optional)


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
