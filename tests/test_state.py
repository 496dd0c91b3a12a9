"""The cache: what it holds, what can be done to it, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alone, build, gradients, largest, pad, relative, some_ids, through_cache
from safetensors.torch import load_file, save_file
from tolerances import BFLOAT16, FLOAT64, FLOAT64_GRADIENT, FLOAT64_LOGITS
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

import hymba.cache
from hymba import HymbaCache
from hymba.cache import CacheError
from hymba.inputs import InputError


@pytest.fixture
def model() -> Any:
    return build()


def _addresses(cache: HymbaCache) -> list[int]:
    found = []
    for state in cache.layers:
        tensors = [state.conv, state.ssm, *((state.kv.keys, state.kv.values) if state.kv else ())]
        found += [tensor.data_ptr() for tensor in tensors]
    return found


def _next(model: Any, cache: HymbaCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.model(ids, past_key_values=cache).last_hidden_state


# What is held.


@pytest.mark.parametrize("length", [2, 5, 6, 30])
def test_slots_after_a_prefill(model: Any, length: int) -> None:
    """A windowed layer keeps the window, a fixed one a slot more, a borrower nothing; meta keys stand once."""
    for room in (None, 40):
        cache = HymbaCache(model.config, max_length=room)
        _next(model, cache, some_ids(3, length))
        window = model.config.sliding_window
        for spec, state in zip(model.config.layers, cache.layers, strict=True):
            assert state.prefix_k is None or state.prefix_k.shape[0] == 1
            if spec.kv_from is not None:
                assert state.kv is None
            elif room:
                assert state.kv.slots == (room if spec.window is None else window + 1)
            else:
                assert state.kv.slots == (length if spec.window is None else min(length, window))
            assert state.conv.shape == (3, model.config.mamba_d_conv - 1, model.config.d_inner)
            assert state.ssm.shape == (3, model.config.d_inner, model.config.mamba_d_state)


def test_a_fixed_cache_keeps_its_addresses(model: Any) -> None:
    cache = HymbaCache(model.config, max_length=40)
    _next(model, cache, some_ids(2, 9))
    before = _addresses(cache)
    for step in range(12):
        _next(model, cache, some_ids(2, 1, seed=step))
    cache.reorder_cache(torch.tensor([1, 1]))
    held = cache.snapshot()
    _next(model, cache, some_ids(2, 4))
    model.model(some_ids(2, 2), past_key_values=cache)  # gradients on
    cache.restore(held)
    assert _addresses(cache) == before


def test_bfloat16_keeps_the_scan_in_float32() -> None:
    model = build(dtype=torch.bfloat16)
    ids = some_ids(2, 30)
    cache = HymbaCache(model.config)
    parts = through_cache(model, ids, [9, 1, 1, 12, 1, 1, 1, 1, 3], cache=cache)
    assert all(state.ssm.dtype == torch.float32 for state in cache.layers)
    assert all(state.conv.dtype == torch.bfloat16 for state in cache.layers)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    scale = float(whole.std())
    assert largest(parts / scale, whole / scale) <= BFLOAT16


def test_lengths_count_text(model: Any) -> None:
    cache = HymbaCache(model.config)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized, len(cache)) == (0, None, False, 4)
    _next(model, cache, some_ids(2, 7))
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (7, 2, True)
    assert cache.get_max_cache_shape() == -1
    assert "dynamic, rows=2, tokens=7" in repr(cache)
    fixed = HymbaCache(model.config, max_length=9)
    assert (fixed.get_max_cache_shape(), fixed.max_cache_len) == (9, 9)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, None)
    ids = some_ids(1, 5)
    assert largest(_next(model, cache, ids), model.model(ids, use_cache=False).last_hidden_state) <= FLOAT64


def test_the_default_is_a_cache_outside_training(model: Any) -> None:
    ids = some_ids(1, 3)
    assert model(ids).past_key_values.get_seq_length() == 3
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 3


@pytest.mark.parametrize("room", [None, 420])
def test_long_texts(room: int | None) -> None:
    """Several growths of every buffer, windows larger than a step of growth, chunks larger than the window."""
    model = build(sliding_window=70, num_hidden_layers=3, kv_reuse_group=[[1, 2]])
    ids = some_ids(2, 400)
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[0, 100:130] = mask[1, 350] = 0
    sizes = [1, 1, 60, 9, 1, 30, 1, 150, 1, 1, 100, 45]
    assert sum(sizes) == 400
    with torch.no_grad():
        whole = model.model(ids, use_cache=False).last_hidden_state
    parts = through_cache(model, ids, sizes, cache=HymbaCache(model.config, max_length=room), hidden=True)
    assert largest(parts, whole) <= FLOAT64
    cache = HymbaCache(model.config, max_length=room)
    parts = through_cache(model, ids, sizes, mask=mask, cache=cache, hidden=True)
    for row, want in enumerate(alone(model, ids, mask, hidden=True)):
        assert largest(parts[row, mask[row] == 1], want) <= FLOAT64


# Gradients.


def test_nothing_in_a_cache_carries_gradients(model: Any) -> None:
    for room in (None, 30):
        cache = HymbaCache(model.config, max_length=room)
        for length in (4, 1, 9):
            out = model(some_ids(2, length), past_key_values=cache, use_cache=True)
            assert out.logits.requires_grad
            for state in cache.layers:
                tensors = [
                    state.conv,
                    state.ssm,
                    state.prefix_k,
                    *((state.kv.keys, state.kv.values) if state.kv else ()),
                ]
                assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("room", [None, 40])
def test_gradients_with_a_cache_are_those_without(model: Any, room: int | None) -> None:
    """Also when the cache has been written again before the backward pass."""
    ids = some_ids(2, 17)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    cache = HymbaCache(model.config, max_length=room)
    loss = model(ids, labels=ids, past_key_values=cache).loss
    _next(model, cache, some_ids(2, 1))
    loss.backward()
    found = gradients(model)
    assert max(relative(found[name], expected[name]) for name in expected) <= FLOAT64_GRADIENT


def test_text_in_the_cache_is_a_constant(model: Any) -> None:
    """A loss on later tokens has the gradient of exactly those tokens' own computation."""
    first, second = some_ids(1, 9), some_ids(1, 6, seed=1)
    cache = HymbaCache(model.config)
    _next(model, cache, first)
    states = cache.snapshot()

    def loss() -> Tensor:
        cache.restore(states)
        return model.model(second, past_key_values=cache).last_hidden_state.pow(2).sum()

    loss().backward()
    found = gradients(model)
    assert "model.meta_tokens.weight" not in found
    weight, step = model.model.layers[2].mixer.in_proj.weight, 1e-5
    for row, column in ((3, 5), (20, 0), (-1, 2)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row, column] += sign * step
                values.append(float(loss()))
                weight[row, column] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(found["model.layers.2.mixer.in_proj.weight"][row, column]), rel=1e-5)


