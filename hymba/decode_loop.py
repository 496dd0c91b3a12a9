"""The sampling loop of `generate` around `DecodeStep`.

Where choosing the next token depends on nothing but its scores, choosing is part of the replayed step: the host looks
at the device once per `_CHECK_EVERY` tokens (every token when streaming), to see whether all rows have ended, and only
replays between those looks. Processors and criteria that look at the text so far, or that this file does not know, run
on the host's side of the step, one token at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Generated:
    """What a loop made.

    Attributes:
        tokens: (b, n) new tokens; rows that ended early are filled with the padding id.
        scores, logits: n tensors (b, vocab) float32 after and before the processors, or `None` when not asked for.
    """

    tokens: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


def can_capture_choice(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """Whether choosing and stopping depend on nothing but the scores, the token and the length."""
    return all(type(p) in _PURE for p in processors) and all(
        type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria
    )


def _drawn(scores: Tensor, sample: bool) -> Tensor:
    """(b,) the best token, or one drawn from the distribution. No value leaves the device."""
    if not sample:
        return scores.argmax(dim=-1)
    # As torch.multinomial draws one sample, which reads a value back to check the distribution.
    probabilities = scores.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


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
        token = _drawn(self.processors(self.step.tokens[:, None], logits), self.sample)
        token = torch.where(self.done, self.pad, token)
        self.step.active.copy_(~self.done)
        self.chosen.index_copy_(1, self.count, token[:, None])
        self.real.index_copy_(1, self.count, self.step.active[:, None])
        self.count.add_(1)
        if self.eos is not None:
            # Not torch.isin, which sorts and waits when there are many ids.
            self.done.logical_or_((token[:, None] == self.eos).any(dim=1))
        self.step.tokens.copy_(token)


@contextmanager
def _written(cache: HymbaCache) -> Iterator[None]:
    """Steps run ahead of what the cache's own counters say; a loop that is broken off leaves them apart."""
    cache.interrupted = True
    yield
    cache.interrupted = False


def _replayed(advance: Callable[[], None], step: DecodeStep, held: list[Tensor], new_tokens: int) -> Callable[[], None]:
    """`advance` as a graph's replay on CUDA, or as it is where there is none or it cannot be captured."""
    if not step.tokens.is_cuda or new_tokens <= 2:
        return advance
    try:  # pragma: gpu
        return capture(advance, step=step, held=held)
    except RuntimeError as error:  # pragma: gpu
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"this model's decode step cannot be captured as a CUDA graph ({reason}); it runs launch by launch",
            stacklevel=2,
        )
        return advance


def run_loop(
    model: HymbaForCausalLM,
    cache: HymbaCache,
    first_logits: Tensor,
    *,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    sample: bool,
    pad: Tensor | None,
    streamer: Any = None,
    keep_scores: bool = False,
    keep_logits: bool = False,
) -> Generated:
    """Generate after a prefill.

    Args:
        cache: static, holds the prompt; moved on by the tokens that were taken in.
        first_logits: (b, vocab) float32 of the prompt's last position.
        input_ids: (b, l) the text so far, for processors and criteria that look at it.
        criteria: what ends a row; a maximal length among them.
        pad: what an ended row is fed.
        keep_scores, keep_logits: return them.
    """
    new_tokens = max(1, (criteria.max_length or 0) - input_ids.shape[1])
    step = DecodeStep(model, cache, fused=first_logits.is_cuda and why_not_fused(model) is None)
    with _written(cache):
        if can_capture_choice(processors, criteria) and criteria.max_length and not keep_scores and not keep_logits:
            ids = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
            eos = torch.cat([i.to(step.tokens.device).flatten() for i in ids]) if ids else None
            choice = Choice(step, processors, sample=sample, eos=eos, pad=pad, room=new_tokens + _CHECK_EVERY)
            return _device_loop(step, choice, first_logits, new_tokens=new_tokens, streamer=streamer)
        return _host_loop(
            step, first_logits, input_ids, processors, criteria, sample=sample, pad=pad, new_tokens=new_tokens,
            streamer=streamer, keep_scores=keep_scores, keep_logits=keep_logits,
        )  # fmt: skip


def _device_loop(
    step: DecodeStep, choice: Choice, first_logits: Tensor, *, new_tokens: int, streamer: Any
) -> Generated:
    choice(first_logits)

    def advance() -> None:
        step.run()
        choice(step.logits)

    replay = _replayed(advance, step, choice.held, new_tokens)
    made = 1
    if streamer is not None:
        streamer.put(choice.chosen[:, 0].cpu())
    while made < new_tokens and not bool(choice.done.all()):
        for _ in range(1 if streamer is not None else min(_CHECK_EVERY, new_tokens - made)):
            replay()
            made += 1
        if streamer is not None:
            streamer.put(choice.chosen[:, made - 1].cpu())
    real = choice.real[:, :made]
    # Steps past the end of the last row fed padding to rows at rest: they left no trace and are not counted.
    length = int(real.any(dim=0).sum())
    taken = min(made - 1, length)
    valid = real[:, :taken]
    step.cache.note_steps(taken, None if bool(valid.all()) else valid)
    return Generated(choice.chosen[:, :length])


def _host_loop(
    step: DecodeStep,
    logits: Tensor,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    *,
    sample: bool,
    pad: Tensor | None,
    new_tokens: int,
    streamer: Any,
    keep_scores: bool,
    keep_logits: bool,
) -> Generated:
    prompt = input_ids.shape[1]
    ids, done = input_ids, torch.zeros_like(step.active)
    scores_kept: list[Tensor] = []
    logits_kept: list[Tensor] = []
    fed: list[Tensor] = []
    replay: Callable[[], None] | None = None
    while True:
        # Processors may write to what they are given.
        scores = processors(ids, logits.clone())
        if keep_scores:
            scores_kept.append(scores)
        if keep_logits:
            logits_kept.append(logits.clone())
        token = _drawn(scores, sample)
        if pad is not None:
            token = torch.where(done, pad.to(token.device), token)
        ids = torch.cat([ids, token[:, None]], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        active = ~done
        done = done | criteria(ids, tuple(scores_kept) if keep_scores else None)
        if bool(done.all()):
            break
        step.tokens.copy_(token)
        step.active.copy_(active)
        if replay is None:
            replay = _replayed(step.run, step, [], new_tokens)
        replay()
        fed.append(active)
        logits = step.logits
    if fed:
        valid = torch.stack(fed, dim=1)
        step.cache.note_steps(len(fed), None if bool(valid.all()) else valid)
    return Generated(
        ids[:, prompt:],
        scores=tuple(scores_kept) if keep_scores else None,
        logits=tuple(logits_kept) if keep_logits else None,
    )
