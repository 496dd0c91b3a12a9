"""The meta tokens' state: computed once per cache, never stale, kept longer only where the user says so."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import build, largest, randomise, some_ids
from peft import LoraConfig, get_peft_model
from tolerances import FLOAT64
from torch import Tensor, nn

from hymba import HymbaCache, HymbaModel

EVERY_PROJECTION = "in_proj out_proj x_proj dt_proj gate_proj up_proj down_proj".split()


@contextmanager
def count_runs(model: Any) -> Iterator[list[int]]:
    """How often the meta tokens have been run, counted where they enter the first layer."""
    runs = [0]
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))

    def seen(*_: Any) -> None:
        runs[0] += 1

    handle = inner.meta_tokens.register_forward_hook(seen)
    try:
        yield runs
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_once_per_generate(options: dict[str, Any]) -> None:
    model = build(dtype=torch.float32)
    with count_runs(model) as runs:
        model.generate(some_ids(3, 7), max_new_tokens=6, eos_token_id=None, **options)
    assert runs == [1]


def test_once_per_conversation() -> None:
    model = build()
    cache = HymbaCache(model.config)
    tokens = some_ids(1, 5)
    with count_runs(model) as runs:
        for _ in range(3):
            tokens = model.generate(tokens, past_key_values=cache, max_new_tokens=3, eos_token_id=None)
            tokens = torch.cat([tokens, some_ids(1, 2)], dim=1)
        cache.expand(4)
        model(some_ids(4, 1), past_key_values=cache)
    assert runs == [1]
    cache.reset()
    with count_runs(model) as runs:
        model(some_ids(1, 1), past_key_values=cache)
    assert runs == [1]


def test_once_per_step_in_training() -> None:
    model = build().train()
    ids = some_ids(4, 9)
    with count_runs(model) as runs:
        model(ids, labels=ids).loss.backward()
    assert runs == [1]
    assert model.model.meta_tokens.weight.grad.norm() > 0


def test_once_in_a_frozen_scope() -> None:
    model = build()
    ids = some_ids(2, 5)
    want = model(ids).logits
    with count_runs(model) as runs, torch.no_grad(), model.frozen_meta_state():
        for _ in range(3):
            assert torch.equal(model(ids).logits, want)
            model.generate(ids, max_new_tokens=2, eos_token_id=None)
            with model.frozen_meta_state():
                model(ids, use_cache=False)
    assert runs == [1]
    with count_runs(model) as runs, torch.no_grad():
        model(ids)
        model(ids)
    assert runs == [2]


def test_a_frozen_scope_does_not_cut_gradients() -> None:
    model = build()
    ids = some_ids(1, 5)
    with model.frozen_meta_state():
        with torch.no_grad():
            model(ids)
        model(ids, labels=ids).loss.backward()
    assert model.model.meta_tokens.weight.grad is not None


def test_a_frozen_state_is_of_its_precision() -> None:
    """Autocast computes another state; a scope must not hand one to the other."""
    model = build(dtype=torch.float32)
    ids = some_ids(1, 6)

    def both() -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            low = model(ids).logits
        with torch.no_grad():
            return [low, model(ids).logits]

    want = both()
    with model.frozen_meta_state():
        assert all(torch.equal(a, b) for a, b in zip(both() + both(), want + want, strict=True))


def test_no_meta_tokens() -> None:
    model = build(num_memory_tokens=0)
    assert model.model.meta_tokens is None
    with model.frozen_meta_state():
        model.generate(some_ids(1, 3), max_new_tokens=2)


def test_forward_writes_nothing_to_the_model() -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {id(module): set(vars(module)) for module in model.modules()}
    config = model.config.to_dict()
    model.generate(some_ids(2, 9), max_new_tokens=4, eos_token_id=None)
    model(some_ids(2, 9))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert attributes == {id(module): set(vars(module)) for module in model.modules()}


# Every way in which weights change.


def _fused_adamw(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = some_ids(2, 9)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _data_writes(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def _data_replaced(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def _assigned(model: Any) -> None:
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))
    other = copy.deepcopy(inner)
    randomise(other, seed=9)
    inner.load_state_dict(other.to(torch.float64).state_dict(), assign=True)


def _loaded(model: Any) -> None:
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))
    other = copy.deepcopy(inner)
    randomise(other, seed=11)
    inner.load_state_dict(other.state_dict())


def _to_float32(model: Any) -> None:
    model.to(torch.float32)


def _no_grad_write(model: Any) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("meta_tokens.weight")).add_(0.5)


def _module_replaced(model: Any) -> None:
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))
    inner.layers[1].mixer.mamba.D = nn.Parameter(torch.full_like(inner.layers[1].mixer.mamba.D, 3.0))


def _hooked(model: Any) -> None:
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))
    inner.layers[0].mixer.mamba.register_forward_hook(lambda module, args, output: output * 1.5)


CHANGES: dict[str, Callable[[Any], None]] = {
    "fused AdamW": _fused_adamw,
    "p.data written": _data_writes,
    "p.data replaced": _data_replaced,
    "load_state_dict(assign=True)": _assigned,
    "load_state_dict": _loaded,
    ".to(dtype)": _to_float32,
    "written under no_grad": _no_grad_write,
    "parameter replaced": _module_replaced,
    "forward hook": _hooked,
}


def _outputs(model: Any) -> list[Tensor]:
    ids = some_ids(2, 12, seed=4)
    inner = next(module for module in model.modules() if isinstance(module, HymbaModel))
    with torch.no_grad():
        out = [inner(ids, use_cache=False).last_hidden_state, inner(ids).last_hidden_state]
        generated = model.generate(
            input_ids=ids, max_new_tokens=3, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
    return [*out, torch.stack(generated.logits)]


def _assert_fresh(model: Any, before: list[Tensor] | None) -> list[Tensor]:
    """The model's outputs are those of a copy that has never run, and are not what they were."""
    twin = copy.deepcopy(model)
    after = _outputs(model)
    for i, (new, want) in enumerate(zip(after, _outputs(twin), strict=True)):
        assert torch.equal(new, want)
        if before is not None and new.dtype == before[i].dtype:
            assert largest(new, before[i]) > 1e-6, "the change should be seen"
    return after


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_never_stale(change: Callable[[Any], None]) -> None:
    model = build()
    with torch.no_grad(), model.frozen_meta_state():
        model(some_ids(1, 3))  # what a scope kept must not outlive it
    before = _outputs(model)
    change(model)
    _assert_fresh(model, before)
    change(model)
    _assert_fresh(model, None)