# Going back, moving rows, disk.


def test_crop_names_the_way(model: Any) -> None:
    cache = model(some_ids(1, 3)).past_key_values
    with pytest.raises(NotImplementedError, match=r"snapshot\(\).*restore\(snapshot\)"):
        cache.crop(2)
    assert cache.is_croppable is False


@pytest.mark.parametrize("room", [None, 60])
def test_restore_as_often_as_wanted(model: Any, room: int | None) -> None:
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (11, 4)], side="right")
    cache = HymbaCache(model.config, max_length=room)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    held = cache.snapshot()
    new = some_ids(2, 3, seed=5)
    want = _next(model, cache, new)
    for detour in (1, 30):
        cache.restore(held)
        _next(model, cache, some_ids(2, detour, seed=detour))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.restore(held)
        assert torch.equal(_next(model, cache, new), want)
    cache.expand(2)
    cache.restore(held)
    assert torch.equal(_next(model, cache, new), want)


def test_a_snapshot_of_another_cache_is_refused(model: Any) -> None:
    cache = model(some_ids(1, 3)).past_key_values
    fixed = HymbaCache(model.config, max_length=9)
    with pytest.raises(CacheError, match="max_length"):
        fixed.restore(cache.snapshot())
    other = build(num_hidden_layers=5)
    with pytest.raises(CacheError, match="num_hidden_layers: cache 5, snapshot 4"):
        HymbaCache(other.config).restore(cache.snapshot())


