"""One example of fine-tuning data, from whatever form it has into the one that TRL reads, or a line that says why not.

Forms: `text`; `prompt` and `completion`; `messages`, with `tools` and `contexts`; `conversations` (turns with `from`
and `value`); and for DPO `chosen` and `rejected`, with a `prompt` or as whole conversations. Other keys are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
TEXT, PROMPT, MESSAGES, PROMPT_MESSAGES, PAIRS, PAIRS_MESSAGES = (
    "text",
    "prompt and completion",
    "messages",
    "prompt and completion as messages",
    "prompt, chosen and rejected",
    "prompt, chosen and rejected as messages",
)
CONVERSATIONAL = (MESSAGES, PROMPT_MESSAGES, PAIRS_MESSAGES)
FORMS = {
    "sft": "text; prompt and completion; messages; conversations",
    "dpo": "prompt, chosen and rejected; chosen and rejected as conversations with a common beginning",
}
Row = dict[str, Any]


class DataError(ValueError):
    """Fine-tuning data that cannot be used; the message names file and line, what is wrong and what is allowed."""


def read_row(raw: Any, *, method: str, where: str) -> tuple[str, Row]:
    """The form of an example and its columns, in TRL's names.

    Args:
        raw: the example. method: ``sft`` or ``dpo``. where: file and line, for errors.

    Raises:
        DataError: not one of the forms, or a turn that the chat template cannot write.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: {_short(raw)}: expected an object with keys")
    row = {key: value for key, value in raw.items() if value is not None}
    if method == "dpo":
        return _pair(row, where)
    if "messages" in row or "conversations" in row:
        turns = _turns(row, "messages" if "messages" in row else "conversations", where)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f"{where}: no turn is the assistant's, so that there is nothing to learn")
        return MESSAGES, {"messages": turns, **_extras(row, where)}
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str):
            return PROMPT, {key: _text(row[key], key, where) for key in ("prompt", "completion")}
        answer = _turns(row, "completion", where)
        if answer[-1]["role"] != "assistant":
            raise DataError(f"{where}: completion ends with a turn of {answer[-1]['role']!r}; allowed: 'assistant'")
        return PROMPT_MESSAGES, {"prompt": _turns(row, "prompt", where), "completion": answer, **_extras(row, where)}
    if "text" in row:
        return TEXT, {"text": _text(row["text"], "text", where)}
    raise DataError(f"{where}: has {', '.join(map(repr, raw)) or 'no keys'}; expected {FORMS['sft']}")


def _pair(row: Row, where: str) -> tuple[str, Row]:
    if "chosen" not in row or "rejected" not in row:
        raise DataError(f"{where}: has {', '.join(map(repr, row)) or 'no keys'}; expected {FORMS['dpo']}")
    if isinstance(row["chosen"], str):
        if "prompt" not in row:
            raise DataError(f"{where}: chosen is text and there is no prompt; expected {FORMS['dpo']}")
        if isinstance(row["prompt"], str):
            return PAIRS, {key: _text(row[key], key, where) for key in ("prompt", "chosen", "rejected")}
        # One answer each to a conversation.
        row = row | {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    chosen, rejected = _turns(row, "chosen", where), _turns(row, "rejected", where)
    if "prompt" in row:
        prompt = row["prompt"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = _turns({"prompt": prompt}, "prompt", where)
    else:
        same = next((i for i, pair in enumerate(zip(chosen, rejected)) if pair[0] != pair[1]), 0)
        if not same:
            raise DataError(f"{where}: chosen and rejected have no common beginning; expected {FORMS['dpo']}")
        turns, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise DataError(f"{where}: {key} does not end with a turn of the assistant")
    return PAIRS_MESSAGES, {"prompt": turns, "chosen": chosen, "rejected": rejected, **_extras(row, where)}


def _turns(row: Row, key: str, where: str) -> list[dict[str, str]]:
    turns = row[key]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: {key} = {_short(turns)}: expected a list of turns with role and content")
    found = []
    for i, turn in enumerate(turns):
        named = f"{where}: {key}[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{named} = {_short(turn)}: expected an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _SHAREGPT.get(role, role) if "from" in turn else role
        if role not in ROLES:
            raise DataError(f"{named}.role = {_short(role)}: allowed: {', '.join(map(repr, ROLES))}")
        if not isinstance(content, str):
            raise DataError(f"{named}.content = {_short(content)}: expected text; the template writes nothing else")
        if turn.get("tool_calls"):
            raise DataError(f"{named}.tool_calls: the template does not write them; put the call into content")
        found.append({"role": role, "content": content})
    return found


def _extras(row: Row, where: str) -> Row:
    """Tools as JSON text, and what else the chat template takes: both the same for every row of a table."""
    tools, contexts = row.get("tools"), row.get("contexts")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: tools = {_short(row['tools'])}: not readable as JSON: {error}") from error
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise DataError(f"{where}: tools = {_short(tools)}: expected a list of JSON schemas")
    if contexts is not None and not (isinstance(contexts, (list, tuple)) and all(isinstance(c, str) for c in contexts)):
        raise DataError(f"{where}: contexts = {_short(contexts)}: expected a list of texts")
    return {
        "tools": json.dumps(list(tools)) if tools else None,
        "chat_template_kwargs": {"contexts": list(contexts) if contexts else None},
    }


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} = {_short(value)}: expected text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Examples of a .jsonl file (one object a line) or a .json file (a list, or LMFlow's ``instances``), each with
    its place.

    Raises:
        DataError: not JSON, or no list of examples.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}")
        return
    content = _json(text, str(path))
    if isinstance(content, dict) and isinstance(content.get("instances"), list):
        # LMFlow's names of a prompt with its completion.
        names = {"input": "prompt", "output": "completion"} if content.get("type") == "text2text" else {}
        content = [
            {names.get(key, key): value for key, value in row.items()} if isinstance(row, dict) else row
            for row in content["instances"]
        ]
        content = [_with_system(row) for row in content]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of examples, or an object with 'instances'")
    for i, row in enumerate(content):
        yield f"{path}[{i}]", row


def _with_system(row: Any) -> Any:
    """LMFlow keeps the system message beside the turns."""
    if not isinstance(row, dict) or not isinstance(row.get("system"), str) or not isinstance(row.get("messages"), list):
        return row
    return {**row, "messages": [{"role": "system", "content": row["system"]}, *row["messages"]]}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {error}") from error
