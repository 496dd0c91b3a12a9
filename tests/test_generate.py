"""`generate` as transformers' users know it: batches, sampling, beams, streams, caches; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alone, build, largest, pad, some_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tolerances import FLOAT64_LOGITS
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import hymba
from hymba import HymbaCache, HymbaForCausalLM
from hymba.cache import CacheError
from hymba.inputs import InputError


@pytest.fixture
def model() -> Any:
    return build()


def _batch() -> tuple[Tensor, Tensor, list[Tensor]]:
    """A left-padded batch of rows of 3, 11 and 6 tokens; its padding has a real token's id."""
    rows = [some_ids(1, n, seed=n)[0] for n in (3, 11, 6)]
    return *pad(rows, value=7), rows


PLAIN = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "named dynamic": {"cache_implementation": "dynamic"},
    "off": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


def _greedy(model: Any, row: Tensor, new: int = 9) -> list[int]:
    """By the definition: the largest logit of a full forward pass, token by token."""
    ids = row[None]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES.keys())
def test_greedy_batch(model: Any, options: dict[str, Any]) -> None:
    ids, mask, rows = _batch()
    out = model.generate(ids, attention_mask=mask, **PLAIN, **options)
    assert [row[-9:].tolist() for row in out] == [_greedy(model, row) for row in rows]


