"""What has to hold for every architecture, batch and way of cutting it up. Cases: `--hypothesis-profile`."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SEEDS, configs, masks, models, tokens
from helpers import alone, assert_same_gradients, build, cut, gradients, largest, pad, some_ids, through_cache
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tolerances import FLOAT64, FLOAT64_GRADIENT, FLOAT64_LOGITS
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from hymba import HymbaCache, HymbaModel
from hymba.nn import state


@pytest.fixture(autouse=True, scope="module")
def _small_growth() -> Iterator[None]:
    """Growing buffers grow by two slots, so that texts of this size make them grow often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_GROWTH", 2)
        yield


@given(model=models(), ids=tokens(), seed=SEEDS, room=st.none() | st.integers(0, 9), most=st.integers(1, 12))
def test_decode_equals_forward(model: Any, ids: Tensor, seed: int, room: int | None, most: int) -> None:
    """In chunks of any size, in a growing and in a fixed cache, at every length."""
    with torch.no_grad():
        whole = model.model(ids, use_cache=False).last_hidden_state
    length = ids.shape[1]
    cache = HymbaCache(model.config, max_length=None if room is None else length + room)
    parts = through_cache(model, ids, cut(length, random.Random(seed), most=most), cache=cache, hidden=True)
    assert largest(parts, whole) <= FLOAT64


@given(data=st.data(), model=models(layers=4), ids=tokens(rows=4, length=30), seed=SEEDS, static=st.booleans())
def test_padded_equals_alone(data: Any, model: Any, ids: Tensor, seed: int, static: bool) -> None:
    """Padding anywhere: in one forward pass, through a cache in chunks, and decoding on afterwards."""
    rows, length = ids.shape
    mask = data.draw(masks(rows, length), label="mask")
    after = some_ids(rows, 3, seed=seed)
    whole = torch.cat([ids, after], dim=1)
    real = torch.cat([mask, torch.ones_like(after)], dim=1)
    expected = alone(model, whole, real, hidden=True)
    counted = (real.cumsum(1) - 1).masked_fill(real == 0, int(seed % 50))
    with torch.no_grad():
        at_once = model.model(whole, attention_mask=real, use_cache=False).last_hidden_state
        placed = model.model(whole, attention_mask=real, position_ids=counted, use_cache=False).last_hidden_state
    sizes = [*cut(length, random.Random(seed)), 1, 1, 1]
    cache = HymbaCache(model.config, max_length=whole.shape[1] if static else None)
    in_chunks = through_cache(model, whole, sizes, mask=real, cache=cache, hidden=True)
    for row in range(rows):
        for way in (at_once, placed, in_chunks):
            assert largest(way[row, real[row] == 1], expected[row]) <= FLOAT64
            assert not way[row, real[row] == 0].any()


class _Force(LogitsProcessor):
    """Lets `generate` take given tokens."""

    def __init__(self, prompt: int, tokens: Tensor) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.tokens[:, input_ids.shape[1] - self.prompt]
        return torch.full_like(scores, -1e9).scatter(1, wanted[:, None], 0.0)


@given(
    data=st.data(),
    model=models(layers=3),
    ids=tokens(rows=4, length=20),
    seed=SEEDS,
    options=st.sampled_from(
        [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"do_sample": True}]
    ),
)
def test_generation_of_a_padded_batch_equals_alone(
    data: Any, model: Any, ids: Tensor, seed: int, options: dict[str, Any]
) -> None:
    """Along a forced continuation, the next-token logits of every row are those of the row alone."""
    rows, length = ids.shape
    mask = data.draw(masks(rows, length, sides="left holes none"), label="mask")
    mask[:, -1] = 1
    forced = some_ids(rows, 6, seed=seed)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        eos_token_id=None,
        logits_processor=[_Force(length, forced)],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert out.sequences[:, length:].tolist() == forced.tolist()
    logits = torch.stack(out.logits, dim=1)
    whole = torch.cat([ids, forced[:, :-1]], dim=1)
    expected = alone(model, whole, torch.cat([mask, torch.ones_like(forced[:, :-1])], dim=1))
    for row in range(rows):
        assert largest(logits[row], expected[row][-6:].float()) <= FLOAT64_LOGITS


