"""Attention weights on every way through the model: those of the form in which meta tokens are plain tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import build, largest, padded_ids, some_ids
from tolerances import FLOAT64
from torch import Tensor

from hymba import HymbaCache
from hymba.nn import Collected, LayerState, Span, run_prefix


def _prepended(model: Any, ids: Tensor) -> list[Tensor]:
    """Attention weights (heads, m + l, m + l) per layer of one row from the definition: meta tokens as plain tokens."""
    inner = model.model
    x = inner.embed_tokens(ids[None])
    if inner.meta_tokens is not None:
        x = torch.cat([inner.meta_tokens()[None], x], dim=1)
    meta, length = model.config.num_memory_tokens, x.shape[1]
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    weights, shared = [], {}
    for i, (spec, layer) in enumerate(zip(model.config.layers, inner.layers, strict=True)):
        allowed = k <= q
        if spec.window is not None:
            allowed = allowed & ((q - k <= spec.window) | (k < meta))
        mixer = layer.mixer
        # The layer as it is, its mask replaced by the definition's.
        span = Span.following(length, device=ids.device)
        collected = Collected()
        h = layer.input_norm(x)
        heads, *own, u, z = mixer.in_proj(h).split(mixer.splits, dim=-1)
        state = LayerState()
        if spec.kv_from is None:
            kv = mixer.attention.keys_and_values(own[0], own[1], None, span=span)
            shared[i] = kv
        kv = shared[i if spec.kv_from is None else spec.kv_from]
        kv.visibility._dense = allowed[None]
        attended = mixer.attention(heads, kv, span=span, weights=collected)
        scanned = mixer.mamba(u, z, state, span=span)
        x = x + mixer.out_proj((mixer.attention_norm(attended) + mixer.mamba_norm(scanned)) / 2)
        x = x + layer.mlp(layer.ffn_norm(x))
        weights.append(collected.tensors[0][0])
    assert largest(inner.final_norm(x)[:, meta:], inner(ids[None], use_cache=False).last_hidden_state) <= FLOAT64
    return weights


@pytest.mark.parametrize("way", ["forward", "position_ids", "one call with a cache", "chunks", "static chunks"])
def test_attention_weights(way: str) -> None:
    """(b, heads, l, meta + columns) per layer: those of the prepended form, by input column, padding empty."""
    model = build()
    ids, mask = padded_ids()
    meta, length = model.config.num_memory_tokens, ids.shape[1]
    options: dict[str, Any] = {"attention_mask": mask, "output_attentions": True}
    if way == "forward":
        found = model(ids, use_cache=False, **options).attentions
    elif way == "position_ids":
        # As generate(use_cache=False) sends them.
        found = model(ids, use_cache=False, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options).attentions
    elif way == "one call with a cache":
        found = model(ids, use_cache=True, **options).attentions
    else:
        cache = HymbaCache(model.config, max_length=length + 2 if way == "static chunks" else None)
        parts = []
        for first, last in ((0, 6), (6, 7), (7, 12), (12, 13)):
            out = model(
                ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, output_attentions=True
            ).attentions
            parts.append([torch.nn.functional.pad(w, (0, length - last)) for w in out])
        found = [torch.cat(layer, dim=2) for layer in zip(*parts, strict=True)]
    for row in range(len(ids)):
        real = (mask[row] == 1).nonzero().flatten()
        columns = torch.cat([torch.arange(meta), real + meta])
        for layer, want in enumerate(_prepended(model, ids[row, real])):
            weights = found[layer][row]
            assert weights.shape == (model.config.num_attention_heads, length, meta + length)
            assert largest(weights[:, real][:, :, columns], want[:, meta:]) <= FLOAT64
            assert not weights[:, mask[row] == 0].any(), "a padded query sees nothing"
            assert not weights[:, :, meta:][:, :, mask[row] == 0].any(), "nobody sees padding"


def test_attention_weights_of_packed_rows() -> None:
    model = build()
    documents = [some_ids(1, n, seed=n)[0] for n in (5, 8, 3)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    meta = model.config.num_memory_tokens
    for wide, mask in ((ids, None), (torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1), 4)):
        extra: dict[str, Any] = {"position_ids": positions}
        if mask:
            extra["position_ids"] = torch.cat([torch.zeros(1, mask, dtype=torch.long), positions], dim=1)
            extra["attention_mask"] = torch.cat([torch.zeros(1, mask), torch.ones_like(ids)], dim=1)
        found = model(wide, output_attentions=True, use_cache=False, **extra).attentions
        at = mask or 0
        for document in documents:
            end = at + len(document)
            for layer, want in enumerate(_prepended(model, document)):
                weights = found[layer][0][:, at:end]
                assert largest(weights[:, :, :meta], want[:, meta:, :meta]) <= FLOAT64
                assert largest(weights[:, :, meta + at : meta + end], want[:, meta:, meta:]) <= FLOAT64
                assert largest(weights.sum(-1), torch.ones(4, len(document), dtype=torch.float64)) <= 1e-6
            at = end


def test_prepended_form() -> None:
    """Meta tokens as an initial state are the prepended form exactly; `_prepended` asserts it."""
    for fields in (
        {},
        {"num_memory_tokens": 0},
        {"sliding_window": None},
        {"kq_norm": "rms", "mlp_hidden_act": "relu2"},
    ):
        _prepended(build(**fields), some_ids(1, 19)[0])
    model = build()
    states, hidden = run_prefix(model.model.layers, model.model.meta_tokens(), lenders=model.model.lenders)
    assert len(states) == 4 and len(hidden) == 5
    assert states[0].prefix == model.config.num_memory_tokens and states[2].prefix_k is None
