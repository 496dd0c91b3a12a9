"""Architectures other than the released ones, by `layer_pattern`: what holds for the hybrid holds for each of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, largest, small_config

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.config import ConfigError
from hymba.cost import cache_bytes, parameters
from hymba.layout import LayerSpec, pattern_layers

ATTENTION, MAMBA, HYBRID = {"mixer": "attention"}, {"mixer": "mamba"}, {"mixer": "hybrid"}
MAMBA2_HEADS = {"ssm": "mamba2", "ssm_head_dim": 4}
MAMBA2 = MAMBA | MAMBA2_HEADS
PATTERNS: dict[str, list[dict[str, Any]]] = {
    "transformer": [ATTENTION | {"repeat": 2}],
    "windowed transformer with shared keys": [
        ATTENTION | {"window": 5},
        ATTENTION | {"window": 5, "kv_from": "previous", "repeat": 2},
    ],
    "mamba": [MAMBA | {"ffn": False, "repeat": 2}],
    "mamba with mlps": [MAMBA | {"repeat": 2}],
    "samba": [MAMBA, ATTENTION | {"window": 4}],
    "sequential": [MAMBA | {"repeat": 2}, ATTENTION, MAMBA],
    "concatenated, fewer heads": [HYBRID | {"fusion": "concat", "heads": 2, "window": 6}, HYBRID],
    "mamba-2": [MAMBA2 | {"ffn": False, "ssm_groups": 2, "repeat": 2}],
    "hybrid with mamba-2 heads": [HYBRID | MAMBA2_HEADS | {"window": 5}, HYBRID | MAMBA2_HEADS],
    "mamba of both kinds": [MAMBA, MAMBA2, ATTENTION],
    "hybrid borrows from a transformer layer": [
        ATTENTION | {"v_head_dim": 8},
        HYBRID | {"fusion": "concat", "v_head_dim": 8, "kv_from": 0},
    ],
}


def config_of(name: str, **fields: Any) -> HymbaConfig:
    pattern = PATTERNS[name]
    layers = len(pattern_layers(pattern))
    off = {"kv_reuse_group": None, "global_attn_idx": None, "layer_type": None, "kv_reuse_every_i_layer": -1}
    return small_config(layer_pattern=pattern, num_hidden_layers=layers, **off, **fields)


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(config_of(request.param))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 41, (3, 19)), torch.ones(3, 19, dtype=torch.long)
    mask[0, :6], mask[1, 4:7], mask[2, 15:] = 0, 0, 0
    return ids, mask


@torch.no_grad()
def test_decoding_padding_and_caches(model: Any) -> None:
    ids, mask = padded()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for row in range(3):
        real = mask[row] == 1
        alone = model(ids[row][real][None], use_cache=False).logits[0]
        assert largest(whole[row][real], alone) < 1e-5
    for room in (None, 24):
        cache = HymbaCache(model.config, max_length=room)
        parts = [model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits]
        for t in range(9, 19):
            parts.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
        got = torch.cat(parts, dim=1)
        assert largest(got[mask == 1], whole[mask == 1]) < 1e-5


@torch.no_grad()
def test_packed_documents(model: Any) -> None:
    ids = torch.randint(1, 41, (1, 15))
    seq_idx = torch.tensor([[0] * 6 + [1] * 9], dtype=torch.int32)
    packed = model(ids, seq_idx=seq_idx, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in ids.split([6, 9], dim=1)]
    assert largest(packed, torch.cat(apart, dim=1)) < 1e-5


def test_saved_equals_loaded_and_the_file_says_what_it_is(model: Any, tmp_path: Path) -> None:
    ids, mask = padded()
    model.save_pretrained(tmp_path)
    loaded = HymbaForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert loaded.config.layers == model.config.layers
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    text = (tmp_path / "config.json").read_text()
    # Not a file that the reference could take for one of its own.
    assert "layer_pattern" in text and '"flex"' not in text


@torch.no_grad()
def test_costs_are_those_of_the_model(model: Any) -> None:
    assert parameters(model.config).total == sum(p.numel() for p in model.parameters())
    ids = torch.randint(1, 41, (2, 13))
    for room in (None, 20):
        cache = HymbaCache(model.config, max_length=room)
        model(ids, past_key_values=cache)
        length = 13 if room is None else room
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype in ("float32", "bfloat16"):
            assert (
                cache.nbytes() == cache_bytes(model.config, length, batch=2, dtype=dtype, static=room is not None).total
            )


@pytest.mark.parametrize("name", PATTERNS)
def test_every_parameter_learns_and_generation_works(name: str) -> None:
    model = build(config_of(name), dtype=torch.float32).train()
    ids, mask = padded()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()}
    # A borrower's key norm is in the released files and never used.
    assert not {n for n in without if "k_norm" not in n}, without
    model.eval()
    left = torch.ones_like(ids)
    left[0, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=left, cache_implementation="static", **options)[:, 19:]
    for row in range(3):
        alone = model.generate(ids[row][left[row] == 1][None], **options)[:, -8:]
        assert together[row].tolist() == alone[0].tolist()


def test_attention_weights_of_layers_that_have_them() -> None:
    model = build(config_of("samba"))
    out = model(torch.randint(1, 41, (2, 7)), output_attentions=True)
    meta = model.config.num_memory_tokens
    assert out.attentions[0] is None and out.attentions[1].shape == (2, model.config.num_attention_heads, 7, meta + 7)


def test_patterns_are_read_as_written() -> None:
    layers = pattern_layers([{"mixer": "mamba", "repeat": 2}, {"window": 8}, {"window": 8, "kv_from": "previous"}])
    assert layers == (
        LayerSpec(mixer="mamba"),
        LayerSpec(mixer="mamba"),
        LayerSpec(window=8),
        LayerSpec(window=8, kv_from=2),
    )
    group = {"layers": [{"mixer": "mamba"}, {"window": 4, "repeat": 2}], "repeat": 2}
    assert [spec.mixer for spec in pattern_layers([group])] == ["mamba", "hybrid", "hybrid"] * 2
    released = small_config()
    assert "layer_pattern" not in released.to_dict()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([{"mixr": "mamba"}], "no key 'mixr'; nearest: 'mixer'"),
        ([{"mixer": "mamba3"}], "mixer='mamba3': allowed: hybrid, attention, mamba"),
        ([{"ssm": "mamba3"}], "ssm='mamba3': allowed: mamba, mamba2"),
        ([{"mixer": "attention", "ssm": "mamba2"}], "only on a layer with Mamba heads"),
        ([{"ssm_groups": 2}], 'ssm_groups=2: allowed: null, or a layer with ssm="mamba2"'),
        ([{"ssm": "mamba2"}], "ssm_head_dim=64; allowed: divisors of 32"),
        ([{"ssm": "mamba2", "ssm_head_dim": 16, "ssm_groups": 3}], "ssm_groups=3; allowed: divisors of its 2 heads"),
        ([{"mixer": "mamba", "window": 4}], "window=4: allowed: null on a layer without attention heads"),
        ([{"mixer": "attention", "fusion": "mean"}], "only on a hybrid layer"),
        ([{"repeat": 0}], "repeat=0: allowed: integers from 1"),
        ([{"kv_from": "previous"}], "no layer before the first"),
        ([{"mixer": "mamba"}, {"kv_from": 0}], "an earlier layer with attention heads"),
        ([{"window": 4}, {"window": 5, "kv_from": 0}], "window=5: allowed: 4, that of layer 0"),
        ([{"layers": [], "repeat": 2}], "layers=[]: allowed: a list of at least one layer"),
        ([{"layers": [{"windw": 3}]}], "layer_pattern[0].layers[0] has no key 'windw'; nearest: 'window'"),
        ([{"layers": [{}], "ffn": True}], "no key 'ffn'"),
        ([{"ffn": 1}], "ffn=1: allowed: true or false"),
        ([3], "layer_pattern=[3] has the wrong type"),
        ([{"heads": 1}], 'or fusion="concat"'),
    ],
)
def test_bad_patterns(pattern: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_config(
            layer_pattern=pattern, num_hidden_layers=len(pattern), global_attn_idx=None, kv_reuse_group=None,
            kv_reuse_every_i_layer=-1, layer_type=None,
        )  # fmt: skip


def test_a_pattern_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        pattern_layers([])


def test_a_pattern_beside_the_released_lists() -> None:
    with pytest.raises(ConfigError, match="global_attn_idx"):
        HymbaConfig(layer_pattern=[{}], num_hidden_layers=1, global_attn_idx=[0])
    with pytest.raises(ConfigError, match="num_hidden_layers=3"):
        HymbaConfig(layer_pattern=[{}], num_hidden_layers=3)
    with pytest.raises(
        ConfigError, match="layer 1 has kv_heads=5, v_head_dim=128; allowed: 5 and 64, those of layer 0"
    ):
        HymbaConfig(layer_pattern=[{"mixer": "attention"}, {"kv_from": 0}], num_hidden_layers=2)
