"""Training settings: what is accepted, and that every refusal names key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hymba.experiments.settings import DataSettings, SettingsError, load_settings, settings_from

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "train.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_load(path):
    settings = load_settings(path)
    assert settings.model["hidden_size"]


def test_defaults_overrides_and_round_trip(settings_file):
    path = settings_file("run: {steps: 5}\nmodel: {hidden_size: 32}\n")
    overrides = ["optimizer.learning_rate=1e-3", "optimizer.betas=[0.8, 0.9]", "model.num_hidden_layers=2"]
    settings = load_settings(path, [*overrides, "tokenizer.path=null", "data.paths=[a, b]", "run.tensorboard=false"])
    assert settings.run.steps == 5
    assert settings.optimizer.learning_rate == 1e-3  # YAML 1.1 takes 1e-3 for text
    assert settings.optimizer.betas == (0.8, 0.9)
    assert settings.model == {"hidden_size": 32, "num_hidden_layers": 2}
    assert settings.data.paths == ("a", "b")
    assert settings.run.tensorboard is False
    again = settings_file(yaml.safe_dump(settings.to_dict()))
    assert load_settings(again) == settings


def test_model_in_a_file_of_its_own(settings_file, tmp_path):
    (tmp_path / "model.yaml").write_text("hidden_size: 48\n", encoding="utf-8")
    settings = load_settings(settings_file("model: model.yaml\n"), ["model.hidden_size=64"])
    assert settings.model == {"hidden_size": 64}
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_settings(settings_file("model: absent.yaml\n"))


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("run: {stps: 5}", [], ["run.stps", "did you mean 'run.steps'"]),
        ("optimiser: {}", [], ["optimiser", "did you mean 'optimizer'"]),
        ("steps: 5", [], ["'steps'", "did you mean 'run.steps'"]),
        ("", ["run.stps=5"], ["run.stps", "did you mean 'run.steps'"]),
        ("", ["steps=5"], ["'steps'", "did you mean 'run.steps'"]),
        ("", ["run=5"], ["'run' is a section"]),
        ("", ["run.steps"], ["expected key=value"]),
        ("", ["=3"], ["expected key=value"]),
        ("", ["run.steps=[1"], ["not readable as YAML"]),
        ("run: {steps: many}", [], ["run.steps = 'many'", "whole number"]),
        ("run: {steps: 1.5}", [], ["run.steps = 1.5", "whole number"]),
        ("run: {steps: true}", [], ["run.steps = True", "whole number"]),
        ("run: {tensorboard: 1}", [], ["run.tensorboard = 1", "true or false"]),
        ("run: {output: 3}", [], ["run.output = 3", "expected text"]),
        ("run: {precision: fp8}", [], ["run.precision = 'fp8'", "'float32', 'bfloat16'"]),
        ("run: [1]", [], ["run = [1]", "mapping"]),
        ("run: 3", ["run.steps=5"], ["section 'run' is 3"]),
        ("optimizer: {learning_rate: fast}", [], ["optimizer.learning_rate = 'fast'", "expected a number"]),
        ("optimizer: {learning_rate: -1}", [], ["optimizer.learning_rate = -1.0", "more than 0"]),
        ("optimizer: {betas: 0.9}", [], ["optimizer.betas = 0.9", "expected a list"]),
        ("optimizer: {betas: [0.9]}", [], ["optimizer.betas = [0.9]", "2 values"]),
        ("optimizer: {betas: [0.9, 1.0]}", [], ["optimizer.betas", "value < 1"]),
        ("data: {paths: [1]}", [], ["data.paths[0] = 1", "expected text"]),
        ("data: {source: files}", [], ["data.paths = []", "at least one"]),
        ("data: {source: datasets}", [], ["data.dataset = None"]),
        ("data: {held_out: 1.0}", [], ["data.held_out = 1.0", "value < 1"]),
        ("data: {sequence_length: 1}", [], ["data.sequence_length = 1"]),
        ("tokenizer: {vocab_size: 100}", [], ["tokenizer.vocab_size = 100", "260"]),
        ("schedule: {warmup: 0.6, decay: 0.6}", [], ["schedule.warmup + schedule.decay = 1.2"]),
        ("schedule: {floor: 2}", [], ["schedule.floor = 2.0", "between 0 and 1"]),
        ("run: {batch_size: 0}", [], ["run.batch_size = 0", "at least 1"]),
        ("run: {threads: -1}", [], ["run.threads = -1"]),
        ("model: 3", [], ["model = 3"]),
        ("model: {1: 2}", [], ["model ="]),
        ("export: {generation: 3}", [], ["export.generation = 3", "mapping"]),
        ("- a", [], ["expected sections"]),
        ("run: {", [], ["not readable as YAML"]),
        ("run: {steps: 1, steps: 2}", [], ["'steps' is written twice"]),
    ],
)
def test_refusals_name_key_value_and_remedy(settings_file, text, overrides, parts):
    with pytest.raises(SettingsError) as error:
        load_settings(settings_file(text), overrides)
    for part in parts:
        assert part in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such settings file"):
        load_settings(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not readable as YAML"):
        load_settings(tmp_path / "binary.yaml")


def test_one_section_alone():
    assert settings_from(DataSettings, {"held_out": 0.1}, where="here").held_out == 0.1
    with pytest.raises(SettingsError, match="here: unknown key 'heldout'; did you mean 'held_out'"):
        settings_from(DataSettings, {"heldout": 0.1}, where="here")
