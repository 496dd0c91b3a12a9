"""A decode step over fixed addresses, and the loop around it, give what `generate` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hymba import HymbaCache
from hymba.decode_loop import can_capture_choice, run_loop
from hymba.decoding import DecodeStep, why_not_fused
from hymba.generation import HymbaGenerationMixin


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 41, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return ids, mask


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)])
@torch.no_grad()
def test_steps_give_the_forward_pass(rows: slice) -> None:
    model = build()
    ids, mask = left_padded()
    more = torch.randint(1, 41, (3, 20))
    ids, mask, more = ids[rows], mask[rows], more[rows]
    whole = model(torch.cat([ids, more], 1), attention_mask=torch.cat([mask, torch.ones_like(more)], 1)).logits
    cache = HymbaCache(model.config, max_length=29)
    model(ids, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, cache, fused=False)
    addresses = [t.data_ptr() for s in cache.layers for t in (s.conv, s.ssm)]
    for t in range(20):
        step.tokens.copy_(more[:, t])
        step.run()
        assert torch.allclose(step.logits.double(), whole[:, 9 + t].double(), atol=1e-5)
    assert addresses == [t.data_ptr() for s in cache.layers for t in (s.conv, s.ssm)]


class NothingReadBack(TorchDispatchMode):
    """Fails where a value goes to the host, which a capture does not allow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_steps_of_mamba_2_heads_can_be_captured() -> None:
    """Alone and beside attention: the forward pass's logits, state where it was, nothing read back."""
    pattern = [
        {"mixer": "hybrid", "window": 4, "ssm": "mamba2", "ssm_head_dim": 4, "ssm_groups": 2},
        {"mixer": "mamba", "ssm": "mamba2", "ssm_head_dim": 8},
    ]
    model = build(layer_pattern=pattern, num_hidden_layers=2, global_attn_idx=None, kv_reuse_group=None)
    assert why_not_fused(model) is not None
    ids, mask = left_padded()
    more = torch.randint(1, 41, (3, 8))
    whole = model(torch.cat([ids, more], 1), attention_mask=torch.cat([mask, torch.ones_like(more)], 1)).logits
    cache = HymbaCache(model.config, max_length=17)
    model(ids, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, cache, fused=False)

    def held() -> list[int]:
        states = [t for s in cache.layers for t in (s.conv, s.ssm, *(() if s.kv is None else (s.kv.keys, s.kv.values)))]
        return [t.data_ptr() for t in (*states, cache.seen, step.tokens, step.logits) if t is not None]

    before = held()
    for t in range(8):
        step.tokens.copy_(more[:, t])
        with NothingReadBack():
            step.run()
        assert torch.allclose(step.logits.double(), whole[:, 9 + t].double(), atol=1e-5)
        assert held() == before
    # A row at rest keeps its state.
    step.active[1] = False
    kept = [s.ssm[1].clone() for s in cache.layers if s.ssm is not None]
    step.run()
    assert all(torch.equal(s.ssm[1], k) for s, k in zip(cache.layers, kept) if s.ssm is not None)


@torch.no_grad()
def test_a_step_inside_untouched_leaves_no_trace() -> None:
    model = build()
    ids, mask = left_padded()
    cache = HymbaCache(model.config, max_length=20)
    model(ids, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, cache, fused=False)
    step.run()
    expected = step.logits.clone()
    cache = HymbaCache(model.config, max_length=20)
    model(ids, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, cache, fused=False)
    for _ in range(3):
        with step.untouched():
            step.tokens.fill_(7)
            step.run()
    step.tokens.zero_()
    step.run()
    assert torch.equal(step.logits, expected)


