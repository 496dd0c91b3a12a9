"""A conversation stays on one cache, keeps the model's own tokens, and outlives whatever ends a turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Script
from tiny_checkpoint import byte_tokenizer, llama_tokenizer, tiny_model
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from hymba import HymbaForCausalLM
from hymba.chat import ChatError, Conversation, Detokenizer, generation_settings, released_template

SYSTEM, USER, ASSISTANT = "<extra_id_0>System", "<extra_id_1>User\n", "<extra_id_1>Assistant\n"


@pytest.fixture(scope="module", params=[llama_tokenizer, byte_tokenizer], ids=["llama", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> HymbaForCausalLM:
    return tiny_model(tokenizer).double()


@pytest.fixture
def chat(model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Conversation]:
    with model.frozen_meta_state():
        yield Conversation(model, tokenizer)


def spell(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text in the middle of another, by single characters: never what the tokenizer itself would choose."""
    ids = []
    for character in text:
        piece = tokenizer("a" + character, add_special_tokens=False)["input_ids"]
        ids += piece[1:] if tokenizer.decode(piece[:1]) == "a" else piece[2:]
    return ids


def say(chat: Conversation, content: str, answer: list[Any] | str, **kwargs: Any) -> Any:
    """A turn in which the model says `answer` (spelt) and then whatever its limit leaves."""
    ids = spell(chat.tokenizer, answer) if isinstance(answer, str) else answer
    settings = generation_settings(chat.model, chat.tokenizer, do_sample=False, max_new_tokens=len(ids))
    return chat.send(content, settings=settings, logits_processor=LogitsProcessorList([Script(ids)]), **kwargs)


def assert_in_step(chat: Conversation) -> None:
    """The cache is what a fresh run over its share of the conversation's ids leaves behind."""
    ids, held = chat.ids, chat.cache.columns
    assert 0 < held <= len(ids)
    probe = torch.tensor([[5]])
    with torch.no_grad():
        expected = chat.model(torch.tensor([[*ids[:held], 5]]), use_cache=False).logits[0, -1]
        undo = chat.cache.snapshot()
        found = chat.model(probe, past_key_values=chat.cache).logits[0, -1]
        chat.cache.restore(undo)
    assert torch.allclose(found, expected, atol=1e-6)


def text_of(chat: Conversation) -> str:
    """The conversation as text, special tokens included."""
    return chat.tokenizer.decode(chat.ids, clean_up_tokenization_spaces=False)


# The released template.


def test_the_shipped_template_is_the_papers(tokenizer: PreTrainedTokenizerFast) -> None:
    def render(messages: list[dict[str, str]], **kwargs: Any) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=released_template(), tokenize=False, add_generation_prompt=True, **kwargs
        )

    user = [{"role": "user", "content": " hi "}]
    system = [{"role": "system", "content": "Be brief."}]
    tool = {"name": "add", "why": "1 < 2"}
    assert render(user) == f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}"
    assert render(system + user) == f"{SYSTEM}\nBe brief.\n\n{USER}hi\n{ASSISTANT}"
    assert render(system + user, tools=[tool], contexts=["a ", "b"]) == (
        f'{SYSTEM}\nBe brief.\n\n<tool> {{"name": "add", "why": "1 < 2"}} </tool>\n\n'
        f"<context> a </context>\n<context> b </context>\n\n{USER}hi\n{ASSISTANT}"
    )
    later = [*user, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "3"}]
    assert render(later) == f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}x\n<extra_id_1>Tool\n3\n{ASSISTANT}"


def test_tools_contexts_and_system_reach_the_model(model: Any, tokenizer: Any) -> None:
    chat = Conversation(model, tokenizer, system="S", tools=[{"name": "t"}], contexts=["c"])
    say(chat, "hi", "x")
    assert text_of(chat) == (
        f'{SYSTEM}\nS\n\n<tool> {{"name": "t"}} </tool>\n\n<context> c </context>\n\n{USER}hi\n{ASSISTANT}x'
    )


# Turns.


def test_turns_append_to_one_cache_and_the_answers_keep_their_tokens(chat: Conversation) -> None:
    cache = chat.cache
    answers = []
    for question, answer in (("hi", "Hello."), ("more?", "Hello<a def"), ("and?", "no")):
        before = chat.ids
        reply = say(chat, question, answer)
        assert reply.text == answer
        assert reply.finish == "length"
        assert chat.ids[: len(before)] == before
        assert reply.prompt_tokens + len(reply.tokens) == len(chat.ids) - len(before)
        answers.append(reply.tokens)
        assert_in_step(chat)
    # Spelt character by character, which no tokenizer would do: nothing was tokenised a second time.
    assert answers[0] == spell(chat.tokenizer, "Hello.")
    assert chat.cache is cache
    assert text_of(chat) == (
        f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}Hello.\n{USER}more?\n{ASSISTANT}Hello<a def\n{USER}and?\n{ASSISTANT}no"
    )
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_what_the_template_adds_has_the_tokens_that_it_has_in_the_whole_text(chat: Conversation) -> None:
    say(chat, "hi", "x")
    before = len(chat.ids)
    say(chat, "def Hello", "y")
    added = chat.ids[before:-1]
    suffix = f"\n{USER}def Hello\n{ASSISTANT}"
    whole = chat.tokenizer("x" + suffix, add_special_tokens=False)["input_ids"]
    assert added == whole[-len(added) :]
    assert chat.tokenizer.decode(whole[: -len(added)]) == "x"


