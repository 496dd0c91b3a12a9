"""Whole runs of `hymba train` on a few hundred bytes: results, exact resuming, refusals."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import losses_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.cli import app
from hymba.config import ConfigError
from hymba.experiments import train as train_module
from hymba.experiments.ablation.lock import Locks
from hymba.experiments.checkpoints import OutputError, complete_checkpoints
from hymba.experiments.corpus import CorpusError
from hymba.experiments.material import sample_documents
from hymba.experiments.resuming import changed_settings
from hymba.experiments.settings import SettingsError
from hymba.experiments.train import main
from hymba.experiments.trainer import HymbaTrainer, truncate_log

STEPS = 8
SETTINGS = {
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]], "mamba_d_state": 4, "rope_type": "default",
    },
    "data": {"source": "files", "patterns": ["*.py"], "held_out": 0.3, "sequence_length": 24},
    "tokenizer": {"vocab_size": 280},
    "run": {
        "steps": STEPS, "batch_size": 2, "gradient_accumulation": 2, "device": "cpu", "threads": 1, "log_every": 3,
        "save_every": 2, "tensorboard": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def config(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "paths": [str(text)]}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return main(config, [f"run.output={output}", "run.evaluate_every=4", "run.tensorboard=true"])


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_ends_with_a_checkpoint_in_the_released_layout(whole, config):
    assert (whole.status, whole.step) == ("finished", STEPS)
    assert whole.exported == whole.output / "final"
    saved = weights(whole.exported)
    assert "model.layers.0.mamba.A_log.0" in saved
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    # The training itself was in fp32, and the export is its last checkpoint, rounded.
    last = weights(whole.checkpoint)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    assert same(saved, {key: tensor.bfloat16() for key, tensor in last.items()})

    tokenizer = AutoTokenizer.from_pretrained(whole.exported)
    model = AutoModelForCausalLM.from_pretrained(whole.exported)
    assert type(model) is HymbaForCausalLM
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("def ")

    record = json.loads((whole.exported / "training.json").read_text())
    assert record["held_out"]["bits_per_byte"] == whole.bits_per_byte
    assert record["corpus"]["train"]["files"] + record["corpus"]["held_out"]["files"] == 10
    assert record["corpus"]["sha256"] == json.loads((whole.output / "corpus.json").read_text())["sha256"]
    assert record["settings"]["run"]["steps"] == STEPS
    assert not list(whole.output.rglob("*.bin"))
    assert list((whole.output / "tensorboard").iterdir())


def test_the_log_and_the_checkpoints_that_are_kept(whole):
    entries = [json.loads(line) for line in (whole.output / "log.jsonl").read_text().splitlines()]
    assert [step for step, *_ in losses_of(whole.output)] == [3, 6]
    assert [e["step"] for e in entries if "bits_per_byte" in e] == [4]
    assert all(e["tokens_per_second"] > 0 for e in entries if "loss" in e)
    assert [path.name for path in complete_checkpoints(whole.output)] == ["checkpoint-6", "checkpoint-8"]


def test_the_same_command_again_does_nothing_new(whole, config, capsys):
    before = weights(whole.exported)
    again = main(config, [f"run.output={whole.output}"])
    assert (again.status, again.step) == ("finished", STEPS)
    assert same(before, weights(again.exported))
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize("at", [3, 5])
def test_ctrl_c_saves_and_the_same_command_goes_on_exactly(whole, config, tmp_path, monkeypatch, at):
    real, sent = HymbaTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at - 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HymbaTrainer, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    result = main(config, [f"run.output={tmp_path}"])
    assert (result.status, result.step, result.exported) == ("interrupted", at, None)
    assert result.checkpoint == tmp_path / f"checkpoint-{at}"
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()

    result = main(config, [f"run.output={tmp_path}", "run.save_every=3"])
    assert result.status == "finished"
    assert losses_of(tmp_path) == losses_of(whole.output)
    assert same(weights(result.checkpoint), weights(whole.checkpoint))


def test_a_second_ctrl_c_stops_at_once(config, tmp_path, monkeypatch):
    def twice(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(HymbaTrainer, "training_step", twice)
    with pytest.raises(KeyboardInterrupt):
        main(config, [f"run.output={tmp_path}"])
    assert complete_checkpoints(tmp_path) == []


KILLED = """
import os, signal, sys
import torch
from hymba.experiments.train import main
from hymba.experiments.trainer import HymbaTrainer

