"""`hymba serve` as OpenAI's own client sees it: the same answers as alone, and refusals that leave the server well."""

from __future__ import annotations

import importlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ecosystem.server import CONTEXT, NAME, Served, alone, content, error_of, joined, running, turn, until
from helpers import Script
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from hymba.chat import Detokenizer, released_template
from hymba.cli import app
from hymba.commands import serve as command

openai = pytest.importorskip("openai", reason="needs the extra serve")

ROOT = Path(__file__).parents[2]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("serve") / NAME) as found:
        yield found


@pytest.fixture
def say(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Sets what the next answers are, each a text or a list of ids; returns what `generate` was given for them."""

    def script(*answers: str | list[Any]) -> list[dict[str, Any]]:
        generate, left, seen = served.model.generate, iter(answers), []

        def scripted(**kwargs: Any) -> Any:
            seen.append(kwargs)
            answer = next(left)
            ids = served.tokenizer(answer, add_special_tokens=False)["input_ids"] if isinstance(answer, str) else answer
            return generate(**kwargs, logits_processor=LogitsProcessorList([Script(ids)]))

        monkeypatch.setattr(served.model, "generate", scripted)
        return seen

    return script


# Answers.


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    refused = error_of(lambda: served.client.models.retrieve("owner/other"), openai.NotFoundError)
    assert refused["code"] == "model_not_found"


@pytest.mark.parametrize("text", ["Hello", "Hello Hello\nHe", "x" * 60])
def test_chat_is_what_it_is_alone(served: Served, text: str) -> None:
    answer = served.chat(text)
    assert content(answer) == alone(served, text)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == NAME
    prompt = served.tokenizer.apply_chat_template(
        turn(text), chat_template=released_template(), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_a_stream_is_the_same_in_pieces(served: Served) -> None:
    chunks = list(served.chat(stream=True, max_tokens=30, stream_options={"include_usage": True}))
    assert len(chunks) > 10
    assert joined(chunks) == alone(served, "Hello", 30)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 30


def test_completions_continue_a_text(served: Served) -> None:
    prompt = "Hello"
    ids = served.tokenizer(prompt, return_tensors="pt").input_ids
    new = served.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    pieces = Detokenizer(served.tokenizer, ids[0].tolist())
    expected = "".join(map(pieces.push, new)) + pieces.flush()
    whole = served.client.completions.create(model=NAME, prompt=prompt, max_tokens=20)
    stream = served.client.completions.create(model=NAME, prompt=prompt, max_tokens=20, stream=True)
    assert whole.choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_responses(served: Served) -> None:
    whole = served.client.responses.create(model=NAME, input="Hello", max_output_tokens=12)
    assert whole.output_text == alone(served, "Hello")
    events = list(served.client.responses.create(model=NAME, input=turn("Hello"), max_output_tokens=12, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed"
    with_system = served.client.responses.create(
        model=NAME, instructions="Hell", input=[{"role": "user", "content": "Hello"}], max_output_tokens=12
    )
    assert with_system.output_text == alone(served, "Hello", system="Hell")


def test_tools_contexts_and_roles_are_rendered(served: Served, say: Any) -> None:
    seen = say("He", "He")
    messages = [
        {"role": "developer", "content": "Hell"},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "He"},
        {"role": "tool", "content": "H", "tool_call_id": "1"},
    ]
    extra = {"chat_template_kwargs": {"contexts": ["x y"]}}
    for choice in ("auto", "none"):
        served.client.chat.completions.create(
            model=NAME, messages=messages, tools=[WEATHER], tool_choice=choice, extra_body=extra, max_tokens=1
        )
    expected = (
        "<extra_id_0>System\nHell\n\n<tool> " + json.dumps(WEATHER) + " </tool>\n\n<context> x y </context>\n\n"
        "<extra_id_1>User\nHello\n<extra_id_1>Assistant\nHe\n<extra_id_1>Tool\nH\n<extra_id_1>Assistant\n"
    )
    assert served.tokenizer.decode(seen[0]["input_ids"][0]) == expected
    assert "<tool>" not in served.tokenizer.decode(seen[1]["input_ids"][0])


def test_calls_of_tools_where_the_tokenizer_says_how_they_read(
    served: Served, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<extra_id_1>Assistant\n",
        "fields": {
            "tool_calls": {
                "open": "<toolcall>",
                "close": "</toolcall>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "</s>", "content": "text"},
        },
    }
    from hymba.serving.app import OneModel

    loaded = OneModel.load_model_and_processor

    def with_template(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = loaded(*args, **kwargs)
        monkeypatch.setattr(tokenizer, "response_template", template, raising=False)
        return model, tokenizer

    monkeypatch.setattr(OneModel, "load_model_and_processor", with_template)
    call = '<toolcall>{"name": "weather", "arguments": {"city": "Rome"}}</toolcall>'
    ids = [*served.tokenizer(call, add_special_tokens=False)["input_ids"], served.tokenizer.eos_token_id]
    say(ids, ids)
    whole = served.chat(tools=[WEATHER], max_tokens=120).choices[0]
    chunks = list(served.chat(tools=[WEATHER], max_tokens=120, stream=True))
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    for function in (whole.message.tool_calls[0].function, streamed[0].function):
        assert function.name == "weather" and json.loads(function.arguments) == {"city": "Rome"}


# The end of an answer.


def test_it_ends_where_the_release_ends(served: Served, say: Any) -> None:
    eos = served.tokenizer.eos_token_id
    spelt = served.tokenizer("He.<extra_id_1>User", add_special_tokens=False)["input_ids"]
    hello = served.tokenizer("Hello", add_special_tokens=False)["input_ids"]
    ended = [*hello, eos, *hello]
    say(ended, ended, spelt, spelt)
    for text in (" Hello", " He."):
        answer = served.chat(max_tokens=100)
        assert (content(answer), answer.choices[0].finish_reason) == (text, "stop")
        assert joined(served.chat(max_tokens=100, stream=True)) == text


def test_stop_strings_are_left_out(served: Served) -> None:
    text = alone(served, "Hello", 30)
    stop = text[10:13]
    expected = text[: text.index(stop)]
    for given in (stop, ["never said", stop]):
        assert content(served.chat(max_tokens=30, stop=given)) == expected
        assert joined(served.chat(max_tokens=30, stop=given, stream=True)) == expected


def test_a_limit_that_fits(served: Served) -> None:
    long = "x" * (CONTEXT - 80)
    room = CONTEXT - served.chat(long, max_tokens=1).usage.prompt_tokens
    assert 0 < room < 40
    # Without a limit of its own, an answer may fill the context.
    for limit in (None, room):
        assert served.chat(long, max_tokens=limit).usage.completion_tokens == room
    for call in (
        lambda: served.chat(long, max_tokens=room + 1),
        lambda: served.chat("Hello " * CONTEXT),
        lambda: served.chat("Hello " * CONTEXT, stream=True),
        lambda: served.client.completions.create(model=NAME, prompt="Hello " * CONTEXT),
        lambda: served.client.responses.create(model=NAME, input="Hello", max_output_tokens=CONTEXT, stream=True),
    ):
        error = error_of(call, openai.BadRequestError)
        assert error["code"] == "context_length_exceeded" and f"{CONTEXT} tokens" in error["message"]


def test_sampling_follows_the_seed(served: Served) -> None:
    greedy = content(served.chat())
    assert content(served.chat(temperature=0)) == greedy
    answers = {content(served.chat(temperature=1.5, seed=seed)) for seed in range(4)}
    assert len(answers) == 4
    assert content(served.chat(temperature=1.5, seed=3)) in answers
    extra = {"generation_config": json.dumps({"do_sample": True, "temperature": 1.5, "max_new_tokens": 12})}
    assert content(served.chat(seed=3, max_tokens=None, extra_body=extra)) in answers
    banned = served.tokenizer(greedy, add_special_tokens=False)["input_ids"]
    assert content(served.chat(logit_bias={str(token): -100 for token in banned})) != greedy


# Many clients.


def test_eight_at_once_equal_each_alone(served: Served) -> None:
    texts = ["Hello " * (1 + i) for i in range(8)]

    def ask(i: int) -> str:
        options = {"temperature": 1.2, "seed": i} if i % 2 else {}
        if i % 4 > 1:
            return joined(served.chat(texts[i], max_tokens=20, stream=True, **options))
        return content(served.chat(texts[i], max_tokens=20, **options))

    one_by_one = list(map(ask, range(8)))
    assert one_by_one[0] == alone(served, texts[0], 20)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(ask, range(8))) == one_by_one


@pytest.fixture
def steps(served: Served) -> Iterator[list[int]]:
    """Grows with every forward pass: the tokens it took in."""
    taken: list[int] = []
    hook = served.model.register_forward_pre_hook(
        lambda _, args, kwargs: taken.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    yield taken
    hook.remove()


def _body(**fields: Any) -> bytes:
    body = json.dumps({"messages": turn("Hello"), "max_tokens": 150, **fields}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    )
    return head.replace("\n", "\r\n").encode() + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(served: Served, steps: list[int], stream: bool) -> None:
    expected = alone(served, "Hello")
    steps.clear()
    # What would end the answer by itself is kept from being said.
    ban = {"logit_bias": {str(served.tokenizer.eos_token_id): -100}}
    first, second = (socket.create_connection(("127.0.0.1", served.port)) for _ in range(2))
    with first, second:
        first.sendall(_body(stream=stream, **ban))
        until(lambda: len(steps) > 2)
        # This one waits its turn, and its client leaves as well.
        second.sendall(_body(stream=stream, **ban))
        time.sleep(0.05)
        second.close()
        time.sleep(0.05)
    after = served.chat()
    assert content(after) == expected
    # The answer that was stopped had a prefill and some tokens; the one that never began had none.
    assert len(steps) < 100
    assert sum(length > 1 for length in steps) == 2


def test_a_client_that_leaves_in_its_request(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as leaving:
        leaving.sendall(_body()[:-10])
    assert content(served.chat()) == alone(served, "Hello")


# Refusals.


def _chat(**fields: Any) -> dict[str, Any]:
    return {"messages": turn("Hello"), "max_tokens": 2, **fields}


BAD_CHATS: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 400, "the body is not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "the body is not JSON"),
    "nested too deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "a list": (b"[]", 400, "the body is a JSON list"),
    "empty": (b"", 400, "the body is not JSON"),
    "nothing": ({}, 400, "messages: field required"),
    "no messages": (_chat(messages=[]), 400, "messages: list should have at least 1 item"),
    "messages a text": (_chat(messages="Hello"), 400, "messages: input should be a valid list"),
    "a message a text": (_chat(messages=["Hello"]), 400, "messages[0]: "),
    "no content": (_chat(messages=[{"role": "user"}]), 400, "messages[0].content: missing"),
    "content a number": (_chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content: "),
    "a role": (_chat(messages=[{"role": "robot", "content": "x"}]), 400, "messages[0].role: input should be 'system'"),
    "an image": (
        _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type: input should be 'text'",
    ),
    "a call": (
        _chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]),
        400,
        "messages[0].tool_calls: the model's chat template does not write calls",
    ),
    "no tokens": (_chat(max_tokens=0), 400, "max_tokens: input should be greater than or equal to 1; given: 0"),
    "tokens a text": (_chat(max_tokens="5"), 400, 'max_tokens: input should be a valid integer; given: "5"'),
    "too hot": (_chat(temperature=2.5), 400, "temperature: input should be less than or equal to 2"),
    "NaN": (_chat(temperature=float("nan")), 400, "temperature: input should be a finite number"),
    "top_p": (_chat(top_p=0), 400, "top_p: input should be greater than 0"),
    "seed": (_chat(seed=2**64), 400, "seed: "),
    "stop": (_chat(stop=["a", ""]), 400, "stop: '' ends nothing"),
    "bias": (_chat(logit_bias={"100000": 1}), 400, "logit_bias: '100000' is not a token"),
    "tools": (_chat(tools=["weather"]), 400, "tools[0]: "),
    "n": (_chat(n=2), 400, "n: 2 is not supported; allowed: 1"),
    "logprobs": (_chat(logprobs=True), 400, "logprobs: true is not supported; allowed: false"),
    "format": (_chat(response_format={"type": "json_object"}), 400, "response_format: "),
    "penalty": (_chat(presence_penalty=1), 400, "presence_penalty: 1 is not supported; allowed: 0"),
    "unknown": (_chat(wrong=1), 422, "Unexpected fields in the request: {'wrong'}"),
    "template": (_chat(chat_template_kwargs={"chat_template": "x"}), 400, "chat_template_kwargs: 'chat_template'"),
    "contexts": (_chat(chat_template_kwargs={"contexts": [1]}), 400, "the request cannot be used: UndefinedError"),
    "settings": (_chat(generation_config="{"), 400, "generation_config: not JSON"),
    "settings a list": (_chat(generation_config="[]"), 400, "generation_config: allowed: a JSON object"),
    "a setting": (_chat(generation_config='{"top_kk": 1}'), 400, "generation_config: 'top_kk' is not a generation"),
    "beams": (_chat(generation_config='{"num_beams": 2}'), 400, "generation_config: num_beams=2"),
    "top_k": (_chat(generation_config='{"do_sample": true, "top_k": -3}'), 400, "`top_k` has to be"),
    "a model": (_chat(model="other/model"), 404, "model: 'other/model' is not served here; allowed: 'tiny'"),
    "model a number": (_chat(model=5), 400, "model: 5; allowed: the name of a model"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(served: Served, name: str) -> None:
    body, status, message = BAD_CHATS[name]
    found, answer = served.post("/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body).encode())
    assert found == status
    assert answer["error"]["message"].startswith(message)
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt: input should be a valid string"),
        ("/v1/completions", {}, 400, "prompt: field required"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo: true is not supported"),
        ("/v1/responses", {}, 400, "input: field required"),
        ("/v1/responses", {"input": 5}, 400, "input: "),
        ("/v1/responses", {"input": []}, 400, "input: "),
        ("/v1/responses", {"input": [{"type": "x"}]}, 400, "input[0]."),
        ("/v1/responses", {"input": "a", "previous_response_id": "r"}, 400, "previous_response_id: "),
        ("/load_model", {"model": "other/model"}, 404, "model: 'other/model' is not served here"),
        ("/load_model", {}, 422, "Missing `model`"),
        ("/v1/embeddings", {"input": "a"}, 404, "Not Found"),
        ("/v1/audio/transcriptions", {}, 404, "this server's model reads and writes text only"),
    ],
)  # fmt: skip
def test_other_bad_requests(served: Served, path: str, body: Any, status: int, message: str) -> None:
    found, answer = served.post(path, json.dumps(body).encode())
    assert found == status and answer["error"]["message"].startswith(message)


def test_a_body_that_is_too_long_or_no_json_by_its_header(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    status, answer = served.post("/v1/chat/completions", json.dumps(_chat()).encode(), kind="text/plain")
    assert status == 400 and "Content-Type" in answer["error"]["message"]
    monkeypatch.setattr("hymba.serving.app.MAX_BODY_BYTES", 1000)
    status, answer = served.post("/v1/chat/completions", json.dumps(_chat(x="a" * 1000)).encode())
    assert status == 413 and "1,000 bytes" in answer["error"]["message"]


def test_no_other_model_is_loaded(served: Served) -> None:
    def ask(name: str) -> Any:
        return served.client.chat.completions.create(model=name, messages=turn("Hello"))

    for name in ("nvidia/Hymba-1.5B-Instruct", f"{NAME}@main", ""):
        assert error_of(lambda name=name: ask(name), openai.NotFoundError)["code"] == "model_not_found"
    # Nobody can take the model away, either.
    assert served.post("/reset", b"") == (200, {"status": "ok"})
    assert content(served.chat()) == alone(served, "Hello")


def test_a_generation_that_fails_harms_no_other(served: Served, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    say([5, RuntimeError('out of "luck"\n')], [5, RuntimeError('out of "luck"\n')])
    assert error_of(served.chat, openai.InternalServerError)["message"] == 'generation failed: out of "luck"\n'
    with pytest.raises(openai.APIError) as raised:
        joined(served.chat(stream=True))
    assert raised.value.body == "out of 'luck'"
    monkeypatch.undo()
    assert content(served.chat()) == alone(served, "Hello")


# The command.


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_command_refusals(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("--continuous-batching").startswith("--continuous-batching: transformers' continuous batching keeps")
    assert "give the model once" in refused("a/b", "--model", "c/d")
    assert f"--port {served.port}: " in refused("--port", served.port)
    assert "--port 70000: " in refused("--port", 70000)
    assert "--host no.such.host.invalid: " in refused("--host", "no.such.host.invalid")
    assert "no such folder" in refused("nowhere", "--port", 0)
    assert "cannot be read" in refused("--chat-template", tmp_path / "none", "--port", 0)
    monkeypatch.setattr(command, "_NEEDED", ("uvicorn", "no_such_package"))
    assert refused() == "serve needs no_such_package: pip install 'hymba[serve]'"


def test_the_benchmark(
    served: Served, say: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    benchmark = importlib.import_module("benchmarks.serve")
    url = f"http://127.0.0.1:{served.port}/v1"
    options = ["--url", url, "--clients", "1", "3", "--requests", "1", "--tokens", "6"]
    assert benchmark.main(options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "serve" and [row["clients"] for row in found["rows"]] == [1, 3]
    assert [row["tokens"] for row in found["rows"]] == [6, 18]
    assert all(row["tokens_per_s"] > 0 for row in found["rows"])
    # Four answers alone and then the same questions at once: the last one differs.
    say(*["Hello Hello"] * 6, "He He He He")
    with pytest.raises(SystemExit, match="no number"):
        benchmark.main([*options, "--tokens", "1"])
    assert "tokens/s" not in capsys.readouterr().out