def test_an_end_token_stays_out(chat: Conversation) -> None:
    reply = say(chat, "hi", [*spell(chat.tokenizer, "ok"), chat.tokenizer.eos_token_id])
    assert (reply.text, reply.finish) == ("ok", "end")
    assert chat.tokenizer.eos_token_id not in chat.ids
    say(chat, "more", "x")
    assert text_of(chat) == f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}ok\n{USER}more\n{ASSISTANT}x"
    assert_in_step(chat)


def test_an_empty_answer(chat: Conversation) -> None:
    reply = say(chat, "hi", [chat.tokenizer.eos_token_id])
    assert (reply.text, reply.tokens, reply.finish) == ("", [], "end")
    say(chat, "more", "x")
    assert_in_step(chat)


@pytest.mark.parametrize(
    "answer", ["ok\n<extra_id_1>", "ok<extra_id_1>", "ok\n\n<extra_id_1>", "ok <extra_id_<extra_id_1>"]
)
def test_the_next_turns_marker_ends_an_answer_and_leaves_no_trace(chat: Conversation, answer: str) -> None:
    shown: list[str] = []
    kept = answer.removesuffix("<extra_id_1>")
    reply = say(chat, "hi", answer, on_text=shown.append)
    assert reply.finish == "stop"
    assert reply.text == kept.strip()
    assert "".join(shown) == kept
    assert_in_step(chat)
    say(chat, "more", "x")
    written = kept if kept.endswith("\n") else kept + "\n"
    assert text_of(chat) == f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}{written}{USER}more\n{ASSISTANT}x"
    assert_in_step(chat)


@pytest.mark.parametrize("tokenizer", [llama_tokenizer], ids=["llama"], indirect=True)
def test_a_stop_string_that_shares_a_token_with_the_answer(chat: Conversation) -> None:
    tokenizer = chat.tokenizer
    assert ".<" in tokenizer.get_vocab()
    ids = [*spell(tokenizer, "ok"), tokenizer.convert_tokens_to_ids(".<"), *spell(tokenizer, "extra_id_1>")]
    reply = say(chat, "hi", ids)
    assert (reply.text, reply.finish) == ("ok.", "stop")
    assert_in_step(chat)
    say(chat, "more", "x")
    assert text_of(chat) == f"{SYSTEM}\n\n{USER}hi\n{ASSISTANT}ok.\n{USER}more\n{ASSISTANT}x"
    assert_in_step(chat)


def test_the_end_token_written_out_ends_an_answer_too(chat: Conversation) -> None:
    end = chat.tokenizer.eos_token
    reply = say(chat, "hi", f"a<b{end}")
    assert (reply.text, reply.finish) == ("a<b", "stop")


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end(chat: Conversation) -> None:
    shown: list[str] = []
    reply = say(chat, "hi", "a <extra_id_2> <extra_id_", on_text=shown.append)
    assert "".join(shown) == "a <extra_id_2> <extra_id_" == reply.text
    assert reply.finish == "length"
    assert_in_step(chat)


def test_static_and_dynamic_caches_say_the_same(model: Any, tokenizer: Any) -> None:
    said = []
    for max_length in (None, 400):
        chat = Conversation(model, tokenizer, system="S", max_length=max_length)
        settings = generation_settings(model, tokenizer, do_sample=False, max_new_tokens=12)
        said.append([chat.send(q, settings=settings).tokens for q in ("hi", "more", "def")])
    assert said[0] == said[1]


def test_a_full_static_cache_shortens_the_answer_and_then_refuses(model: Any, tokenizer: Any) -> None:
    used = Conversation(model, tokenizer)
    prompt = say(used, "hi", "x").prompt_tokens
    chat = Conversation(model, tokenizer, max_length=prompt + 4)
    assert len(chat.send("hi").tokens) == 5
    before = chat.ids
    with pytest.raises(ChatError, match=rf"static cache has room for {prompt + 4}"):
        chat.send("more")
    assert chat.ids == before
    chat.reset()
    assert chat.messages == []
    assert len(chat.send("hi").tokens) == 5


# Turns that do not end well.


