"""The chat template for training: the released one, with the part of each assistant turn marked that is learned.

An assistant's turn is learned with the newline that ends it, and the end of a conversation with the end-of-sequence
token: the model learns to end its answer with newline and end of sequence, while its history reads as the released
template writes it, in training as in use.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hymba.chat import released_template
from hymba.experiments.settings import SettingsError

_APPEND = "{%- set append_eos = true %}"
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What tells one template from another: every kind of turn, tools and contexts, white space around texts.
_PROBES: tuple[dict[str, Any], ...] = (
    {"conversation": [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b\n"}]},
    {
        "conversation": [
            {"role": "system", "content": "s "},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "tool", "content": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}],
        "contexts": ["x", " y"],
        "add_generation_prompt": True,
    },
)


def training_template(*, append_eos: bool = True) -> str:
    """The released chat template with the markers that `return_assistant_tokens_mask` and TRL's
    `assistant_only_loss` ask for.

    Args:
        append_eos: write the end-of-sequence token after a conversation that ends with the assistant. Without it the
            text is that of the released template, byte for byte.
    """
    text = (files("hymba") / "assets" / "chat_template_training.jinja").read_text("utf-8").rstrip("\n")
    return _APPEND + text if append_eos else text


def has_markers(template: str) -> bool:
    """Whether a template marks what the assistant says, with `{% generation %}`."""
    return _MARKERS.search(template) is not None


def is_released(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes what the released one writes, however it is written itself."""
    released = released_template()
    if template.strip() == released.strip():
        return True
    try:
        return all(_render(tokenizer, template, probe) == _render(tokenizer, released, probe) for probe in _PROBES)
    except Exception:
        # Jinja's errors, or whatever the template raises for a turn that it does not take.
        return False


def _render(tokenizer: PreTrainedTokenizerBase, template: str, probe: dict[str, Any]) -> Any:
    return tokenizer.apply_chat_template(**probe, chat_template=template, tokenize=False)


def choose_templates(tokenizer: PreTrainedTokenizerBase, wanted: str = "auto") -> tuple[str, str]:
    """The template for use, which is saved with the checkpoint, and the one for training.

    Args:
        wanted: `"auto"`, the tokenizer's own or, where it has none, the released one; `"released"`; or the path of a
            Jinja file.

    Raises:
        SettingsError: the file is not there.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if wanted == "released" or (wanted == "auto" and own is None):
        return released_template(), training_template()
    if wanted != "auto":
        path = Path(wanted)
        if not path.is_file():
            raise SettingsError(f"data.chat_template = {wanted!r}: no such file; allowed: auto, released or a file")
        own = path.read_text(encoding="utf-8")
    assert isinstance(own, str)
    return (own, training_template()) if is_released(tokenizer, own) else (own, own)
