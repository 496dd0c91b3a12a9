"""A decode step over fixed addresses, and the loop around it, give what `generate` gives."""

from __future__ import annotations

import pytest
import torch
from helpers import build
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hymba import HymbaCache
from hymba.decode_loop import can_capture_choice, run_loop
from hymba.decoding import DecodeStep, why_not_fused


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


@torch.no_grad()
def test_the_loop_chooses_what_generate_chooses_and_leaves_a_cache_that_continues() -> None:
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
    new = run_loop(
        model, cache, first, processors=LogitsProcessorList(), sample=False,
        eos=torch.tensor([eos]), pad=torch.tensor(0), new_tokens=24,
    )  # fmt: skip
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
    new = run_loop(model, cache, first, processors=processors, sample=True, eos=None, pad=None, new_tokens=1)
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
