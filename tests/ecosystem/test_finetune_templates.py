"""The chat template for training: the released text, and a mask on what the assistant says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import byte_tokenizer, llama_tokenizer
from transformers import PreTrainedTokenizerFast

from hymba.chat import released_template
from hymba.experiments.settings import SettingsError
from hymba.finetuning.templates import choose_templates, has_markers, is_released, training_template

TOKENIZERS = {"release": llama_tokenizer(), "bytes": byte_tokenizer()}
TEXTS = st.text(st.sampled_from("ab.<>_01{}%\n \"'é"), min_size=1, max_size=12)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | TEXTS, lambda inner: st.lists(inner, max_size=2))
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(TEXTS, JSON)}))


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Turns in any order, a system message or none, tools and contexts or none."""
    turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXTS})
    system = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    return {
        "conversation": system + draw(st.lists(turn, min_size=1, max_size=5)),
        "tools": draw(st.none() | TOOLS),
        "contexts": draw(st.none() | st.lists(TEXTS, max_size=2)),
    }


@given(conversations(), st.booleans())
def test_the_text_is_the_released_one(given: dict[str, Any], prompt: bool) -> None:
    tokenizer = TOKENIZERS["release"]

    def render(template: str) -> str:
        return tokenizer.apply_chat_template(
            **given, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )

    released = render(released_template())
    assert render(training_template(append_eos=False)) == released
    last = given["conversation"][-1]["role"]
    if not prompt:
        assert render(training_template()) == released + ("</s>" if last == "assistant" else "")


def learned_runs(tokenizer: PreTrainedTokenizerFast, given: dict[str, Any]) -> list[str]:
    """The texts that are learned, each a run of masked-in tokens."""
    encoded = tokenizer.apply_chat_template(
        **given, chat_template=training_template(), return_assistant_tokens_mask=True, return_dict=True
    )
    pairs = zip(encoded["assistant_masks"], encoded["input_ids"], strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in run]) for masked, run in runs if masked]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(conversations())
def test_the_mask_is_what_the_assistant_says(kind: str, given: dict[str, Any]) -> None:
    """Each answer with the newline after it, the last one with the end of sequence, and nothing else."""
    tokenizer = TOKENIZERS[kind]
    turns = given["conversation"]
    expected = [turn["content"].strip() + "\n" for turn in turns if turn["role"] == "assistant"]
    if turns[-1]["role"] == "assistant":
        expected[-1] += tokenizer.eos_token
    assert learned_runs(tokenizer, given) == expected


def test_which_template(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    assert choose_templates(tokenizer) == (released_template(), training_template())
    # The released template in other words is the released one.
    tokenizer.chat_template = released_template().replace("message['role']", "message.role") + "\n"
    assert is_released(tokenizer, tokenizer.chat_template)
    assert choose_templates(tokenizer) == (tokenizer.chat_template, training_template())
    own = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    tokenizer.chat_template = {"default": own, "tool_use": "x"}
    assert not is_released(tokenizer, own) and has_markers(own)
    assert choose_templates(tokenizer) == (own, own)
    assert choose_templates(tokenizer, "released") == (released_template(), training_template())
    file = tmp_path / "own.jinja"
    file.write_text(own)
    assert choose_templates(llama_tokenizer(), str(file)) == (own, own)
    with pytest.raises(SettingsError, match=r"data.chat_template = 'no.jinja': no such file; allowed: auto"):
        choose_templates(tokenizer, "no.jinja")
    assert not has_markers(released_template()) and has_markers(training_template(append_eos=False))
