"""What the tests of this folder share: the device, the released shape on it, and the mark that skips without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.decoding import DecodeStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RELEASE = Path(__file__).parents[2] / "configs" / "model" / "hymba-1.5b.json"
VOCAB = 32000


def released(layers: int | None = None, **fields: Any) -> HymbaConfig:
    """The released configuration, with its first layers only; 4 have a global layer, a lending pair and a lender."""
    config: dict[str, Any] = json.loads(RELEASE.read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        config["global_attn_idx"] = [i for i in config["global_attn_idx"] if i < layers]
        config["kv_reuse_group"] = [group for group in config["kv_reuse_group"] if max(group) < layers]
        for name in ("layer_type", "conv_dim"):
            config.pop(name)
    return HymbaConfig.from_dict(config | fields)


def model_on_gpu(layers: int | None = None, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The released shape with weights on which everything depends (`helpers.randomise`), drawn on the device."""
    config = released(layers, **fields)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = HymbaForCausalLM(config)
        model = model.to_empty(device="cuda")
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    randomise(model)
    return model.eval()


def ids_on_gpu(rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) random token ids."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator, device="cuda")


@torch.no_grad()
def decoded(model: Any, ids: Tensor, prompt: int, *, fused: bool, mask: Tensor | None = None) -> Tensor:
    """Logits (b, l - prompt, vocab) of the tokens behind a prompt, taken in one at a time on a static cache."""
    cache = HymbaCache(model.config, max_length=ids.shape[1])
    model(ids[:, :prompt], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(model, cache, fused=fused)
    out = []
    for t in range(prompt, ids.shape[1]):
        step.tokens.copy_(ids[:, t])
        step.run()
        out.append(step.logits.clone())
    return torch.stack(out, dim=1)
