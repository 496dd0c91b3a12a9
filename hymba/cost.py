"""What a model costs, from its configuration alone: parameters, floating-point operations, cache bytes.

Nothing is built and torch is not needed. The tests hold every figure to a real model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hymba.layout import LayerSpec

if TYPE_CHECKING:
    from hymba.config import HymbaConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE_BYTES = 4
"""The SSM state is float32 whatever the model's dtype."""


class Parts:
    """A frozen dataclass of integers that add up."""

    @property
    def total(self) -> int:
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, int]:
        """Part name to value, without the total."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Parameters(Parts):
    """Parameters by what they are for; a shared matrix is split by its rows.

    Attributes:
        embedding: token embeddings. head: the output matrix, 0 when it is the embedding.
        meta_tokens: the learned vectors before the text.
        attention: projections to queries, keys and values, and their norms.
        mamba: projections to SSM input and gate, convolution, step size, B, C, A, D, and the three norms.
        fusion: the output projection and, where there are two branches, the norm of each.
        mlp: the feed-forward halves.
        norms: before each mixer and MLP, and the last one.
    """

    embedding: int
    head: int
    meta_tokens: int
    attention: int
    mamba: int
    fusion: int
    mlp: int
    norms: int


@dataclass(frozen=True)
class Flops(Parts):
    """Forward FLOPs, a multiplication and an addition counted as two.

    Attributes:
        projections: into and out of the mixers.
        attention: scores and weighted values; the only part that depends on the length.
        mamba: convolution, projections to step size, B and C, and the scan.
        mlp: the feed-forward halves. head: the logits.

    Not counted: the embedding lookup, norms, activations, rotary, softmax, residual additions, and the pass of the
    meta tokens, which happens once per cache.
    """

    projections: int
    attention: int
    mamba: int
    mlp: int
    head: int


@dataclass(frozen=True)
class CacheBytes(Parts):
    """Bytes that decoding holds.

    Attributes:
        global_kv: keys and values of the text on layers without a window; a layer that borrows has none.
        windowed_kv: the same on layers with one.
        meta_kv: keys and values of the meta tokens, held once for the whole batch.
        conv: the last inputs of each convolution. ssm: the SSM states, float32.
    """

    global_kv: int
    windowed_kv: int
    meta_kv: int
    conv: int
    ssm: int


def parameters(config: HymbaConfig) -> Parameters:
    """Parameters by part, as `sum(p.numel() for p in model.parameters())` counts them (a tied head once)."""
    d, inner, state = config.hidden_size, config.d_inner, config.mamba_d_state
    rank = int(config.mamba_dt_rank)
    bias = 1 if config.mamba_proj_bias else 0
    attention = mamba = fusion = mlp = norms = 0
    for spec in config.layers:
        if spec.attends:
            attention += qkv_width(config, spec) * (d + bias) + _qk_norm(config, spec)
        if spec.scans:
            convolved, projected = ssm_widths(config, spec)
            mamba += (projected + inner) * (d + bias) + convolved * (config.mamba_d_conv + 1)
            if spec.ssm == "mamba":
                mamba += inner * (rank + 2 * state) + rank * inner
                # dt_bias, A_log and D, then the norms of step size, B and C.
                mamba += inner * (2 + state) + rank + 2 * state
            else:
                # dt_bias, A_log and D of each head; a hybrid's branch norm, in fusion, is the norm of the gated output.
                mamba += 3 * config.ssm_shape(spec)[0] + (inner if spec.mixer == "mamba" else 0)
        fusion += d * (fused_width(config, spec) + bias)
        if spec.mixer == "hybrid":
            fusion += attended_width(config, spec) + inner
        norms += d
        if spec.ffn:
            mlp += mlp_matrices(config) * d * config.intermediate_size
            norms += d
    embedding = config.vocab_size * d
    return Parameters(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        meta_tokens=config.num_memory_tokens * d,
        attention=attention,
        mamba=mamba,
        fusion=fusion,
        mlp=mlp,
        norms=norms + d,
    )


def flops_per_token(config: HymbaConfig, length: int) -> Flops:
    """Forward FLOPs of one token that has `length` text tokens before it."""
    _check("length", length, 0)
    return _flops(config, tokens=1, visible=lambda window: _sees(length, window) + config.num_memory_tokens)


def flops_of_text(config: HymbaConfig, length: int) -> Flops:
    """Forward FLOPs of a text of `length` tokens, logits at every one: the sum of `flops_per_token` over it."""
    _check("length", length, 0)

    def visible(window: int | None) -> int:
        reach = length if window is None else min(window, length)
        # The first `reach` tokens see 1, 2, ..., reach keys, the others window + 1 each.
        return reach * (reach + 1) // 2 + (length - reach) * (reach + 1) + length * config.num_memory_tokens

    return _flops(config, tokens=length, visible=visible)


def cache_bytes(
    config: HymbaConfig, length: int, *, batch: int = 1, dtype: Any = "bfloat16", static: bool = False
) -> CacheBytes:
    """Bytes that a `HymbaCache` holds for `batch` rows of `length` text tokens.

    Args:
        config: the architecture.
        length: text tokens per row; for a static cache the `max_length` that it has room for.
        batch: rows.
        dtype: of keys, values and convolution inputs: a name of `DTYPE_BYTES` or a torch dtype.
        static: buffers of a fixed size, in which a windowed layer has one slot more than its window. Without, the
            bytes after one prefill; a cache that grows token by token has up to a quarter of spare slots on layers
            without a window.

    Raises:
        ValueError: a length, batch or dtype that cannot be.
    """
    _check("length", length, 0)
    _check("batch", batch, 1)
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype={dtype!r}: allowed: {', '.join(DTYPE_BYTES)}")
    width = DTYPE_BYTES[name]
    global_kv = windowed_kv = meta_kv = 0
    for spec in config.layers:
        if not spec.attends or spec.kv_from is not None:
            continue
        position = kv_width(config, spec) * width
        meta_kv += config.num_memory_tokens * position
        if spec.window is None:
            global_kv += length * position
        else:
            windowed_kv += min(length, spec.window + (1 if static else 0)) * position
    layers, inner = sum(spec.scans for spec in config.layers), config.d_inner
    convolved = sum(ssm_widths(config, spec)[0] for spec in config.layers if spec.scans)
    return CacheBytes(
        global_kv=batch * global_kv,
        windowed_kv=batch * windowed_kv,
        meta_kv=meta_kv,
        conv=batch * convolved * (config.mamba_d_conv - 1) * width,
        ssm=batch * layers * inner * config.mamba_d_state * STATE_BYTES,
    )


def paper_cache_bytes(config: HymbaConfig, length: int = 8000) -> float:
    """Cache bytes by the arithmetic behind the paper's tables, for comparison with them only.

    Two bytes a number throughout; meta tokens on the global layers alone; with KV sharing exactly half of the windowed
    layers own keys and values, whatever the groups are; no convolution inputs; and the tables' "8k" is 8,000 tokens,
    their MB 10^6 bytes. For what a cache takes up, see `cache_bytes`.
    """
    _check("length", length, 0)
    specs = config.layers
    share = 2 if any(spec.kv_from is not None for spec in specs) else 1
    numbers = 0.0
    for spec in specs:
        if spec.attends:
            slots = length + config.num_memory_tokens if spec.window is None else spec.window / share
            numbers += kv_width(config, spec) * slots
        if spec.scans:
            numbers += config.d_inner * config.mamba_d_state
    return 2 * numbers


def _check(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: allowed: integers from {least}")


def kv_width(config: HymbaConfig, spec: LayerSpec) -> int:
    """Numbers that one position's key and value take up on a layer with attention heads."""
    _, kv_heads, value = config.attention_shape(spec)
    return kv_heads * (config.head_dim + value)