where, config, output = sys.argv[1:]
real_step, real_save = HymbaTrainer.training_step, torch.save

def step(self, *args, **kwargs):
    if where == "training" and self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    step.now = self.state.global_step
    return real_step(self, *args, **kwargs)

def save(obj, file, *args, **kwargs):
    real_save(obj, file, *args, **kwargs)
    if where == "saving" and step.now >= 3 and "optimizer" in str(file):
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)

HymbaTrainer.training_step, torch.save = step, save
main(config, ["run.output=" + output])
"""


@pytest.mark.parametrize(("where", "survivor"), [("training", "checkpoint-4"), ("saving", "checkpoint-2")])
def test_kill_9_in_training_and_in_saving(whole, config, tmp_path, where, survivor):
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(config), str(output)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in complete_checkpoints(output)][-1] == survivor
    assert bool(list(output.glob(".writing-*"))) == (where == "saving")

    result = main(config, [f"run.output={output}"])
    assert result.status == "finished"
    assert losses_of(output) == losses_of(whole.output)
    assert same(weights(result.checkpoint), weights(whole.checkpoint))
    assert not list(output.glob(".writing-*"))


LIMITED = """
import resource, signal, sys
from hymba.experiments.train import main
from hymba.experiments import train, trainer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = trainer.HymbaTrainer._save_checkpoint

def save(self, *args, **kwargs):
    if self.state.global_step >= 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return real(self, *args, **kwargs)

trainer.HymbaTrainer._save_checkpoint = save
try:
    main(sys.argv[1], ["run.output=" + sys.argv[2]])
except OSError as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_writes_that_the_system_refuses_leave_the_previous_checkpoint(config, tmp_path):
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(config), str(output)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 3, done.stderr
    assert "OutputError" in done.stdout
    assert "checkpoint-4: could not be written" in done.stdout
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-2"]
    assert not list(output.glob(".writing-*"))


def test_a_failed_export_keeps_the_previous_one(whole, config, monkeypatch):
    before = weights(whole.exported)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "bits_per_byte", fail)
    with pytest.raises(OutputError, match=r"final: could not be written: .*No space left"):
        main(config, [f"run.output={whole.output}"])
    assert same(before, weights(whole.exported))
    assert not list(whole.output.glob(".writing-*"))


def test_what_a_resumed_run_must_not_change(whole, config, text, tmp_path):
    output = f"run.output={whole.output}"
    with pytest.raises(SettingsError, match=r"other settings: optimizer.weight_decay: 0.1 -> 0.2; .* choose another"):
        main(config, [output, "optimizer.weight_decay=0.2"])
    with pytest.raises(SettingsError, match=r"model.hidden_size: 16 -> 32"):
        main(config, [output, "model.hidden_size=32"])
    with pytest.raises(SettingsError, match=r"run.resume = 'never': .* already has checkpoint-8"):
        main(config, [output, "run.resume=never"])
    before = {"run": {"threads": 1}, "export": {"folder": "a"}}
    assert changed_settings(before, {"run": {"threads": 2}, "export": {"folder": "b"}}) == []

    record = whole.output / "corpus.json"
    saved = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(saved), "sha256": "0" * 64, "python": "3.0.0"}))
        with pytest.raises(SettingsError, match=r"corpus has changed .*sha256 000000000000 with Python 3.0.0"):
            main(config, [output])
    finally:
        record.write_text(saved)
    copy = tmp_path / "run"
    copy.mkdir()
    (whole.output / "checkpoint-8").rename(copy / "checkpoint-8")
    try:
        with pytest.raises(SettingsError, match=r"no readable settings.yaml"):
            main(config, [f"run.output={copy}"])
    finally:
        (copy / "checkpoint-8").rename(whole.output / "checkpoint-8")