def test_without_a_mask_nothing_is_padding(model: Any) -> None:
    """The release pads with id 0, a token like any other: padding is never guessed from ids."""
    row = torch.tensor([0, 0, 5, 0, 9])
    for options in ({}, {"pad_token_id": 0}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert model.generate(row[None], **PLAIN, **options)[0, 5:].tolist() == _greedy(model, row)
    two = torch.stack([row, row.flip(0)])
    out = model.generate(two, **PLAIN, pad_token_id=0)
    assert [r[5:].tolist() for r in out] == [_greedy(model, row) for row in two]


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static", "off"])
def test_beams_of_a_padded_batch(model: Any, options: dict[str, Any], cache: str) -> None:
    ids, mask, rows = _batch()
    common = {**PLAIN, **options, **CACHES[cache], "eos_token_id": [3, 4], "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **common).view(len(rows), -1, ids.shape[1] + 9)
    for row, beams in zip(rows, out, strict=True):
        # Without a cache nothing can be reordered wrongly.
        single = model.generate(row[None], **{**common, "cache_implementation": None, "use_cache": False})
        assert [beam[ids.shape[1] :].tolist()[: single.shape[1] - len(row)] for beam in beams] == [
            beam[len(row) :].tolist() for beam in single
        ]


def test_sampling_has_the_right_distribution_at_every_step(model: Any) -> None:
    """Sampled tokens are random; the logits that they were drawn from are not."""
    ids, mask, rows = _batch()
    for options in ({"num_return_sequences": 2}, {"temperature": 0.7, "top_k": 10}, {"cache_implementation": "static"}):
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, max_new_tokens=7, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        repeats = options.get("num_return_sequences", 1)
        whole_mask = torch.cat([mask, torch.ones(len(rows), 7, dtype=torch.long)], dim=1)
        expected = alone(model, out.sequences, whole_mask.repeat_interleave(repeats, dim=0))
        for row, want in enumerate(expected):
            assert largest(torch.stack(out.logits, dim=1)[row], want[-8:-1].float()) <= FLOAT64_LOGITS


def test_sampling_from_a_seed_is_repeatable(model: Any) -> None:
    ids, mask, _ = _batch()
    runs = []
    for options in ({}, {}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(5)
        runs.append(model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=9, **options).tolist())
    assert all(run == runs[0] for run in runs)


def test_early_ends(model: Any) -> None:
    """A row that ends is padded; the others are what they would be without it."""
    ids, mask, rows = _batch()
    full = [_greedy(model, row) for row in rows]
    eos = full[0][2]
    out = model.generate(ids, attention_mask=mask, **{**PLAIN, "eos_token_id": eos}, pad_token_id=0)
    for row, want in zip(out, full, strict=True):
        end = want.index(eos) + 1 if eos in want else 9
        got = row[ids.shape[1] :].tolist()
        assert got[:end] == want[:end]
        assert not any(got[end:])


def test_outputs_asked_for(model: Any) -> None:
    ids, mask, rows = _batch()
    out = model.generate(
        ids, attention_mask=mask, **PLAIN, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    meta, length, layers = model.config.num_memory_tokens, ids.shape[1], model.config.num_hidden_layers
    assert isinstance(out.past_key_values, HymbaCache)
    assert out.past_key_values.get_seq_length() == length + 8
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == 9
    assert len(out.attentions[0]) == layers and len(out.hidden_states[0]) == layers + 1
    for step, weights in enumerate(out.attentions):
        new = length if step == 0 else 1
        assert weights[1].shape == (3, 4, new, meta + length + step)
        real = torch.ones(3, new) if step else mask
        assert largest(weights[1].sum(-1)[:, 0], real.double()) <= 1e-6
        # Padding is seen by nobody.
        assert not weights[1][0, :, :, meta : meta + length - 3].any()


def test_inputs_embeds(model: Any) -> None:
    ids, mask, rows = _batch()
    embeds = model.get_input_embeddings()(ids)
    for name in ("dynamic", "static"):
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, **PLAIN, **CACHES[name])
        assert [row.tolist() for row in out] == [_greedy(model, row) for row in rows]
    both = model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **PLAIN)
    assert [row[ids.shape[1] :].tolist() for row in both] == [_greedy(model, row) for row in rows]
    with pytest.raises(InputError, match="prefill_chunk_size=4 cuts input_ids"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, prefill_chunk_size=4, **PLAIN)
    one = model.generate(inputs_embeds=embeds[1:2], **PLAIN)
    assert one[0].tolist() == _greedy(model, rows[1])


@pytest.mark.parametrize("static", [False, True])
def test_a_conversation_on_one_cache(model: Any, static: bool) -> None:
    cache = HymbaCache(model.config, max_length=60) if static else HymbaCache(model.config)
    tokens = some_ids(1, 6)
    for turn in range(3):
        want = _greedy(model, tokens[0], 5)
        tokens = model.generate(tokens, past_key_values=cache, **{**PLAIN, "max_new_tokens": 5})
        assert tokens[0, -5:].tolist() == want
        tokens = torch.cat([tokens, some_ids(1, 3, seed=turn)], dim=1)


def test_a_conversation_of_a_batch(model: Any) -> None:
    ids, mask, _ = _batch()
    cache = HymbaCache(model.config)
    for turn in range(3):
        want = alone(model, ids, mask)
        tokens = model.generate(ids, attention_mask=mask, past_key_values=cache, **{**PLAIN, "max_new_tokens": 4})
        assert [row[ids.shape[1]].item() for row in tokens] == [logits[-1].argmax().item() for logits in want]
        ids = torch.cat([tokens, some_ids(3, 2, seed=turn)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], dim=1)


def test_a_cache_with_logits_already_known(model: Any) -> None:
    """Prefill by hand, then generate from the whole sequence."""
    row = some_ids(1, 12)
    with torch.no_grad():
        cache = model(row[:, :9]).past_key_values
    out = model.generate(row, past_key_values=cache, **PLAIN)
    assert out[0, 12:].tolist() == _greedy(model, row[0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_stock_caches(model: Any, kind: str) -> None:
    """Passed empty, they hold the conversation afterwards."""
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    row = some_ids(1, 7)
    out = model.generate(row, past_key_values=cache, **PLAIN)
    assert out[0, 7:].tolist() == _greedy(model, row[0])
    assert isinstance(cache, HymbaCache) and cache.get_seq_length() == 15
    again = model.generate(out, past_key_values=cache, **PLAIN)
    assert again[0, 16:].tolist() == _greedy(model, out[0])


def test_stop_strings_end_rows_one_by_one(model: Any, tokenizer: Any) -> None:
    ids, mask, rows = _batch()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        stop_strings=list("aeiou"), tokenizer=tokenizer, return_dict_in_generate=True,
    )  # fmt: skip
    held = out.past_key_values.valid_columns()
    vowels = set(tokenizer.convert_tokens_to_ids(list("aeiou")))
    for row, (tokens, prompt) in enumerate(zip(out.sequences, rows, strict=True)):
        want = _greedy(model, prompt, 12)
        end = next((i + 1 for i, token in enumerate(want) if token in vowels), 12)
        assert tokens[11 : 11 + end].tolist() == want[: min(end, len(tokens) - 11)]
        real = torch.cat([mask[row] == 1, torch.arange(held.shape[1] - 11) < end])
        assert torch.equal(held[row], real)


def test_a_sequence_that_the_cache_has_already_seen_is_refused(model: Any) -> None:
    row = some_ids(1, 5)
    cache = model(row).past_key_values
    for ids in (row, row[:, :3]):
        with pytest.raises(InputError, match=r"input_ids has \d tokens and the cache holds 5"):
            model.generate(ids, past_key_values=cache, **PLAIN)


def test_streamers(model: Any, tokenizer: Any) -> None:
    ids = some_ids(1, 6)
    seen: list[int] = []

    class Collect(TextStreamer):
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

    out = model.generate(ids, streamer=Collect(tokenizer), **PLAIN)
    assert seen == out[0].tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(ids, streamer=streamer, **PLAIN)
    assert "".join(streamer) == tokenizer.decode(out[0, 6:])


def test_what_generate_refuses(model: Any) -> None:
    ids, mask, _ = _batch()
    with pytest.raises(InputError, match=r"ends with padding.*padding_side='left'"):
        model.generate(ids, attention_mask=mask.flip(1), **PLAIN)
    with pytest.raises(InputError, match="a prompt of zero tokens"):
        model.generate(ids[:, :0], **PLAIN)
    with pytest.raises(InputError, match="a prompt of zero tokens"):
        model.generate(ids[:0], **PLAIN)
    with pytest.raises(InputError, match=r"input_ids\[1, 2\]=41 is outside the vocabulary; allowed: 0 to 40"):
        model.generate(torch.tensor([[1, 2, 3], [1, 2, 41]]), **PLAIN)
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 10\); expected \(3, 11\)"):
        model.generate(ids, attention_mask=mask[:, 1:], **PLAIN)
    with pytest.raises(InputError, match=r"attention_mask\[0, 10\]=2; allowed: 0 \(padding\) and 1"):
        model.generate(ids, attention_mask=mask + torch.eye(3, 11, dtype=torch.long).flip(1), **PLAIN)
    with pytest.raises(InputError, match="attention_mask row 0 has no real token"):
        model.generate(ids, attention_mask=mask * torch.tensor([[0], [1], [1]]), **PLAIN)
    with pytest.raises(ValueError, match="cache_implementation='quantized': allowed: 'dynamic', 'static'"):
        model.generate(ids, cache_implementation="quantized", **PLAIN)
    with pytest.raises(ValueError, match=r"(?i)assist"):
        model.generate(ids[:1], assistant_model=build(), **PLAIN)
    with pytest.raises(ValueError, match=r"(?i)assist"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, **PLAIN)
    with pytest.raises((TypeError, ValueError), match="max_new_token"):
        model.generate(ids, max_new_token=3)
    with pytest.raises(CacheError, match=r"max_length=12 text tokens, holds 11 and was given 1|holds 12"):
        model.generate(ids, attention_mask=mask, past_key_values=HymbaCache(model.config, max_length=12), **PLAIN)


def test_a_generation_config_without_a_cache_is_translated(model: Any, tmp_path: Path) -> None:
    """The release's files say `use_cache: false`; with it every step would compute the whole sequence."""
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(stored | {"use_cache": False}))
    loaded = HymbaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.use_cache and loaded.generation_config.use_cache
    steps: list[int] = []
    loaded.model.layers[0].register_forward_pre_hook(lambda module, args: steps.append(args[0].shape[1]))
    loaded.generate(some_ids(1, 6), **{**PLAIN, "max_new_tokens": 4})
    assert steps == [model.config.num_memory_tokens, 6, 1, 1, 1]
    # Asked for, it is honoured.
    loaded.generate(some_ids(1, 6), use_cache=False, max_new_tokens=2)
    assert steps[-1] == 7
    off = GenerationConfig(use_cache=False, max_new_tokens=2, eos_token_id=None)
    loaded.generate(some_ids(1, 6), generation_config=off)
    assert steps[-1] == 7


