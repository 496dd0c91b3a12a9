"""What a model does on held-out examples: the loss, the preferences, and its own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hymba.chat import generation_settings
from hymba.finetuning.data import Examples
from hymba.finetuning.rows import MESSAGES, PROMPT, PROMPT_MESSAGES, TEXT

IGNORED = -100


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is expected and, of a preference, the one that is not."""

    prompt: list[int]
    expected: str
    rejected: str | None = None


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def score_rows(model: Any, rows: Sequence[tuple[list[int], list[int]]], *, batch_size: int) -> Tensor:
    """Log-likelihood of each row's targets, their number, and how many of them are the likeliest token.

    Args:
        rows: token ids and labels of one length; a label of -100, and the first one, is no target.
        batch_size: rows in a forward pass.

    Returns:
        (rows, 3) float64.
    """
    scores = torch.zeros(len(rows), 3, dtype=torch.float64)
    # Rows of like length together; the order of the result is the rows'.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    with evaluating(model):
        for at in range(0, len(order), batch_size):
            picked = order[at : at + batch_size]
            length = max(len(rows[i][0]) for i in picked)
            ids, labels = (torch.full((len(picked), length), fill) for fill in (0, IGNORED))
            mask = torch.zeros(len(picked), length, dtype=torch.long)
            for place, i in enumerate(picked):
                size = len(rows[i][0])
                ids[place, :size], labels[place, :size] = torch.tensor(rows[i][0]), torch.tensor(rows[i][1])
                mask[place, :size] = 1
            ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels, mask))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            targets = labels[:, 1:]
            real = targets != IGNORED
            lost = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            right = (logits.argmax(dim=-1) == targets) & real
            found = torch.stack([-lost.double().sum(dim=1), real.sum(dim=1), right.sum(dim=1)], dim=1)
            scores[picked] = found.double().cpu()
    return scores


def held_out_loss(model: Any, encoded: Any, *, batch_size: int) -> dict[str, float]:
    """Mean loss over the learned tokens, in nats, and the share of them that the model finds likeliest.

    ``encoded``: rows with ``input_ids`` and ``labels``.
    """
    rows = [(row["input_ids"], row["labels"]) for row in encoded]
    likelihood, tokens, right = score_rows(model, rows, batch_size=batch_size).sum(dim=0).tolist()
    return {"loss": -likelihood / tokens, "token_accuracy": right / tokens}


def preference_scores(model: Any, encoded: Any, *, max_length: int, batch_size: int) -> Tensor:
    """Log-likelihoods of chosen and rejected answers, (pairs, 2) float64.

    ``encoded``: rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
    """
    rows = []
    for row in encoded:
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = row["prompt_ids"] + answer
            rows.append((ids[:max_length], ([IGNORED] * len(row["prompt_ids"]) + answer)[:max_length]))
    return score_rows(model, rows, batch_size=batch_size)[:, 0].reshape(-1, 2)


def preferences(scores: Tensor, reference: Tensor, *, beta: float) -> dict[str, float]:
    """How often the chosen answer is the likelier one, and DPO's rewards against a reference.

    Args:
        scores, reference: of `preference_scores`. beta: the reward is beta times the gain in log-likelihood.
    """
    rewards = beta * (scores - reference)
    return {
        "preference_accuracy": float((scores[:, 0] > scores[:, 1]).double().mean()),
        "reward_accuracy": float((rewards[:, 0] > rewards[:, 1]).double().mean()),
        "reward_margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
    }


def questions(examples: Examples, tokenizer: PreTrainedTokenizerBase, *, count: int) -> list[Question]:
    """The first held-out examples that a model can be asked, their prompts written as for use."""
    if examples.form == TEXT:
        return []
    found = []
    for row in examples.held_out.select(range(min(count, len(examples.held_out)))):
        if examples.form == MESSAGES:
            last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
            prompt, expected, rejected = row["messages"][:last], row["messages"][last]["content"], None
        elif examples.form in (PROMPT, PROMPT_MESSAGES):
            prompt, expected, rejected = row["prompt"], row["completion"], None
        else:
            prompt, expected, rejected = row["prompt"], row["chosen"], row["rejected"]
        if examples.conversational:
            extras = row["chat_template_kwargs"] | {"tools": _tools(row["tools"]), "add_generation_prompt": True}
            text = tokenizer.apply_chat_template(prompt, tokenize=False, **extras)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected, rejected = (
                turns if turns is None or isinstance(turns, str) else turns[0]["content"]
                for turns in (expected, rejected)
            )
        else:
            ids = tokenizer(prompt)["input_ids"]
        found.append(Question(list(ids), expected, rejected))
    return found


def _tools(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    generation: dict[str, Any],
) -> list[str]:
    """The model's greedy answers, without white space around them and special tokens.

    ``generation``: fields of GenerationConfig in place of the model's.
    """
    settings = _greedy(model, tokenizer, generation, max_new_tokens)
    found = []
    with evaluating(model):
        for at in range(0, len(asked), batch_size):
            prompts = [question.prompt for question in asked[at : at + batch_size]]
            length = max(map(len, prompts))
            ids = torch.zeros(len(prompts), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt), 1
            made = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
            found += [tokenizer.decode(row[length:], skip_special_tokens=True) for row in made]
    return found


def _greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any], max_new_tokens: int
) -> GenerationConfig:
    options = {"max_new_tokens": max_new_tokens, **generation, "do_sample": False}
    kept = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k", "min_p")}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return generation_settings(base, tokenizer, **kept)


def judge(asked: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """How often the answer is the expected one; of preferences, how often it is nearer to the chosen one.

    Nearer is the answer that begins alike for longer.
    """
    pairs = [(question, text) for question, text in zip(asked, given) if question.rejected is not None]
    if pairs:
        nearer = [_common(text, q.expected) > _common(text, q.rejected or "") for q, text in pairs]
        return {"chosen_answers": sum(nearer) / len(nearer)}
    exact = [text.strip() == question.expected.strip() for question, text in zip(asked, given)]
    return {"exact_answers": sum(exact) / len(exact)}


def _common(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
