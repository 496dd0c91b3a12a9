"""How much device memory work needs, from a configuration alone, and a refusal before anything is allocated.

The cache's part is exact (`hymba.cost`). Activations are counted from what the layers keep at their widest moment, in
numbers per token and layer, with the kernels of a GPU; tests on one hold them to its allocator. Where a device does
not say what is free (a CPU), nothing is refused; `HYMBA_MEMORY_CHECK=off` refuses nothing anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hymba import cost

if TYPE_CHECKING:
    from hymba.config import HymbaConfig
    from hymba.layout import LayerSpec

ENV = "HYMBA_MEMORY_CHECK"
POLICIES = ("none", "selective", "full")
"""Activation checkpointing in training, as `set_activation_checkpointing` names it."""
_GIB = 2**30
# The scan keeps its float32 state once per so many steps.
_SCAN_CHUNK = 256
# Logits of the fused loss that exist together.
_LOSS_AT_ONCE = 1 << 27


class MemoryEstimateError(ValueError):
    """Work that will not fit; the message says what it needs, what is free and what would fit."""


@dataclass(frozen=True)
class MemoryBytes(cost.Parts):
    """Bytes at the peak of some work, by what holds them.

    Attributes:
        weights: parameters, and their copies in autocast's dtype. gradients: those that exist at the peak. optimizer:
            two moments as wide as the parameters.
        cache: keys, values and states of decoding. activations: what layers keep, and the widest layer's work.
        logits: of the positions whose logits are asked for, with their float32 copies.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0


def generation_bytes(
    config: HymbaConfig,
    *,
    batch: int,
    prompt: int,
    length: int,
    dtype: Any = "bfloat16",
    static: bool = False,
    chunk: int | None = None,
    weights: int | None = None,
) -> MemoryBytes:
    """Bytes of a prefill and the decoding behind it.

    Args:
        config: the architecture.
        batch: rows. prompt: tokens of a row that are taken in at once. length: tokens of a row at the end.
        dtype: of weights and cache.
        static: a cache of fixed size; one that grows is copied while it does.
        chunk: take the prompt in so many tokens at a time.
        weights: their bytes, where they are not all in `dtype` (quantised ones).
    """
    width = cost.DTYPE_BYTES[_name(dtype)]
    tokens = batch * min(prompt, prompt if chunk is None else chunk)
    cache = cost.cache_bytes(config, length, batch=batch, dtype=dtype, static=static)
    total = cache.total
    if not static:
        # The largest buffer exists twice while it grows by a quarter.
        owners = sum(spec.is_global and spec.kv_from is None for spec in config.layers)
        total += cache.global_kv // 4 + (5 * cache.global_kv // (4 * owners) if owners else 0)
    return MemoryBytes(
        weights=cost.parameters(config).total * width if weights is None else weights,
        cache=total,
        activations=tokens * width * max(_widest_moment(config, spec) for spec in config.layers),
        logits=batch * config.vocab_size * (width + 8),
    )