@pytest.mark.parametrize("room", [None, 60])
def test_a_prefix_from_disk_serves_a_batch(model: Any, tmp_path: Path, room: int | None) -> None:
    """One prefix computed, saved, loaded and expanded; each row goes its own way from there."""
    prefix, rest = some_ids(1, 13), some_ids(4, 9, seed=2)
    cache = HymbaCache(model.config, max_length=room)
    _next(model, cache, prefix)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = HymbaCache.load(tmp_path / "prefix.safetensors", model.config)
    assert loaded.max_length == room
    expanded = loaded.expand(4)
    assert expanded is loaded
    out = _next(model, loaded, rest)
    want = model.model(torch.cat([prefix.expand(4, -1), rest], dim=1), use_cache=False).last_hidden_state[:, 13:]
    assert largest(out, want) <= FLOAT64
    # The one that was saved goes on as well.
    assert largest(_next(model, cache, rest[:1]), want[:1]) <= FLOAT64


def test_a_padded_batch_on_disk(model: Any, tmp_path: Path) -> None:
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (9, 2, 5)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
    cache.save(tmp_path / "state")
    loaded = HymbaCache.load(tmp_path / "state", copy.deepcopy(model.config))
    assert torch.equal(loaded.valid_columns(), mask == 1)
    new = some_ids(3, 2)
    assert torch.equal(_next(model, loaded, new), _next(model, cache, new))


def test_unfit_files_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="empty cache"):
        HymbaCache(model.config).save(tmp_path / "empty")
    assert not list(tmp_path.iterdir())
    good = tmp_path / "good"
    model(some_ids(1, 4)).past_key_values.save(good)

    for fields, named in (
        ({"hidden_size": 32}, "hidden_size: file 16, model 32"),
        ({"rope_type": "default", "rope_theta": 500.0}, r"rope_base: file [\d.]+, model 500.0"),
        ({"global_attn_idx": [0, 3]}, r"layer 3: file \[5, None\], model \[None, None\]"),
    ):
        with pytest.raises(CacheError, match=named):
            HymbaCache.load(good, build(**fields).config)

    foreign = tmp_path / "foreign"
    save_file(load_file(good), foreign)
    with pytest.raises(CacheError, match="hymba-cache-1"):
        HymbaCache.load(foreign, model.config)
    cut = tmp_path / "cut"
    cut.write_bytes(good.read_bytes()[:-9])
    with pytest.raises(CacheError, match=r"cut.*not a readable safetensors file"):
        HymbaCache.load(cut, model.config)


def test_a_failed_save_leaves_the_old_file(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    cache = model(some_ids(1, 4)).past_key_values
    cache.save(file)
    before = file.read_bytes()
    _next(model, cache, some_ids(1, 1))

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hymba.cache, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# Other people's caches.


def test_empty_stock_caches_are_taken_over(model: Any) -> None:
    ids = some_ids(2, 12)
    want = model.model(ids, use_cache=False).last_hidden_state
    stock = LlamaConfig(num_hidden_layers=4, hidden_size=16, num_attention_heads=4)
    for cache in (
        DynamicCache(),
        DynamicCache(config=stock),
        StaticCache(config=stock, max_cache_len=15),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=15),
    ):
        first = _next(model, cache, ids[:, :7])
        assert isinstance(cache, HymbaCache) and cache.get_seq_length() == 7
        assert cache.max_length in (None, 15)
        assert largest(torch.cat([first, _next(model, cache, ids[:, 7:])], dim=1), want) <= FLOAT64


