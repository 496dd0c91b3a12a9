"""Phases of a run: where they begin, which rows they read, how their batches are dealt out, and exact resuming."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
import torch
import yaml
from helpers import losses_of

from hymba import HymbaConfig
from hymba.experiments.mixing import BLOCK, Mixture
from hymba.experiments.packing import Tokens
from hymba.experiments.phases import digest, plan_phases, task_rows, text_rows, tokens_after
from hymba.experiments.settings import SettingsError, train_settings
from hymba.experiments.train import main
from hymba.experiments.trainer import HymbaTrainer

MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
    "mamba_d_state": 4, "rope_type": "default", "max_position_embeddings": 24, "orig_max_position_embeddings": 24,
}  # fmt: skip


def settings(world=1, **sections):
    raw = {
        "model": MODEL,
        "data": {
            "sequence_length": 8,
            "sources": [
                {"name": "one", "weight": 3, "source": "files", "paths": ["one"]},
                {"name": "two", "source": "files", "paths": ["two"]},
            ],
        },
        "run": {"steps": 100, "batch_size": 2},
    }
    raw = {name: {**raw.get(name, {}), **sections.get(name, {})} for name in raw}
    raw["phases"] = sections.get("phases", [])
    return train_settings(raw, where="here")


def recall(task, **phase):
    """Sections of a run on recall, with a phase that changes the task."""
    easy = {"name": "mqar", "pairs": [1, 2], "length": 8, "vocabulary": 32}
    return {"data": {"task": easy, "sources": []}, "phases": [{"name": "a", "start": 0.5, "task": task, **phase}]}


PHASES = [
    {"name": "anneal", "start": 0.5, "weights": {"two": 1}},
    {"name": "long", "start": 0.75, "sequence_length": 16, "batch_size": 1, "weights": {"one": 1, "two": 3}},
]


def test_phases_begin_at_shares_of_the_steps():
    first, anneal, long = plan_phases(settings(phases=PHASES), 2)
    assert [(p.name, p.start, p.end) for p in (first, anneal, long)] == [
        ("first", 0, 50), ("anneal", 50, 75), ("long", 75, 100),
    ]  # fmt: skip
    assert [p.length for p in (first, anneal, long)] == [8, 8, 16]
    assert [p.tokens_per_step for p in (first, anneal, long)] == [32, 32, 32]
    assert first.weights == {"one": 3.0, "two": 1.0} and anneal.weights == {"two": 1.0}
    assert (long.settings.run.batch_size, first.settings.run.batch_size) == (1, 2)


@pytest.mark.parametrize(("world", "rows", "accumulation"), [(1, 2, 8), (2, 2, 4), (4, 4, 1), (1, 16, 1)])
def test_accumulation_follows_from_the_tokens_of_a_step(world, rows, accumulation):
    run = {"tokens_per_step": 128, "batch_size": rows}
    (phase,) = plan_phases(settings(run=run), world)
    assert (phase.accumulation, phase.rows_per_step) == (accumulation, 16)


@pytest.mark.parametrize(
    ("world", "rows", "parts"),
    [
        (3, 2, ["128", "3 processes x run.batch_size = 2 rows x 8 tokens takes 48", "multiple", "such as 120"]),
        (1, 3, ["1 process x run.batch_size = 3", "takes 24", "allowed run.batch_size: 1, 2, 4, 8"]),
        (2, 16, ["takes 256", "allowed run.batch_size: 1, 2, 4, 8"]),
    ],
)
def test_a_step_that_cannot_be_dealt_out(world, rows, parts):
    with pytest.raises(SettingsError) as error:
        plan_phases(settings(run={"tokens_per_step": 128, "batch_size": rows}), world)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"phases": [{"name": "a"}]}, ["phases[0].start is missing"]),
        ({"phases": [{"name": "a", "start": 0.5, "lenght": 3}]}, ["phases[0].lenght", "did you mean"]),
        ({"phases": [{"name": "a", "start": 1.0}]}, ["phases[0].start = 1.0"]),
        ({"phases": [{"name": "a", "start": 0.001}]}, ["step 0 of 100"]),
        ({"phases": [PHASES[1], PHASES[0]]}, ["phases[1].start", "step 50 of 100", "step 75"]),
        ({"phases": [{"name": "a", "start": 0.5, "weights": {"three": 1}}]}, ["'three'", "one, two"]),
        ({"phases": [{"name": "a", "start": 0.5, "weights": {"one": 0}}]}, ["phases[0].weights", "more than 0"]),
        ({"phases": [{"name": "a", "start": 0.5, "weights": {"one": "x"}}]}, ["weights.one = 'x'", "a number"]),
        ({"data": {"sources": [{"name": "a/b"}]}}, ["data.sources[0].name = 'a/b'", "letters"]),
        ({"data": {"sources": [{"name": "a", "weight": -1}]}}, ["data.sources[0].weight = -1.0"]),
        ({"data": {"sources": [{"name": "a"}, {"name": "a"}]}}, ["data.sources[0].name", "another name"]),
        ({"data": {"sources": [{"name": "a", "source": "files"}]}}, ["data.sources[0].paths", "at least one"]),
        ({"data": {"sources": [{"name": "a"}], "paths": ["x"]}}, ["data.sources take its place"]),
        ({"data": {"task": {"name": "mqar"}}}, ["data.task reads no text"]),
        ({"phases": [{"name": "a", "start": 0.5, "task": {"length": 64}}]}, ["phases[0].task", "there is none"]),
        (recall({"length": 6}), ["data.task.length = 6", "8 tokens"]),
        (recall({"lenght": 16}), ["data.task.lenght", "did you mean"]),
        (recall({"vocabulary": 16}), ["phases[0].task", "17 tokens", "33 of data.task"]),
        (recall({"name": "copying"}), ["phases[0].task.name = 'copying'", "mqar"]),
        (recall({}, sequence_length=8), ["phases[0]", "from `task` alone"]),
        ({"run": {"tokens_per_step": 64, "gradient_accumulation": 2}}, ["gradient_accumulation", "tokens_per_step"]),
    ],
)
def test_refusals_name_key_value_and_remedy(sections, parts):
    with pytest.raises(SettingsError) as error:
        settings(**sections)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("weights", [(1,), (0.9, 0.1), (5, 3, 2), (1, 1e-3)])
def test_a_mixture_has_its_shares_in_every_stretch_and_no_gaps(weights):
    rows = 20 * BLOCK + 17
    mixture = Mixture(weights, rows, (4, 0))
    places = [mixture.place(i) for i in range(rows)]
    counts = Counter(source for source, _ in places)
    assert [counts[i] for i in range(len(weights))] == mixture.totals()
    for source in range(len(weights)):
        assert [place for own, place in places if own == source] == list(range(counts[source]))
        expected = BLOCK * weights[source] / sum(weights)
        for block in range(20):
            there = sum(own == source for own, _ in places[block * BLOCK : (block + 1) * BLOCK])
            assert abs(there - expected) < 1
    assert [Mixture(weights, rows, (4, 0)).place(i) for i in (rows - 1, 3, 2 * BLOCK)] == [
        places[i] for i in (rows - 1, 3, 2 * BLOCK)
    ]
    if len(weights) > 1:
        other = Mixture(weights, rows, (5, 0))
        assert [other.place(i)[0] for i in range(rows)] != [source for source, _ in places]


def numbered(start, documents):
    """Documents of 7 tokens that occur once."""
    return [list(range(start + 7 * i, start + 7 * i + 7)) for i in range(documents)]


def test_a_task_changes_from_phase_to_phase():
    phases = plan_phases(settings(**recall({"pairs": [4], "length": 16}, batch_size=1), run={"steps": 8}), 1)
    easy, hard = task_rows(phases)
    assert [phase.task.pairs for phase in phases] == [(1, 2), (4,)]
    assert [phase.tokens_per_step for phase in phases] == [16, 16]
    assert [tokens_after(phases, step) for step in (0, 3, 8)] == [0, 48, 128]
    seen = [easy[i] for i in range(8)] + [hard[4 + i] for i in range(4)]
    assert [len(row["input_ids"]) for row in seen] == [8] * 8 + [16] * 4
    assert digest([easy, hard]) != digest([easy, easy])


def test_no_row_of_a_task_comes_twice():
    data = {"task": {"name": "mqar", "pairs": [4], "length": 16, "vocabulary": 32}, "sources": []}
    phases = plan_phases(
        settings(data=data, run={"steps": 8}, phases=[{"name": "a", "start": 0.5, "batch_size": 4}]), 1
    )
    seen = [rows[i] for rows, part in zip(task_rows(phases), (range(8), range(16, 32))) for i in part]
    assert len({tuple(row["input_ids"].tolist()) for row in seen}) == 24


def test_sources_go_on_between_phases_and_start_a_pass_with_another_length():
    phases = plan_phases(settings(phases=PHASES, run={"steps": 40}), 1)
    tokens = {"one": Tokens.of(numbered(0, 400)), "two": Tokens.of(numbered(10_000, 400))}
    rows, passes = text_rows(phases, tokens)
    seen = [[tuple(each[i]["input_ids"].tolist()) for i in range(each.first, each.rows)] for each in rows]
    assert [len(each) for each in seen] == [phase.steps * phase.rows_per_step for phase in phases]
    shares = [sum(row[0] < 10_000 for row in each) / len(each) for each in seen]
    assert shares[0] == pytest.approx(0.75, abs=0.15) and shares[1] == 0 and shares[2] == pytest.approx(0.25, abs=0.2)
    # Nothing twice while the rows keep their length: one pass is more than the phases take.
    assert len({*seen[0], *seen[1]}) == len(seen[0]) + len(seen[1])
    assert {len(row) for row in seen[2]} == {16}
    assert passes["two"] == pytest.approx(8 * len(seen[0] + seen[1]) * 0.56 / 2800 + 16 * 10 * 0.75 / 2800, rel=0.2)
    # Rows are a function of their index: read backwards, they are the same.
    again, _ = text_rows(phases, tokens)
    for each, expected in zip(again, seen):
        back = [tuple(each[i]["input_ids"].tolist()) for i in reversed(range(each.first, each.rows))]
        assert back[::-1] == expected
        for outside in (each.first - 1, each.rows):
            with pytest.raises(IndexError):
                each[outside]
    assert digest(again) == digest(rows)


def test_tokens_in_files_are_the_tokens_in_memory(tmp_path):
    tokens = Tokens.of([*numbered(0, 5), [70_000]])
    tokens.save(tmp_path)
    mapped = Tokens.open(tmp_path)
    assert (mapped.ids == tokens.ids).all() and (mapped.ends == tokens.ends).all()
    assert (tokens.ids.dtype, Tokens.of([[1]]).ids.dtype) == ("int32", "uint16")


# Whole runs.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    for name, line in (
        ("prose", "the quick brown fox jumps over the lazy dog\n"),
        ("code", "def f(x): return x + 1\n"),
    ):
        (folder / name).mkdir()
        for i in range(8):
            (folder / name / f"{i}.txt").write_text(line * (4 + i), encoding="utf-8")
    raw = {
        "model": MODEL,
        "data": {
            "held_out": 0.2,
            "sequence_length": 24,
            "sources": [
                {"name": name, "weight": weight, "source": "files", "paths": [str(folder / name)]}
                for name, weight in (("prose", 0.7), ("code", 0.3))
            ],
        },
        "tokenizer": {"vocab_size": 280},
        "run": {
            "steps": 10, "batch_size": 4, "tokens_per_step": 192, "device": "cpu", "threads": 1, "log_every": 1,
            "save_every": 50, "tensorboard": False,
        },
        "phases": [
            {"name": "anneal", "start": 0.4, "weights": {"prose": 0.1, "code": 0.9}},
            {
                "name": "long", "start": 0.7, "sequence_length": 96, "batch_size": 1,
                "model": {"max_position_embeddings": 96, "rope_type": "ntk"},
            },
        ],
    }  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    before = torch.get_num_threads()
    output = tmp_path_factory.mktemp("whole") / "run"
    result = main(config, [f"run.output={output}", "run.evaluate_every=5"])
    torch.set_num_threads(before)
    return result


def test_a_run_in_phases_has_one_schedule_and_ends_with_the_last_context(whole):
    assert (whole.status, whole.step) == ("finished", 10)
    assert [step for step, *_ in losses_of(whole.output)] == list(range(1, 11))
    rates = [rate for *_, rate in losses_of(whole.output)]
    assert rates[:8] == [rates[0]] * 8 and rates[8] < rates[0] and rates[9] == pytest.approx(3e-5)
    exported = HymbaConfig.from_pretrained(whole.exported)
    assert (exported.max_position_embeddings, exported.rope_type) == (96, "ntk")
    assert exported.rope_base > HymbaConfig(**MODEL).rope_base
    plan = json.loads((whole.output / "plan.json").read_text())
    assert [(p["start"], p["length"], p["rows_per_step"]) for p in plan] == [(0, 24, 8), (4, 24, 8), (7, 96, 2)]
    assert {name.split("/")[0] for name in json.loads((whole.output / "corpus.json").read_text())["train"]["list"]} == {
        "prose", "code",
    }  # fmt: skip


@pytest.mark.parametrize("at", [4, 6, 9])
def test_every_phase_resumes_exactly(whole, config, tmp_path, monkeypatch, at):
    """Interrupted at the end of a phase and inside two."""
    real, sent = HymbaTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at - 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HymbaTrainer, "training_step", interrupted)
    overrides = [f"run.output={tmp_path}"]
    first = main(config, overrides)
    assert (first.status, first.step) == ("interrupted", at)
    monkeypatch.undo()
    second = main(config, overrides)
    assert second.status == "finished"
    assert losses_of(tmp_path) == losses_of(whole.output)
    assert second.rows == whole.rows


def test_a_run_on_a_task_is_measured_on_that_of_its_last_phase_and_resumes_exactly(tmp_path, monkeypatch):
    sections = recall({"pairs": [4], "length": 16, "test_lengths": [32], "test_rows": 4}, batch_size=2)
    run = {"steps": 6, "batch_size": 4, "device": "cpu", "log_every": 1, "tensorboard": False, "threads": 1}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"model": {**MODEL, "max_position_embeddings": 64}, "run": run, **sections}))
    whole = main(path, [f"run.output={tmp_path / 'whole'}"])
    assert (whole.results["pairs"], whole.results["lengths"]) == ([4], [16, 32])
    record = json.loads((whole.output / "results.json").read_text())
    assert (record["task"]["pairs"], record["task"]["length"]) == ([4], 16)
    for at in (2, 5):
        output = tmp_path / str(at)
        overrides = [f"run.output={output}", "run.save_every=1"]
        real = HymbaTrainer.training_step

        def interrupted(self, *args, at=at, real=real, **kwargs):
            if self.state.global_step == at - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(HymbaTrainer, "training_step", interrupted)
        assert main(path, overrides).step == at
        monkeypatch.undo()
        assert main(path, overrides).rows == whole.rows
        assert losses_of(output) == losses_of(whole.output)


def test_what_a_run_in_phases_refuses(whole, config, tmp_path):
    output = f"run.output={whole.output}"
    with pytest.raises(
        SettingsError, match=r"its steps have 8 rows; now 1 process .* make 16; run.tokens_per_step = 192"
    ):
        main(config, [output, "run.tokens_per_step=384"])
    with pytest.raises(SettingsError, match="other settings: phases: "):
        main(config, [output, "phases=[]"])
    wider = "phases=[{name: wide, start: 0.5, model: {intermediate_size: 32}}]"
    with pytest.raises(SettingsError, match=r"phase 'wide': .*other tensors .* such as model\.layers\.0\.mlp"):
        main(config, [f"run.output={tmp_path / 'run'}", wider])