@given(data=st.data(), model=models(layers=3), ids=tokens(rows=3, length=15), beams=st.integers(2, 4))
def test_beam_search_of_a_padded_batch_equals_alone(data: Any, model: Any, ids: Tensor, beams: int) -> None:
    rows, length = ids.shape
    mask = data.draw(masks(rows, length, sides="left none"), label="mask")
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    batch = model.generate(ids, attention_mask=mask, **options).sequences_scores.view(rows, beams)
    for row in range(rows):
        single = model.generate(ids[row][mask[row] == 1][None], use_cache=False, **options).sequences_scores
        # Scores, not tokens: two beams may tie to the last bit of a float32.
        assert largest(batch[row], single) <= FLOAT64_LOGITS


@given(data=st.data(), model=models(layers=4), rows=st.integers(1, 3), seed=SEEDS, learn=st.booleans())
def test_packed_equals_apart(data: Any, model: Any, rows: int, seed: int, learn: bool) -> None:
    """Documents in one row, told apart in any of the ways that collators use: outputs and gradients."""
    told = data.draw(st.sets(st.sampled_from(["position_ids", "seq_idx", "cu_seq_lens_q"]), min_size=1), label="told")
    if rows > 1:
        told = told - {"cu_seq_lens_q"} or {"seq_idx"}
    lengths = [data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4), label="lengths") for _ in range(rows)]
    documents = [
        [some_ids(1, n, seed=seed + 10 * i + j)[0] for j, n in enumerate(row)] for i, row in enumerate(lengths)
    ]
    ids, mask = pad([torch.cat(row) for row in documents], side=data.draw(st.sampled_from(["left", "right"])))
    described: dict[str, Tensor] = {}
    if "position_ids" in told:
        described["position_ids"] = torch.zeros_like(ids)
        for i, row in enumerate(lengths):
            described["position_ids"][i, mask[i] == 1] = torch.cat([torch.arange(n) for n in row])
    if "seq_idx" in told:
        described["seq_idx"] = torch.full(ids.shape, -1, dtype=torch.int32)
        for i, row in enumerate(lengths):
            numbers = [torch.full((n,), j, dtype=torch.int32) for j, n in enumerate(row)]
            described["seq_idx"][i, mask[i] == 1] = torch.cat(numbers)
    if "cu_seq_lens_q" in told:
        described["cu_seq_lens_q"] = torch.tensor([0, *lengths[0]]).cumsum(0).to(torch.int32)
    if len(set(map(sum, lengths))) > 1 or data.draw(st.booleans()):
        described["attention_mask"] = mask
    weight = torch.randn(model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    model.train(learn)
    with torch.set_grad_enabled(learn):
        packed = model.model(ids, use_cache=False, **described).last_hidden_state
        if learn:
            (packed @ weight).pow(2).sum().backward()
            found = gradients(model)
        total: Any = 0
        for i, row in enumerate(documents):
            apart = [model.model(document[None], use_cache=False).last_hidden_state[0] for document in row]
            assert largest(packed[i, mask[i] == 1], torch.cat(apart)) <= FLOAT64
            total = total + (torch.cat(apart) @ weight).pow(2).sum()
        if learn:
            total.backward()
            assert_same_gradients(found, gradients(model), FLOAT64_GRADIENT)


@given(data=st.data(), model=models(layers=4), ids=tokens(rows=3, length=24))
def test_gradients_of_a_padded_batch_equal_alone(data: Any, model: Any, ids: Tensor) -> None:
    mask = data.draw(masks(*ids.shape), label="mask")
    cached = data.draw(st.booleans(), label="cached")
    model.train()
    out = model.model(ids, attention_mask=mask, use_cache=cached).last_hidden_state
    (out.pow(2).sum() + (out * out.roll(1, dims=2)).sum()).backward()
    found = gradients(model)
    for row in range(ids.shape[0]):
        out = model.model(ids[row][mask[row] == 1][None], use_cache=False).last_hidden_state
        (out.pow(2).sum() + (out * out.roll(1, dims=2)).sum()).backward()
    assert_same_gradients(found, gradients(model), FLOAT64_GRADIENT)


@given(
    config=configs(),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.sampled_from(["5GB", "20KB"]),
    bare=st.booleans(),
)
def test_saved_equals_loaded(config: Any, seed: int, dtype: torch.dtype, shard: str, bare: bool) -> None:
    """Bit for bit: tensors, configuration, and the file written from what was loaded."""
    model = build(config, seed=seed, dtype=dtype)
    saved = model.model if bare else model
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        saved.save_pretrained(first, max_shard_size=shard)
        loaded = (HymbaModel if bare else AutoModelForCausalLM).from_pretrained(first)
        assert type(loaded) is type(saved)
        state = saved.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, state[name]), name
        own = {"architectures": [type(saved).__name__], "_name_or_path": str(first)}
        assert loaded.config.to_dict() == saved.config.to_dict() | own
        loaded.save_pretrained(second, max_shard_size=shard)
        assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
        for file in first.iterdir():
            if file.suffix == ".safetensors":
                ours, theirs = load_file(file), load_file(second / file.name)
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            else:
                assert file.read_text() == (second / file.name).read_text()