def test_foreign_caches_are_refused(model: Any) -> None:
    full = DynamicCache()
    full.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(CacheError, match=r"DynamicCache that holds 3 tokens.*allowed: a HymbaCache"):
        model(some_ids(1, 2), past_key_values=full)
    with pytest.raises(CacheError, match=r"EncoderDecoderCache.*allowed: HymbaCache"):
        model(some_ids(1, 2), past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(CacheError, match=r"tuple; allowed: HymbaCache"):
        model(some_ids(1, 2), past_key_values=((torch.zeros(1), torch.zeros(1)),))
    windowed = build(global_attn_idx=[])
    with pytest.raises(CacheError, match=r"does not know its own length; use HymbaCache\(model.config, max_length"):
        windowed(some_ids(1, 2), past_key_values=StaticCache(config=windowed.config, max_cache_len=9))
    with pytest.raises(CacheError, match="written by HymbaModel"):
        HymbaCache(model.config).update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)


def test_another_models_cache_is_refused(model: Any) -> None:
    cache = model(some_ids(1, 3)).past_key_values
    for other in (build(num_hidden_layers=5), build(sliding_window=4), build(num_memory_tokens=0)):
        with pytest.raises(CacheError, match="the cache and the model are of different architectures"):
            other(some_ids(1, 1), past_key_values=cache)
    # A copy of the model is the same model.
    twin = copy.deepcopy(model)
    assert torch.equal(_next(twin, copy.deepcopy(cache), some_ids(1, 2)), _next(model, cache, some_ids(1, 2)))


# Refusals leave the cache as it was.


def test_a_full_cache_refuses_and_stays_usable(model: Any) -> None:
    cache = HymbaCache(model.config, max_length=10)
    ids = some_ids(1, 10)
    first = _next(model, cache, ids[:, :8])
    with pytest.raises(CacheError, match=r"max_length=10 text tokens, holds 8 and was given 3 more.*max_length=11"):
        _next(model, cache, some_ids(1, 3))
    whole = torch.cat([first, _next(model, cache, ids[:, 8:])], dim=1)
    assert largest(whole, model.model(ids, use_cache=False).last_hidden_state) <= FLOAT64


def test_another_number_of_rows_is_refused(model: Any) -> None:
    cache = HymbaCache(model.config)
    _next(model, cache, some_ids(2, 4))
    with pytest.raises(CacheError, match=r"holds 2 rows, the input has 3; use expand\(\) or select\(\)"):
        _next(model, cache, some_ids(3, 1))
    _next(model, cache, some_ids(2, 1))


def test_an_interrupted_call_spoils_the_cache_until_it_is_restored(model: Any) -> None:
    ids = some_ids(1, 12)
    want = model.model(ids, use_cache=False).last_hidden_state[:, 8:]
    cache = HymbaCache(model.config)
    _next(model, cache, ids[:, :8])
    held = cache.snapshot()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        _next(model, cache, ids[:, 8:])
    hook.remove()
    with pytest.raises(CacheError, match=r"interrupted; restore\(\) a snapshot or start a new cache"):
        _next(model, cache, ids[:, 8:])
    cache.restore(held)
    assert largest(_next(model, cache, ids[:, 8:]), want) <= FLOAT64


def test_positions_that_the_cache_does_not_count_are_refused(model: Any) -> None:
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (6, 3)])
    good = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=good, use_cache=True).past_key_values
    new, wide = some_ids(2, 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with pytest.raises(InputError, match=r"position_ids=\[\[6\], \[6\]\].*\[\[6\], \[3\]\].*use_cache=False"):
        model(new, attention_mask=wide, position_ids=torch.tensor([[6], [6]]), past_key_values=cache)
    model(new, attention_mask=wide, position_ids=torch.tensor([[6], [3]]), past_key_values=cache)
    with pytest.raises(InputError, match=r"position_ids has shape \(2, 3\)"):
        model(new, position_ids=torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)


def test_a_mask_that_rewrites_the_past_is_refused(model: Any) -> None:
    """What the cache has taken in is in its states; a later mask cannot take it out again."""
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (6, 3)])
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(CacheError, match=r"attention_mask\[1, 0\]=1 disagrees.*as padding.*valid_columns\(\)"):
        model(some_ids(2, 1), attention_mask=torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    cache = model(ids).past_key_values
    with pytest.raises(CacheError, match=r"attention_mask\[1, 0\]=0 disagrees.*as a real token"):
        model(
            some_ids(2, 1), attention_mask=torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), past_key_values=cache
        )


