"""What a request may say: fields with their ranges, and refusals in the API's own format.

transformers' handlers read the body as a plain dictionary and leave out, with a note in the log, what they do not
support; a client sees a server error for the one and an answer to another question for the other. Both are refused
here.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BODY_BYTES = 16 * 2**20
"""A text of two million tokens, far beyond what a request can use."""
_SHOWN = 80


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: names the field, its value and what is allowed.
        status: of the HTTP response. param: the field. code: for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        return error_body(str(self), self.status, param=self.param, code=self.code)


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error object in OpenAI's format."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Fields(BaseModel):
    # Names that nothing here reads are transformers' matter: it refuses those that the API does not have.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Text(_Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _Function(_Fields):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(_Fields):
    function: _Function


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Text] | None = None
    tool_calls: list[_ToolCall] | None = None


class _Call(_Fields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class _CallOutput(_Fields):
    type: Literal["function_call_output"]
    call_id: str
    output: str


class _Reasoning(_Fields):
    type: Literal["reasoning"]


class _Tool(_Fields):
    type: Literal["function"]
    function: dict[str, Any] | None = None
    name: str | None = None


class _Decoding(_Fields):
    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # transformers makes a repetition penalty of 1 + this of it.
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    stop: str | list[str] | None = None
    generation_config: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[_Tool] | None = None


class Completion(_Decoding):
    """Body of `/v1/completions`."""

    prompt: str
    max_tokens: int | None = Field(None, ge=1)
    suffix: str | None = None


class Chat(_Decoding):
    """Body of `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logit_bias: dict[str, float] | None = None


class Response(_Decoding):
    """Body of `/v1/responses`."""

    input: str | list[_Message | _Text | _Call | _CallOutput | _Reasoning]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)


# Fields that transformers leaves out, and the values with which the answer is the same.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "background": (False,),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
    "web_search_options": (),
}


def check(body: dict[str, Any], kind: type[_Decoding], vocab_size: int) -> dict[str, Any]:
    """The body with its values checked and put into the names that every version of transformers reads.

    Raises:
        RequestError: a field that is missing, of the wrong type or out of range, or one that would be left out.
    """
    try:
        kind.model_validate(body)
    except ValidationError as error:
        # A value that fits no alternative of a union fails them all; the deepest failure is of the likeliest.
        worst = max(error.errors(include_url=False), key=lambda e: (_depth(e["loc"]), e["type"] != "missing"))
        names = _field(worst["loc"])
        given = "" if worst["type"] == "missing" else f"; given: {_shown(worst['input'])}"
        raise RequestError(f"{names}: {worst['msg'][0].lower()}{worst['msg'][1:]}{given}", param=names) from error
    for name, allowed in _ONLY.items():
        value = body.get(name)
        if name in kind.model_fields or value is None or value in allowed:
            continue
        names = ", ".join(json.dumps(choice) for choice in allowed) or "leaving it out"
        raise RequestError(f"{name}: {_shown(value)} is not supported; allowed: {names}", param=name)
    body = dict(body)
    if kind is not Response and body.get("stop") is not None:
        stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not all(stops):
            raise RequestError("stop: '' ends nothing; allowed: texts of at least one character", param="stop")
        body["stop"] = stops
    for token in body.get("logit_bias") or {}:
        if not (token.isdecimal() and int(token) < vocab_size):
            raise RequestError(
                f"logit_bias: {token!r} is not a token; allowed: ids from 0 to {vocab_size - 1}", param="logit_bias"
            )
    if body.get("logit_bias"):
        # generate() takes no integers.
        body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
    if kind is Response and not body["input"]:
        raise RequestError("input: empty; allowed: a text, or at least one item", param="input")
    if kind is Chat and body.get("max_completion_tokens") is not None:
        body["max_tokens"] = body.pop("max_completion_tokens")
    # Streaming is what transformers takes a missing value of /v1/responses for, and not streaming is what it means.
    body["stream"] = bool(body.get("stream"))
    if body.get("tool_choice") == "none" or not body.get("tools"):
        body.pop("tools", None)
    for turns in ("messages", "input"):
        if isinstance(body.get(turns), list):
            body[turns] = [_turn(message, f"{turns}[{i}]") for i, message in enumerate(body[turns])]
    return body


def _turn(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The newer name of the system role is not in templates, and an empty list of calls is none."""
    message = dict(message)
    if message.get("role", "assistant") != "assistant" and message.get("content") is None:
        raise RequestError(f"{where}.content: missing; allowed: a text", param=f"{where}.content")
    if message.get("role") == "developer":
        message["role"] = "system"
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    return message


def _field(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` for an error's place; the names of a union's alternatives left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "dict") and not part.startswith("_"):
            text += f".{part}" if text else part
    return text


def _depth(location: tuple[int | str, ...]) -> int:
    return _field(location).count(".") + _field(location).count("[")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
