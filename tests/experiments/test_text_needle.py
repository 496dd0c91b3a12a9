"""The needle in text: where it stands, what is asked, and models whose score is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hymba.experiments.tasks.text_needle import TextNeedle
from hymba.experiments.tokenizer import train_tokenizer

FILLER = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(30)]
NEEDLE = TextNeedle(lengths=(90, 110), depths=(0.0, 0.5, 1.0), trials=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(FILLER, 300)


class Reader(torch.nn.Module):
    """Finds the last tokens of the row so far earlier in it and says what followed; records what it was given."""

    def __init__(self, vocabulary: int, span: int = 3, wrong: bool = False) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.vocabulary, self.span, self.wrong, self.seen = vocabulary, span, wrong, []

    def forward(self, input_ids, use_cache):
        assert not self.training and use_cache is False
        self.seen.append(input_ids)
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids) - 8, len(ids)):
                tail = ids[place - self.span + 1 : place + 1]
                for i in range(place - self.span):
                    if ids[i : i + self.span] == tail:
                        logits[row, place, ids[i + self.span]] = -9.0 if self.wrong else 9.0
                        break
        return SimpleNamespace(logits=logits)


def test_a_model_that_looks_back_finds_every_needle(tokenizer):
    model = Reader(len(tokenizer))
    found = NEEDLE.evaluate(model, tokenizer, FILLER)
    assert found["exact"] == found["choice"] == 1.0
    assert found["exact_grid"] == found["choice_grid"] == [[1.0] * 3] * 2
    assert found["chance"] == 0.25
    assert model.training
    worst = NEEDLE.evaluate(Reader(len(tokenizer), wrong=True), tokenizer, FILLER)
    assert worst["exact"] == worst["choice"] == 0.0


def test_the_needle_stands_at_its_depth_in_a_text_of_its_length(tokenizer):
    model = Reader(len(tokenizer))
    NEEDLE.evaluate(model, tokenizer, FILLER)
    again = Reader(len(tokenizer))
    NEEDLE.evaluate(again, tokenizer, FILLER)
    assert all(torch.equal(a, b) for a, b in zip(model.seen, again.seen, strict=True))
    cells = [(length, depth) for length in NEEDLE.lengths for depth in NEEDLE.depths for _ in range(NEEDLE.trials)]
    for (length, depth), ids in zip(cells, model.seen, strict=True):
        assert len(ids) == 1 + NEEDLE.distractors
        row = ids[0].tolist()
        assert row[0] == tokenizer.bos_token_id
        answer_tokens = len(row) - length
        assert 1 <= answer_tokens <= 5
        assert len({tuple(each[:length]) for each in ids.tolist()}) == 1
        text = tokenizer.decode(row[:length])
        assert text.count("The secret number of") == 2
        opening = text[text.rindex("\nThe secret number of") :]
        assert text.endswith(opening) and opening.endswith(" is")
        question = tokenizer(opening, add_special_tokens=False)["input_ids"]
        where = next(i for i in range(length) if row[i : i + len(question)] == question)
        room = length - 1 - 2 * len(question) - len(tokenizer(".\n", add_special_tokens=False)["input_ids"])
        assert where == 1 + round(depth * (room - true_answer(ids, length)))


def true_answer(ids, length):
    """Tokens of the first row's answer: padding, which is 0, fills it up to the longest."""
    return int((ids[0, length:] != 0).sum())


def test_models_of_transformers_are_measured(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    found = TextNeedle(lengths=(90,), depths=(0.5,), trials=1).evaluate(LlamaForCausalLM(config), tokenizer, FILLER)
    assert 0.0 <= found["choice"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": ()}, "lengths"),
        ({"depths": (1.2,)}, "depths"),
        ({"trials": 0}, "trials"),
        ({"digits": 10}, "digits"),
        ({"distractors": 0}, "distractors"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextNeedle(**arguments)


def test_texts_that_cannot_be_made_are_refused(tokenizer):
    model = Reader(len(tokenizer))
    with pytest.raises(ValueError, match="filler has no text"):
        NEEDLE.evaluate(model, tokenizer, [""])
    with pytest.raises(ValueError, match="20 tokens do not hold"):
        TextNeedle(lengths=(20,)).evaluate(model, tokenizer, FILLER)
