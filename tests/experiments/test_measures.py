"""Bits per byte and the Kneser-Ney baseline against slow, obvious versions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.experiments.bits import bits_per_byte, windows
from hymba.experiments.corpus import Document
from hymba.experiments.ngram import KneserNey
from hymba.experiments.tokenizer import train_tokenizer

TEXTS = ["alpha beta gamma\n" * 9, "é\n", "delta = alpha + 1\n" * 4, "z"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 270)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_memory_tokens=3, sliding_window=4, global_attn_idx=[0], mamba_d_state=4,
        rope_type="default", initializer_range=0.3,
    )  # fmt: skip
    return HymbaForCausalLM(config)


def alone(model, ids, first, scored, last):
    """Bits of ids[scored:last] of one document, given ids[first:scored], one forward pass, no padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[first:last]])).logits[0]
    log_p = logits.log_softmax(-1)
    return sum(-float(log_p[i - 1 - first, ids[i]]) for i in range(scored, last)) / math.log(2)


def test_bits_are_each_document_on_its_own(model, tokenizer):
    model.eval()
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    ids = [[1, *tokenizer(text, add_special_tokens=False).input_ids] for text in TEXTS]
    for context, batch_size in ((1000, 3), (16, 2)):
        measured = bits_per_byte(model, tokenizer, documents, context=context, batch_size=batch_size)
        expected = 0.0
        for row in ids:
            first, scored = 0, 1
            while scored < len(row):
                last = min(first + context, len(row))
                expected += alone(model, row, first, scored, last)
                first, scored = last - context // 2, last
        assert measured.bits == pytest.approx(expected, rel=1e-5)
        assert measured.bytes == sum(len(text.encode()) for text in TEXTS)
        assert measured.tokens == sum(len(row) - 1 for row in ids)
        assert measured.per_byte == measured.bits / measured.bytes


def test_windows_score_each_token_once_with_half_a_context_before():
    for length in range(1, 60):
        for context in (2, 3, 8, 9):
            plan = windows([length], context)
            scored = [i for window in plan for i in range(window.scored, window.last)]
            assert scored == list(range(1, length))
            assert all(window.last - window.first <= context for window in plan)
            assert all(window.scored - window.first >= context // 2 for window in plan[1:])


def test_mode_is_put_back_and_nothing_to_measure_is_refused(model, tokenizer):
    model.train()
    bits_per_byte(model, tokenizer, [Document("a", "alpha")], context=8)
    assert model.training
    with pytest.raises(ValueError, match="no held-out text"):
        bits_per_byte(model, tokenizer, [], context=8)
    with pytest.raises(ValueError, match="context = 1"):
        bits_per_byte(model, tokenizer, [Document("a", "alpha")], context=1)


def slow_probability(documents, vocabulary, order, history, token):
    """Interpolated modified Kneser-Ney straight from its definition, with counters."""
    padding = ("#",) * (order - 1)
    grams = {k: Counter() for k in range(1, order + 1)}
    for document in documents:
        text = (*padding, *document)
        for end in range(order - 1, len(text)):
            for k in range(1, order + 1):
                grams[k][text[end - k + 1 : end + 1]] += 1
    counts = {order: grams[order]}
    for k in range(1, order):
        counts[k] = Counter(gram[1:] for gram in grams[k + 1])

    def p(k, context):
        if k == 0:
            return 1 / vocabulary
        table = counts[k]
        n = [max(sum(value == i for value in table.values()), 1) for i in (1, 2, 3, 4)]
        share = n[0] / (n[0] + 2 * n[1])
        steps = [1 - 2 * share * n[1] / n[0], 2 - 3 * share * n[2] / n[1], 3 - 4 * share * n[3] / n[2]]
        steps = [min(max(step, 1e-3), limit - 1e-3) for step, limit in zip(steps, (1, 2, 3))]
        follow = {gram: value for gram, value in table.items() if gram[:-1] == context}
        below = p(k - 1, context[1:])
        if not follow:
            return below
        total = sum(follow.values())
        own = table.get((*context, token), 0)
        direct = own - steps[min(own, 3) - 1] if own else 0.0
        rest = sum(steps[min(value, 3) - 1] for value in follow.values())
        return (direct + rest * below) / total

    return p(order, (*padding, *history)[-(order - 1) :] if order > 1 else ())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_follows_its_definition(order):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 6, size=n).tolist() for n in (30, 1, 17)]
    model = KneserNey(documents, vocabulary=6, order=order)
    test = [generator.integers(0, 6, size=9).tolist(), [5]]
    expected = [
        -math.log2(slow_probability(documents, 6, order, document[:i], document[i]))
        for document in test
        for i in range(len(document))
    ]
    assert model.bits(test) == pytest.approx(expected, rel=1e-9)


def test_kneser_ney_sums_to_one_and_refuses_what_does_not_fit():
    model = KneserNey([[0, 1, 2, 0, 1, 3], [2, 2, 1]], vocabulary=5, order=3)
    for history in ([], [0], [0, 1], [4, 4]):
        total = sum(2 ** -model.bits([[*history, token]])[-1] for token in range(5))
        assert total == pytest.approx(1.0)
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey([[0]], vocabulary=100_000, order=4)
    with pytest.raises(ValueError, match="no tokens"):
        KneserNey([], vocabulary=5)