def _adapted() -> Any:
    config = LoraConfig(target_modules=EVERY_PROJECTION, r=2, lora_alpha=8, init_lora_weights=False)
    model = get_peft_model(build(), config).eval()
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.1)
    return model


def test_never_stale_under_adapters() -> None:
    """PEFT on every projection: merge, unmerge, switch, disable, delete. None of them moves a counter."""
    model = _adapted()
    plain = _outputs(build())
    first = _assert_fresh(model, plain)

    model.set_adapter("other")
    second = _assert_fresh(model, first)
    model.merge_adapter()
    for new, old in zip(_assert_near(model, second), second, strict=True):
        assert largest(new, old) <= 1e-5
    model.unmerge_adapter()
    _assert_near(model, second)
    model.set_adapter("default")
    _assert_near(model, first)
    with model.disable_adapter():
        _assert_near(model, plain)
    _assert_near(model, first)
    _assert_near(model.merge_and_unload(), first)


def _assert_near(model: Any, want: list[Tensor]) -> list[Tensor]:
    """The outputs of a copy that never ran, and, up to the order of sums, those given."""
    twin = copy.deepcopy(model)
    after = _outputs(model)
    for new, fresh, old in zip(after, _outputs(twin), want, strict=True):
        assert torch.equal(new, fresh)
        assert largest(new, old) <= (FLOAT64 if new.dtype == torch.float64 else 1e-5)
    return after


def test_adapters_reach_every_projection() -> None:
    """An adapter on each projection alone changes the output: nothing is computed around a module."""
    ids = some_ids(1, 9)
    for target in EVERY_PROJECTION:
        model = build()
        want = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=[target], r=2, init_lora_weights=False)).eval()
        assert largest(adapted(input_ids=ids).logits, want) > 1e-6, target
        adapted(input_ids=ids, labels=ids).loss.backward()
        untrained = [
            n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert not untrained


def test_overlapping_scopes_of_threads_end_with_the_last() -> None:
    model = build()
    ids = some_ids(1, 4)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with torch.no_grad(), model.frozen_meta_state():
            entered.set()
            leave.wait(20)
            model(ids)

    thread = threading.Thread(target=hold)
    with torch.no_grad(), model.frozen_meta_state():
        thread.start()
        assert entered.wait(20)
        before = model(ids).logits
    leave.set()
    thread.join()
    with torch.no_grad():
        model.model.meta_tokens.weight.add_(0.5)
        after = model(ids).logits
        assert largest(after, before) > 1e-6
        assert torch.equal(after, copy.deepcopy(model)(ids).logits)


def test_a_copy_made_in_a_scope_is_not_in_it() -> None:
    model = build()
    ids = some_ids(1, 4)
    with torch.no_grad(), model.frozen_meta_state():
        before = model(ids).logits
        twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.meta_tokens.weight.add_(0.5)
        assert largest(twin(ids).logits, before) > 1e-6
        assert torch.equal(model(ids).logits, before)