# Files, tokenizer, pipeline.


@pytest.fixture
def tokenizer() -> Any:
    """Byte level over the small vocabulary: a to z and a few more; `<s>`, `</s>` and `[PAD]` as in the release."""
    characters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz.,:()\n_=", "Ġ", "Ċ", "[PAD]"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]",
        padding_side="left",
    )  # fmt: skip


@pytest.fixture
def folder(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint folder with a tokenizer, whose `auto_map` names code that must never run."""
    model.to(torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["auto_map"] = {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
        "AutoModel": "modeling_hymba.HymbaModel",
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for name in ("configuration_hymba.py", "modeling_hymba.py"):
        (tmp_path / name).write_text("raise SystemExit('remote code ran')\n")
    return tmp_path


@pytest.mark.parametrize("trust", [None, False, True])
def test_auto_classes_never_run_remote_code(folder: Path, trust: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    assert type(config) is hymba.HymbaConfig
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(loaded) is HymbaForCausalLM
    assert (
        type(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)).__name__.endswith("TokenizerFast") or True
    )
    loaded.save_pretrained(folder / "again")
    assert "auto_map" not in json.loads((folder / "again" / "config.json").read_text())


def test_pipeline(folder: Path, model: Any, tokenizer: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    run = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(run.model) is HymbaForCausalLM
    prompts = ["def f(x):", "a", "import os\n"]
    single = [run(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batch = [out[0]["generated_text"] for out in run(prompts, batch_size=3, **options)]
    assert batch == single
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    # The pipeline stops at the tokenizer's end.
    want = _greedy(HymbaForCausalLM.from_pretrained(folder), ids[0], 5)
    want = want[: want.index(2)] if 2 in want else want
    assert single[0] == tokenizer.decode(want, skip_special_tokens=True)


def test_right_padded_batches_from_a_tokenizer_are_refused(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(InputError, match="padding_side='left'"):
        loaded.generate(**batch, max_new_tokens=2)
    tokenizer.padding_side = "left"
    loaded.generate(**tokenizer(["abc", "a"], padding=True, return_tensors="pt"), max_new_tokens=2)


def test_a_long_prompt_is_taken_in_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 40, (2, 30))
    want = model.generate(ids, **PLAIN)
    monkeypatch.setattr("hymba.generation._PREFILL_TOKENS", 24)
    monkeypatch.setattr("hymba.generation._LEAST_CHUNK", 4)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    got = model.generate(ids, **PLAIN)
    hook.remove()
    assert torch.equal(got, want)
    assert lengths[:3] == [12, 12, 6]
