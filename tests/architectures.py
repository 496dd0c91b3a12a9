"""Random small architectures and batches, for hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from helpers import VOCAB, build
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

from hymba import HymbaConfig

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def configs(draw: st.DrawFn, *, layers: int = 5, **fixed: Any) -> HymbaConfig:
    """Any architecture that the configuration allows, small: every option, every form of KV sharing."""
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    heads, head_dim = kv_heads * groups, draw(st.sampled_from([2, 4, 6, 8]))
    depth = draw(st.integers(1, layers))
    window = draw(st.none() | st.integers(1, 7))
    sharing: dict[str, Any] = {}
    form = draw(st.sampled_from(["none", "groups", "groups", "every"]))
    if form == "every":
        every = draw(st.integers(1, depth))
        sharing["kv_reuse_every_i_layer"] = every
        # A group is of one kind, so whole groups are made global.
        blocks = [list(range(at, min(at + every, depth))) for at in range(0, depth, every)]
        global_layers = [layer for block in blocks if draw(st.booleans()) for layer in block]
    else:
        global_layers = [layer for layer in range(depth) if draw(st.integers(0, 3)) == 0]
    if form == "groups":
        parts = []
        kinds = [set(range(depth))] if window is None else [set(global_layers), set(range(depth)) - set(global_layers)]
        for kind in kinds:
            members = draw(st.permutations(sorted(kind)))
            while len(members) > 1:
                size = draw(st.integers(1, len(members)))
                group, members = sorted(members[:size]), members[size:]
                if size > 1:
                    parts.append(group)
        sharing["kv_reuse_group"] = parts or None
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(3, 20)),
        "num_hidden_layers": depth,
        "sliding_window": window,
        "global_attn_idx": global_layers or draw(st.sampled_from([None, []])),
        "num_memory_tokens": draw(st.integers(0, 5)),
        "kq_norm": draw(st.sampled_from(["none", "rms", "perhead-rms", None])),
        "mlp_hidden_act": draw(st.sampled_from(["silu", "relu2"])),
        "mamba_proj_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "mamba_d_conv": draw(st.integers(2, 5)),
        "mamba_d_state": draw(st.integers(1, 5)),
        "mamba_dt_rank": draw(st.sampled_from(["auto", 1, 2, 5])),
        "mamba_expand": draw(st.integers(1, 3)),
        "rope_type": draw(st.sampled_from(["default", None] if head_dim == 2 else ["ntk", "default", None])),
        "rope_theta": draw(st.sampled_from([10000.0, 50.0])),
        "max_position_embeddings": 64,
        "orig_max_position_embeddings": draw(st.sampled_from([None, 16, 64])),
        "layer_type": draw(st.sampled_from([None, ["h"] * depth])),
    }
    if draw(st.integers(0, 3)) == 0:
        released = dict.fromkeys(("global_attn_idx", "layer_type", "kv_reuse_group"))
        pattern = draw(patterns(depth, kv_heads, groups, head_dim, fields["mamba_expand"]))
        return HymbaConfig(**(fields | released | {"layer_pattern": pattern} | fixed))
    return HymbaConfig(**(fields | sharing | fixed))


@st.composite
def patterns(
    draw: st.DrawFn, depth: int, kv_heads: int, groups: int, head_dim: int, expand: int
) -> list[dict[str, Any]]:
    """Any list of layers: every mixer, both fusions, both SSMs, narrower branches, lenders of either kind."""
    pattern: list[dict[str, Any]] = []
    lenders: list[tuple[int, tuple[Any, ...]]] = []
    for i in range(depth):
        mixer = draw(st.sampled_from(["hybrid", "hybrid", "attention", "mamba"]))
        layer: dict[str, Any] = {"mixer": mixer, "ffn": draw(st.booleans())}
        pattern.append(layer)
        if mixer != "attention" and draw(st.booleans()):
            # Divisors of the width whatever it is: kv_heads and groups make up its heads.
            width = draw(st.sampled_from([head_dim, expand * head_dim]))
            layer |= {"ssm": "mamba2", "ssm_head_dim": width, "ssm_groups": draw(st.sampled_from([1, kv_heads]))}
        if mixer == "mamba":
            continue
        layer["window"] = draw(st.none() | st.integers(1, 7))
        value = head_dim if mixer == "attention" else expand * head_dim
        if mixer == "attention" or draw(st.booleans()):
            layer["heads"], layer["kv_heads"] = kv_heads * draw(st.integers(1, groups)), kv_heads
            layer["v_head_dim"] = value = draw(st.sampled_from([head_dim, expand * head_dim]))
            if mixer == "hybrid":
                layer["fusion"] = "concat"
        shape = (layer["window"], layer.get("kv_heads"), value)
        fitting = [lender for lender, of in lenders if of == shape]
        if fitting and draw(st.booleans()):
            layer["kv_from"] = draw(st.sampled_from(fitting))
        else:
            lenders.append((i, shape))
    return pattern


@st.composite
def models(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, layers: int = 5, **fixed: Any) -> Any:
    """A model of a random architecture, weights from a random seed."""
    config, seed = draw(configs(layers=layers, **fixed)), draw(SEEDS)
    note(f"weights {seed}, {config}")
    return build(config, seed=seed, dtype=dtype)


@st.composite
def tokens(draw: st.DrawFn, *, rows: int = 3, length: int = 40) -> Tensor:
    """(b, l) token ids; lengths go far past every window."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, length))
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(draw(SEEDS)))


@st.composite
def masks(draw: st.DrawFn, rows: int, length: int, *, sides: str = "left right holes none") -> Tensor:
    """(rows, length) with padding of a random kind in each row; every row keeps a real token."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        kind = draw(st.sampled_from(sides.split()))
        missing = draw(st.integers(0, length - 1))
        if kind == "left":
            mask[row, :missing] = 0
        elif kind == "right":
            mask[row, length - missing :] = 0
        elif kind == "holes":
            order = torch.randperm(length, generator=torch.Generator().manual_seed(draw(SEEDS)))
            mask[row, order[:missing]] = 0
    return mask
