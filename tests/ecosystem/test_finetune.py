"""`hymba finetune`: runs end with loadable folders, resume exactly, and say what is wrong in one line."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import CONVERSATIONS, DORA, LORA, PAIRS, losses, tensors, write_config
from helpers import largest, some_ids
from peft import PeftModel
from tiny_checkpoint import tiny_checkpoint
from tolerances import FLOAT32
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.chat import released_template
from hymba.cli import app
from hymba.experiments import checkpoints
from hymba.experiments.trainer import RecordedTrainer
from hymba.finetuning import run
from hymba.finetuning.run import main

METHODS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "sft-lora": (CONVERSATIONS, {"adapter": LORA}),
    "dpo-full": (PAIRS, {"method": {"name": "dpo"}, "run": {"gradient_accumulation": 2}}),
    "sft-packed": (CONVERSATIONS, {"data": {"packing": "bfd"}, "run": {"evaluate_every": 2, "tensorboard": True}}),
    "dpo-dora": (PAIRS, {"method": {"name": "dpo"}, "adapter": DORA, "run": {"evaluate_every": 2}}),
}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs without interruption, each made once: its settings file and result."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            rows, sections = METHODS[name]
            config = write_config(folder, checkpoint, rows, **sections)
            made[name] = config, main(config, [f"run.output={folder / 'run'}"])
        return made[name]

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=some_ids(2, 9, vocab=200)).logits


def followed(output: Path, name: str) -> list[int]:
    """The steps at which a figure was measured during a run."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if name in entry]


