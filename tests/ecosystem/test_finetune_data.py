"""What TRL is given to learn: forms of examples, masks, packing; and what is refused, with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import CONVERSATIONS, PAIRS, SETTINGS, write_config, write_rows
from tiny_checkpoint import byte_tokenizer, llama_tokenizer, tiny_model
from tolerances import FLOAT64_GRADIENT, OPERATOR

from hymba.experiments.settings import SettingsError
from hymba.finetuning.data import find_files, is_held_out, load_examples
from hymba.finetuning.examples import EXAMPLES
from hymba.finetuning.rows import DataError, read_file, read_row
from hymba.finetuning.settings import DataSettings, FinetuneSettings, load_settings
from hymba.finetuning.templates import choose_templates
from hymba.finetuning.trainers import build_trainer

USER, ANSWER = {"role": "user", "content": "Use 1."}, {"role": "assistant", "content": "Hello"}


def trainer_for(folder: Path, rows: list[Any], *overrides: str, model: Any = None, tokenizer: Any = None) -> Any:
    """The trainer of a run on rows, nothing held out, and its tokenizer."""
    tokenizer = llama_tokenizer() if tokenizer is None else tokenizer
    config = write_config(folder, Path("unused"), rows, data={"held_out": 0.0})
    settings = load_settings(config, [f"run.output={folder}", *overrides])
    examples = load_examples(settings.data, settings.method.name)
    _, template = choose_templates(tokenizer, settings.data.chat_template)
    model = tiny_model(tokenizer) if model is None else model
    return build_trainer(settings, model, tokenizer, template, examples, output=folder)


def learned(trainer: Any) -> list[str]:
    """The learned tokens of each row as text."""
    tokenizer = trainer.processing_class
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset]


def test_answers_of_conversations_are_learned(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, CONVERSATIONS)
    said = [[turn["content"] for turn in row["messages"] if turn["role"] == "assistant"] for row in CONVERSATIONS]
    assert learned(trainer) == ["".join(text.strip() + "\n" for text in texts) + "</s>" for texts in said]
    texts = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts[0].startswith('<extra_id_0>System\n<tool> {"name": "f0"} </tool>\n\n<context> text </context>\n\n')
    assert texts[1].startswith("<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nUse 1.\n<extra_id_1>Assistant\n")
    whole = trainer_for(tmp_path, CONVERSATIONS, "data.loss=all")
    assert learned(whole) == texts


def test_the_other_forms(tmp_path: Path) -> None:
    prompts = [{"prompt": "Use 1. ", "completion": "Hello"}] * 2
    trainer = trainer_for(tmp_path, prompts)
    assert learned(trainer) == ["Hello</s>"] * 2
    assert learned(trainer_for(tmp_path, prompts, "data.loss=all")) == ["<s> Use 1. Hello</s>"] * 2
    turns = [{"prompt": [USER], "completion": [ANSWER]}] * 2
    assert learned(trainer_for(tmp_path, turns)) == ["Hello\n</s>"] * 2
    texts = [{"text": "Use text"}] * 2
    assert learned(trainer_for(tmp_path, texts)) == ["<s> Use text</s>"] * 2
    with pytest.raises(SettingsError, match="the examples are texts without answers; allowed: auto, all"):
        trainer_for(tmp_path, texts, "data.loss=answers")
    pairs = [{"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "extr"}]}] * 2
    row = trainer_for(tmp_path, pairs, "method.name=dpo").train_dataset[0]
    decode = llama_tokenizer().decode
    assert [decode(row[key]) for key in ("chosen_ids", "rejected_ids")] == ["Hello\n</s>", "extr\n</s>"]
    assert decode(row["prompt_ids"]) == "<extra_id_0>System\n\n<extra_id_1>User\nUse 1.\n<extra_id_1>Assistant\n"


def test_templates_without_markers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [USER, ANSWER]}]
    with pytest.raises(SettingsError, match=r"does not mark what the assistant says .* data.loss=all"):
        trainer_for(tmp_path, rows, tokenizer=tokenizer)
    assert learned(trainer_for(tmp_path, rows, "data.loss=all", tokenizer=tokenizer)) == ["Use 1.Hello"]


def test_examples_too_long_for_a_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.max_length = 8: none of the 12 examples has a token to learn"):
        trainer_for(tmp_path, CONVERSATIONS, "data.max_length=8")
    assert learned(trainer_for(tmp_path, [{"text": "Use text"}], "data.max_length=4"))[0] == "<s> Use "


def test_packed_rows_are_their_documents_apart(tmp_path: Path) -> None:
    """The loss and its gradients do not depend on which examples share a row."""
    found = []
    for packing in ("none", "bfd"):
        model = tiny_model(llama_tokenizer()).double().train()
        rows = [{"prompt": "Use " * (2 + i % 3), "completion": "Hello text " * (1 + i)} for i in range(4)]
        settings = (f"data.packing={packing}", "data.max_length=80", "run.batch_size=4")
        trainer = trainer_for(tmp_path, rows, *settings, model=model)
        (batch,) = trainer.get_train_dataloader()
        if packing == "bfd":
            assert batch["input_ids"].shape[0] == 1 and len(trainer.train_dataset) < 4
            assert {"position_ids", "seq_idx", "cu_seq_lens_q"} <= batch.keys() and "attention_mask" not in batch
            assert int(batch["seq_idx"].max()) == 3
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (apart, gradients), (packed, same) = found
    assert packed == pytest.approx(apart, rel=OPERATOR)
    for name, gradient in gradients.items():
        assert float((same[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)) <= 1e3 * FLOAT64_GRADIENT, name


def test_held_out_examples_are_drawn_by_what_they_say(tmp_path: Path) -> None:
    rows = [{"text": f"line {i}"} for i in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = DataSettings(paths=(str(path),), held_out=0.25)
    examples = load_examples(settings, "sft")
    assert 70 < len(examples.held_out) < 130 and len(examples.train) + len(examples.held_out) == 400
    write_rows(path, rows[::-1])
    turned = load_examples(settings, "sft")
    assert sorted(turned.held_out["text"]) == sorted(examples.held_out["text"])
    assert turned.digest() != examples.digest()
    assert not is_held_out(rows[0], 0.0) and is_held_out(rows[0], 1.0)
    apart = write_rows(tmp_path / "apart.jsonl", rows[:3])
    kept = load_examples(DataSettings(paths=(str(path),), held_out_paths=(str(apart),), rows=5), "sft")
    assert (len(kept.train), len(kept.held_out)) == (5, 3)


def test_folders_lists_and_lmflow_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}]))
    (tmp_path / "other.txt").write_text("not data")
    files = find_files([str(tmp_path)], "data.paths")
    assert [row["text"] for path in files for _, row in read_file(path)] == ["a", "b"]
    flow = {"type": "text2text", "instances": [{"input": "x", "output": "y"}]}
    (tmp_path / "flow.json").write_text(json.dumps(flow))
    ((where, row),) = read_file(tmp_path / "flow.json")
    assert where.endswith("flow.json[0]") and read_row(row, method="sft", where=where)[1] == {
        "prompt": "x",
        "completion": "y",
    }
    talk = {"type": "conversation", "instances": [{"system": "s", "messages": [USER, ANSWER]}]}
    (tmp_path / "flow.json").write_text(json.dumps(talk))
    ((_, row),) = read_file(tmp_path / "flow.json")
    assert [turn["role"] for turn in read_row(row, method="sft", where="")[1]["messages"]] == [
        "system",
        "user",
        "assistant",
    ]


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3)
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    settings = DataSettings(source="datasets", dataset=str(tmp_path / "saved"), held_out_split="test")
    examples = load_examples(settings, "sft")
    assert (len(examples.train), len(examples.held_out)) == (3, 1)
    assert [turn["role"] for turn in examples.train[0]["messages"]] == ["user", "assistant"]
    with pytest.raises(DataError, match=r"data.dataset = .* split 'no': cannot be loaded"):
        load_examples(DataSettings(source="datasets", dataset=str(tmp_path / "saved"), dataset_split="no"), "sft")


@pytest.mark.parametrize(
    ("method", "row", "message"),
    [
        ("sft", [1], r"x:1: \[1\]: expected an object with keys"),
        ("sft", {"txt": "a"}, r"x:1: has 'txt'; expected text; prompt and completion; messages"),
        ("sft", {"text": ""}, r"x:1: text = '': expected text"),
        ("sft", {"messages": []}, r"x:1: messages = \[\]: expected a list of turns"),
        ("sft", {"messages": ["a"]}, r"messages\[0\] = 'a': expected an object with role and content"),
        ("sft", {"messages": [USER, {**ANSWER, "role": "bot"}]}, r"x:1: messages\[1\].role = 'bot': allowed: 'system'"),
        ("sft", {"messages": [USER, {**ANSWER, "content": None}]}, r"messages\[1\].content = None: expected text"),
        ("sft", {"messages": [{**ANSWER, "tool_calls": [1]}]}, r"messages\[0\].tool_calls: the template does not"),
        ("sft", {"messages": [USER]}, r"x:1: no turn is the assistant's"),
        ("sft", {"messages": [ANSWER], "tools": "{"}, r"x:1: tools = '{': not readable as JSON"),
        ("sft", {"messages": [ANSWER], "tools": 1}, r"x:1: tools = 1: expected a list of JSON schemas"),
        ("sft", {"messages": [ANSWER], "contexts": [1]}, r"x:1: contexts = \[1\]: expected a list of texts"),
        ("sft", {"prompt": [USER], "completion": [USER]}, r"completion ends with a turn of 'user'; allowed: 'assist"),
        ("dpo", {"text": "a"}, r"x:1: has 'text'; expected prompt, chosen and rejected"),
        ("dpo", {"chosen": "a", "rejected": "b"}, r"x:1: chosen is text and there is no prompt"),
        ("dpo", {"chosen": [ANSWER], "rejected": [USER]}, r"x:1: chosen and rejected have no common beginning"),
        (
            "dpo",
            {"chosen": [USER, ANSWER], "rejected": [USER]},
            r"x:1: chosen and rejected have no common|rejected doe",
        ),
    ],
)
def test_examples_that_are_refused(method: str, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row, method=method, where="x:1")


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not readable as JSON"):
        list(read_file(path))
    write_rows(path, [{"text": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"a.jsonl:2: prompt and completion, where the examples before have text"):
        load_examples(DataSettings(paths=(str(path),)), "sft")
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_file(path))
    path.write_text("")
    with pytest.raises(DataError, match="jsonl: there is no example in it; expected text; prompt"):
        load_examples(DataSettings(paths=(str(path),)), "sft")
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a list of examples, or an object with 'instances'"):
        list(read_file(tmp_path / "b.json"))
    for name, message in {"no": "no such file or folder", "c.txt": "allowed are .json", "d": "no .json or"}.items():
        (tmp_path / "c.txt").write_text("x")
        (tmp_path / "d").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            find_files([str(tmp_path / name)], "data.paths")
    with pytest.raises(DataError, match="no example is left to train on"):
        load_examples(DataSettings(source="example", rows=2, held_out=0.999999), "sft")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.packin=bfd", "unknown key 'data.packin'; did you mean 'data.packing'"),
        ("adapter.r=8", "unknown key 'adapter.r'; did you mean|known keys"),
        ("run.use_liger_kernel=true", "Liger has no kernels for this architecture; leave it out"),
        ("method=dpo", "'method' is a section; set one of its keys"),
        ("method.beta=0", "method.beta = 0.0: expected more than 0"),
        ("method.label_smoothing=0.1", "method.label_smoothing = 0.1: is read with method.loss: robust"),
        ("model.dtype=bfloat16", "model.dtype = 'bfloat16': training every weight needs 'float32'"),
        ("adapter.kind=ia3", "adapter.kind = 'ia3': allowed are 'none', 'lora', 'dora'"),
        ("adapter.target_modules=[lm_head]", "TRL's losses read the head's weight directly"),
        ("run.batch_size=0", "run.batch_size = 0: expected at least 1"),
        ("run.epochs=-1", "run.epochs = -1.0: expected more than 0"),
        ("schedule.warmup=2", "schedule.warmup = 2.0: expected a fraction"),
        ("export.folder=checkpoint-1", "export.folder = 'checkpoint-1': expected a folder's name"),
        ("export.generation={top_m: 1}", "export.generation: unknown field 'top_m'"),
        ("data.source=datasets", "data.dataset = None: name a dataset or its folder"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, override: str, message: str) -> None:
    config = write_config(tmp_path, Path("unused"), PAIRS, run={"steps": 0})
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        load_settings(config, [override])


def test_methods_and_their_data(tmp_path: Path) -> None:
    config = write_config(tmp_path, Path("unused"), PAIRS, method={"name": "dpo"})
    with pytest.raises(SettingsError, match=r"data.packing = 'bfd': DPO has no packing"):
        load_settings(config, ["data.packing=bfd"])
    with pytest.raises(SettingsError, match=r"data.example = 'arithmetic': is for method.name: sft, not dpo"):
        load_settings(config, ["data.source=example"])
    written = load_settings(config).to_dict()
    assert written["adapter"]["target_modules"] == [] and written["run"]["steps"] == SETTINGS["run"]["steps"]
    assert FinetuneSettings().optimizer.learning_rate == 5e-5


def test_the_examples_are_made_once_and_for_all() -> None:
    for example in EXAMPLES.values():
        rows = example.rows()
        assert len(rows) == 7840 == len({json.dumps(row) for row in rows}) and rows == example.rows()
        form, _ = read_row(rows[0], method=example.method, where="")
        assert form.startswith("messages" if example.method == "sft" else "prompt")
