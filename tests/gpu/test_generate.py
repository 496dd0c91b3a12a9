"""`generate` with a static cache replays its steps: the same tokens as launch by launch, whatever is asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.on_gpu import needs_gpu
from helpers import randomise

from hymba import HymbaConfig, HymbaForCausalLM

pytestmark = needs_gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one row": {"rows": 1},
    "ends early": {"eos_token_id": list(range(3, 60)), "pad_token_id": 0},
    "drawn from one": {"do_sample": True, "top_k": 1},
    "penalty, on the host's side": {"repetition_penalty": 1.4},
    "modules": {"hook": True},
}


@pytest.fixture(scope="module")
def model() -> HymbaForCausalLM:
    torch.manual_seed(0)
    config = HymbaConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=300, sliding_window=16, global_attn_idx=[0], num_memory_tokens=8,
    )  # fmt: skip
    model = HymbaForCausalLM(config).cuda().eval()
    randomise(model)
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_choose_what_launched_steps_choose(model: HymbaForCausalLM, name: str) -> None:
    asked = {"rows": 3, "hook": False, "do_sample": False, "eos_token_id": None, **OPTIONS[name]}
    rows, hook = asked.pop("rows"), asked.pop("hook")
    ids = torch.randint(3, 300, (rows, 21), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    handle = model.model.layers[1].register_forward_hook(lambda *_: None) if hook else None
    common = {"attention_mask": mask, "max_new_tokens": 40, **asked}
    got = model.generate(ids, cache_implementation="static", **common)
    want = model.generate(ids, cache_implementation="static", disable_compile=True, **common)
    if handle is not None:
        handle.remove()
    assert got.tolist() == want.tolist()


def test_a_model_that_cannot_be_captured_runs_launch_by_launch(model: HymbaForCausalLM) -> None:
    ids = torch.randint(3, 300, (2, 9), device="cuda")
    common: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **common)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: float(args[0].sum()) and None)
    with pytest.warns(UserWarning, match="cannot be captured"):
        got = model.generate(ids, cache_implementation="static", **common)
    handle.remove()
    assert got.tolist() == want.tolist()
    # What a broken capture leaves behind is mended: random numbers, and captures that come after.
    torch.rand(3, device="cuda")
    assert model.generate(ids, cache_implementation="static", **common).tolist() == want.tolist()


def test_streamed_tokens_are_the_sequence(model: HymbaForCausalLM) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.got.append(-1)

    streamer = Streamer()
    ids = torch.randint(3, 300, (1, 9), device="cuda")
    out = model.generate(
        ids, cache_implementation="static", max_new_tokens=20, do_sample=True, eos_token_id=None, streamer=streamer
    )
    assert streamer.got == [*out[0].tolist(), -1]


def test_a_conversation_goes_on_in_its_static_cache(model: HymbaForCausalLM) -> None:
    from hymba import HymbaCache

    ids = torch.randint(3, 300, (2, 9), device="cuda")
    common: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = HymbaCache(model.config, max_length=60)
    first = model.generate(ids, past_key_values=cache, **common)
    more = torch.cat([first, ids], dim=1)
    assert model.generate(more, past_key_values=cache, **common).tolist() == model.generate(more, **common).tolist()
