"""What is handed from layer to layer follows to another device, and a model that is spread out gives the same."""

from __future__ import annotations

import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from helpers import VOCAB, build, largest, pad, padded_ids, small_config, some_ids
from tolerances import FLOAT32
from torch import Tensor

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.nn import Collected, KVState, LayerState, SharedKV, Span
from hymba.ops.masks import Visibility


def _tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in a dataclass and the dataclasses in it, except what is computed on demand."""
    found = []
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            found.append((field.name, item))
        elif is_dataclass(item):
            found += [(f"{field.name}.{name}", tensor) for name, tensor in _tensors(item)]
    return found


def _all_kinds() -> list[Any]:
    """One of each with every optional tensor filled in."""
    seen = Visibility(*(torch.zeros(1, 3, dtype=torch.long) for _ in range(2)), window=2, prefix=1)
    seen.query_document = seen.key_document = torch.zeros(1, 3)
    seen.start = torch.zeros(1, dtype=torch.long)
    span = Span.following(3, lengths=torch.tensor([2, 3]), offset=1)
    span.seq_idx = torch.zeros(2, 3, dtype=torch.int32)
    kv = KVState(window=2, keys=torch.zeros(2, 3, 1, 4), values=torch.zeros(2, 3, 1, 4))
    state = LayerState(kv, *(torch.zeros(2, 3, 4) for _ in range(5)))
    shared = SharedKV(*(torch.zeros(2, 3, 1, 4) for _ in range(2)), seen, *(torch.zeros(1, 1, 1, 4) for _ in range(2)))
    return [seen, span, state, shared]


@pytest.mark.parametrize("value", _all_kinds(), ids=lambda value: type(value).__name__)
def test_every_tensor_follows(value: Any) -> None:
    empty = [field.name for field in fields(value) if getattr(value, field.name) is None]
    assert set(empty) <= {"_dense", "_bounds", "own_keys"}, "the case should fill every field in"
    before = _tensors(value)
    for move in (lambda: value.to("meta"), lambda: send_to_device({"a": value}, torch.device("meta"))["a"]):
        moved = move()
        assert type(moved) is type(value)
        after = _tensors(moved)
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(tensor.device.type == "meta" for _, tensor in after)
        assert all(tensor.device.type == "cpu" for _, tensor in _tensors(value)), "the original stays where it is"
        plain = {f.name: getattr(value, f.name) for f in fields(value) if f.name[0] != "_"}
        for name, item in plain.items():
            if not isinstance(item, Tensor) and not is_dataclass(item):
                assert getattr(moved, name) == item, name
    assert value.to("cpu") is value


def test_layers_of_a_device_share_a_span() -> None:
    """And with it masks and rotary tables, which are computed once per device and call."""
    span = Span.following(3)
    assert span.to("meta") is span.to("meta")
    assert span.to("meta").visibility(2, prefix=0) is span.to("meta").visibility(2, prefix=0)


def test_what_is_collected_is_not_copied() -> None:
    collected = Collected()
    assert send_to_device((collected,), torch.device("meta"))[0] is collected


def _with_borrowing() -> HymbaConfig:
    return small_config(num_hidden_layers=6, kv_reuse_group=[[1, 2, 4], [3, 5]], tie_word_embeddings=False)


@pytest.mark.parametrize("elsewhere", ["disk", "cpu offload hooks"])
def test_offloading_with_a_borrowing_layer_elsewhere(tmp_path: Path, elsewhere: str) -> None:
    """Layers on disk or behind accelerate's hooks, lenders and borrowers apart: same outputs, caches, weights seen."""
    model = build(_with_borrowing(), dtype=torch.float32)
    ids, mask = padded_ids()
    want = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    if elsewhere == "disk":
        model.save_pretrained(tmp_path / "model")
        places = {"model.embed_tokens": "cpu", "model.meta_tokens": "cpu", "model.final_norm": "cpu", "lm_head": "disk"}
        places |= {f"model.layers.{i}": "disk" if i in (2, 3) else "cpu" for i in range(6)}
        spread = HymbaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert spread.model.layers[2].mixer.in_proj.weight.is_meta
    else:
        from accelerate import cpu_offload

        spread = build(_with_borrowing(), dtype=torch.float32)
        cpu_offload(spread, execution_device=torch.device("cpu"))
    out = spread(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert largest(out.logits, want.logits) <= FLOAT32
    for a, b in zip(out.attentions, want.attentions, strict=True):
        assert largest(a, b) <= FLOAT32
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "use_cache": False}):
        again = spread.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None, **options)
        assert torch.equal(again, tokens)


def test_device_map_auto(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = HymbaForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(some_ids(1, 9)).logits, model(some_ids(1, 9)).logits)


def test_layers_on_two_devices() -> None:
    """Shapes only, on devices without arithmetic: what a layer hands to another one follows it."""
    from accelerate import dispatch_model

    model = build(_with_borrowing(), dtype=torch.float32).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = [f"model.layers.{i}" for i in range(6)]
        places += ["model.embed_tokens", "model.meta_tokens", "model.final_norm", "lm_head"]
        dispatch_model(model, dict.fromkeys(places, "meta"), main_device="meta", force_hooks=True)
    assert model(torch.zeros(2, 7, dtype=torch.long, device="meta")).logits.shape == (2, 7, VOCAB)


ACCELERATORS = torch.accelerator.device_count() if torch.accelerator.is_available() else 0


@pytest.mark.skipif(not ACCELERATORS, reason="needs an accelerator")
@pytest.mark.parametrize("second", ["cpu", "disk", "1"])
def test_a_model_on_two_devices(second: str, tmp_path: Path) -> None:
    """Lenders on one device, borrowers on the other: outputs, gradients, caches as on the CPU alone."""
    if second == "1" and ACCELERATORS < 2:
        pytest.skip("needs two accelerators")
    config = small_config(num_hidden_layers=6, kv_reuse_group=[[1, 2, 4], [3, 5]])
    model = build(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (9, 4, 13)])
    want = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    elsewhere: Any = int(second) if second.isdigit() else second
    places: dict[str, Any] = {f"model.layers.{i}": elsewhere if i in (2, 3) else 0 for i in range(6)}
    places |= dict.fromkeys(("model.embed_tokens", "model.meta_tokens", "model.final_norm", "lm_head"), 0)
    for device_map in (places, "auto"):
        spread = HymbaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        device = torch.device(torch.accelerator.current_accelerator().type, 0)
        here, there = ids.to(device), mask.to(device)
        out = spread(here, attention_mask=there, output_attentions=True, output_hidden_states=True)
        assert largest(out.logits.cpu(), want.logits) <= FLOAT32
        for found, expected in zip(out.attentions, want.attentions, strict=True):
            assert largest(found.cpu(), expected) <= FLOAT32
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None, num_beams=2)
        for room in (None, 40):
            cache = HymbaCache(config, max_length=room)
            with torch.no_grad():
                parts = [
                    spread(here[:, a:b], attention_mask=there[:, :b], past_key_values=cache).logits
                    for a, b in ((0, 5), (5, 6), (6, 13))
                ]
            assert largest(torch.cat(parts, dim=1).cpu(), want.logits) <= FLOAT32
            options = {"cache_implementation": "static"} if room else {}
            found = spread.generate(
                here, attention_mask=there, max_new_tokens=9, eos_token_id=None, num_beams=2, **options
            )
            assert torch.equal(found.cpu(), tokens)
