"""The `hymba` command: results, files, one-line errors, exit codes."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import byte_tokenizer, llama_tokenizer, tiny_checkpoint
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hymba import HymbaConfig, HymbaForCausalLM, cost
from hymba.cli import app
from hymba.commands import chat as chat_command
from hymba.commands import errors
from hymba.commands.inspect import layer_map
from hymba.layout import LayerSpec, released_layers


def hymba(*args: object, text: str = "", code: int = 0) -> Any:
    """Run the command in this process, with `text` as stdin."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=text)
    assert result.exit_code == code, result.output
    return result


def error(*args: object, text: str = "", code: int = 2) -> str:
    """The one line that a failing command prints."""
    result = hymba(*args, text=text, code=code)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "bytes", byte_tokenizer())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", llama_tokenizer())


def expected(folder: Path, prompt: str, **options: Any) -> str:
    """Prompt and continuation as transformers gives them for the prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HymbaForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, pad_token_id=0, **options)[0], skip_special_tokens=True)


# Help and usage.


def test_help_names_the_commands() -> None:
    code = "import sys; sys.argv = ['hymba', '--help']; from hymba.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("generate", "chat", "serve", "inspect", "train", "ablate", "analyze", "convert", "env"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", ["generate", "chat", "serve", "inspect", "train", "ablate", "analyze", "convert", "env"]
)
def test_every_command_has_help(command: str) -> None:
    assert f"Usage: hymba {command}" in " ".join(hymba(command, "--help").stdout.split()).replace("root", "hymba")


def test_version() -> None:
    assert hymba("--version").stdout.startswith("hymba 0.")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["genrate"], ["genrate", "generate"]),
        (["generate", "x", "--max-new-token", "3"], ["--max-new-token", "--max-new-tokens"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens many", "integer"]),
        (["generate", "x", "--max-new-tokens", "0"], ["--max-new-tokens 0", "1"]),
        (["generate", "x", "--top-p=1.5"], ["--top-p 1.5", "1"]),
        (["generate", "x", "--dtype", "float23"], ["--dtype float23", "'float32'", "'bfloat16'"]),
        (["generate", "x", "--cache-implementation", "fast"], ["--cache-implementation fast", "'static'"]),
        (["generate"], ["PROMPT", "--prompts-file", "neither"]),
        (["generate", "x", "--prompts-file", "y"], ["PROMPT", "--prompts-file", "both"]),
        (["generate", ""], ["PROMPT is empty"]),
        (["generate", "-"], ["stdin is empty"]),
        (["chat", " "], ["PROMPT is empty"]),
        (["train"], ["CONFIG"]),
        (["train", "no/such.yaml"], ["CONFIG no/such.yaml", "no such file"]),
        (["inspect", "--length", "-1"], ["--length -1", "0"]),
        (["inspect", "--model", "no such"], ["--model no such", "no such folder", "hub id"]),
    ],
)
def test_usage_errors_are_one_line_with_value_and_way_out(args: list[str], parts: list[str]) -> None:
    line = error(*args)
    assert all(part in line for part in parts), line


# Models.


def test_the_checkpoint_in_the_package_is_the_default(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba.commands.models.files", lambda _: tmp_path)
    assert "no checkpoint inside" in error("inspect")
    shutil.copytree(folder, tmp_path / "assets" / "default")
    assert hymba("generate", "def ", "--max-new-tokens", 4).stdout.startswith("def ")
    assert json.loads(hymba("inspect", "--json").stdout)["model"] == str(tmp_path / "assets" / "default")


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no config.json" in error("inspect", "-m", tmp_path)
    assert "a file; give the folder" in error("inspect", "-m", folder / "config.json")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    assert "model_type='llama'; allowed: 'hymba'" in error("inspect", "-m", tmp_path)
    config.write_text('{"model_type": ')
    assert "config.json cannot be read" in error("inspect", "-m", tmp_path)
    config.write_text('{"model_type": "hymba", "num_experts": 4}')
    assert "num_experts=4 is not supported; allowed: 1" in error("generate", "x", "-m", tmp_path)
    shutil.copy(folder / "config.json", config)
    assert "no tokenizer can be loaded from it; needed: tokenizer.json" in error("generate", "x", "-m", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert "no model.safetensors" in error("generate", "x", "-m", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50_000])
    assert "truncated" in error("generate", "x", "-m", tmp_path)
    # Offline, as every test run is.
    line = error("inspect", "-m", "no/such")
    assert "no such folder, and as a hub id it cannot be fetched" in line


def test_devices_that_are_not_there(folder: Path) -> None:
    assert "--device warp: allowed: auto, cpu, cuda" in error("generate", "x", "-m", folder, "--device", "warp")
    many = f"cuda:{torch.cuda.device_count()}"
    line = error("generate", "x", "-m", folder, "--device", many)
    assert f"--device {many}: this " in line
    assert "use auto or cpu" in line


def test_dtypes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    generate = HymbaForCausalLM.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.dtype)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(HymbaForCausalLM, "generate", watched)
    for dtype in ("auto", "bfloat16"):
        hymba("generate", "x", "-m", folder, "--max-new-tokens", 2, "--dtype", dtype, "--device", "cpu")
    assert seen == [torch.float32, torch.bfloat16]


# generate.


def test_generate_prints_what_the_model_says(folder: Path, llama: Path) -> None:
    for where, prompt in ((folder, "def "), (llama, "Hello")):
        result = hymba("generate", prompt, "-m", where, "--max-new-tokens", 12, "--stats")
        assert result.stdout == expected(where, prompt, max_new_tokens=12) + "\n"
        assert "12 tokens in" in result.stderr


def test_generate_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hymba.commands.generate.say", said.append)
    hymba("generate", "def ", "-m", folder, "--max-new-tokens", 9, "--repetition-penalty", 1.5)
    assert said[0] == "def "
    assert len(said) > 9
    whole = expected(folder, "def ", max_new_tokens=9, repetition_penalty=1.5)
    assert "".join(said) == whole + "\n"


def test_generate_reads_stdin_and_can_leave_the_prompt_out(folder: Path) -> None:
    whole = hymba("generate", "-", "-m", folder, "--max-new-tokens", 5, text="a\nb").stdout
    alone = hymba("generate", "a\nb", "-m", folder, "--max-new-tokens", 5, "--no-return-full-text").stdout
    assert whole == "a\nb" + alone


def test_sampling_is_seeded_and_switched_on_by_its_options(folder: Path) -> None:
    args = ["generate", "a", "-m", folder, "--max-new-tokens", 16]
    first, again, other = (hymba(*args, "--temperature", 5, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert first != hymba(*args).stdout
    assert "top_k=3 would do nothing" in error(*args, "--no-do-sample", "--top-k", 3)
    assert "greedy decoding has one continuation" in error(*args, "--num-return-sequences", 2)
    assert "allowed: up to --num-beams 2" in error(*args, "--num-return-sequences", 3, "--num-beams", 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def \n\n  \na much longer line than the others\r\nb")
    return path


@pytest.mark.parametrize("options", [[], ["--cache-implementation", "static"], ["--num-beams", 2]])
def test_a_batch_gives_every_prompt_what_it_gets_alone(folder: Path, prompts: Path, options: list[Any]) -> None:
    args = ["-m", folder, "--max-new-tokens", 20, *options]
    batch = hymba("generate", "--prompts-file", prompts, "--batch-size", 2, "--json", *args)
    rows = [json.loads(line) for line in batch.stdout.splitlines()]
    assert [row["line"] for row in rows] == [1, 4, 5]
    assert [row["prompt"] for row in rows] == ["def ", "a much longer line than the others", "b"]
    for row in rows:
        alone = hymba("generate", row["prompt"], "--json", *args)
        assert json.loads(alone.stdout) == {**row, "line": 1}
        assert row["tokens"] == 20
        assert row["finish_reason"] == "length"


def test_a_batch_as_text(folder: Path, prompts: Path) -> None:
    result = hymba("generate", "--prompts-file", prompts, "-m", folder, "--max-new-tokens", 3)
    whole = "".join(f"==> {n} <==\n{expected(folder, p, max_new_tokens=3)}\n" for n, p in
                    ((1, "def "), (4, "a much longer line than the others"), (5, "b")))  # fmt: skip
    assert result.stdout == whole


def test_several_continuations_of_one_prompt(folder: Path) -> None:
    args = ["generate", "a", "-m", folder, "--max-new-tokens", 4, "--num-return-sequences", 3]
    result = hymba(*args, "--temperature", 3, "--seed", 0)
    assert [line for line in result.stdout.splitlines() if line.startswith("==>")] == [
        "==> 1.1 <==",
        "==> 1.2 <==",
        "==> 1.3 <==",
    ]
    rows = hymba(*args, "--num-beams", 3, "--json").stdout.splitlines()
    assert [json.loads(row)["sequence"] for row in rows] == [0, 1, 2]


def test_an_end_token_ends_a_row_and_is_not_text(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: Any, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        new = torch.full((len(ids), 4), 300 % self.config.vocab_size)
        new[:, 0] = 40
        new[1:, 1] = 0
        return torch.cat([ids, new], dim=1)

    monkeypatch.setattr(HymbaForCausalLM, "generate", ending)
    result = hymba("generate", "--prompts-file", prompts, "-m", folder, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["tokens"], row["finish_reason"]) for row in rows] == [(4, "length"), (1, "eos"), (1, "eos")]


@pytest.mark.parametrize("options", [[], ["--num-beams", 2]])
def test_stop_strings(folder: Path, prompts: Path, options: list[Any]) -> None:
    args = ["-m", folder, "--max-new-tokens", 20, "--no-return-full-text", *options]
    whole = hymba("generate", "def ", *args).stdout
    stop = whole[1:3]  # of two tokens, so that it is completed, not only said
    at = whole.index(stop) + 2
    result = hymba("generate", "def ", *args, "--stop-strings", "never said", "--stop-strings", stop)
    assert result.stdout.removesuffix("\n") == whole[:at]
    batch = hymba("generate", "--prompts-file", prompts, "--json", *args, "--stop-strings", stop)
    for row in map(json.loads, batch.stdout.splitlines()):
        alone = json.loads(hymba("generate", row["prompt"], "--json", *args, "--stop-strings", stop).stdout)
        assert alone == {**row, "line": 1}
        assert (row["finish_reason"] == "stop") == (stop in row["text"]) == row["text"].endswith(stop)
        assert row["finish_reason"] == "stop" or row["tokens"] == 20
    assert "a stop string needs at least one character" in error("generate", "a", "-m", folder, "--stop-strings", "")


def test_an_output_file_is_written_at_the_end_or_not_at_all(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    args = ["generate", "--prompts-file", prompts, "-m", folder, "--max-new-tokens", 2, "--json"]
    assert hymba(*args, "--output-file", out).stdout == ""
    written = out.read_text()
    assert len(written.splitlines()) == 3
    calls = iter(range(9))
    generate = HymbaForCausalLM.generate

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls):
            raise RuntimeError("out of memory")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(HymbaForCausalLM, "generate", failing)
    line = error(*args, "--output-file", out, "--batch-size", 1, code=1)
    assert line == "RuntimeError: out of memory (run again with --debug to see where)"
    assert out.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    assert "there is no folder" in error(*args, "--output-file", tmp_path / "no" / "out")
    assert "a folder" in error(*args, "--output-file", tmp_path)


def test_prompt_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    assert f"--prompts-file {path}: cannot be read: No such file" in error("generate", "--prompts-file", path)
    assert "Is a directory" in error("generate", "--prompts-file", tmp_path)
    path.write_text("\n \n")
    assert "no prompt in it; one prompt a line" in error("generate", "--prompts-file", path)
    path.write_bytes(b"ab\xff\n")
    assert "not UTF-8 text (byte 2)" in error("generate", "--prompts-file", path)
    assert "no prompt in it" in error("generate", "--prompts-file", "-", text="\n")


def test_ctrl_c_and_debug(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    args = ["generate", "def ", "-m", folder]
    with monkeypatch.context() as patch:
        patch.setattr(HymbaForCausalLM, "generate", interrupted)
        assert hymba(*args, code=errors.INTERRUPTED).stdout == "def \n"
    result = CliRunner().invoke(app, [*map(str, args), "--top-k", "1", "--no-do-sample", "--debug"])
    assert isinstance(result.exception, ValueError)
    # Behind -- it is a prompt like any other.
    assert hymba("generate", "-m", folder, "--max-new-tokens", 1, "--", "--debug").stdout.startswith("--debug")


# chat.


def test_a_piped_conversation(llama: Path) -> None:
    result = hymba("chat", "-m", llama, "--max-new-tokens", 6, "--stats", text="hi\n\n  more \n")
    assert len(result.stdout.splitlines()) >= 2
    first, second = (line for line in result.stderr.splitlines() if "tokens/s" in line)
    held = [int(line.split(" in the conversation")[0].split()[-1]) for line in (first, second)]
    assert held[0] < held[1]
    assert result.stderr.count("(cut after 6 tokens; --max-new-tokens allows more)") == 2
    assert result.stdout == hymba("chat", "hi", "-m", llama, "--max-new-tokens", 6, text="more").stdout


def test_chat_commands(llama: Path) -> None:
    args = ["chat", "-m", llama, "--max-new-tokens", 5]
    said = hymba(*args, text="hi\n/reset\nhi\n/quit\nnever\n")
    half = len(said.stdout) // 2
    assert said.stdout[:half] == said.stdout[half:]
    assert "(a new conversation)" in said.stderr
    assert "/reset" in hymba(*args, text="/help").stderr
    result = hymba(*args, text="/rest", code=2)
    assert "/rest is not a command. Did you mean '/reset'?" in result.stderr
    assert "the tool turn is empty" in hymba(*args, text="/tool", code=2).stderr


class Recorder:
    """Stands in for a conversation and writes down what it is asked."""

    made: list[Any]

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options, self.sent, self.resets, self.ids = options, [], 0, []
        self.cache = SimpleNamespace(nbytes=lambda: 0)
        self.made.append(self)

    def send(self, content: str, *, role: str, on_text: Any, settings: Any) -> Any:
        self.sent.append((role, content))
        self.settings = settings
        if content == "stop":
            return SimpleNamespace(finish="interrupted", tokens=[1], prompt_tokens=1)
        for piece in (" ", " ok", " then"):
            on_text(piece)
        return SimpleNamespace(finish="end", tokens=[1], prompt_tokens=1)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    Recorder.made = []
    monkeypatch.setattr("hymba.chat.Conversation", Recorder)
    return Recorder.made


def test_chat_hands_on_system_tools_contexts_and_settings(llama: Path, tmp_path: Path, recorder: list[Any]) -> None:
    tools, texts, text, template = (tmp_path / n for n in ("tools.json", "texts.json", "text.md", "t.jinja"))
    tools.write_text('[{"name": "add"}]')
    texts.write_text('["one", "two"]')
    text.write_text("three\n")
    template.write_text("{{ messages }}")
    args = ["chat", "first", "-m", llama, "--system", "Be brief.", "--tools", tools, "--chat-template", template]
    hymba(*args, "--contexts", texts, "--contexts", text, text="//path\n/tool 42\nlast\n")
    (chat,) = recorder
    assert chat.options == {
        "system": "Be brief.",
        "tools": [{"name": "add"}],
        "contexts": ["one", "two", "three\n"],
        "chat_template": "{{ messages }}",
        "max_length": None,
    }
    assert chat.sent == [("user", "first"), ("user", "/path"), ("tool", "42"), ("user", "last")]
    assert (chat.settings.do_sample, chat.settings.max_new_tokens) == (False, 256)
    hymba("chat", "x", "-m", llama, "--cache-implementation", "static", "--top-p", 0.5)
    assert recorder[1].options["max_length"] == HymbaConfig.from_pretrained(llama).max_position_embeddings
    assert recorder[1].settings.do_sample


def test_files_that_chat_cannot_use(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert f"--tools {path}: cannot be read: No such file" in error("chat", "-m", llama, "--tools", path)
    for content in ("[", "{}", "[]", '["x"]'):
        path.write_text(content)
        assert f"--tools {path}: " in error("chat", "-m", llama, "--tools", path)
    for content in ("{}", '[""]', "[1]"):
        path.write_text(content)
        assert f"--contexts {path}: allowed: a JSON list of texts" in error("chat", "-m", llama, "--contexts", path)
    text = tmp_path / "file.txt"
    text.write_text(" ")
    assert f"--contexts {text}: empty" in error("chat", "-m", llama, "--contexts", text)
    text.write_bytes(b"\xff")
    assert "not UTF-8 text (byte 0)" in error("chat", "-m", llama, "--chat-template", text)


def test_a_terminal_goes_on_after_errors_and_interrupts(
    recorder: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = iter(["hi", "/nope", KeyboardInterrupt, "", "stop", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def typed(_: str) -> str:
        line = next(script)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    chat = Recorder()
    chat_command._talk(chat, None, "first", stats=True)
    assert [content for _, content in chat.sent] == ["first", "hi", "stop"]
    shown = capsys.readouterr()
    # The space that a tokenizer puts before a first word is no part of the answer.
    assert "\nok then\n" in shown.out
    assert "> first" in shown.out
    assert "/nope is not a command" in shown.err
    assert "(Ctrl-C again, Ctrl-D or /quit to leave)" in shown.err
    assert "(interrupted; what was said stays)" in shown.err


def test_an_interrupted_pipe_ends(recorder: list[Any], llama: Path) -> None:
    hymba("chat", "stop", "-m", llama, text="never\n", code=errors.INTERRUPTED)
    assert recorder[0].sent == [("user", "stop")]


# inspect, env, train.


def test_inspect_needs_nothing_but_the_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    config = HymbaConfig.from_pretrained(folder)
    args = ["inspect", "-m", tmp_path, "--length", 100, "--batch-size", 3]
    facts = json.loads(hymba(*args, "--json", "--cache-implementation", "static", "--dtype", "float16").stdout)
    model = HymbaForCausalLM.from_pretrained(folder)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["weight_bytes"] == 2 * facts["parameters"]["total"]
    held = cost.cache_bytes(config, 100, batch=3, dtype="float16", static=True)
    assert facts["cache_bytes"] == {"total": held.total, **held.to_dict()}
    peak = facts["peak_bytes"]
    assert peak["generation"] > facts["weight_bytes"] + held.total
    assert peak["training_step_none"] > peak["training_step_selective"] > peak["training_step_full"]
    assert facts["flops_per_token"]["total"] == cost.flops_per_token(config, 100).total
    assert facts["layers"][2] == {"layer": 2, "mixer": "hybrid", "window": 16, "kv_from": 1, "ffn": True}
    assert facts["config"]["hidden_size"] == 32
    page = hymba(*args).stdout
    for part in (
        f"{facts['parameters']['total']:,} parameters",
        "float32",
        "1-2     hybrid  the last 16     1 has them, 2 borrows",
        f"{cost.flops_per_token(config, 100).total:,}",
        f"{cost.cache_bytes(config, 100, batch=3, dtype='float32').total:,}",
        "100 text tokens, 3 rows, float32, dynamic",
    ):
        assert part in page, part


def test_inspect_of_quantised_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    held = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    args = ["inspect", "-m", tmp_path, "--dtype", "bfloat16"]
    facts = json.loads(hymba(*args, "--json").stdout)
    assert (facts["weight_bytes"], facts["quantization"]) == (held, "torchao")
    assert list(facts["peak_bytes"]) == ["generation"] and facts["peak_bytes"]["generation"] > held
    assert f"quantised (torchao): {held:,} bytes, bfloat16 around them" in hymba(*args).stdout
    (tmp_path / "model.safetensors").unlink()
    assert json.loads(hymba(*args, "--json").stdout)["weight_bytes"] is None
    assert "a size that only its files say" in " ".join(hymba(*args).stdout.split())


def test_layer_maps() -> None:
    def lists(**options: Any) -> list[str]:
        given = {"window": 8, "global_layers": None, "kv_groups": None, "kv_every": None, **options}
        return [f"{row[0]}: {row[2]}, {row[3]}" for row in layer_map(released_layers(6, **given))]

    assert lists() == ["0-5: the last 8, own"]
    assert lists(window=None, kv_every=4) == [
        "0-3: all tokens, 0 has them, 1, 2 and 3 borrow",
        "4-5: all tokens, 4 has them, 5 borrows",
    ]
    assert lists(global_layers=[0, 2], kv_groups=[[1, 3]]) == [
        "0: all tokens, own",
        "1: the last 8, own, lent to 3",
        "2: all tokens, own",
        "3: the last 8, borrowed from 1",
        "4-5: the last 8, own",
    ]
    assert layer_map((LayerSpec(mixer="other"),)) == [("0", "other", "all tokens", "own")]


def test_env_names_versions_and_backends() -> None:
    facts = json.loads(hymba("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert any(row["op"] == "selective_scan" and row["usable"] for row in facts["backends"])
    page = hymba("env").stdout
    assert "selective_scan" in page
    assert torch.__version__ in page


def test_train_hands_its_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    result = SimpleNamespace(status="finished")
    monkeypatch.setattr("hymba.experiments.train.main", lambda *args: calls.append(args) or result)
    config = tmp_path / "tiny.yaml"
    config.write_text(f"run: {{output: {tmp_path / 'run'}}}")
    hymba("train", config, "run.steps=3", "run.seed=1")
    assert calls == [(config, ["run.steps=3", "run.seed=1"])]
    result.status = "interrupted"
    hymba("train", config, code=errors.INTERRUPTED)
    assert "'steps' is not a setting; write KEY=VALUE" in error("train", config, "steps")


def test_a_training_saves_by_the_released_names(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("run: {output: run}")
    code = (
        "import sys, types; sys.argv = ['hymba', 'train', 'tiny.yaml']\n"
        "from hymba.cli import app\n"
        "def main(*_):\n"
        "    from hymba.model import HymbaConfig, HymbaForCausalLM\n"
        "    sizes = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)\n"
        "    HymbaForCausalLM(HymbaConfig(vocab_size=9, intermediate_size=8, **sizes)).save_pretrained('out')\n"
        "    return types.SimpleNamespace(status='finished')\n"
        "sys.modules['hymba.experiments.train'] = types.SimpleNamespace(main=main)\n"
        "app()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.memory_tokens", "model.layers.0.mamba.A_log.0", "model.final_layernorm.weight"} <= names


def test_a_wrong_setting_of_a_training_is_a_usage_error(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("run: {stepz: 3}")
    line = error("train", config)
    assert "stepz" in line
    assert "steps" in line


# Messages.


def test_messages() -> None:
    assert errors.message(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert errors.message(RuntimeError("a\n b")) == "RuntimeError: a b (run again with --debug to see where)"
    assert errors.message(errors.UsageError("x=1; allowed: 2")) == "x=1; allowed: 2"
    assert errors.message(KeyboardInterrupt()) == "interrupted"
    assert errors.exit_code(KeyboardInterrupt()) == 130
    assert errors.exit_code(errors.UsageError()) == 2
    assert errors.exit_code(ValueError()) == 1


def test_control_characters_are_shown_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from hymba.commands.terminal import say

    written: list[str] = []
    out = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", out)
    say("a\x1b[31m\n\té\x9b")
    assert written == ["a\\x1b[31m\n\té\\x9b"]


def test_spinner_and_bar_only_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hymba.commands.terminal import progress, status

    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with status("loading [a]"):
            pass
        with progress(3, shown=True) as advance:
            advance(2)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("loading [a]" in shown.err) == ("2/3" in shown.err) == terminal


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hymba", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hymba", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("hymba 0.")
