"""The sampling loop of `generate` around `DecodeStep`: choosing the next token is part of the replayed step.

The host looks at the device once per `_CHECK_EVERY` tokens (every token when streaming), to see whether all rows have
ended; between those looks it only replays. Processors that look at the text so far, or that this file does not know,
run on the host's side of the step instead, one token at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hymba.cache import HymbaCache
from hymba.decoding import DecodeStep, capture, why_not_fused

if TYPE_CHECKING:
    from hymba.model import HymbaForCausalLM

_CHECK_EVERY = 16
# Functions of the scores alone, made of device operations: they can be part of a captured step.
_PURE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    InfNanRemoveLogitsProcessor,
)


def can_capture_choice(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """Whether choosing and stopping depend on nothing but the scores, the token and the length."""
    return all(type(p) in _PURE for p in processors) and all(
        type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria
    )


class Choice:
    """Chooses the next token of every row on the device and notes which rows have ended.

    Args:
        step: the decode step whose `tokens` and `active` it fills in.
        processors: functions of the scores.
        sample: draw from the distribution; otherwise take the best token.
        eos: (n,) ids that end a row, or `None`. pad: what an ended row is fed.
        room: tokens to make room for.
    """

    def __init__(
        self,
        step: DecodeStep,
        processors: LogitsProcessorList,
        *,
        sample: bool,
        eos: Tensor | None,
        pad: Tensor | None,
        room: int,
    ) -> None:
        device = step.tokens.device
        self.step, self.processors, self.sample = step, processors, sample
        self.eos = None if eos is None else eos.to(device)
        self.pad = torch.zeros((), dtype=torch.long, device=device) if pad is None else pad.to(device)
        self.done = torch.zeros(step.rows, dtype=torch.bool, device=device)
        self.chosen = torch.zeros(step.rows, room, dtype=torch.long, device=device)
        self.real = torch.zeros(step.rows, room, dtype=torch.bool, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)

    @property
    def held(self) -> list[Tensor]:
        """Every tensor that a call writes."""
        return [self.step.tokens, self.step.active, self.done, self.chosen, self.real, self.count]

    def __call__(self, logits: Tensor) -> None:
        """logits: (b, vocab) float32 of the newest position."""
        scores = self.processors(self.step.tokens[:, None], logits)
        if self.sample:
            # The Gumbel form of torch.multinomial: no value leaves the device.
            probabilities = scores.softmax(dim=-1)
            token = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)
        else:
            token = scores.argmax(dim=-1)
        token = torch.where(self.done, self.pad, token)
        self.step.active.copy_(~self.done)
        self.chosen.index_copy_(1, self.count, token[:, None])
        self.real.index_copy_(1, self.count, self.step.active[:, None])
        self.count.add_(1)
        if self.eos is not None:
            self.done.logical_or_(torch.isin(token, self.eos))
        self.step.tokens.copy_(token)


def run_loop(
    model: HymbaForCausalLM,
    cache: HymbaCache,
    first_logits: Tensor,
    *,
    processors: LogitsProcessorList,
    sample: bool,
    eos: Tensor | None,
    pad: Tensor | None,
    new_tokens: int,
    streamer: Any = None,
) -> Tensor:
    """Tokens after a prefill.

    Args:
        cache: static, holds the prompt; moved on by the tokens that were taken in.
        first_logits: (b, vocab) float32 of the prompt's last position.
        new_tokens: at most this many.

    Returns:
        (b, n) new tokens, ended rows filled with `pad`.
    """
    step = DecodeStep(model, cache, fused=first_logits.is_cuda and why_not_fused(model) is None)
    choice = Choice(step, processors, sample=sample, eos=eos, pad=pad, room=new_tokens + _CHECK_EVERY)
    choice(first_logits)

    def advance() -> None:
        step.run()
        choice(step.logits)

    replay = advance
    if first_logits.is_cuda and new_tokens > 2:  # pragma: gpu
        replay = capture(advance, step=step, held=choice.held)
    made, columns = 1, cache.columns
    if streamer is not None:
        streamer.put(choice.chosen[:, 0].cpu())
    while made < new_tokens and not bool(choice.done.all()):
        for _ in range(1 if streamer is not None else min(_CHECK_EVERY, new_tokens - made)):
            replay()
            made += 1
        if streamer is not None and not (eos is not None and made > 1 and not bool(choice.real[:, made - 1].any())):
            streamer.put(choice.chosen[:, made - 1].cpu())
    real = choice.real[:, :made]
    # Steps past the end of the last row fed padding to rows at rest: they left no trace and are not counted.
    length = max(1, int(real.any(dim=0).sum()))
    taken = min(made - 1, length)
    valid = real[:, :taken]
    cache.note_steps(taken, None if bool(valid.all()) else valid)
    assert cache.columns == columns + taken
    return choice.chosen[:, :length]
