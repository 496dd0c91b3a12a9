"""Small tasks that need no download, for the checkpoint inside the package, which knows Python and no conversation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NAMES = (
    "x y n count total price width height size value speed length score age step amount index offset weight rate"
).split()
_NUMBERS = range(2, 100)
# Verb, what is said about a number and a name, and the operator.
_OPERATIONS = (
    ("add", "Add {number} to {name}.", "+"),
    ("subtract", "Subtract {number} from {name}.", "-"),
    ("multiply", "Multiply {name} by {number}.", "*"),
    ("divide", "Divide {name} by {number}.", "/"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A task: the method that it is for, and what makes its rows, in one order for all."""

    method: str
    rows: Callable[[], list[Row]]


def arithmetic() -> list[Row]:
    """Conversations: an instruction, answered with a function.

    Every combination of four operations, 98 numbers and 20 names once, 7,840 in all: an answer that was held out can
    only be given by composing what the others have taught.
    """
    rows = []
    for verb, said, operator in _OPERATIONS:
        for number in _NUMBERS:
            for name in _NAMES:
                code = f"def {verb}_{number}({name}):\n    return {name} {operator} {number}"
                turns = (("user", said.format(number=number, name=name)), ("assistant", code))
                rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return _shuffled(rows)


def comments() -> list[Row]:
    """Preferences: the head of a function goes on with a comment (chosen) or with a docstring that says the same.

    The standard library, of which the package's checkpoint was made, has docstrings there. A prompt ends with the
    indentation, which its tokenizer makes one token with the end of the head.
    """
    rows = []
    for verb, said, operator in _OPERATIONS:
        for number in _NUMBERS:
            for name in _NAMES:
                text = said.format(number=number, name=name)
                body = f"    return {name} {operator} {number}\n"
                rows.append(
                    {
                        "prompt": f"def {verb}_{number}({name}):\n    ",
                        "chosen": f"# {text}\n{body}",
                        "rejected": f'"""{text}"""\n{body}',
                    }
                )
    return _shuffled(rows)


def _shuffled(rows: list[Row]) -> list[Row]:
    random.Random(0).shuffle(rows)
    return rows


EXAMPLES = {"arithmetic": Example("sft", arithmetic), "comments": Example("dpo", comments)}