def test_refusals_before_anything_is_written(config, tmp_path):
    output = f"run.output={tmp_path / 'run'}"
    with pytest.raises(SettingsError, match=r"did you mean 'run.steps'"):
        main(config, [output, "run.stps=3"])
    with pytest.raises(ConfigError, match="hidden_size"):
        main(config, [output, "model.hiden_size=32"])
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written to: Not a directory"):
        main(config, [f"run.output={tmp_path / 'file' / 'run'}"])
    with pytest.raises(CorpusError, match="absent does not exist"):
        main(config, [output, "data.paths=[/absent]"])
    with pytest.raises(SettingsError, match=r"unknown field 'temprature'. Did you mean 'temperature'"):
        main(config, [output, "export.generation={temprature: 1.0}"])
    with pytest.raises(SettingsError, match=r"export.generation = .*num_beams"):
        main(config, [output, "export.generation={num_beams: 1, num_return_sequences: 5, do_sample: false}"])
    with pytest.raises(SettingsError, match=r"model.vocab_size = 100: the tokenizer has 280 tokens"):
        main(config, [output, "model.vocab_size=100"])
    with pytest.raises(ValueError, match=r"data.sequence_length = 100000"):
        main(config, [output, "data.sequence_length=100000"])


def test_options_of_a_run(whole, config, tmp_path):
    """bf16 autocast over fp32 parameters, gradient checkpointing, streamed rows, weights and tokenizer from before."""
    overrides = [
        f"run.output={tmp_path / 'run'}", f"run.init_from={whole.exported}",
        f"tokenizer.path={whole.output / 'tokenizer'}", "run.precision=bfloat16", "run.gradient_checkpointing=true",
        "run.steps=2", "run.log_every=1", "data.layout=stream", "data.held_out=0", f"export.folder={tmp_path / 'out'}",
        "export.dtype=float32", "export.generation={repetition_penalty: 1.3}", "schedule.shape=cosine",
    ]  # fmt: skip
    settings = {**yaml.safe_load(config.read_text()), "model": {"sliding_window": 4}}
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    result = main(path, overrides)
    assert result.exported == tmp_path / "out"
    assert result.bits_per_byte is None
    assert {tensor.dtype for tensor in weights(result.exported).values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(result.exported)
    assert model.config.sliding_window == 4
    assert model.generation_config.repetition_penalty == 1.3
    assert "is_local" not in json.loads((result.exported / "tokenizer_config.json").read_text())
    # It went on from trained weights: a fresh model starts near ln(280) = 5.6.
    assert losses_of(result.output)[0][1] < losses_of(whole.output)[0][1]


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bits_per_byte.py"


def test_the_script_prints_the_exported_figure_and_the_n_gram(whole, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, capsys.readouterr()

    code, out = run("--model", str(whole.exported), "--order", "3")
    result = json.loads(out.out.splitlines()[-1])
    assert code == 0
    assert result["model"]["bits_per_byte"] == pytest.approx(whole.bits_per_byte, rel=1e-6)
    assert 0 < result["ngram"]["bits_per_byte"] < result["model"]["bits_per_byte"]
    assert result["same_corpus"]
    code, out = run("--model", str(whole.output))
    assert code == 2
    assert "no training record" in out.err


@pytest.mark.parametrize("option", ["gradient_checkpointing=true", "activation_checkpointing=selective"])
def test_checkpointing_changes_no_number(whole, config, tmp_path, option):
    result = main(config, [f"run.output={tmp_path}", f"run.{option}", "export.evaluate=false"])
    for one, other in zip(losses_of(result.output), losses_of(whole.output), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_samples_and_log_truncation(tmp_path):
    from hymba.experiments.corpus import Document

    documents = [Document("a", "12345\n"), Document("b", "éé\nabc\n"), Document("c", "x")]
    assert [d.text for d in sample_documents(documents, 100)] == ["12345\n", "éé\nabc\n", "x"]
    assert [d.text for d in sample_documents(documents, 13)] == ["12345\n", "éé\n"]
    assert [d.text for d in sample_documents(documents, 9)] == ["12345\n", "é"]
    assert [d.text for d in sample_documents(documents, 6)] == ["12345\n"]
    path = tmp_path / "log.jsonl"
    truncate_log(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_log(path, None)
    assert path.read_text() == ""


def test_a_second_run_in_the_folder_is_refused(config, tmp_path):
    output = tmp_path / "run"
    with Locks([tmp_path / "run.lock"]):
        refused = CliRunner().invoke(app, ["train", str(config), f"run.output={output}"])
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert "at work on this run" in line and "wait for it or choose another run.output" in line
    assert not output.exists()
