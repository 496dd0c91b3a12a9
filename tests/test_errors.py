"""Bad input: an error that names the field, the value and what is allowed, before anything is lost."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, build, small_config, some_ids
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.config import ConfigError
from hymba.hub import CheckpointError
from hymba.inputs import InputError
from hymba.nn import MLP, AttentionHeads, HeadNorm, HybridHeads, HymbaBlock, Span

# Configuration.

REFUSED: list[tuple[dict[str, Any], str]] = [
    # What SPEC.md says to refuse.
    ({"memory_tokens_interspersed_every": 4}, r"memory_tokens_interspersed_every=4 .*allowed: 0"),
    ({"num_experts": 2}, r"num_experts=2 .*allowed: 1"),
    ({"num_mamba": 2}, r"num_mamba=2 .*allowed: 1"),
    ({"num_mamba": 0}, r"num_mamba=0 .*allowed: 1"),
    ({"kv_weight_reuse": True}, r"kv_weight_reuse=True .*allowed: false"),
    ({"attn_hidden_size": 8}, r"attn_hidden_size=8 .*allowed: -1"),
    ({"rope_type": "dynamic_ntk"}, r"rope_type='dynamic_ntk' .*allowed: 'default', 'ntk', null"),
    ({"rope_type": "yarn"}, r"rope_type='yarn' .*allowed: 'default', 'ntk', null"),
    ({"rope": False}, r"rope=False .*allowed: true"),
    ({"kq_norm": "layer"}, r"kq_norm='layer' .*allowed: 'none', 'rms', 'perhead-rms', null"),
    ({"kq_head_dim": 8}, r"kq_head_dim=8 .*allowed: -1"),
    ({"layer_type": ["h", "h", "m", "h"]}, r"layer_type=.*'m'.*allowed: \"h\""),
    ({"layer_type": ["h"]}, r"layer_type=\['h'\] .*one entry for each of the 4 layers"),
    ({"mamba_inner_layernorms": False}, r"mamba_inner_layernorms=False .*allowed: true"),
    ({"mamba_conv_bias": False}, r"mamba_conv_bias=False .*allowed: true"),
    ({"v_head_dim": 4}, r"v_head_dim=4 .*allowed: mamba_expand \* hidden_size / num_attention_heads = 8"),
    # KV sharing: one kind, increasing, once each.
    ({"kv_reuse_group": [[0, 1]]}, r"group \[0, 1\] mixes kinds \(0 global, 1 windowed\)"),
    ({"kv_reuse_group": [[2, 1]]}, r"\[2, 1\].*entries must increase"),
    ({"kv_reuse_group": [[1, 1]]}, r"\[1, 1\].*stand once each"),
    ({"kv_reuse_group": [[1, 2], [2, 3]]}, r"layer 2 is in two groups, \[1, 2\] and \[2, 3\]"),
    ({"kv_reuse_group": [[1]]}, r"group \[1\] has fewer than two layers"),
    ({"kv_reuse_group": [[3, 4]]}, r"there is no layer 4; allowed: 0 to 3"),
    ({"kv_reuse_group": [[-1, 1]]}, r"there is no layer -1"),
    ({"kv_reuse_group": None, "kv_reuse_every_i_layer": 2}, r"kv_reuse_every_i_layer=2: group \[0, 1\] mixes kinds"),
    ({"kv_reuse_every_i_layer": 2}, r"kv_reuse_every_i_layer=2 and kv_reuse_group=\[\[1, 2\]\] are two forms"),
    ({"kv_reuse_group": None, "kv_reuse_every_i_layer": 0}, r"kv_reuse_every_i_layer=0: allowed: -1"),
    ({"global_attn_idx": [4]}, r"global_attn_idx=\[4\]: there is no layer 4; allowed: 0 to 3"),
    ({"global_attn_idx": [3, 0]}, r"global_attn_idx=\[3, 0\]: entries must increase"),
    # Shapes that do not fit.
    ({"hidden_size": 18}, r"num_attention_heads=4 .*divisors of hidden_size=18"),
    ({"hidden_size": 12, "v_head_dim": None}, r"hidden_size=12 .*even"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads=3 .*divisors of num_attention_heads=4"),
    ({"hidden_size": 8}, r"rope_type='ntk' .*\"default\" with a head width of 2"),
    ({"orig_max_position_embeddings": 128}, r"orig_max_position_embeddings=128 .*less than 2 \* 64"),
    ({"mamba_d_conv": 1}, r"mamba_d_conv=1 .*integers from 2"),
    ({"num_memory_tokens": -1}, r"num_memory_tokens=-1 .*integers from 0"),
    ({"sliding_window": 0}, r"sliding_window=0 .*integers from 1, or null"),
    ({"attention_dropout": 1.0}, r"attention_dropout=1.0 .*from 0 to below 1"),
    ({"mlp_hidden_act": "gelu"}, r"mlp_hidden_act='gelu' .*allowed: 'silu', 'relu2'"),
    ({"hidden_act": "relu"}, r"hidden_act='relu' .*allowed: 'silu'"),
    ({"attn_implementation": "flash_attention_3"}, r"attn_implementation='flash_attention_3': allowed: eager, sdpa"),
    ({"rms_norm_eps": 0.0}, r"rms_norm_eps=0.0 .*above 0"),
    ({"rope_theta": -1.0}, r"rope_theta=-1.0 .*above 0"),
    *[
        ({field: 0}, rf"{field}=0 .*integers from 1")
        for field in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "mamba_d_state mamba_expand mamba_dt_rank max_position_embeddings"
        ).split()
    ],
    # Wrong types.
    ({"hidden_size": "16"}, r"hidden_size='16' has the wrong type; allowed: int"),
    ({"hidden_size": True}, r"hidden_size=True has the wrong type; allowed: int"),
    ({"num_hidden_layers": 4.0}, r"num_hidden_layers=4\.0 has the wrong type; allowed: int"),
    ({"global_attn_idx": 0}, r"global_attn_idx=0 has the wrong type; allowed: list\[int\] or null"),
    ({"global_attn_idx": [True]}, r"global_attn_idx=\[True\] has the wrong type"),
    ({"kv_reuse_group": [1, 2]}, r"kv_reuse_group=\[1, 2\] has the wrong type; allowed: list\[list\[int\]\] or null"),
    ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes' has the wrong type; allowed: bool"),
    ({"sliding_window": 2.5}, r"sliding_window=2\.5 has the wrong type; allowed: int or null"),
    ({"num_memory_tokens": None}, r"num_memory_tokens=None has the wrong type; allowed: int"),
    ({"rms_norm_eps": "small"}, r"rms_norm_eps='small' has the wrong type; allowed: float or int"),
    ({"mamba_dt_rank": "big"}, r"mamba_dt_rank='big' .*\"auto\""),
    # Misspelled.
    ({"slidng_window": 4}, r"slidng_window=4\. Did you mean 'sliding_window'\?"),
    ({"hiden_size": 32}, r"hiden_size=32\. Did you mean 'hidden_size'\?"),
    ({"bogus": 1, "num_meta_tokens": 2}, r"bogus=1.*num_meta_tokens=2"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_config(**fields)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("fields", "message"), REFUSED[:8], ids=lambda value: str(value)[:60])
def test_files_and_assignments_are_held_to_the_same(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = small_config()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | fields))
    for load in (HymbaConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        HymbaForCausalLM(config)


def test_misspelled_keywords(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for load in (HymbaForCausalLM.from_pretrained, HymbaModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((TypeError, ValueError), match=r"slidng_window.*Did you mean 'sliding_window'\?"):
            load(tmp_path, slidng_window=3)
    with pytest.raises(ConfigError, match=r"slidng_window=3\. Did you mean 'sliding_window'\?"):
        HymbaConfig.from_pretrained(tmp_path, slidng_window=3)
    with pytest.raises(TypeError, match=r"atention_mask.*Did you mean 'attention_mask'\?"):
        model(some_ids(1, 3), atention_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"input_id.*Did you mean 'input_ids'\?"):
        model.model(input_id=some_ids(1, 3))


# Checkpoint files.


@contextmanager
def _listening(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers' loggers do not reach the root logger, where pytest listens."""
    found = [logging.getLogger(name) for name in ("transformers", "hymba")]
    before = [logger.propagate for logger in found]
    for logger in found:
        logger.propagate = True
    with caplog.at_level("WARNING"):
        yield
    for logger, value in zip(found, before, strict=True):
        logger.propagate = value


