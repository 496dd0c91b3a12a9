"""`hymba eval`: every type of request against the model itself, any batch size, one-line errors."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint, tiny_model
from tolerances import FLOAT32
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hymba import HymbaForCausalLM
from hymba.cli import app
from hymba.eval import DEFAULT_MODEL, EvaluationError
from hymba.eval import TASKS as OURS
from hymba.eval.documents import contains, swde, text_files

pytest.importorskip("lm_eval")

LONGEST = 48
NEW, STOP = 6, "e"
CHOICES = [
    {"question": "The text has an extra text", "answers": ["Hello", "Use text .", "s"], "right": 1},
    {"question": "Hello", "answers": ["Hello Hello Hello", "r", "text"], "right": 0},
    {"question": "Use the extra text of the other text", "answers": ["a", "b c", "Hello ."], "right": 2},
    {"question": "x", "answers": ["extra", "text", "a longer answer than any other"], "right": 0},
    {"question": "7 + 8 = ", "answers": ["15", "14", "twenty"], "right": 0},
]
TEXTS = [{"text": t} for t in ("Hello", "The text is text. " * 9, "Use extra text:\n\n  as it is. " * 3, "é ü")]
PROMPTS = [
    {"text": "Hello", "value": "Hello"},
    {"text": "Use text, and more text than that: ", "value": "x"},
    {"text": "The", "value": "t"},
    {"text": "The first, the second, the third and", "value": "fourth"},
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "tiny_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{value}}",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def hymba(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No data cached outside, and no `pip list` for the harness's description of the machine."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the release's kind of tokenizer, whose generation settings are not greedy."""
    path = tiny_checkpoint(
        tmp_path_factory.mktemp("eval") / "tiny", max_position_embeddings=LONGEST, orig_max_position_embeddings=LONGEST
    )
    settings = json.loads((path / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 3.0}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    for (name, task), rows in zip(TASKS.items(), (CHOICES, TEXTS, PROMPTS)):
        data = {"test": str(write_lines(path / f"{name}.jsonl", rows))}
        head = {"task": name, "tag": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
        (path / f"{name}.yaml").write_text(yaml.safe_dump({**head, "test_split": "test", **task}))
    return path


@pytest.fixture(scope="module")
def runs(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By batch size: the results, the samples of each task, what was printed and the output folder."""
    found = {}
    for rows in ("1", "auto"):
        out = tmp_path_factory.mktemp("out") / "results"
        done = hymba("eval", "--tasks", "tiny", "--include_path", tasks, "--model", folder, "--batch_size", rows,
                     "--dtype", "float32", "--device", "cpu", "--output", out, "--log_samples")  # fmt: skip
        (results,) = out.glob("*/results_*.json")
        samples = {
            task: [json.loads(line) for line in next(out.glob(f"*/samples_{task}_*.jsonl")).read_text().splitlines()]
            for task in TASKS
        }
        found[rows] = {"results": json.loads(results.read_text()), "samples": samples, "out": out, "done": done}
    return found


@pytest.fixture(scope="module")
def direct(folder: Path) -> tuple[HymbaForCausalLM, Any]:
    model = HymbaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def log_likelihood(model: Any, ids: Sequence[int], scored: int) -> float:
    """Of the last `scored` ids."""
    logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return float(logits[range(-scored, 0), torch.tensor(ids[-scored:])].sum())


# The three types of request, against the model itself.


def test_choices_have_the_likelihood_of_their_text(runs: Any, direct: Any) -> None:
    model, tokenizer = direct
    for sample in runs["auto"]["samples"]["tiny_choice"]:
        doc = sample["doc"]
        wanted = []
        for answer in doc["answers"]:
            context = f"Q: {doc['question']}\nA:"
            ids = tokenizer(f"{context} {answer}")["input_ids"]
            assert ids[0] == tokenizer.bos_token_id != ids[1]
            wanted.append(log_likelihood(model, ids, len(ids) - len(tokenizer(context)["input_ids"])))
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(wanted, abs=20 * FLOAT32)
        assert sample["acc"] == float(max(range(3), key=wanted.__getitem__) == doc["right"])


def test_rolling_scores_the_text_and_nothing_else(runs: Any, direct: Any) -> None:
    model, tokenizer = direct
    total, size = 0.0, 0
    for sample in runs["auto"]["samples"]["tiny_rolling"]:
        text = sample["doc"]["text"]
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        wanted = 0.0
        for start in range(1, len(ids), LONGEST):
            end = min(start + LONGEST, len(ids))
            wanted += log_likelihood(model, ids[max(0, end - LONGEST - 1) : end], end - start)
        assert float(sample["resps"][0][0]) == pytest.approx(wanted, abs=len(ids) * FLOAT32)
        total, size = total + wanted, size + len(text.encode())
    assert any(len(tokenizer(text["text"])["input_ids"]) > 2 * LONGEST for text in TEXTS)
    measured = runs["auto"]["results"]["results"]["tiny_rolling"]["bits_per_byte,none"]
    assert measured == pytest.approx(-total / size / math.log(2), rel=1e-4)


@torch.no_grad()
def test_writing_is_greedy_up_to_the_stop(runs: Any, direct: Any) -> None:
    model, tokenizer = direct
    texts = []
    for sample in runs["auto"]["samples"]["tiny_writing"]:
        # As the harness cuts prompts that leave no room for the answer.
        ids = tokenizer(sample["doc"]["text"])["input_ids"][-(LONGEST - NEW) :]
        new: list[int] = []
        while len(new) < NEW and tokenizer.eos_token_id not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(new, skip_special_tokens=True).split(STOP)[0])
        assert sample["resps"] == [[texts[-1]]]
    assert len(set(texts)) > 1


def test_any_batch_size_gives_the_same(runs: Any) -> None:
    one, many = runs["1"]["samples"], runs["auto"]["samples"]
    for task in ("tiny_choice", "tiny_rolling"):
        for a, b in zip(one[task], many[task]):
            assert a["doc_id"] == b["doc_id"]
            for x, y in zip(a["resps"], b["resps"]):
                x, y = (x[0][0], y[0][0]) if task == "tiny_choice" else (x[0], y[0])
                assert float(x) == pytest.approx(float(y), abs=100 * FLOAT32)
    assert [s["resps"] for s in one["tiny_writing"]] == [s["resps"] for s in many["tiny_writing"]]
    assert runs["1"]["results"]["config"]["batch_size"] == 1


def test_the_files_are_the_harness_s(runs: Any, folder: Path) -> None:
    results = runs["auto"]["results"]
    assert results["config"]["model"] == "hymba" and results["config"]["model_args"]["pretrained"] == str(folder)
    assert results["max_length"] == LONGEST and results["fewshot_as_multiturn"] is False
    assert results["n-shot"] == dict.fromkeys(TASKS, 0) and set(results["task_hashes"]) == set(TASKS)
    assert not list(runs["auto"]["out"].glob(".*"))
    done = runs["auto"]["done"]
    assert "written:" in done.stdout and "bits_per_byte" in done.stdout
    assert "Determined" not in done.output and "Traceback" not in done.output


def test_a_shared_token_belongs_to_the_continuation() -> None:
    from hymba.eval.harness import HymbaLM

    tokenizer = byte_tokenizer()
    lm = HymbaLM(tiny_model(tokenizer), tokenizer=tokenizer)
    for context, continuation in [("d", "ef"), ("a\n", "\nb"), ("x", "y"), ("a ", ":"), ("a d", "e f")]:
        ids, scored = lm._encode_pair(context, continuation)
        assert ids and scored
        # This tokenizer adds no beginning-of-text token; one stands in where nothing is left of the context.
        assert [i for i in ids if i != tokenizer.bos_token_id] + scored == tokenizer.encode(context + continuation)


@pytest.mark.parametrize("device", ["cpu"])
def test_auto_takes_rows_for_the_longest_request(device: str, folder: Path) -> None:
    from hymba.eval.harness import HymbaLM

    lm = HymbaLM(str(folder), batch_size="auto", device=device, max_length=4096)
    assert lm._detect_batch_size([("", [1] * 1000, [1] * 24)]) == 8
    assert lm._detect_batch_size() == 2
    assert lm._detect_batch_size([("", [1], [1])]) == 64


def test_outside_a_repository_with_a_chat_template(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hymba("eval", "-t", "tiny_writing", "--include-path", tasks, "--limit", 1, "--apply_chat_template",
                 "--output", "out", "--log-samples")  # fmt: skip
    assert "fatal" not in capfd.readouterr().err + done.stderr
    # The model inside the package by its name, not by where it is installed; it has no chat template of its own.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["hymba"]
    (samples,) = (tmp_path / "out" / "hymba").glob("samples_*.jsonl")
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert "<extra_id_1>User\n" in prompt and prompt.endswith("<extra_id_1>Assistant\n")


# Adapters and quantised weights.


def test_an_adapter_and_its_generation(folder: Path, tasks: Path, tmp_path: Path, direct: Any) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = HymbaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["in_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    done = hymba("eval", "-t", "tiny_rolling,tiny_writing", "--include-path", tasks, "--model", folder, "--limit", 1,
                 "--peft", tmp_path / "adapter", "--json")  # fmt: skip
    results = json.loads(done.stdout)["results"]
    _, tokenizer = direct
    adapted = PeftModel.from_pretrained(
        HymbaForCausalLM.from_pretrained(folder, dtype=torch.float32), str(tmp_path / "adapter")
    ).eval()
    text = TEXTS[0]["text"]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    bits = [-log_likelihood(m, ids, len(ids) - 1) / len(text) / math.log(2) for m in (adapted, direct[0])]
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits[0], rel=1e-4)
    assert abs(bits[0] - bits[1]) > 0.01
    assert "measured on a part" in done.stderr


@pytest.mark.slow
def test_quantised_weights() -> None:
    pytest.importorskip("torchao")
    from lm_eval.api.instance import Instance

    from hymba.eval.harness import HymbaLM

    text = "def main():\n    return 1\n"
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    plain, rounded = (
        HymbaLM(device="cpu", quantization=kind).loglikelihood_rolling(request)[0] for kind in (None, "int8")
    )
    assert plain != rounded and rounded == pytest.approx(plain, rel=0.05)


# Tasks of the package.


def test_the_default_is_the_held_out_corpus() -> None:
    from hymba.experiments.bits import bits_per_byte
    from hymba.experiments.corpus import load_corpus
    from hymba.experiments.settings import DataSettings

    done = hymba("eval", "--limit", 1, "--dtype", "float32", "--json")
    got = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    model = HymbaForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    first = load_corpus(DataSettings()).held_out[:1]
    wanted = bits_per_byte(model, tokenizer, first, context=2048).per_byte
    assert got["results"]["hymba_stdlib"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)
    assert got["n-shot"] == {"hymba_stdlib": 0}


def test_completions_from_local_files(folder: Path, tmp_path: Path) -> None:
    rows = [{"doc_id": str(i), "key": "k", **row} for i, row in enumerate(PROMPTS)]
    files = {"swde_files": str(write_lines(tmp_path / "swde.jsonl", rows))}
    files["squad_files"] = [str(write_lines(tmp_path / "squad.jsonl", rows[::-1]))]
    done = hymba(
        *("eval", "--tasks", "hymba_swde,hymba_squad_completion", "--metadata", json.dumps(files), "--model", folder),
        *("--num_fewshot", 1, "--model_args", "max_length=512", "--gen_kwargs", f"max_gen_toks={NEW}", "--limit", 2),
        *("--output_path", tmp_path / "out.json", "-s"),
    )
    assert "contains" in done.stdout
    (path,) = tmp_path.glob("out_*.json")
    results = json.loads(path.read_text())
    for task in ("hymba_swde", "hymba_squad_completion"):
        samples = [json.loads(s) for s in next(tmp_path.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()]
        assert len(samples) == 2 and results["n-shot"][task] == 1
        for sample in samples:
            context, arguments = sample["arguments"]["gen_args_0"].values()
            assert arguments["until"] == ["\n"] and arguments["max_gen_toks"] == NEW
            # One solved page, a blank line, and this page; never itself.
            shot, _, own = context.rpartition("\n\n")
            assert own == sample["doc"]["text"].strip() and shot not in ("", f"{own} {sample['doc']['value']}")
            assert shot in [f"{row['text'].strip()} {row['value']}" for row in PROMPTS]
            assert sample["contains"] == contains(sample["doc"], sample["resps"][0])["contains"]
        mean = sum(sample["contains"] for sample in samples) / len(samples)
        assert results["results"][task]["contains,none"] == mean
        settings = results["configs"][task]["generation_kwargs"]
        assert settings["do_sample"] is False


def test_completions_write_48_tokens_up_to_a_newline() -> None:
    for name in ("hymba_swde", "hymba_squad_completion"):
        # Functions are named by tags of the harness's own.
        text = (OURS / f"{name}.yaml").read_text().replace("!function ", "")
        settings = yaml.safe_load(text)["generation_kwargs"]
        assert settings == {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}


def test_data_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello, text.")
    (tmp_path / "b.txt").write_text("\n")
    assert text_files(paths=[str(tmp_path)])["test"].to_list() == [{"name": "a.txt", "text": "Hello, text."}]
    for paths, message in ((None, "hymba_text needs files"), ("gone.txt", "paths: gone.txt does not exist"),
                           (str(tmp_path / "b.txt"), "no text in them")):  # fmt: skip
        with pytest.raises(EvaluationError, match=message):
            text_files(paths=paths)
    with pytest.raises(EvaluationError, match=r"swde_files=.*no column value; needed: text and value"):
        swde(swde_files=str(write_lines(tmp_path / "no.jsonl", [{"text": "a"}])))


@pytest.mark.parametrize(
    ("text", "value", "score"),
    [
        ("the Eiffel Tower, in Paris", "eiffel tower", 1),
        ("THE EIFFEL", " Eiffel ", 1),
        ("the eiffel", "Eiffel Tower", 0),
        ("costs $4.50 (now)", "$4.50", 1),
        ("costs $4x50", "$4.50", 0),
        ("", "a", 0),
    ],
)
def test_contains(text: str, value: str, score: int) -> None:
    from lm_eval.tasks.squad_completion.task import contains_score

    assert contains({"value": value}, [text]) == {"contains": score}
    assert contains_score(text, [value.strip()]) == score


# Errors: one line that says what to do.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit 0: allowed: 1, 2, 3"),
        (["--limit", "2.5"], "--limit 2.5: allowed"),
        (["--preset", "tabel2"], "Did you mean 'table2'?"),
        (["--preset", "table2", "--tasks", "piqa"], "exclude each other"),
        (["--batch_size", "many"], "--batch-size many: allowed: 1, 2, 3"),
        (["--seed", "1,2"], "--seed 1,2: allowed"),
        (["--metadata", "{"], "--metadata {: not JSON"),
        (["--metadata", "[]"], "needed: a JSON object"),
        (["--tasks", ","], "--tasks ',': no name in it"),
        (["--tasks", "tiny_chioce"], "Did you mean 'tiny_choice'?"),
        (["--tasks", "nowhere/mine.yaml"], "--tasks nowhere/mine.yaml: no such file"),
        (["--include_path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--output", "{file}/out"], "cannot be written to"),
        (["--log_samples"], "--log-samples needs --output"),
        (["--predict_only"], "--predict-only needs --output"),
        (["--fewshot-as-multiturn"], "only with --apply-chat-template"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model_args", "max_length"], "--model-args max_length: write KEY=VALUE"),
        (["--peft", "{file}"], "no adapter_config.json there; give the folder of an adapter"),
        (["-t", "tiny_writing", "--model_args", "max_lenght=9"], "--model-args max_lenght=9: from_pretrained() got an"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    file = tmp_path / "file"
    file.write_text("")
    # The harness's 14,000 files take seconds to read, and the names here are in the others.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_defaults=True, **rest: TaskManager(include_defaults=False, **rest)
    )
    given = [option.format(file=file) if "{file}" in option else option for option in options]
    found = hymba("eval", "--include-path", tasks, *given, code=2)
    assert message in found.stderr and found.stderr.count("\n") == 1 and not found.stdout


def test_a_task_that_cannot_be_loaded_is_named(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: away\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n")
    found = hymba("eval", "--tasks", broken, code=2)
    assert "error: task " in found.stderr and "gone.jsonl" in found.stderr
    broken.write_text("task: [")
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_defaults=True, **rest: TaskManager(include_defaults=False, **rest)
    )
    found = hymba("eval", "--tasks", "away", "--include-path", tmp_path, code=2)
    assert f"{broken} cannot be read" in found.stderr


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else there(name, *rest)
    )
    assert hymba("eval", code=2).stderr.endswith("not installed; pip install 'hymba[eval]' brings it\n")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    from hymba.eval.__main__ import main

    with pytest.raises(SystemExit, match=r"pip install 'hymba\[eval\]'"):
        main()


def test_the_harness_s_own_command_line_knows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import __main__ as harness
    from lm_eval.api.registry import get_model

    from hymba.eval.__main__ import main

    seen = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.append(get_model("hymba").__name__))
    main()
    assert seen == ["HymbaLM"]
