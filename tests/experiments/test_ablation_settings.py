"""Settings of an ablation: what is accepted, selected, checked, and refused with key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from experiments.ablation_runs import BASE, MODEL, Here, ablate
from typer.testing import CliRunner

from hymba.cli import app
from hymba.experiments.ablation.plan import AblationError, make_plan
from hymba.experiments.ablation.settings import load_ablation
from hymba.experiments.settings import SettingsError


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"variant": {}}, ["unknown key 'variant'", "did you mean 'variants'"]),
        ({"run": {"output": "x", "job": 2}}, ["unknown key 'run.job'", "did you mean 'run.jobs'"]),
        ({"tasks": [{"name": "a", "setings": {}}]}, ["tasks[0]", "'setings'", "did you mean 'settings'"]),
        ({"tasks": [{"name": "a", "settings": {"run.step": 3}}]}, ["tasks: a", "run.step", "'run.steps'"]),
        ({"tasks": [{"name": "a", "settings": {"run.seed": 3}}]}, ["'run.seed' is not a task's to set"]),
        ({"tasks": [{"name": "a", "settings": {"data.task": {"name": "mqar"}}}]}, ["'data.task' is null or left out"]),
        ({"tasks": ["text"]}, ["tasks[0] = 'text': expected a mapping"]),
        ({"tasks": [{"metrics": []}]}, ["tasks[0]: name: give the task one"]),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, ["two tasks have one name"]),
        ({"tasks": [{"name": "a/b"}]}, ["name = 'a/b': it names a folder"]),
        ({"tasks": []}, ["tasks = []: name at least one task"]),
        ({"seeds": [0, 0]}, ["seeds = [0, 0]: expected different numbers"]),
        ({"seeds": []}, ["seeds = []"]),
        ({"seeds": ["a"]}, ["seeds[0] = 'a': expected a whole number"]),
        ({"variants": {}}, ["variants = {}: name at least one"]),
        ({"variants": {"a": {"modell.hidden_size": 3}}}, ["variants: a: 'modell.hidden_size'", "a variant may set"]),
        ({"variants": {"a": {"run.steps": 3}}}, ["variants: a: 'run.steps': a variant may set model.<field>"]),
        ({"variants": {"a": {"optimizer.lerning_rate": 3}}}, ["variants: a", "'optimizer.learning_rate'"]),
        ({"variants": {"a": {"model": {"hidden_size": 3}}}}, ["variants: a: model = ", "expected a file"]),
        ({"variants": {"a": 3}}, ["variants: a = 3: expected dotted settings"]),
        ({"variants": {"a": {"run.batch_size": 1}}}, ["variants: a", "= 1: expected the task's 2", "same tokens"]),
        ({"base": None}, ["base = None: expected a training file"]),
        ({"base": {}}, ["base: expected a training file"]),
        ({"base": {"file": 3}}, ["base.file = 3"]),
        ({"run": {"jobs": -1}}, ["run.jobs = -1: expected 0 or more"]),
    ],
)
def test_refusals_name_key_value_and_remedy(file, keys, parts):
    with pytest.raises((SettingsError, AblationError)) as refused:
        make_plan(load_ablation(file(**keys)))
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("override", ["seeds", "=3", "seeds=[", "seeds.a=3"])
def test_overrides_that_are_none(file, override):
    with pytest.raises(SettingsError, match="override"):
        load_ablation(file(), [override])


def test_a_variant_that_does_not_build_is_named_before_anything_trains(file, tmp_path):
    path = file(variants={"hymba": None, "odd": {"model.num_attention_heads": 3}, "typo": {"model.sliding_windw": 4}})
    start = Here()
    with pytest.raises(AblationError) as refused:
        ablate(path, start=start)
    message = str(refused.value)
    assert "nothing was trained" in message
    assert "odd (text): " in message and "num_attention_heads=3" in message
    assert "typo (text): " in message and "'sliding_window'" in message
    assert start.started == [] and not (tmp_path / "out").exists()


def test_a_base_from_a_file_and_models_from_files(file, text, tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump({**MODEL, "intermediate_size": 64}))
    data = {**BASE["data"], "paths": [str(text)]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**BASE, "data": data, "model": "model.yaml"}))
    variants = {"wide": {"model.num_memory_tokens": 0, "model": "wide.yaml"}}
    for base in ("train.yaml", {"file": "train.yaml", "run": {"steps": 3}}):
        settings = load_ablation(file(base=base, variants=variants), ["base.run.batch_size=4"])
        (unit,) = make_plan(settings).units
        run = unit.settings.run
        assert (run.steps, run.batch_size, run.log_every) == (3 if isinstance(base, dict) else 4, 4, 1)
        assert unit.settings.model == {**MODEL, "intermediate_size": 64, "num_memory_tokens": 0}
    settings = load_ablation(file(base={**BASE, "model": "model.yaml"}))
    assert settings.base["model"] == MODEL
    halved = {"halved": {"run.batch_size": 1, "run.gradient_accumulation": 2}}
    assert make_plan(load_ablation(file(base="train.yaml", variants=halved))).units


def test_selection_by_name(file):
    plan = make_plan(load_ablation(file(seeds=[3, 4])))
    assert [unit.name for unit in plan.select(["wide"], ["text"], [4])] == ["wide · text · seed 4"]
    with pytest.raises(AblationError, match=r"--only wid: the file has hymba, no-meta, wide\. Did you mean 'wide'"):
        plan.select(["wid"])
    with pytest.raises(AblationError, match="--seed 7: the file has 3, 4"):
        plan.select(seeds=[7])


def test_a_task_may_leave_the_bases_task_out(file, text):
    mqar = {"name": "mqar", "pairs": [2], "length": 16}
    base = {**BASE, "data": {**BASE["data"], "paths": [str(text)], "task": mqar}}
    tasks = [{"name": "recall"}, {"name": "text", "settings": {"data.task": None}}]
    plan = make_plan(load_ablation(file(base=base, tasks=tasks)))
    found = {unit.task.name: unit.settings.data.task for unit in plan.units}
    assert found == {"recall": mqar, "text": None}


def test_the_command_checks_and_refuses(file, tmp_path):
    path = file()
    runner = CliRunner()
    checked = runner.invoke(app, ["ablate", str(path), "--check", "--only", "wide"])
    assert checked.exit_code == 0, checked.output
    assert "1 runs selected" in checked.stdout and "warning: wide has +" in checked.stdout
    assert not (tmp_path / "out").exists()
    for arguments in (["no.yaml"], [str(path), "seeds"], [str(path), "--check", "--table"], [str(path), "--only", "x"]):
        refused = runner.invoke(app, ["ablate", *arguments])
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    assert runner.invoke(app, ["ablate", str(path), "--table"]).exit_code == 0
    assert "3 missing" not in (tmp_path / "out" / "table.md").read_text()
    assert Path(tmp_path / "out" / "table.csv").read_text().count("\n") == 4