_OPERATIONS = st.lists(
    st.sampled_from("feed feed feed padded reorder expand select snapshot restore disk copy learn".split()),
    min_size=2,
    max_size=12,
)


@given(data=st.data(), model=models(layers=3), operations=_OPERATIONS, room=st.none() | st.just(80), seed=SEEDS)
def test_a_cache_always_stands_for_its_tokens(
    data: Any, model: Any, operations: list[str], room: int | None, seed: int
) -> None:
    """Whatever is done to a cache, its next outputs are those of each row's tokens run afresh."""
    rng = random.Random(seed)
    cache = HymbaCache(model.config, max_length=room)
    rows: list[list[int]] = [[] for _ in range(rng.randint(1, 3))]
    saved: tuple[Any, list[list[int]], Tensor | None] | None = None
    mask: Tensor | None = None

    def check(out: Tensor, real: Tensor) -> None:
        for row, history in enumerate(rows):
            if history and real[row].any():
                with torch.no_grad():
                    fresh = model.model(torch.tensor([history]), use_cache=False).last_hidden_state[0]
                count = int(real[row].sum())
                assert largest(out[row, real[row] == 1], fresh[-count:]) <= FLOAT64

    for operation in [*operations, "feed"]:
        length = rng.randint(1, 7)
        if cache.columns + length + 1 > 79 or len(rows) > 8:
            break
        if operation in ("feed", "padded", "learn"):
            new = some_ids(len(rows), length, seed=rng.randint(0, 99))
            real = torch.ones_like(new)
            if operation == "padded":
                real = data.draw(masks(len(rows), length), label="mask")
                if cache.columns and rng.random() < 0.5:
                    real[rng.randrange(len(rows))] = 0
            mask = real if mask is None else torch.cat([mask, real], dim=1)
            with torch.set_grad_enabled(operation == "learn"):
                out = model.model(
                    new, attention_mask=mask if mask.eq(0).any() else None, past_key_values=cache, use_cache=True
                ).last_hidden_state
            for row, history in enumerate(rows):
                history += new[row][real[row] == 1].tolist()
            check(out, real)
        elif mask is None:
            continue
        elif operation in ("reorder", "select"):
            picked = [
                rng.randrange(len(rows)) for _ in range(len(rows) if operation == "reorder" else rng.randint(1, 4))
            ]
            (cache.reorder_cache if operation == "reorder" else cache.select)(torch.tensor(picked))
            rows, mask = [list(rows[i]) for i in picked], mask[picked]
        elif operation == "expand":
            cache.expand(2)
            rows, mask = [list(row) for row in rows for _ in range(2)], mask.repeat_interleave(2, dim=0)
        elif operation == "snapshot":
            saved = cache.snapshot(), [list(row) for row in rows], mask.clone()
        elif operation == "restore" and saved is not None:
            cache.restore(saved[0])
            rows, mask = [list(row) for row in saved[1]], saved[2]
        elif operation == "disk":
            with tempfile.TemporaryDirectory() as folder:
                cache.save(Path(folder, "state"))
                cache = HymbaCache.load(Path(folder, "state"), model.config)
        elif operation == "copy":
            cache = copy.deepcopy(cache)