@pytest.mark.parametrize("first", [True, False])
def test_ctrl_c_keeps_what_was_said_and_the_conversation_goes_on(chat: Conversation, first: bool) -> None:
    if not first:
        say(chat, "hi", "x")
    start = text_of(chat) if not first else f"{SYSTEM}\n\n"
    reply = say(chat, "go", [*spell(chat.tokenizer, "Hel"), KeyboardInterrupt])
    assert (reply.text, reply.finish) == ("Hel", "interrupted")
    say(chat, "shorter", "y")
    joint = "" if first else "\n"
    assert text_of(chat) == f"{start}{joint}{USER}go\n{ASSISTANT}Hel\n{USER}shorter\n{ASSISTANT}y"
    assert_in_step(chat)


def test_ctrl_c_before_the_first_token_takes_the_turn_back(chat: Conversation) -> None:
    say(chat, "hi", "x")
    before = (chat.ids, chat.messages)
    reply = say(chat, "go", [KeyboardInterrupt])
    assert (reply.text, reply.finish) == ("", "interrupted")
    assert (chat.ids, chat.messages) == before
    assert_in_step(chat)


def test_ctrl_c_in_the_middle_of_a_forward_pass(chat: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    say(chat, "hi", "x")
    layer = chat.model.model.layers[2]
    forward, calls = layer.forward, iter(range(100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        reply = say(chat, "go", "Hello")
    assert (reply.text, reply.finish) == ("Hel", "interrupted")
    say(chat, "more", "y")
    assert text_of(chat).endswith(f"{USER}go\n{ASSISTANT}Hel\n{USER}more\n{ASSISTANT}y")
    assert_in_step(chat)


def test_a_failure_takes_the_turn_back_and_is_passed_on(chat: Conversation) -> None:
    say(chat, "hi", "x")
    before = (chat.ids, chat.messages)
    with pytest.raises(MemoryError):
        say(chat, "go", [*spell(chat.tokenizer, "He"), MemoryError])
    assert (chat.ids, chat.messages) == before
    assert_in_step(chat)


@pytest.mark.parametrize("content", ["", "  \n"])
def test_an_empty_turn_is_refused(chat: Conversation, content: str) -> None:
    with pytest.raises(ChatError, match="the user turn is empty"):
        chat.send(content)


# Other templates.

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_a_template_that_closes_its_turns_with_the_end_token(model: Any, tokenizer: Any) -> None:
    chat = Conversation(model, tokenizer, chat_template=CHATML)
    end = tokenizer.eos_token_id
    assert say(chat, "hi", [*spell(tokenizer, "ok"), end]).text == "ok"
    say(chat, "more", "x")
    turn = "<|start|>user\n{}<|end|>\n<|start|>assistant\n"
    assert text_of(chat) == turn.format("hi") + "ok<|end|>\n" + turn.format("more") + "x"
    assert_in_step(chat)


def test_a_template_that_rewrites_earlier_turns_is_refused(model: Any, tokenizer: Any) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = Conversation(model, tokenizer, chat_template=template)
    say(chat, "hi", "x")
    with pytest.raises(ChatError, match="writes earlier turns differently"):
        chat.send("more")


def test_a_template_that_fails_is_named(model: Any, tokenizer: Any) -> None:
    chat = Conversation(model, tokenizer, chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(ChatError, match="cannot render this conversation: no system"):
        chat.send("hi")


# Text and settings.


@pytest.mark.parametrize("text", ["Hello Hello", " two  spaces", "é€😀 x", "a\n\n b", "def :"])
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for cut in range(len(ids)):
        head = tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False)
        if "\ufffd" in head:
            continue
        pieces = Detokenizer(tokenizer, ids[:cut])
        joined = "".join(pieces.push(token) for token in ids[cut:]) + pieces.flush()
        assert head + joined == whole


def test_bytes_that_make_no_character_are_shown_in_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    first = spell(tokenizer, "é")[0]
    pieces = Detokenizer(tokenizer)
    assert pieces.push(first) == ""
    assert pieces.flush() == "\ufffd"
    assert pieces.flush() == ""


def test_settings(model: Any, tokenizer: Any) -> None:
    greedy = generation_settings(model, tokenizer, max_new_tokens=3, temperature=None)
    assert not greedy.do_sample
    assert greedy.max_new_tokens == 3
    assert generation_settings(model, tokenizer, top_p=0.5).do_sample
    assert greedy.eos_token_id == [tokenizer.eos_token_id]
    with pytest.raises(ChatError, match=r"temprature=1 is not a generation option. Did you mean 'temperature'\?"):
        generation_settings(model, tokenizer, temprature=1)
    with pytest.raises(ChatError, match=r"do_sample=False decodes greedily, and top_k=3"):
        generation_settings(model, tokenizer, top_k=3, do_sample=False)
    with pytest.raises(ChatError, match="num_beams=1"):
        Conversation(model, tokenizer).send("hi", settings=generation_settings(model, tokenizer, num_beams=2))


def test_meta_tokens_run_once_in_a_conversation(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = model.model._run_meta_tokens
    monkeypatch.setattr(model.model, "_run_meta_tokens", lambda: runs.append(1) or run())
    chat = Conversation(model, tokenizer)
    for question in ("hi", "more", "def"):
        say(chat, question, "x")
    assert len(runs) == 1