def ssm_widths(config: HymbaConfig, spec: LayerSpec) -> tuple[int, int]:
    """Channels of the convolution, and rows of the input projection that feed the Mamba heads besides the gate."""
    if spec.ssm == "mamba":
        return config.d_inner, config.d_inner
    # B and C of each group take part in the convolution; the step size of each head does not.
    heads, groups = config.ssm_shape(spec)
    convolved = config.d_inner + 2 * groups * config.mamba_d_state
    return convolved, convolved + heads


def qkv_width(config: HymbaConfig, spec: LayerSpec) -> int:
    """Rows of the input projection that make queries, keys and values; 0 without attention heads."""
    if not spec.attends:
        return 0
    heads, _, _ = config.attention_shape(spec)
    return heads * config.head_dim + (kv_width(config, spec) if spec.kv_from is None else 0)


def attended_width(config: HymbaConfig, spec: LayerSpec) -> int:
    """Width of the attention branch's output; 0 without attention heads."""
    heads, _, value = config.attention_shape(spec)
    return heads * value if spec.attends else 0


def fused_width(config: HymbaConfig, spec: LayerSpec) -> int:
    """What the output projection reads."""
    scanned = config.d_inner if spec.scans else 0
    both = (attended_width(config, spec), scanned)
    return sum(both) if spec.fusion == "concat" else max(both)


def _qk_norm(config: HymbaConfig, spec: LayerSpec) -> int:
    heads, kv_heads, _ = config.attention_shape(spec)
    if config.kq_norm == "rms":
        return 2 * config.head_dim
    if config.kq_norm == "perhead-rms":
        return (heads + kv_heads) * config.head_dim
    return 0


def mlp_matrices(config: HymbaConfig) -> int:
    """Matrices of an MLP: three with a gate projection, else two."""
    return 3 if config.mlp_hidden_act == "silu" else 2


def _sees(length: int, window: int | None) -> int:
    """Text keys that a token with `length` tokens before it sees, its own included."""
    return 1 + (length if window is None else min(length, window))


def _flops(config: HymbaConfig, *, tokens: int, visible: Any) -> Flops:
    """FLOPs of `tokens` tokens whose visible keys, summed over them, are `visible(window)` on a layer."""
    d, inner, state = config.hidden_size, config.d_inner, config.mamba_d_state
    rank = int(config.mamba_dt_rank)
    # Per channel and state: dt*A, exp, (dt*x)*B, state*decay, their sum, times C, added up; per channel: dt*x,
    # D*x added, times the gate.
    scan = inner * (7 * state + 4)
    branch = 2 * inner * (rank + 2 * state + rank) + scan
    projections = attention = mamba = mlp = 0
    for spec in config.layers:
        projections += 2 * d * (qkv_width(config, spec) + fused_width(config, spec))
        if spec.attends:
            # A key costs one product of width head_dim and one of width v_head_dim in every query head.
            heads, _, value = config.attention_shape(spec)
            attention += 2 * heads * (config.head_dim + value) * visible(spec.window)
        if spec.scans:
            convolved, projected = ssm_widths(config, spec)
            projections += 2 * d * (projected + inner)
            mamba += 2 * convolved * config.mamba_d_conv
            # In Mamba-2 the decay, dt*A and exp, is one number per head.
            mamba += branch if spec.ssm == "mamba" else inner * (5 * state + 4) + 2 * config.ssm_shape(spec)[0]
        mlp += 2 * mlp_matrices(config) * d * config.intermediate_size if spec.ffn else 0
    return Flops(
        projections=tokens * projections,
        attention=attention,
        mamba=tokens * mamba,
        mlp=tokens * mlp,
        head=tokens * 2 * config.vocab_size * d,
    )
