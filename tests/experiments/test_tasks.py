"""Synthetic tasks: rows by seed, a split that nothing crosses, labels by an independent reading, known models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hymba.experiments.settings import SettingsError
from hymba.experiments.tasks import IGNORED, TASKS, make_task
from hymba.experiments.tasks.base import side_of

SMALL = {
    "copying": {"tokens": (3, 5), "length": 20, "vocabulary": 14, "test_rows": 30},
    "mqar": {"pairs": (2, 4), "length": 24, "vocabulary": 32, "test_rows": 40},
    "needle": {"length": 24, "facts": 3, "keys": 8, "values": 6, "fillers": 9, "test_rows": 40},
}


@pytest.fixture(params=sorted(SMALL))
def task(request):
    return make_task(request.param, **SMALL[request.param])


def answers_mqar(task, ids):
    """The targets of a row by reading it from the left: position to value."""
    known, found, place = {}, {}, 0
    half = task.vocabulary // 2
    while ids[place + 1] > half:
        known[ids[place]] = ids[place + 1]
        place += 2
    for i in range(place, len(ids)):
        if ids[i]:
            assert 1 <= ids[i] <= half
            found[i + 1] = known[ids[i]]
    assert len(found) == len(known)
    return found


def answers_copying(task, ids):
    content = [token for token in ids if token > 1]
    first = ids.index(1)
    assert ids[first:] == [1] * len(content) + [0]
    assert all(token != 1 for token in ids[:first])
    return {first + 1 + i: token for i, token in enumerate(content)}


def answers_needle(task, ids):
    assert ids[-3] == 2 and ids.count(2) == 1
    facts = {ids[i + 1]: ids[i + 2] for i, token in enumerate(ids) if token == 1}
    assert len(facts) == ids.count(1) == task.facts
    filler = [token for token in ids if token >= 3 + task.keys + task.values]
    assert len(filler) == len(ids) - 3 * task.facts - 3
    return {len(ids) - 1: facts[ids[-2]]}


ANSWERS = {"copying": answers_copying, "mqar": answers_mqar, "needle": answers_needle}


class Oracle:
    """Reads the answer off the row."""

    def __init__(self, task):
        self.task = task

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.task.vocab_size)
        for i, row in enumerate(input_ids.tolist()):
            for place, answer in ANSWERS[self.task.name](self.task, row).items():
                logits[i, place - 1, answer] = 1.0
        return logits


def test_every_task_is_tested():
    assert set(SMALL) == set(TASKS)


def test_labels_are_the_answers_that_a_reader_finds(task):
    for index in range(60):
        row = task.row(3, index)
        found = {i: int(label) for i, label in enumerate(row.labels) if label != IGNORED}
        assert found == ANSWERS[task.name](task, row.ids.tolist())
        assert len(row.ids) == len(row.labels) == task.length
        assert len(row.distances) == len(found)
        assert row.ids.min() >= 0 and row.ids.max() < task.vocab_size
        assert all(row.ids[i] != answer for i, answer in found.items())  # the answer itself is not fed


def test_batches_depend_on_the_seed_alone(task):
    def take(seed, start=0):
        return list(itertools.islice(task.train_batches(seed, batch_size=4, start=start), 3))

    first, again, other = take(5), take(5), take(6)
    for one, two in zip(first, again):
        assert all(torch.equal(one[key], two[key]) for key in ("input_ids", "labels"))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert torch.equal(take(5, start=2)[0]["input_ids"], first[2]["input_ids"])
    rows = task.rows(5, 12)
    assert len(rows) == 12 and rows.length == task.length
    assert torch.equal(torch.stack([rows[i]["input_ids"] for i in range(4)]), first[0]["input_ids"])
    with pytest.raises(IndexError):
        rows[12]


def test_no_row_is_on_both_sides(task):
    held_out = [task.row(0, i, side="held_out").ids.tobytes() for i in range(50)]
    train = [task.row(seed, i).ids.tobytes() for seed in (0, 1) for i in range(200)]
    assert not set(held_out) & set(train)
    assert {side_of(np.frombuffer(row, dtype=np.int64)) for row in train} == {"train"}


def test_an_oracle_is_right_everywhere_and_guessing_is_chance(task):
    measured = task.evaluate(Oracle(task), batch_size=7)
    assert measured["accuracy"] == 1.0
    assert all(cell["accuracy"] == cell["rows_solved"] == 1.0 for cell in measured["cells"])
    assert {value for line in measured["grid"] for value in line} <= {1.0, None}
    assert max(measured["lengths"]) == task.max_length

    generator = torch.Generator().manual_seed(0)
    guess = task.evaluate(lambda input_ids: torch.rand(*input_ids.shape, task.vocab_size, generator=generator))
    asked = sum(cell["targets"] for cell in guess["cells"])
    right = sum(cell["targets"] * cell["accuracy"] for cell in guess["cells"])
    chance = 1 / task.vocab_size
    assert abs(right / asked - chance) < 4 * (chance * (1 - chance) / asked) ** 0.5


def test_evaluation_sees_the_same_rows_and_leaves_the_model_as_it_was(task):
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(task.vocab_size, task.vocab_size)

        def forward(self, input_ids):
            assert not self.training and not torch.is_grad_enabled()
            seen.append(input_ids)
            return self.embedding(input_ids)

    model = Model()
    one = task.evaluate(model, rows=5, batch_size=2)
    count = len(seen)
    assert task.evaluate(model, rows=5, batch_size=2) == one
    assert all(torch.equal(a, b) for a, b in zip(seen[:count], seen[count:], strict=True))
    assert model.training
    with pytest.raises(ValueError, match="expected at least 1"):
        task.evaluate(model, batch_size=0)


def test_parameters_make_the_same_task_again(task):
    parameters = task.parameters()
    assert make_task(**parameters) == task


@pytest.mark.parametrize(
    ("name", "parameters", "parts"),
    [
        ("mqra", {}, ["data.task.name = 'mqra'", "Did you mean 'mqar'"]),
        ("mqar", {"pair": [3]}, ["data.task.pair", "did you mean 'data.task.pairs'"]),
        ("mqar", {"pairs": 3}, ["data.task.pairs = 3", "expected a list"]),
        ("mqar", {"pairs": []}, ["data.task.pairs = []", "from 1"]),
        ("mqar", {"pairs": [2, 2]}, ["data.task.pairs = [2, 2]", "twice"]),
        ("mqar", {"pairs": [20]}, ["data.task.length = 64", "80 tokens"]),
        ("mqar", {"pairs": [80]}, ["data.task.vocabulary = 128", "at least 160"]),
        ("mqar", {"vocabulary": 33}, ["data.task.vocabulary = 33", "even"]),
        ("mqar", {"length": "long"}, ["data.task.length = 'long'", "whole number"]),
        ("mqar", {"test_lengths": [16]}, ["data.task.test_lengths = 16", "32 tokens"]),
        ("mqar", {"power": 0.0}, ["data.task.power = 0.0"]),
        ("mqar", {"distance_bins": 0}, ["data.task.distance_bins = 0"]),
        ("mqar", {"test_rows": 0}, ["data.task.test_rows = 0"]),
        ("copying", {"token": [3]}, ["data.task.token", "did you mean 'data.task.tokens'"]),
        ("copying", {"tokens": [0]}, ["data.task.tokens = [0]", "from 1"]),
        ("copying", {"tokens": [40]}, ["data.task.length = 64", "81"]),
        ("copying", {"vocabulary": 1}, ["data.task.vocabulary = 1"]),
        ("needle", {"facts": 0}, ["data.task.facts = 0"]),
        ("needle", {"facts": 17}, ["data.task.keys = 16", "17 facts"]),
        ("needle", {"facts": 16, "length": 50}, ["data.task.length = 50", "54 tokens"]),
        ("needle", {"depths": []}, ["data.task.depths = []"]),
        ("needle", {"depths": [1.5]}, ["data.task.depths = [1.5]", "between 0 and 1"]),
        ("needle", {"values": 1}, ["data.task.values = 1"]),
        ("needle", {"fillers": 0}, ["data.task.fillers = 0"]),
    ],
)
def test_refusals_name_key_value_and_remedy(name, parameters, parts):
    with pytest.raises(SettingsError) as caught:
        make_task(name, **parameters)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_side_without_rows_is_refused():
    task = make_task("mqar", pairs=[1], length=4, vocabulary=2, test_lengths=[4])
    only = side_of(task.draw(np.random.default_rng(0), pairs=1, length=4).ids)
    with pytest.raises(SettingsError, match="too few different rows"):
        task.row(0, 0, side="held_out" if only == "train" else "train")


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 9), (1.0, 18)])
def test_the_needle_stands_at_its_depth(depth, place):
    task = make_task("needle", **SMALL["needle"])
    for index in range(20):
        row = task.row(0, index, depth=depth, length=24)
        assert row.ids[place] == 1 and row.ids[place + 1] == row.ids[-2]
        assert row.distances.tolist() == [22 - (place + 1)]


def test_the_tightest_row_holds_its_facts_at_every_depth():
    task = make_task("needle", length=15, facts=3, keys=4, test_lengths=[15])
    for index in range(100):
        assert (task.row(0, index).ids == 1).sum() == 3


def test_recall_gaps_follow_the_power_law():
    task = make_task("mqar", pairs=[1], length=66, vocabulary=64)
    slots = np.array([(int(task.row(0, i).distances[0]) - 2) // 2 for i in range(2000)])
    weight = np.arange(1, 33) ** (0.01 - 1.0)
    expected = weight / weight.sum()
    for slot in (0, 1, 5):
        share, want = (slots == slot).mean(), expected[slot]
        assert abs(share - want) < 4 * (want * (1 - want) / len(slots)) ** 0.5
