"""The table of an ablation: its columns, its warnings, and its figures."""

from __future__ import annotations

import itertools
import json
import sys

from experiments.ablation_runs import Here, ablate, table_of

from hymba.experiments.ablation import plots, worker
from hymba.experiments.ablation.settings import load_ablation
from hymba.experiments.ablation.table import shown_metrics
from hymba.experiments.packing import TokenRows, rows_digest


def test_the_numbers_of_a_task():
    measured = {
        "accuracy": 0.5, "solved": True, "pairs": [4, 8], "accuracy_by_pairs": [1.0, None], "lengths": [64],
        "accuracy_by_length": [0.25], "grid": [[1.0]], "loss_by_x": [1.0],
    }  # fmt: skip
    assert worker.scalars(measured) == {"accuracy": 0.5, "accuracy[pairs=4]": 1.0, "accuracy[length=64]": 0.25}


def test_the_columns_of_a_task(file):
    def entry(*metrics):
        return load_ablation(file(tasks=[{"name": "a", "metrics": list(metrics)}])).tasks[0]

    names = ["chance", "accuracy", "accuracy[pairs=4]", "accuracy[pairs=8]", "train_loss"]
    assert shown_metrics(entry(), names) == ["accuracy"]
    assert shown_metrics(entry(), ["train_loss", "other"]) == ["other"]
    assert shown_metrics(entry("accuracy[pairs=*]", "accuracy"), names) == [names[2], names[3], names[1]]


def test_runs_that_saw_other_tokens_are_warned_of(file, tmp_path):
    path = file(variants={"hymba": None, "no-meta": {"model.num_memory_tokens": 0}})
    ablate(path)
    result = tmp_path / "out" / "runs" / "hymba" / "text" / "seed-0" / "result.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "rows": "others", "commit": "def"}))
    ablate(path, mode="table")
    fairness, commits = table_of(tmp_path)["warnings"]
    assert fairness == "text, seed 0: the runs did not see the same tokens: hymba against no-meta"
    assert commits.startswith("the runs were made by several commits: ")


def test_the_hash_of_rows_follows_seed_and_documents():
    def digest(seed, last=9, rows=40):
        documents = [[1, 2, 3, 4, 5] * 8, [6, 7, 8, last] * 8]
        return rows_digest(TokenRows(documents, length=8, rows=rows, seed=seed, layout="stream"))

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1), digest(0, last=10), digest(0, rows=41)}) == 4


def test_without_matplotlib_one_line_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = ablate(file(variants={"hymba": None}), start=Here({"hymba": 7}))
    assert said.splitlines()[-1] == plots.MISSING and "pip install" in plots.MISSING


def test_heat_maps_of_tasks_at_several_lengths(file, tmp_path):
    task = {"name": "needle", "length": 12, "facts": 2, "keys": 4, "values": 2, "fillers": 2}
    names = ("far", "near", "text")
    tasks = [{"name": name, "task": None if name == "text" else task} for name in names]
    path = file(variants={"hymba": None}, seeds=[0, 1], tasks=tasks)
    ablate(path)
    cells = [[[1.0, None], [0.5, 0.0]], [[0.0, None], [1.0, None]]]
    for name, seed in itertools.product(names, (0, 1)):
        result = tmp_path / "out" / "runs" / "hymba" / name / f"seed-{seed}" / "result.json"
        lines = 2 if name == "far" else 1
        held_out = {"lengths": [12, 20][:lines], "depths": [0, 1], "grid": cells[seed][:lines]}
        result.write_text(
            json.dumps(json.loads(result.read_text()) | ({} if name == "text" else {"held_out": held_out}))
        )
    ablate(path, mode="table")
    maps = json.loads((tmp_path / "out" / "heat-maps.json").read_text(encoding="utf-8"))
    grid = [[0.5, None], [0.75, 0.0]]
    assert maps == {"far": {"hymba": {"lengths": [12, 20], "depths": [0, 1], "grid": grid}}}
    assert (tmp_path / "out" / "heat-maps.png").is_file()
