"""`HymbaConfig`: the released field names, strict, and one place that checks the architecture.

A `config.json` as published loads untouched; what the library does not read is kept and written back.
"""

import contextvars
import difflib
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.utils import logging

from hymba.adapters import name_default_targets
from hymba.layout import LayerSpec, pattern_layers, released_layers

logger = logging.get_logger(__name__)

# Keyword arguments that transformers itself adds or reads; everything else has to be a field.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "attn_implementation",
        "attn_implementation_new",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
    }
)
# Of the reference's mixture of experts, here always of one. Kept for the file and no attributes: TRL takes a model
# whose configuration has them for a mixture, and asks it for a router's logits.
_EXPERT_FIELDS = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
# What the reference calls its attention implementations; ours are transformers' names.
_REFERENCE_ATTENTION = frozenset({"flex", "flash_attention_2", "flash_attention"})
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")

_ROPE_TYPES = ("default", "ntk", None)
_QK_NORMS = ("none", "rms", "perhead-rms", None)
_MLP_ACTIVATIONS = ("silu", "relu2")


KEYS_REPORTED: contextvars.ContextVar[bool] = contextvars.ContextVar("keys_reported", default=False)
"""Set while a `config.json` is read again whose unknown keys have been warned of."""


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names field, value and what is allowed."""


def nearest(name: str, known: Any) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or nothing when none is close."""
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def check_attention_implementation(name: Any) -> None:
    """Refuse implementations that this library does not have, by name.

    Raises:
        ConfigError: another name than those of `ATTENTION_IMPLEMENTATIONS` and `None`.
    """
    if name is not None and name not in ATTENTION_IMPLEMENTATIONS:
        raise ConfigError(
            f"attn_implementation={name!r}: allowed: {', '.join(ATTENTION_IMPLEMENTATIONS)} (faster kernels are chosen "
            "by hymba.ops.backend)"
        )