def test_a_run_ends_with_adapter_and_merged_checkpoint(finished: Any, checkpoint: Path, tmp_path: Path) -> None:
    _, result = finished("sft-lora")
    assert (result.status, result.step) == ("finished", 4)
    assert result.adapter == result.output / "adapter" and result.exported == result.output / "final"
    base = HymbaForCausalLM.from_pretrained(checkpoint)
    plain = logits(base)
    adapted = PeftModel.from_pretrained(base, str(result.adapter)).eval()
    merged = HymbaForCausalLM.from_pretrained(result.exported)
    assert largest(logits(merged), logits(adapted)) <= FLOAT32
    assert largest(logits(merged), plain) > FLOAT32
    assert "model.layers.0.mamba.x_proj.0.weight" in tensors(result.exported)
    # The released template is what is saved, whatever was trained with; the base's configuration stays.
    tokenizer = AutoTokenizer.from_pretrained(result.exported)
    assert tokenizer.chat_template.strip() == released_template().strip() and tokenizer.padding_side == "left"
    assert json.loads((result.exported / "config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    # `hymba merge` writes the same file again, and the command-line tools load it.
    done = CliRunner().invoke(app, ["merge", str(result.adapter), "--output", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    again = tensors(tmp_path / "merged")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors(result.exported).items())
    done = CliRunner().invoke(app, ["generate", "Use", "--model", str(tmp_path / "merged"), "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["merge", str(result.adapter), "--output", str(tmp_path / "merged")])
    assert done.exit_code == 2 and "is there already; choose a new folder" in done.output


def test_results_of_a_run(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config, result = finished("sft-lora")
    record = json.loads((result.output / "results.json").read_text())
    assert record["before"] == result.before and record["after"] == result.after
    assert result.after["loss"] < result.before["loss"]
    assert record["examples"]["answered"] == 2 and record["method"] == "sft"
    assert (result.output / "log.jsonl").is_file() and not (result.output / "lock.json").exists()
    capsys.readouterr()
    again = main(config, [f"run.output={result.output}"])
    said = capsys.readouterr().out
    assert (again.status, again.before, again.after) == ("finished", result.before, result.after)
    assert again.checkpoint == result.output / "checkpoint-4" and [step for step, *_ in losses(result.output)][-1] == 4
    assert "resuming from" in said and f"{result.before['loss']:>10.4f}{result.after['loss']:>10.4f}" in said


def test_every_weight_is_trained_without_an_adapter(finished: Any, checkpoint: Path) -> None:
    _, result = finished("sft-packed")
    assert result.adapter is None and not (result.output / "adapter").exists()
    assert followed(result.output, "held_out_loss") == [2] and any((result.output / "tensorboard").iterdir())
    before, after = tensors(checkpoint), tensors(result.exported)
    assert before.keys() == after.keys()
    # Weight decay is off, so that what moved had a gradient; layer 2 borrows its keys.
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("name", ["dpo-full", "dpo-dora"])
def test_dpo_starts_from_its_reference(finished: Any, name: str) -> None:
    """The first step's loss is ln 2: the policy is the reference, frozen copy or model without its adapter."""
    _, result = finished(name)
    assert losses(result.output)[0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert result.before["reward_margin"] == 0.0 and result.after["reward_margin"] > 0
    assert followed(result.output, "preference_accuracy") == ([2] if name == "dpo-dora" else [])
    assert result.after["reward_accuracy"] == 1.0 and "chosen_answers" in result.after


@pytest.mark.slow
def test_dpo_with_the_reference_run_once_before(finished: Any, tmp_path: Path) -> None:
    config, result = finished("dpo-full")
    other = main(config, [f"run.output={tmp_path}", "method.precompute_reference=true", "evaluate.generate=0"])
    for one, two in zip(losses(other.output), losses(result.output), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("name", ["sft-lora", pytest.param("dpo-full", marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_same_command_goes_on_exactly(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config, whole = finished(name)
    real, sent = RecordedTrainer.training_step, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RecordedTrainer, "training_step", interrupted)
    cut = main(config, [f"run.output={tmp_path}"])
    assert (cut.status, cut.step, cut.exported) == ("interrupted", 3, None)
    assert cut.checkpoint == tmp_path / "checkpoint-3"
    assert "the same command goes on from there" in capsys.readouterr().out
    on = main(config, [f"run.output={tmp_path}"])
    assert (on.status, losses(tmp_path), on.after) == ("finished", losses(whole.output), whole.after)
    ours, theirs = tensors(on.exported), tensors(whole.exported)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = finished("sft-lora")
    real = checkpoints.seal

    def full(folder: Path) -> None:
        if folder.name.endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(checkpoints.OutputError, match=r"No space left.*Earlier checkpoints are untouched"):
        main(config, [f"run.output={tmp_path}"])
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "lock.json").exists()
    monkeypatch.undo()
    assert main(config, [f"run.output={tmp_path}"]).after == whole.after


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    assert done.exit_code in (1, 2), done.output
    assert "Traceback" not in done.output and done.output.count("error:") == 1
    return done.output.partition("error: ")[2].strip()


def test_what_a_folder_with_a_run_refuses(finished: Any, tmp_path: Path) -> None:
    config, result = finished("sft-lora")
    said = invoke(config, f"run.output={result.output}", "adapter.rank=3")
    assert "holds a run with other settings: adapter.rank: 2 -> 3; use the same settings to resume" in said
    said = invoke(config, f"run.output={result.output}", "run.resume=never")
    assert "already has checkpoint-4; choose another run.output" in said
    lock = tmp_path / "lock.json"
    with run.Locks([lock]):
        said = invoke(config, f"run.output={tmp_path}")
    assert "is at work on this run" in said and said.endswith("wait for it or choose another run.output")
    rows = Path(config).with_name("rows.jsonl")
    kept = rows.read_text()
    rows.write_text(kept.replace("Hello 1", "Hello 2"))
    try:
        said = invoke(config, f"run.output={result.output}")
    finally:
        rows.write_text(kept)
    assert "the examples have changed since this run was started" in said


def test_missing_packages(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = finished("sft-lora")
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "peft" else object())
    assert "fine-tuning needs peft: pip install 'hymba[finetune]'" in invoke(config)


def test_starts_that_are_no_checkpoint(finished: Any, tmp_path: Path) -> None:
    config, result = finished("sft-lora")
    assert "no such folder; give a checkpoint's folder or a hub id" in invoke(config, "model.path=./nowhere")
    said = invoke(config, f"run.output={tmp_path}", f"model.path={result.adapter}")
    assert f"an adapter, not a checkpoint; merge it first: hymba merge {result.adapter}" in said
    said = invoke(config, f"run.output={tmp_path}", "adapter.target_modules=[k_proj]")
    assert "the model has no linear layer 'k_proj'; allowed: down_proj, dt_proj" in said
    done = CliRunner().invoke(app, ["merge", str(tmp_path), "--output", str(tmp_path / "x")])
    assert done.exit_code == 2 and "no adapter_config.json in it; give the folder of an adapter" in done.output
    done = CliRunner().invoke(app, ["merge", str(result.adapter), "-o", str(tmp_path / "x"), "-m", str(tmp_path)])
    assert done.exit_code != 0 and done.output.count("error:") == 1 and not (tmp_path / "x").exists()
    done = CliRunner().invoke(app, ["merge", str(result.adapter), "-o", str(tmp_path / "x"), "-m", "./nowhere"])
    assert done.exit_code == 2 and "--model ./nowhere: no such folder" in done.output
    done = CliRunner().invoke(app, ["generate", "x", "--model", str(result.adapter)])
    assert done.exit_code == 2 and f"an adapter, not a model; hymba merge {result.adapter}" in done.output
    shutil.copytree(result.exported, tmp_path / "rounded")
    fields = json.loads((tmp_path / "rounded" / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "rounded" / "config.json").write_text(json.dumps(fields))
    said = invoke(config, f"run.output={tmp_path / 'run'}", f"model.path={tmp_path / 'rounded'}")
    assert "its weights are quantised (torchao), which are not trained here" in said