def training_bytes(
    config: HymbaConfig,
    *,
    batch: int,
    length: int,
    parameter_dtype: Any = "float32",
    compute_dtype: Any = "bfloat16",
    optimizer: bool = True,
    checkpointing: str = "none",
    fused_loss: bool = False,
    shards: int = 1,
) -> MemoryBytes:
    """Bytes of a training step.

    Args:
        config: the architecture.
        batch, length: rows and tokens of a row on one device.
        parameter_dtype: of parameters and gradients. compute_dtype: of activations; another one is autocast.
        optimizer: two moments for every parameter, as AdamW keeps them.
        checkpointing: one of `POLICIES`.
        fused_loss: the loss without the logits of all tokens.
        shards: devices that share parameters, gradients and moments; what they gather for the layers at work comes on
            top.

    Raises:
        ValueError: a policy or dtype that there is not.
    """
    if checkpointing not in POLICIES:
        raise ValueError(f"checkpointing={checkpointing!r}: allowed: {', '.join(map(repr, POLICIES))}")
    wide, width = cost.DTYPE_BYTES[_name(parameter_dtype)], cost.DTYPE_BYTES[_name(compute_dtype)]
    count, tokens = cost.parameters(config).total, batch * length
    kept = sum(_kept(config, spec, checkpointing) for spec in config.layers)
    whole = max(_kept(config, spec, "none") for spec in config.layers)
    # Backward through one layer: gradients of the MLP's products and of the stream, and what is made again.
    ffn = config.intermediate_size * max((spec.ffn for spec in config.layers), default=False)
    work = 2 * ffn + 2 * config.hidden_size + (ffn if checkpointing == "selective" else 0)
    again = whole if checkpointing == "full" else 0
    d, vocabulary = config.hidden_size, config.vocab_size
    if fused_loss:
        # A block of logits and the head's gradient in float32; then the gradients of hidden states and head, kept and
        # multiplied.
        at_loss = min(tokens * vocabulary, _LOSS_AT_ONCE) * width + tokens * d * width + vocabulary * d * (4 + wide)
        behind = 2 * (tokens * d * width + vocabulary * d * wide)
    else:
        # In the compute dtype, then in float32: themselves, their softmax, their gradient.
        at_loss, behind = tokens * vocabulary * (width + 12), vocabulary * d * wide
    size = tokens * width
    gradients = count * wide * (len(config.layers) - 1) // len(config.layers)
    # Autocast copies the weights; where layers are run again, layer by layer once the first copies are gone.
    copies = count * width if width != wide else 0
    later = copies // len(config.layers) if checkpointing == "full" else copies
    # Gradients come as activations go: the peak is at the loss, where backward starts, or in the layer where it ends.
    moments = (
        MemoryBytes(weights=copies, activations=size * kept, logits=at_loss),
        MemoryBytes(weights=later, activations=size * (kept + again + work), logits=behind),
        MemoryBytes(weights=later, activations=size * (whole + work), gradients=gradients),
    )
    peak = max(moments, key=lambda moment: moment.total)
    # The embedding stays gathered for the step; of the layers the one at work and the next one, and a gradient.
    outside = vocabulary * d * (1 if config.tie_word_embeddings else 2)
    gathered = 0 if shards == 1 else wide * (outside + 2 * (count - outside) // len(config.layers))
    return replace(
        peak,
        weights=peak.weights + count * wide // shards + gathered,
        gradients=peak.gradients // shards + (gathered if peak.gradients else 0),
        optimizer=2 * count * wide // shards if optimizer else 0,
    )


def _kept(config: HymbaConfig, spec: LayerSpec, checkpointing: str) -> int:
    """Numbers that a layer keeps for backward, per token."""
    d, state = config.hidden_size, config.mamba_d_state
    inner = config.d_inner if spec.scans else 0
    owns = spec.attends and spec.kv_from is None
    if checkpointing == "full":
        # The layer's input, and keys and values that others may borrow.
        return d + (cost.kv_width(config, spec) if owns else 0)
    rank, ffn = int(config.mamba_dt_rank), config.intermediate_size if spec.ffn else 0
    matrices = cost.mlp_matrices(config) if spec.ffn else 0
    # The residual stream twice; the projection's output; rotated queries and keys; what attention and scan put out,
    # the states inside the scan, B, C and the rank of dt; what MLP products read.
    keys = config.attention_shape(spec)[1] * config.head_dim if owns else 0
    convolved, projected = cost.ssm_widths(config, spec) if spec.scans else (0, 0)
    kept = 2 * d + cost.qkv_width(config, spec) + projected + inner + d + keys
    kept += cost.attended_width(config, spec) + (matrices - 1) * ffn
    if spec.scans:
        kept += inner + 2 * inner * state // _SCAN_CHUNK
        kept += 2 * (rank + 2 * state) if spec.ssm == "mamba" else 0
    if checkpointing == "none":
        # Outputs of both norms, convolution, step sizes (the gated output of Mamba-2), the branches' mean, and the
        # MLP's product.
        kept += 2 * d + convolved + 2 * inner + ffn
    return kept


def _widest_moment(config: HymbaConfig, spec: LayerSpec) -> int:
    """Numbers that exist together in a forward pass without gradients, per token."""
    d, inner = config.hidden_size, config.d_inner if spec.scans else 0
    ffn = config.intermediate_size * cost.mlp_matrices(config) if spec.ffn else 0
    # In the scan: embeddings, residual stream and normed input, the projection's output, rotated queries, what
    # attention put out, the convolution's output, step sizes, and what the scan puts out.
    convolved, fed = cost.ssm_widths(config, spec) if spec.scans else (0, 0)
    projected = cost.qkv_width(config, spec) + fed + inner
    # In the MLP: embeddings, the stream before, behind and between, its normed form, the products, and the projection
    # whose values are shared.
    attended = cost.attended_width(config, spec)
    moment = 3 * d + projected + d + attended + convolved + 2 * inner
    return max(moment, 5 * d + ffn + (projected if spec.kv_from is None else 0))


def enabled() -> bool:
    """Whether work that will not fit is refused."""
    return os.environ.get(ENV, "").lower() not in ("off", "0")


def free_bytes(device: Any) -> int | None:
    """Bytes that new tensors could take up on a device, unused parts of PyTorch's pool included; `None` if unknown."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)  # pragma: gpu
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # pragma: gpu


def check_fits(
    what: str,
    need: Callable[[int, int], MemoryBytes],
    *,
    batch: int,
    length: int,
    device: Any,
    held: int = 0,
    advice: str = "",
) -> None:
    """Refuse work that will not fit into what is free on a device.

    Args:
        what: the work, for the message ("generation").
        need: (rows, tokens of a row) to the bytes that they need.
        batch, length: rows and tokens asked for.
        held: bytes of `need` that are allocated already, such as a loaded model's weights.
        advice: what else would help.

    Raises:
        MemoryEstimateError: it will not fit.
    """
    free = free_bytes(device) if enabled() else None
    if free is None:
        return
    wanted = need(batch, length)
    if wanted.total - held <= free:
        return
    rows = _largest(lambda b: need(b, length).total - held <= free, batch)
    tokens = _largest(lambda n: need(batch, n).total - held <= free, length)
    options = [f"{rows} of {batch} rows"] if rows else []
    options += [f"{tokens:,} of {length:,} tokens a row"] if tokens else []
    parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in wanted.to_dict().items() if size >= _GIB / 20)
    raise MemoryEstimateError(
        f"{what} of {batch} rows of {length:,} tokens needs about {wanted.total / _GIB:.1f} GiB ({parts}), of which "
        f"{held / _GIB:.1f} are there, and {device} has {free / _GIB:.1f} GiB free; would fit: "
        f"{' or '.join(options) or 'not one row of one token'}{advice and '; ' + advice} ({ENV}=off tries anyway)"
    )


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits; 0 when 1 does not. What fits also fits when it is smaller."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