def _change(folder: Path, function: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    function(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def _refused(folder: Path, message: str) -> None:
    """By our classes and through the Auto class."""
    for load in (HymbaForCausalLM.from_pretrained, HymbaModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_a_missing_tensor(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.pop("model.layers.2.mamba.D.0"))
    _refused(folder, r"model\.layers\.2\.mamba\.D\.0: missing, expected shape \[32\]")


def test_an_extra_tensor(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({"model.layers.7.mamba.D.0": torch.ones(3)}))
    _refused(folder, r"model\.layers\.7\.mamba\.D\.0 in model\.safetensors: not a tensor of this model \(shape \[3\]\)")


def test_kv_rows_of_a_borrower(folder: Path) -> None:
    """A checkpoint whose layers share otherwise than its configuration says."""
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"kv_reuse_group": None}))
    _refused(
        folder, r"layers\.2\.mamba\.in_proj\.weight in model\.safetensors: expected shape \[104, 16\], found \[80, 16\]"
    )


def test_a_misshaped_tensor(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({"model.memory_tokens": torch.ones(4, 16)}))
    _refused(folder, r"memory_tokens in model\.safetensors: expected shape \[3, 16\], found \[4, 16\]")


def test_a_tied_head_in_the_file_is_no_extra(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    HymbaForCausalLM.from_pretrained(folder)
    HymbaModel.from_pretrained(folder)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_file(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    _refused(folder, rf"model\.safetensors: truncated: expected {len(whole)} bytes, found {len(whole) - cut}")
    file.write_bytes(whole + b"x")
    _refused(folder, rf"too long: expected {len(whole)} bytes, found {len(whole) + 1}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5], r"5 bytes, too short for a safetensors header"),
        (lambda data: b"", r"0 bytes, too short"),
        (lambda data: struct.pack("<Q", 1 << 40) + data[8:], r"corrupt header \(it claims 1099511627776 bytes"),
        (lambda data: data[:8] + b"{broken" + data[15:], r"corrupt header"),
        (lambda data: data[:8] + b"[]" + data[10:], r"corrupt header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", r"corrupt header"),
    ],
    ids=["cut short", "empty", "length", "json", "list", "pointer file"],
)
def test_a_corrupt_header(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    _refused(folder, rf"model\.safetensors.*{message}")


def test_a_header_whose_offsets_lie(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.layers.1.mamba.D.0"]["shape"] = [31]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    _refused(folder, r"tensor model\.layers\.1\.mamba\.D\.0: expected 124 bytes for \[31\] in F32, found 128")


def test_missing_shards(tmp_path: Path) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    _refused(
        tmp_path, rf"1 of {len(shards)} shards named in model\.safetensors\.index\.json are missing: {shards[1].name}"
    )
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    _refused(tmp_path, r"model\.safetensors\.index\.json: not a shard index")


def test_a_shard_of_another_checkpoint(tmp_path: Path) -> None:
    """Both shards are whole files; together they are not this model."""
    build(dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    _refused(tmp_path, r"missing, expected shape")


def test_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    _refused(folder, r"only pickled weights \(pytorch_model\.bin\).*refused.*bin_to_safetensors")
    (folder / "pytorch_model.bin").unlink()
    _refused(folder, r"no model\.safetensors and no model\.safetensors\.index\.json")


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="nowhere"):
        HymbaForCausalLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        HymbaForCausalLM.from_pretrained(tmp_path)


def test_nan_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mamba.A_log.0"][-1, -1] = float("nan")
        tensors["model.memory_tokens"][0, 0] = float("nan")

    for kept in (poison, lambda tensors: [t.copy_(t.nan_to_num()) for t in tensors.values()]):
        _change(folder, kept)
        caplog.clear()
        with _listening(caplog):
            HymbaForCausalLM.from_pretrained(folder)
        warned = [record.message for record in caplog.records if "NaN" in record.message]
        if kept is poison:
            assert len(warned) == 1
            assert "2 tensors: model.memory_tokens, model.layers.3.mamba.A_log.0" in warned[0]
        else:
            assert not warned


def test_nan_is_found_in_every_dtype_and_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Infinities and huge numbers are not NaN, a NaN among them is."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = build(dtype=dtype)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
            model.model.layers[0].mlp.up_proj.weight[1, 0] = float("-inf")
            model.model.layers[1].mlp.up_proj.weight.fill_(torch.finfo(dtype).max)
            model.model.layers[2].mlp.up_proj.weight[-1, -1] = float("nan")
        model.save_pretrained(tmp_path)
        caplog.clear()
        with _listening(caplog):
            HymbaForCausalLM.from_pretrained(tmp_path)
        warned = [record.message for record in caplog.records if "NaN" in record.message]
        assert len(warned) == 1 and "1 tensors: model.layers.2.moe.experts.0.up_proj.weight" in warned[0]


def test_integer_weights_need_a_quantiser(folder: Path) -> None:
    _change(folder, lambda t: t.update({"model.memory_tokens": t["model.memory_tokens"].to(torch.int8)}))
    _refused(folder, r"weights of dtype I8 need a quantization_config; allowed without: F64, F32, F16, BF16")


# Inputs.


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def test_token_ids(model: Any) -> None:
    for bad, index in ((VOCAB, (1, 2)), (-1, (0, 0)), (-100, (1, 0))):
        ids = some_ids(2, 3)
        ids[index] = bad
        with pytest.raises(
            InputError, match=rf"input_ids\[{index[0]}, {index[1]}\]={bad} is outside.*0 to {VOCAB - 1}"
        ):
            model(ids)
    with pytest.raises(InputError, match=r"shape \(3,\); expected \(batch, tokens\)"):
        model(torch.zeros(3, dtype=torch.long))
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(InputError, match=rf"dtype {dtype}; expected torch.long"):
            model(torch.zeros(1, 3, dtype=dtype))
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(InputError, match=rf"shape \({shape[0]}, {shape[1]}\): a prompt of zero tokens"):
            model(torch.zeros(shape, dtype=torch.long))
    model(some_ids(1, 3).int())


def test_ids_and_embeddings(model: Any) -> None:
    ids = some_ids(1, 3)
    embeds = model.model.embed_tokens(ids)
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)
    for wrong in (embeds[0], embeds[..., :4], embeds[:, :0]):
        with pytest.raises(InputError, match=r"inputs_embeds has shape .*; expected \(batch, tokens from 1, 16\)"):
            model(inputs_embeds=wrong)


def test_masks(model: Any) -> None:
    ids = some_ids(2, 4)
    for shape in ((2, 3), (1, 4), (2, 5), (2, 4, 4), (2, 1, 4, 4)):
        with pytest.raises(InputError, match=r"attention_mask has shape .*; expected \(2, 4\)"):
            model(ids, attention_mask=torch.ones(shape))
    for bad in (2, -1, 0.5, float("nan")):
        mask = torch.ones(2, 4)
        mask[1, 2] = bad
        with pytest.raises(InputError, match=rf"attention_mask\[1, 2\]={bad}.*; allowed: 0 \(padding\) and 1 \(real\)"):
            model(ids, attention_mask=mask)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    for use_cache in (True, False):
        with pytest.raises(InputError, match="row 1 has no real token; every row needs at least one 1"):
            model(ids, attention_mask=mask, use_cache=use_cache)
    cache = model(ids).past_key_values
    with pytest.raises(InputError, match=r"shape \(2, 1\); expected \(2, 5\).*tokens in the cache included"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    for dtype in (torch.bool, torch.float32, torch.int32, torch.uint8):
        model(ids, attention_mask=torch.ones(2, 4, dtype=dtype))


def test_a_row_that_never_had_a_token(model: Any) -> None:
    """A chunk may be padding for a row whose tokens come later; a decode step for a row without any is refused."""
    cache = HymbaCache(model.config)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    model(some_ids(2, 3), attention_mask=mask, past_key_values=cache)
    later = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
    model(some_ids(2, 1), attention_mask=later, past_key_values=cache)


def test_documents(model: Any) -> None:
    ids = some_ids(1, 6)
    for name, wrong, message in (
        ("position_ids", torch.arange(5)[None], r"position_ids has shape \(1, 5\); expected \(1, 6\)"),
        ("position_ids", torch.arange(6)[None] - 1, r"position_ids holds -1; allowed: text positions from 0"),
        ("seq_idx", torch.zeros(1, 7), r"seq_idx has shape \(1, 7\); expected \(1, 6\)"),
        ("seq_idx", torch.zeros(1, 1, 6), r"seq_idx has shape \(1, 1, 6\)"),
        ("cu_seq_lens_q", torch.tensor([0, 3]), r"cu_seq_lens_q=\[0, 3\]: boundaries must rise from 0 to .* 6 tokens"),
        ("cu_seq_lens_q", torch.tensor([0, 4, 3, 6]), r"cu_seq_lens_q=\[0, 4, 3, 6\]: boundaries must rise"),
        ("cu_seq_lens_q", torch.tensor([], dtype=torch.int32), r"cu_seq_lens_q=\[\]"),
        ("cu_seq_lens_q", torch.tensor([[0, 6]]), r"cu_seq_lens_q has shape \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            model(ids, use_cache=False, **{name: wrong})
    with pytest.raises(InputError, match=r"cu_seq_lens_q describes one packed row, the input has 2 rows"):
        model(some_ids(2, 6), cu_seq_lens_q=torch.tensor([0, 6]))
    for name, value in (("seq_idx", torch.zeros(1, 6, dtype=torch.int32)), ("cu_seq_lens_q", torch.tensor([0, 6]))):
        with pytest.raises(InputError, match="have no cache; set use_cache=False"):
            model(ids, use_cache=True, **{name: value})


def test_labels(model: Any) -> None:
    ids = some_ids(2, 4)
    for labels, kept in ((ids[:, :3], 0), (ids[:1], 0), (ids[0], 0), (ids, 2)):
        with pytest.raises(InputError, match=r"labels has shape .*; expected \(2, [24]\), one target for each logit"):
            model(ids, labels=labels, logits_to_keep=kept)
    model(ids, labels=ids[:, 2:], logits_to_keep=2)


def test_attention_implementations(folder: Path, model: Any) -> None:
    for name in ("flash_attention_2", "flex_attention", "flex"):
        for load in (HymbaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=rf"attn_implementation='{name}': allowed: eager, sdpa"):
                load(folder, attn_implementation=name)
        with pytest.raises(ValueError, match=name):
            model.set_attn_implementation(name)
        assert model.model.layers[0].mixer.attention.implementation == "sdpa"
    attention = AttentionHeads(num_heads=2, num_kv_heads=1, head_dim=4, v_head_dim=4)
    attention.implementation = "flash"
    kv = attention.keys_and_values(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), None, span=Span.following(3))
    with pytest.raises(ValueError, match="implementation='flash': allowed: 'sdpa', 'eager'"):
        attention(torch.zeros(1, 3, 8), kv, span=Span.following(3))


# Blocks and cache.


def test_blocks() -> None:
    common = {"hidden_size": 16, "num_heads": 4}
    with pytest.raises(ValueError, match="num_heads=3: allowed: divisors of hidden_size=16"):
        HybridHeads(hidden_size=16, num_heads=3)
    with pytest.raises(ValueError, match="num_kv_heads=3: allowed: divisors of num_heads=4"):
        HybridHeads(**common, num_kv_heads=3)
    with pytest.raises(ValueError, match="activation='gelu': allowed: 'silu', 'relu2'"):
        MLP(hidden_size=4, intermediate_size=8, activation="gelu")
    with pytest.raises(ValueError, match="kind='layer': allowed: 'rms', 'perhead-rms'"):
        HeadNorm("layer", num_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="num_kv_heads=3: allowed: divisors of num_heads=4"):
        AttentionHeads(num_heads=4, num_kv_heads=3, head_dim=4, v_head_dim=4)
    x = torch.zeros(1, 3, 16)
    own = HybridHeads(**common)
    borrower = HymbaBlock(**common, intermediate_size=8, borrows_kv=True)
    with pytest.raises(ValueError, match="borrows_kv=True and needs kv"):
        borrower(x)
    _, _, kv = own(x)
    with pytest.raises(ValueError, match="borrows_kv=False and computes its own"):
        own(x, kv=kv)
    borrower(x, kv=kv, span=Span.following(3))


def test_cache_arguments(model: Any) -> None:
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=rf"max_length={wrong}: allowed: text tokens from 1, or None"):
            HymbaCache(model.config, max_length=wrong)