class Never(StoppingCriteria):
    """Unknown to the loop, so that it runs on the host's side."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("where", ["device", "host"])
@torch.no_grad()
def test_the_loop_chooses_what_generate_chooses_and_leaves_a_cache_that_continues(where: str) -> None:
    model = build()
    ids, mask = left_padded()
    # An id that greedy decoding meets early in one row and not at once in all.
    free = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)[:, 9:]
    eos = int(free[1, 5])
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=0
    )[:, 9:]
    cache = HymbaCache(model.config, max_length=40)
    first = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    criteria = [MaxLengthCriteria(33), EosTokenCriteria([eos])]
    if where == "host":
        criteria.append(Never())
    new = run_loop(
        model, cache, first, input_ids=ids, processors=LogitsProcessorList(), criteria=StoppingCriteriaList(criteria),
        sample=False, pad=torch.tensor(0),
    ).tokens  # fmt: skip
    assert torch.equal(new, expected)

    # Every row goes on as it would alone.
    turn = torch.tensor([[3, 4, 5]]).expand(3, -1)
    held = cache.columns
    valid = cache.valid_columns()
    assert valid is not None and valid.shape == (3, held)
    sequence = torch.cat([ids, new], 1)
    fed = sequence[:, :held]
    rest = torch.cat([sequence[:, held:], turn], 1)
    ended = (new == eos).int().cumsum(1) - (new == eos).int() > 0
    whole_mask = torch.cat([mask, (~ended).long()], 1)
    rest_mask = torch.cat([whole_mask[:, held:], torch.ones_like(turn)], 1)
    out = model(rest, attention_mask=torch.cat([valid.long(), rest_mask], 1), past_key_values=cache).logits[:, -1]
    for row in range(3):
        alone = torch.cat([fed[row][valid[row]], rest[row][rest_mask[row] == 1]])[None]
        assert torch.allclose(out[row].double(), model(alone).logits[0, -1].double(), atol=1e-5)


@torch.no_grad()
def test_sampling_follows_the_distribution() -> None:
    model = build(dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]]).expand(400, -1)
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(4)])
    cache = HymbaCache(model.config, max_length=8)
    first = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    torch.manual_seed(0)
    new = run_loop(
        model, cache, first, input_ids=prompt, processors=processors, sample=True, pad=None,
        criteria=StoppingCriteriaList([MaxLengthCriteria(4)]),
    ).tokens  # fmt: skip
    expected = processors(prompt[:1], first[:1]).softmax(-1)[0]
    share = torch.bincount(new[:, 0], minlength=expected.numel()) / 400
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().max() < 4 * 0.5 / 400**0.5


def test_what_can_be_captured() -> None:
    pure = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    stops = StoppingCriteriaList([MaxLengthCriteria(5), EosTokenCriteria(2)])
    assert can_capture_choice(pure, stops)
    assert not can_capture_choice(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)]), stops)


def test_a_step_needs_a_static_cache_with_a_prompt() -> None:
    model = build()
    with pytest.raises(ValueError, match="static cache"):
        DecodeStep(model, HymbaCache(model.config, max_length=4), fused=False)


def test_why_not_fused_names_the_reason() -> None:
    model = build(kq_norm="rms")
    assert "query/key norms" in (why_not_fused(model) or "")


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "eos": {"do_sample": False, "eos_token_id": [3, 4, 9, 12, 20], "pad_token_id": 0},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "eos_token_id": [3, 4, 9], "pad_token_id": 0},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 7, "eos_token_id": [3, 4, 9], "pad_token_id": 0},
    "scores": {"do_sample": False, "eos_token_id": None, "output_scores": True, "output_logits": True},
    "one": {"do_sample": False, "max_new_tokens": 1},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`generate` by steps also without CUDA; counts how often."""
    calls: list[int] = []

    def replays(self: Any, cache: Any, settings: Any) -> bool:
        calls.append(1)
        return isinstance(cache, HymbaCache) and cache.max_length is not None

    monkeypatch.setattr(HymbaGenerationMixin, "_replays", replays)
    return calls


@pytest.mark.parametrize("options", OPTIONS)
def test_generate_by_steps_equals_generate(options: str, everywhere: list[int]) -> None:
    model = build(dtype=torch.float64)
    ids, mask = left_padded()
    common = {"max_new_tokens": 14, "return_dict_in_generate": True, **OPTIONS[options]}
    out = []
    for room in (60, None):
        torch.manual_seed(5)
        cache = HymbaCache(model.config, max_length=room)
        out.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **common))
    assert len(everywhere) == 2
    steps, plain = out
    assert torch.equal(steps.sequences, plain.sequences)
    for name in ("scores", "logits"):
        if common.get(f"output_{name}"):
            assert len(steps[name]) == len(plain[name])
            for a, b in zip(steps[name], plain[name], strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    mine, theirs = (o.past_key_values for o in out)
    assert mine.columns == theirs.columns
    assert (mine.valid_columns() is None) == (theirs.valid_columns() is None)
    if mine.valid_columns() is not None:
        assert torch.equal(mine.valid_columns(), theirs.valid_columns())
    turn = torch.tensor([[3, 4, 5]]).expand(3, -1)
    rest = [torch.cat([o.sequences[:, c.columns :], turn], 1) for o, c in zip(out, (mine, theirs), strict=True)]
    masks = [
        None if c.valid_columns() is None else torch.cat([c.valid_columns().long(), torch.ones_like(r)], 1)
        for c, r in zip((mine, theirs), rest, strict=True)
    ]
    model_out = [
        model(r, attention_mask=m, past_key_values=c).logits[:, -1]
        for r, m, c in zip(rest, masks, (mine, theirs), strict=True)
    ]
    assert torch.allclose(model_out[0], model_out[1], atol=1e-5)


def test_generate_by_steps_streams_and_marks_a_cache_that_was_broken_off(everywhere: list[int]) -> None:
    model = build()

    class Streamer:
        def __init__(self, most: int) -> None:
            self.most, self.got, self.ended = most, [], False

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()
            if len(self.got) > self.most:
                raise KeyboardInterrupt

        def end(self) -> None:
            self.ended = True

    ids = torch.tensor([[5, 6, 7]])
    whole = model.generate(ids, max_new_tokens=9, do_sample=False)
    streamer = Streamer(100)
    model.generate(ids, max_new_tokens=9, do_sample=False, cache_implementation="static", streamer=streamer)
    assert streamer.got == whole[0].tolist() and streamer.ended
    cache = HymbaCache(model.config, max_length=40)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=9, do_sample=False, past_key_values=cache, streamer=Streamer(6))
    with pytest.raises(ValueError, match="interrupted"):
        model(ids, past_key_values=cache)
