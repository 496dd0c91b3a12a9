"""Task lists of `hymba eval` and the table beside the paper's figures; nothing is run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba.eval import TASKS, EvaluationError
from hymba.eval.presets import load_preset, names
from hymba.eval.run import Evaluation
from hymba.eval.table import render, table


@pytest.mark.parametrize("name", names())
def test_presets_are_well_formed(name: str) -> None:
    preset = load_preset(name)
    assert preset.title and preset.protocol
    assert all(isinstance(task.num_fewshot, int) for task in preset.tasks)
    assert len({task.task for task in preset.tasks}) == len(preset.tasks)
    assert {figure.task for figure in preset.figures} in (set(), {task.task for task in preset.tasks})
    for model, printed in (preset.paper or {}).items():
        assert preset.guesses and preset.shown
        for mean, parts in preset.averages.items():
            if mean in printed and all(part in printed for part in parts):
                # Llama's 44.08 at 300M is 0.02 off its own cells.
                assert printed[mean] == pytest.approx(sum(printed[p] for p in parts) / len(parts), abs=0.03), model


@pytest.mark.slow
def test_presets_name_tasks_and_metrics_of_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_path=str(TASKS))
    for preset in map(load_preset, names()):
        for task in preset.tasks:
            assert task.task in manager.task_index, task
        for figure in preset.figures:
            cfg = load_yaml(manager.task_index[figure.task].yaml_path, resolve_func=False)
            metrics = cfg.get("metric_list") or cfg.get("aggregate_metric_list")
            assert figure.metric in {metric["metric"] for metric in metrics}
            assert figure.also is None or figure.also in manager.task_index


def results_of(**tasks: tuple[dict[str, float], int]) -> Evaluation:
    results = {name: {"alias": name, **metrics} for name, (metrics, _) in tasks.items()}
    shots = {name: count for name, (_, count) in tasks.items()}
    return Evaluation({"results": results, "n-shot": shots, "group_subtasks": {}}, tuple(tasks))


def test_results_stand_beside_the_paper() -> None:
    run = {
        task.task: ({"acc,none": 0.5, "acc_stderr,none": 0.01}, task.num_fewshot)
        for task in load_preset("table2").tasks
    }
    run["hymba_squad_completion"] = ({"contains,none": 0.25}, 1)
    found = table(results_of(**run), load_preset("table2"))
    assert found.models == ("Hymba 1.5B", "SmolLM2 1.7B", "Llama-3.2-1B")
    rows = {row.task: row for row in found.rows}
    assert rows["arc_easy"].paper == (0.7694, 0.7778, 0.6553) and rows["arc_easy"].stderr == 0.01
    assert rows["average"].value == pytest.approx((6 * 0.5 + 0.25) / 7) and rows["average"].paper[0] == 0.6106
    assert render(found).row_count == 8
    # Other shots are another figure, and there is no average of a part.
    run["mmlu"] = ({"acc,none": 0.5}, 0)
    rows = {row.task: row for row in table(results_of(**run), load_preset("table2")).rows}
    assert rows["mmlu"].paper == (None,) * 3 and "average" not in rows


def test_tasks_of_the_paper_are_known_without_a_preset() -> None:
    metrics = {"perplexity,none": 12.0, "acc,none": 0.4}
    found = table(results_of(lambada_openai=(metrics, 0), hellaswag=({"acc,none": 0.3, "acc_norm,none": 0.4}, 0)))
    assert found.models == ("Hymba 1.5B (table 2)", "Hymba 1B (table 3)", "Hymba 300M (table 9)")
    printed = {(row.task, row.metric): row.paper for row in found.rows}
    assert printed["lambada_openai", "perplexity"] == (None, 10.38, 15.45)
    assert printed["hellaswag", "acc"] == (0.5355, None, None)
    assert printed["hellaswag", "acc_norm"] == (None, pytest.approx(0.6005), pytest.approx(0.4823))
    assert table(results_of(other=({"acc,none": 1.0}, 0))).models == ()


def test_a_group_is_shown_by_its_mean_or_by_its_members() -> None:
    results = {
        "results": {"a": {"acc,none": 0.1}, "b": {"acc,strict": 0.3}, "mean": {"acc,none": 0.2}},
        "n-shot": {"a": 5, "b": 5, "mean": 5},
        "group_subtasks": {"mean": ["a", "b"], "plain": ["a", "b"]},
    }
    assert [(r.task, r.shots) for r in table(Evaluation(results, ("mean",))).rows] == [("mean", 5)]
    rows = table(Evaluation(results, ("plain",))).rows
    assert [(r.task, r.metric) for r in rows] == [("a", "acc"), ("b", "acc (strict)")]


# A bad file.

_TASK = "tasks: [{task: a}]\n"
_FIGURE = "figures: [{name: F, task: a, metric: acc}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "list; needed: a mapping"),
        ("title: [", "not YAML"),
        ("title: t\n", "tasks is missing"),
        ("title: t\ntasks: []\n", "tasks: none; needed"),
        (_TASK, "title is missing"),
        (f"title: t\ntsks: []\n{_TASK}", "no key 'tsks'; allowed: title, tasks"),
        ("title: t\ntasks: [a]\n", "tasks[0]: 'a'; needed: a mapping with task"),
        ("title: t\ntasks: [{task: a, num_fewshot: -1}]\n", "num_fewshot=-1; allowed: 0, 1"),
        ("title: t\ntasks: {task: a}\n", "tasks: {'task': 'a'}; needed: a list"),
        (f"title: t\n{_TASK}figures: [{{name: F, task: aa, metric: acc}}]\n", "Did you mean 'a'?"),
        (f"title: t\n{_TASK}{_FIGURE}averages: [{{name: m, of: [G]}}]\n", "'G' is no figure"),
        (f"title: t\n{_TASK}{_FIGURE}averages: [m]\n", "averages[0]: 'm'; needed"),
        (f"title: t\n{_TASK}{_FIGURE}paper: {{M: {{G: 1}}}}\n", "paper: M: 'G' is no figure"),
        (f"title: t\n{_TASK}shown: [M]\n", "shown: 'M' is not in paper"),
    ],
)
def test_a_bad_preset_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError) as caught:
        load_preset(str(path))
    assert str(caught.value).startswith(f"--preset {path}: ") and message in str(caught.value)