def test_a_cache_made_in_inference_mode_is_a_cache_like_any_other(model: Any, tmp_path: Path) -> None:
    """Prefilled, copied, reordered or loaded there; continued under no_grad, and by a call that autograd records."""
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (6, 3)])
    new = some_ids(4, 2)
    for room in (None, 40):
        cache = HymbaCache(model.config, max_length=room)
        with torch.inference_mode():
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.save(tmp_path / "state")
            caches = [copy.deepcopy(cache), HymbaCache.load(tmp_path / "state", model.config), cache]
            for each in caches:
                each.reorder_cache(torch.tensor([0, 1]))
                each.restore(each.snapshot())
                each.expand(2)
        for each in caches:
            first = _next(model, each, new)
            recorded = model.model(new, past_key_values=each).last_hidden_state
            recorded.sum().backward()
            with torch.inference_mode():
                last = model.model(new, past_key_values=each).last_hidden_state
            whole = torch.cat([ids.repeat_interleave(2, dim=0), new, new, new], dim=1)
            wide = torch.cat([mask.repeat_interleave(2, dim=0), torch.ones(4, 6, dtype=torch.long)], dim=1)
            for row, want in enumerate(alone(model, whole, wide, hidden=True)):
                assert largest(torch.cat([first, recorded, last], dim=1)[row], want[-6:]) <= FLOAT64


# Rows that end at different times.


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 1, "do_sample": True}])
def test_continuing_after_rows_ended_early(model: Any, options: dict[str, Any]) -> None:
    """A second turn on the returned cache equals each conversation run on its own."""
    torch.manual_seed(3)
    prompts, mask = pad([some_ids(1, n, seed=n)[0] for n in (3, 8, 5)])
    length = prompts.shape[1]
    if options.get("cache_implementation") == "static":
        options = {"past_key_values": HymbaCache(model.config, max_length=60)}
    first = model.generate(
        prompts, attention_mask=mask, max_new_tokens=14, eos_token_id=list(range(12)), pad_token_id=0,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    cache, tokens = first.past_key_values, first.sequences
    ended = [next((i for i, t in enumerate(row.tolist()) if t < 12), row.numel() - 1) + 1 for row in tokens[:, length:]]
    assert len(set(ended)) > 1, "the rows should end at different times"
    real = torch.cat([mask, torch.zeros(3, tokens.shape[1] - length, dtype=torch.long)], dim=1)
    for row, count in enumerate(ended):
        real[row, length : length + count] = 1
    assert torch.equal(cache.valid_columns(), real[:, : cache.columns] == 1)

    turn = some_ids(3, 4, seed=9)
    whole, whole_mask = torch.cat([tokens, turn], dim=1), torch.cat([real, torch.ones_like(turn)], dim=1)
    out = model.generate(
        whole, attention_mask=whole_mask, past_key_values=cache, max_new_tokens=3, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, do_sample=False,
    )  # fmt: skip
    final = torch.cat([whole, out.sequences[:, -3:-1]], dim=1)
    final_mask = torch.cat([whole_mask, torch.ones(3, 2, dtype=torch.long)], dim=1)
    for row, want in enumerate(alone(model, final, final_mask)):
        assert largest(torch.stack(out.logits, dim=1)[row], want[-3:].float()) <= FLOAT64_LOGITS


def test_continuing_with_a_mask_that_forgets_the_padding_is_refused(model: Any) -> None:
    prompts, mask = pad([some_ids(1, n, seed=n)[0] for n in (3, 8)])
    first = model.generate(
        prompts, attention_mask=mask, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
    )
    whole = torch.cat([first.sequences, some_ids(2, 2)], dim=1)
    for wrong in (None, torch.ones_like(whole)):
        with pytest.raises(CacheError, match=r"attention_mask.*disagrees with the cache.*valid_columns\(\)"):
            model.generate(whole, attention_mask=wrong, past_key_values=first.past_key_values, max_new_tokens=2)