@strict
class HymbaConfig(PreTrainedConfig):
    r"""Configuration of a Hymba model, with the field names of the released `config.json`.

    Every field of the published file is accepted. Fields that only the reference reads (`conv_dim`, `seq_length`,
    `use_mamba_kernels` and the like) are kept and saved, so that the reference can read a saved file.

    Args:
        hidden_size: width `d` of the residual stream.
        num_hidden_layers: layers, each hybrid heads followed by an MLP.
        num_attention_heads, num_key_value_heads: query heads and key/value heads (grouped-query attention).
        v_head_dim: width of a value head; always `mamba_expand * hidden_size / num_attention_heads`; `None` sets it.
        intermediate_size: inner width of the MLP.
        mlp_hidden_act: `"silu"` (SwiGLU) or `"relu2"` (no gate projection).
        mamba_d_state, mamba_d_conv, mamba_expand, mamba_dt_rank: shape of the Mamba heads; dt rank `"auto"` is
            `ceil(hidden_size / 16)`.
        mamba_proj_bias: bias on the input and output projections of the mixer.
        initializer_range: standard deviation of initial weights; of embeddings too, unless
            `embedding_initializer_range` has another. Written to a file only where it is set.
        num_memory_tokens: meta tokens (section 2.3 of the paper); 0 for none.
        sliding_window: past positions that a windowed layer sees besides itself; `None` makes every layer global.
        global_attn_idx: layers without a window; `None` equals `[]`.
        kv_reuse_group, kv_reuse_every_i_layer: the two forms of cross-layer KV sharing.
        layer_pattern: other architectures than the released ones: a list of layers, each a mapping with the fields of
            `hymba.layout.LayerSpec` (and `repeat`). It takes the place of `sliding_window`, `global_attn_idx` and the
            two forms of KV sharing; the reference cannot read a file that has it.
        rope_type: `"ntk"` (fixed change of base), `"default"` or `None`.
        kq_norm: `"none"`, `"rms"` or `"perhead-rms"`: norm on queries and keys before the rotation.

    Raises:
        ValueError: an unknown keyword (with the nearest name) or a value that the architecture cannot have.

    `config.layers` is the same architecture as a tuple of `hymba.layout.LayerSpec`.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int | None = 5
    hidden_act: str = "silu"
    mlp_hidden_act: str = "silu"
    initializer_range: float | int = 0.02
    embedding_initializer_range: float | int | None = None
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    attention_dropout: float | int = 0.0

    num_memory_tokens: int = 128
    sliding_window: int | None = 1024
    global_attn_idx: list[int] | None = None
    kv_reuse_group: list[list[int]] | None = None
    kv_reuse_every_i_layer: int | None = -1
    kq_norm: str | None = "none"
    v_head_dim: int | None = None
    layer_pattern: list[dict] | None = None

    rope: bool = True
    rope_type: str | None = "ntk"
    rope_theta: float | int = 10000.0
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int | None = 2048

    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_layernorms: bool = True

    # Read by the reference only.
    attn_hidden_size: int | None = -1
    calc_logits_for_entire_prompt: bool = False
    conv_dim: dict | None = None
    kq_head_dim: int | None = -1
    kv_weight_reuse: bool = False
    layer_type: list[str] | None = None
    memory_tokens_interspersed_every: int = 0
    num_experts: int = 1
    num_experts_per_tok: int = 1
    num_mamba: int = 1
    seq_length: int | None = 8192
    use_mamba_kernels: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._expert_fields = {name: kwargs.pop(name, default) for name, default in _EXPERT_FIELDS.items()}
        unknown = [key for key in kwargs if key not in _TRANSFORMERS_KEYS]
        if unknown:
            known = sorted(HymbaConfig.__annotations__)
            named = "; ".join(f"{key}={kwargs[key]!r}.{nearest(key, known)}" for key in unknown)
            raise ConfigError(f"HymbaConfig has no field {named} Fields: {', '.join(known)}")
        kwargs.pop("attn_implementation_new", None)
        if kwargs.get("attn_implementation") in _REFERENCE_ATTENTION:
            kwargs["attn_implementation"] = None
        check_attention_implementation(kwargs.get("attn_implementation"))
        super().__post_init__(**kwargs)

        # Types are checked after this hook, so nothing is derived from a value of the wrong one.
        shape = (self.hidden_size, self.num_attention_heads, self.mamba_expand)
        if not all(isinstance(value, int) and value > 0 for value in shape):
            return
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.v_head_dim is None:
            self.v_head_dim = self.mamba_expand * self.hidden_size // self.num_attention_heads
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)

    # The shapes that several modules share, derived once.

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The architecture as data, one spec per layer."""
        if self.layer_pattern is not None:
            return pattern_layers(self.layer_pattern)
        return released_layers(
            self.num_hidden_layers,
            window=self.sliding_window,
            global_layers=self.global_attn_idx,
            kv_groups=self.kv_reuse_group,
            kv_every=self.kv_reuse_every_i_layer,
        )

    @property
    def layer_types(self) -> list[str] | None:
        """The layers in transformers' words, which its caches ask for; `None` before the fields have been checked."""
        try:
            return [_layer_type(spec) for spec in self.layers]
        except (TypeError, ValueError):
            return None

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """Width of the Mamba branch and of the attention branch's output."""
        return self.mamba_expand * self.hidden_size

    def attention_shape(self, spec: LayerSpec) -> tuple[int, int, int]:
        """Query heads, key/value heads and width of a value head of a layer with attention heads."""
        heads = spec.heads or self.num_attention_heads
        kv_heads = spec.kv_heads or (heads if spec.heads else int(self.num_key_value_heads or heads))
        if spec.v_head_dim is not None:
            return heads, kv_heads, spec.v_head_dim
        return heads, kv_heads, self.head_dim if spec.mixer == "attention" else int(self.v_head_dim or 0)

    def ssm_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """Mamba-2 heads of a layer and their groups."""
        return self.d_inner // (spec.ssm_head_dim or 64), spec.ssm_groups or 1

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies; `"ntk"` is a fixed change of base (SPEC section 2.6)."""
        if self.rope_type != "ntk":
            return float(self.rope_theta)
        original = self.orig_max_position_embeddings or self.max_position_embeddings
        scale = 2 * self.max_position_embeddings / original - 1
        return float(self.rope_theta) * scale ** (self.head_dim / (self.head_dim - 2))

    def validate_architecture(self) -> None:
        """Refuse what the library does not build, naming field, value and what is allowed."""

        def refuse(field: str, allowed: str) -> None:
            raise ConfigError(f"{field}={getattr(self, field)!r} is not supported; allowed: {allowed}")

        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "mamba_d_state mamba_expand mamba_dt_rank max_position_embeddings"
        )
        for field in positive.split():
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                refuse(field, "integers from 1" + (' or "auto"' if field == "mamba_dt_rank" else ""))
        if self.mamba_d_conv < 2:
            refuse("mamba_d_conv", "integers from 2")
        if self.num_memory_tokens < 0:
            refuse("num_memory_tokens", "integers from 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            refuse("sliding_window", "integers from 1, or null for no window")
        for field in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, field) > 0:
                refuse(field, "numbers above 0")
        if self.embedding_initializer_range is not None and not self.embedding_initializer_range > 0:
            refuse("embedding_initializer_range", "numbers above 0, or null for that of all weights")
        if not 0 <= self.attention_dropout < 1:
            refuse("attention_dropout", "numbers from 0 to below 1")

        if self.memory_tokens_interspersed_every > 0:
            refuse("memory_tokens_interspersed_every", "0 (meta tokens stand once, before the text)")
        if self.num_experts > 1:
            refuse("num_experts", "1")
        if self.num_mamba != 1:
            refuse("num_mamba", "1")
        if self.kv_weight_reuse:
            refuse("kv_weight_reuse", "false")
        if (self.attn_hidden_size or -1) > 0:
            refuse("attn_hidden_size", "-1 (attention as wide as the model)")
        if not self.rope:
            refuse("rope", "true")
        if (self.kq_head_dim or -1) > 0:
            refuse("kq_head_dim", "-1 (hidden_size / num_attention_heads)")
        if not self.mamba_inner_layernorms:
            refuse("mamba_inner_layernorms", "true")
        if not self.mamba_conv_bias:
            refuse("mamba_conv_bias", "true")
        for field, allowed in (
            ("rope_type", _ROPE_TYPES),
            ("kq_norm", _QK_NORMS),
            ("mlp_hidden_act", _MLP_ACTIVATIONS),
            ("hidden_act", ("silu",)),
        ):
            if getattr(self, field) not in allowed:
                refuse(field, ", ".join("null" if a is None else repr(a) for a in allowed))
        if self.layer_type is not None:
            if any(kind != "h" for kind in self.layer_type):
                refuse("layer_type", '"h" for every layer')
            if len(self.layer_type) != self.num_hidden_layers:
                refuse("layer_type", f"one entry for each of the {self.num_hidden_layers} layers")

        heads = self.num_attention_heads
        if self.hidden_size % heads:
            refuse("num_attention_heads", f"divisors of hidden_size={self.hidden_size}")
        if self.head_dim % 2:
            refuse("hidden_size", f"values whose head width hidden_size / {heads} is even (rotary needs pairs)")
        if heads % (self.num_key_value_heads or heads):
            refuse("num_key_value_heads", f"divisors of num_attention_heads={heads}")
        if self.v_head_dim != self.d_inner // heads:
            refuse(
                "v_head_dim",
                f"mamba_expand * hidden_size / num_attention_heads = {self.d_inner // heads}, or null",
            )
        if self.rope_type == "ntk":
            if self.head_dim == 2:
                refuse("rope_type", '"default" with a head width of 2')
            original = self.orig_max_position_embeddings or self.max_position_embeddings
            if 2 * self.max_position_embeddings / original <= 1:
                refuse("orig_max_position_embeddings", f"less than 2 * {self.max_position_embeddings}")
        self._validate_layers(refuse)

    def _validate_layers(self, refuse: Callable[[str, str], None]) -> None:
        specs = self.layers
        if self.layer_pattern is None:
            return
        for field, off in (
            ("global_attn_idx", None),
            ("kv_reuse_group", None),
            ("kv_reuse_every_i_layer", -1),
            ("layer_type", None),
        ):
            if getattr(self, field) not in (off, None):
                refuse(field, f"{'null' if off is None else off}, since layer_pattern says what each layer is")
        if len(specs) != self.num_hidden_layers:
            refuse("num_hidden_layers", f"{len(specs)}, the number of layers in layer_pattern")
        for i, spec in enumerate(specs):
            heads, kv_heads, value = self.attention_shape(spec)
            if spec.scans and spec.ssm == "mamba2":
                width = spec.ssm_head_dim or 64
                if self.d_inner % width:
                    raise ConfigError(
                        f"layer_pattern: layer {i} has ssm_head_dim={width}; allowed: divisors of {self.d_inner}"
                    )
                scanning, groups = self.ssm_shape(spec)
                if scanning % groups:
                    raise ConfigError(
                        f"layer_pattern: layer {i} has ssm_groups={groups}; allowed: divisors of its {scanning} heads"
                    )
            if not spec.attends:
                continue
            if heads % kv_heads:
                raise ConfigError(
                    f"layer_pattern: layer {i} has kv_heads={kv_heads}; allowed: divisors of its {heads} heads"
                )
            if spec.kv_from is not None:
                lent = self.attention_shape(specs[spec.kv_from])[1:]
                if lent != (kv_heads, value):
                    raise ConfigError(
                        f"layer_pattern: layer {i} has kv_heads={kv_heads}, v_head_dim={value}; allowed: {lent[0]} and "
                        f"{lent[1]}, those of layer {spec.kv_from}, whose keys and values it borrows"
                    )
            if spec.mixer == "hybrid" and spec.fusion == "mean" and heads * value != self.d_inner:
                raise ConfigError(
                    f"layer_pattern: layer {i} has heads={heads} with values of width {value}, {heads * value} in all; "
                    f'allowed with fusion="mean": {self.d_inner} in all, or fusion="concat"'
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from a checkpoint's `config.json`; keyword arguments replace fields before checking.

        Unknown keys of the file give one warning and are kept; unknown keyword arguments are returned or refused.
        """
        fields = cls.__dataclass_fields__
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        for key, value in config_dict.items():
            ours = key in fields or key in _TRANSFORMERS_KEYS or key in _EXPERT_FIELDS
            (known if ours else kept)[key] = value
        if kept and not KEYS_REPORTED.get():
            logger.warning(
                f"config.json has keys that HymbaConfig does not know: {', '.join(sorted(kept))}. "
                "They are not read, and are kept when the configuration is saved."
            )
        # The release stores `use_cache: false`, with which `generate` would recompute the sequence at every step.
        known["use_cache"] = True
        # A name of the reference's implementations, not one of transformers'.
        known.pop("attn_implementation", None)
        if "attn_implementation" in kwargs:
            # Asked for by name, not left in a file by the reference.
            check_attention_implementation(kwargs["attn_implementation"])
            known["attn_implementation"] = kwargs.pop("attn_implementation")
        for key in [k for k in kwargs if k in fields or k in ("torch_dtype", "output_attentions", "name_or_path")]:
            if key in ("dtype", "torch_dtype"):
                # `from_pretrained` needs it too, so it stays among the unused ones.
                if kwargs[key] != "auto":
                    known["torch_dtype"] = kwargs[key]
                    known.pop("dtype", None)
                continue
            known[key] = kwargs.pop(key)
        for key in ("_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(key, None)
        if kwargs.get("gguf_file", "") is None:
            # lm-evaluation-harness says so to every Auto class.
            del kwargs["gguf_file"]
        if not return_unused:
            unknown = [k for k in kwargs if k not in ("dtype", "torch_dtype", "trust_remote_code", "code_revision")]
            if unknown:
                named = "; ".join(f"{k}={kwargs[k]!r}.{nearest(k, fields)}" for k in unknown)
                raise ConfigError(f"HymbaConfig has no field {named}")
        config = cls(**known)
        for key, value in kept.items():
            setattr(config, key, value)
        return (config, kwargs) if return_unused else config

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: code of an installed package is not copied beside checkpoints. See `hymba.conversion`."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, readable by the reference."""
        # PEFT asks for this dictionary before it looks the model type up in its table of default targets.
        name_default_targets()
        output = super().to_dict()
        output |= output.pop("_expert_fields", _EXPERT_FIELDS)
        output.pop("rope_parameters", None)
        if output.get("embedding_initializer_range") is None:
            output.pop("embedding_initializer_range", None)
        if output.get("layer_pattern") is None:
            output.pop("layer_pattern", None)
            output["attn_implementation"] = output["attn_implementation_new"] = "flex"
        # Code beside the checkpoint is not copied on save; a link into a repository ("repo--module.Class") stays valid.
        auto_map = {k: v for k, v in (output.pop("auto_map", None) or {}).items() if "--" in str(v)}
        if auto_map:
            output["auto_map"] = auto_map
        if output.get("conv_dim") is None:
            output.pop("conv_dim", None)
        else:
            output["conv_dim"] = {str(k): v for k, v in output["conv_dim"].items()}
        return output

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`. The reference's transformers reads `torch_dtype`, not `dtype`."""
        fields = json.loads(super().to_json_string(use_diff=use_diff))
        if "dtype" in fields:
            fields["torch_dtype"] = fields.pop("dtype")
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


_STATE_FIELDS = (
    "hidden_size num_attention_heads num_key_value_heads v_head_dim num_memory_tokens rope_base mamba_d_state "
    "mamba_d_conv mamba_expand"
).split()


def _layer_type(spec: LayerSpec) -> str:
    if spec.mixer == "mamba":
        return "linear_attention"
    kind = "hybrid" if spec.mixer == "hybrid" else "full_attention"
    return kind if spec.window is None else {"hybrid": "hybrid_sliding", "full_attention": "sliding_attention"}[kind]


def _spec_values(config: HymbaConfig, spec: LayerSpec) -> list[Any]:
    """What the state of a layer depends on; short for a hybrid layer of the configuration's shape."""
    extra = [spec.mixer, *config.attention_shape(spec)]
    if spec.scans and spec.ssm != "mamba":
        extra += [spec.ssm, *config.ssm_shape(spec)]
    plain = [*config.attention_shape(LayerSpec())]
    return [spec.window, spec.kv_from] + (extra if extra != ["hybrid", *plain] else [])


def architecture(config: HymbaConfig) -> dict[str, Any]:
    """What a state depends on besides the weights, as plain values by name."""
    layers = {f"layer {i}": _spec_values(config, spec) for i, spec in enumerate(config.layers)}
    fields = {name: getattr(config, name) for name in _STATE_FIELDS}
    return {"num_hidden_layers": len(layers), **fields, "kq_norm": config.kq_norm or "none", **layers}


def differences(one: dict[str, Any], two: dict[str, Any], names: tuple[str, str]) -> str:
    """`"name: one 1, two 2; ..."` for what differs, at most five of them; empty when nothing does."""
    keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    if len(keys) > 5:
        keys = [key for key in keys if not key.startswith("layer ")] or keys
    return "; ".join(f"{key}: {names[0]} {one.get(key)!r}, {names[1]} {two.get(key)!r}" for key in keys[:5])


def _plain_errors(init: Any) -> Any:
    """Raise what the strict base class finds wrong as a `ConfigError`, which is a `ValueError`."""

    @functools.wraps(init)
    def wrapped(self: HymbaConfig, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except StrictDataclassFieldValidationError as error:
            named = re.search(r"field '(\w+)'", str(error))
            field = named[1] if named else ""
            if field not in HymbaConfig.__annotations__:
                raise ConfigError(str(error)) from error
            wanted = str(getattr(HymbaConfig.__annotations__[field], "__name__", HymbaConfig.__annotations__[field]))
            wanted = wanted.replace("None", "null").replace(" | ", " or ")
            raise ConfigError(f"{field}={kwargs.get(field)!r} has the wrong type; allowed: {wanted}") from None
        except StrictDataclassError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError):
                raise cause from None
            raise ConfigError(str(error)) from error

    return wrapped


HymbaConfig.__init__ = _plain_errors(HymbaConfig.__init__)  # type: ignore[method-assign]
