"""A conversation on one cache: the model's own tokens stay as generated, the rendered rest is appended.

A chat template renders a whole conversation to text. To continue one, this file renders it with a stand-in for every
answer of the model, so that what the template writes between the answers is known without looking at them, and
appends only what is new. An answer is never tokenised again: its ids are those that were sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from hymba.cache import CacheSnapshot, HymbaCache
from hymba.config import nearest
from hymba.model import HymbaForCausalLM

TURN_MARKER = "<extra_id_1>"
"""What the released template writes before each turn; it is plain text, and a model may go on to the next turn."""
MAX_NEW_TOKENS = 256
_STAND_IN = "\ue000"
"""A private-use character for an answer; nothing searches for it, so that a text with one does no harm."""
_CONTEXT = 16
"""Tokens before a text that decide how its first token reads."""
NO_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Values that leave greedy decoding without complaints about sampling options that a checkpoint's file carries."""


class ChatError(ValueError):
    """A turn or template that a conversation cannot take; the message says what to do."""


def released_template() -> str:
    """The chat template of the released Instruct model, for tokenizers that have none."""
    return (files("hymba") / "assets" / "chat_template.jinja").read_text("utf-8").rstrip("\n")


def generation_settings(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> GenerationConfig:
    """The model's generation configuration with `options` (transformers' names) in place of its values.

    A sampling option switches sampling on; `None` leaves a value alone. The tokenizer's end of sequence counts too.

    Raises:
        ChatError: a name that transformers does not have, or sampling options together with `do_sample=False`.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in vars(config):
            known = [key for key in vars(config) if not key.startswith("_")]
            raise ChatError(f"{name}={options[name]!r} is not a generation option.{nearest(name, known)}")
    sampling = [name for name in NO_SAMPLING if name in options]
    if sampling and not options.setdefault("do_sample", True):
        named = ", ".join(f"{name}={options[name]!r}" for name in sampling)
        raise ChatError(f"do_sample=False decodes greedily, and {named} would do nothing; leave out one or the other")
    if not options.get("do_sample", config.do_sample):
        options |= NO_SAMPLING
    for name, value in options.items():
        setattr(config, name, value)
    ends = end_tokens(config, tokenizer)
    config.eos_token_id = ends or None
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends else 0
    return config


def end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: the generation configuration's and the tokenizer's."""
    named = config.eos_token_id
    ids = list(named) if isinstance(named, (list, tuple)) else [named]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def default_stops(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Texts that end an answer: the end of sequence written out, and the next turn's marker in released templates."""
    # As text too: a model may spell them out in ordinary tokens.
    stops = [tokenizer.eos_token] if isinstance(tokenizer.eos_token, str) else []
    stops += [TURN_MARKER] if TURN_MARKER in template else []
    return [stop for stop in stops if stop]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stops: Iterable[str]) -> set[int]:
    """Ids of the stop strings that are one token of their own, which no text would show."""
    added = tokenizer.get_added_vocab()
    return {added[stop] for stop in stops if stop in added}


class Detokenizer:
    """Token ids to text, piece by piece; the pieces joined are the text of all, special tokens left out.

    Args:
        tokenizer: decodes.
        context: ids before the text, on which the leading space of its first token depends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        self._shown_from, self._shown_to = 0, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def push(self, token: int) -> str:
        """The text that this token completes; nothing as long as a character lacks bytes."""
        self._ids.append(token)
        return self._new(whole=False)

    def flush(self) -> str:
        """What is left when no more tokens come: the replacement character for bytes that make none."""
        return self._new(whole=True)

    def _new(self, *, whole: bool) -> str:
        # Decoded with the piece before it, because a token at the start of a text may read differently.
        before = self._decode(self._ids[self._shown_from : self._shown_to])
        now = self._decode(self._ids[self._shown_from :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not whole):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._ids)
        return now[len(before) :]


@dataclass
class Reply:
    """An answer.

    Attributes:
        text: as the conversation keeps it, without white space around it.
        tokens: ids that stay in the conversation; an end-of-sequence token is not among them.
        finish: why it ended: an end token, a stop string, the limit of new tokens, or Ctrl-C.
        prompt_tokens: tokens that the turn added before the answer.
    """

    text: str
    tokens: list[int]
    finish: Literal["end", "stop", "length", "interrupted"]
    prompt_tokens: int


@dataclass
class _Mark:
    """A place to go back to: the state before a token in which a stop string may begin."""

    start: int
    tokens: int
    snapshot: CacheSnapshot


class Listener(StoppingCriteria):
    """Follows the tokens of one row: their text, stop strings, and the cache as it was before one began.

    As a stopping criterion it is asked after a token is sampled and before the model takes the token in.

    Args:
        detokenizer: makes the text.
        cache: of the row; `None` when nobody will go back to where a stop string began.
        stops: stop strings. ends: ids that end the text.
        on_text: receives the text piece by piece, a stop string and what follows it left out.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        cache: HymbaCache | None,
        stops: Sequence[str],
        ends: Iterable[int],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.detokenizer, self.cache, self.stops, self.ends = detokenizer, cache, stops, frozenset(ends)
        self.on_text = on_text
        self.tokens: list[int] = []
        self.text = ""
        self.shown = 0
        self.ended = False
        self.stopped_at: int | None = None
        self.marks: list[_Mark] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = self.hear(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def hear(self, token: int) -> bool:
        """Take note of a token; True when the answer is over."""
        if token in self.ends:
            self.ended = True
            return True
        start = len(self.text)
        self.tokens.append(token)
        piece = self.detokenizer.push(token)
        if self.cache is not None and any(stop[0] in piece for stop in self.stops):
            self.marks.append(_Mark(start, len(self.tokens) - 1, self.cache.snapshot()))
        self.text += piece
        safe = self._scan()
        self.marks = [mark for i, mark in enumerate(self.marks) if self._needed(i, safe)]
        self.show(safe)
        return self.stopped_at is not None

    def _needed(self, index: int, safe: int) -> bool:
        """Whether a stop string can still begin in this mark's token: not when all up to the next mark is safe."""
        following = self.marks[index + 1].start if index + 1 < len(self.marks) else len(self.text)
        return safe < following

    def _scan(self) -> int:
        """How much of the text is certainly no part of a stop string; notes where a complete one begins."""
        for at in range(self.shown, len(self.text)):
            rest = self.text[at:]
            if any(rest.startswith(stop) for stop in self.stops):
                self.stopped_at = at
                return at
            if any(stop.startswith(rest) for stop in self.stops):
                return at
        return len(self.text)

    def show(self, until: int) -> None:
        """Hand on the text up to an index, once."""
        if until > self.shown:
            piece, self.shown = self.text[self.shown : until], until
            if self.on_text is not None:
                self.on_text(piece)


@dataclass
class _State:
    """What a turn changes, replaced at its end in one go.

    Attributes:
        ids: every token of the conversation; the cache holds the first ones.
        rendered: the template's text so far, with a stand-in for each answer.
        tail: what the last answer ended with: white space that the template would write again, and text whose token
            had to go because a stop string began in it.
        messages: the conversation, as the template takes it.
    """

    ids: list[int] = field(default_factory=list)
    rendered: str = ""
    tail: tuple[str, str] = ("", "")
    messages: list[dict[str, str]] = field(default_factory=list)


class Conversation:
    """Turns of user and model on one cache.

    Args:
        model: generates.
        tokenizer: its chat template is used; one without gets the released template.
        system: the system message.
        tools: JSON schemas of tools, and `contexts`: texts, for templates that take them.
        chat_template: a Jinja template in place of the tokenizer's.
        max_length: text tokens to make room for, in a static cache; by default the cache grows.
        stop_strings: texts that end an answer and are not part of it; by default the end-of-sequence token written
            out, and the next turn's marker when the template uses the released markers.

    Raises:
        ChatError: a template that cannot be rendered.
    """

    def __init__(
        self,
        model: HymbaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        contexts: list[str] | None = None,
        chat_template: str | None = None,
        max_length: int | None = None,
        stop_strings: Sequence[str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.system, self.tools, self.contexts = system, tools, contexts
        self.max_length = max_length
        template = chat_template or tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if tools else "default", template.get("default"))
        self.template: str = template or released_template()
        if stop_strings is None:
            stop_strings = default_stops(tokenizer, self.template)
        self.stop_strings = [stop for stop in stop_strings if stop]
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message, tools and contexts stay."""
        self.cache = HymbaCache(self.model.config, max_length=self.max_length)
        self._state = _State(messages=list(self._start))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as role and content."""
        return [dict(message) for message in self._state.messages]

    @property
    def ids(self) -> list[int]:
        """Every token of the conversation, answers as they were generated."""
        return list(self._state.ids)

    def send(
        self,
        content: str,
        *,
        role: str = "user",
        on_text: Callable[[str], None] | None = None,
        settings: GenerationConfig | None = None,
        **generate: Any,
    ) -> Reply:
        """Add a turn and let the model answer.

        Args:
            content: what the user (or, with `role="tool"`, a tool) says.
            on_text: receives the answer piece by piece; a stop string never reaches it.
            settings: from `generation_settings`; by default greedy with 256 new tokens.
            generate: further arguments of `generate`, such as `logits_processor`.

        A Ctrl-C ends the answer: what was generated stays in the conversation; without any, the turn is taken back.
        Any other exception takes the turn back and goes on to the caller.

        Raises:
            ChatError: an empty turn, a template that rewrites earlier turns, a static cache without room.
        """
        if not content.strip():
            raise ChatError(f"the {role} turn is empty; give it at least one character that is not white space")
        if settings is None:
            settings = generation_settings(self.model, self.tokenizer, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        if (settings.num_beams or 1) > 1 or (settings.num_return_sequences or 1) > 1:
            raise ChatError("a conversation has one row; allowed: num_beams=1 and num_return_sequences=1")
        before = self._state
        messages = [*before.messages, {"role": role, "content": content}]
        rendered = self._render(messages)
        if not rendered.startswith(before.rendered):
            raise ChatError(
                "the chat template writes earlier turns differently once a new one follows, so that the conversation "
                "cannot go on in its cache; start a new one (/reset), or use another template"
            )
        added = self._encode(rendered[len(before.rendered) :], before)
        settings = self._with_room(settings, len(before.ids) + len(added))

        prompt = before.ids + added
        ends = self._ends(settings)
        listener = Listener(Detokenizer(self.tokenizer, prompt), self.cache, self.stop_strings, ends, on_text)
        undo = self.cache.snapshot()
        interrupted = False
        try:
            ids = torch.tensor([prompt], device=self.model.device)
            self.model.generate(
                ids,
                generation_config=settings,
                past_key_values=self.cache,
                stopping_criteria=StoppingCriteriaList([listener]),
                **generate,
            )
        except KeyboardInterrupt:
            # The states of the layers may disagree about how far they are; what was sampled is taken in again.
            interrupted = True
            self.cache.restore(undo)
        except BaseException:
            self.cache.restore(undo)
            raise
        return self._finish(before, messages, rendered, prompt, len(added), listener, interrupted)

    def _finish(
        self,
        before: _State,
        messages: list[dict[str, str]],
        rendered: str,
        prompt: list[int],
        added: int,
        listener: Listener,
        interrupted: bool,
    ) -> Reply:
        """Settle what the answer is, bring cache and tokens in line with it, and take note of the turn."""
        tokens, cut = listener.tokens, ""
        if listener.stopped_at is None:
            # An interrupted character stays half: its tokens are kept, and it is never shown.
            listener.text += "" if interrupted else listener.detokenizer.flush()
            listener.show(len(listener.text))
            text = listener.text
        else:
            text = listener.text[: listener.stopped_at]
            mark = next(mark for mark in reversed(listener.marks) if mark.start <= listener.stopped_at)
            # The stop string's first token may begin with text of the answer.
            cut = text[mark.start :]
            tokens = tokens[: mark.tokens]
            if not interrupted:
                self.cache.restore(mark.snapshot)
        finish: Literal["end", "stop", "length", "interrupted"] = "length"
        if interrupted:
            finish = "interrupted"
        elif listener.stopped_at is not None:
            finish = "stop"
        elif listener.ended:
            finish = "end"
        if interrupted and not tokens:
            return Reply("", [], finish, added)
        self._state = _State(
            ids=prompt + tokens,
            rendered=rendered + _STAND_IN,
            tail=(text[len(text.rstrip()) :], cut),
            messages=[*messages, {"role": "assistant", "content": text.strip()}],
        )
        return Reply(text.strip(), tokens, finish, added)

    # Text and tokens.

    def _render(self, messages: list[dict[str, str]]) -> str:
        shown = [{**m, "content": _STAND_IN} if m["role"] == "assistant" else m for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                shown,
                tools=self.tools,
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
                contexts=self.contexts,
            )
        except Exception as error:
            raise ChatError(f"the chat template cannot render this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str, before: _State) -> list[int]:
        """Ids of the text that continues the conversation."""
        if not before.ids:
            # As apply_chat_template does: special tokens are the template's matter.
            return self._ids(text)
        space, cut = before.tail
        overlap = max((n for n in range(len(space) + 1) if space.endswith(text[:n])), default=0)
        return self._ids_inside(cut + text[overlap:])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_inside(self, text: str) -> list[int]:
        """Ids of a text that something stands before: SentencePiece-like tokenizers put a space before a first word."""
        for anchor in ("\n", "a", "."):
            start = self._ids(anchor)
            whole = self._ids(anchor + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._ids(text)

    # Limits.

    def _ends(self, settings: GenerationConfig) -> list[int]:
        """End tokens, and stop strings that are one token of their own; completes the settings with them."""
        ends = {*end_tokens(settings, self.tokenizer), *stop_tokens(self.tokenizer, self.stop_strings)}
        settings.eos_token_id = sorted(ends) or None
        return sorted(ends)

    def _with_room(self, settings: GenerationConfig, held: int) -> GenerationConfig:
        settings = copy.deepcopy(settings)
        if self.max_length is not None:
            # The last token of an answer is taken in with the next turn.
            room = self.max_length - held + 1
            if room < 1:
                raise ChatError(
                    f"the conversation would have {held} tokens, the static cache has room for {self.max_length}; "
                    "start a new one (/reset), or use a dynamic cache"
                )
            settings.max_new_tokens = min(room, settings.max_new_tokens or room)
        return settings
