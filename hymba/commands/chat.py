"""`hymba chat`: a conversation in the terminal, or over a pipe with a turn on every line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.commands import options as opt
from hymba.commands.errors import INTERRUPTED, UsageError, report
from hymba.commands.models import load, locate, packed
from hymba.commands.terminal import say, status

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from hymba.chat import Conversation

_CHAT = "Conversation"
_HELP = {
    "/reset": "start again (system message, tools and contexts stay)",
    "/tool TEXT": "answer as a tool",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
}


def chat(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The first turn.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.", rich_help_panel=_CHAT)] = None,
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON list of tool descriptions.", rich_help_panel=_CHAT),
    ] = None,
    contexts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A text, or a JSON list of texts; may be repeated.", rich_help_panel=_CHAT),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja template. [default: the tokenizer's, else the released one]",
            rich_help_panel=_CHAT,
        ),
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = opt.DType.auto,
    device: opt.Device = "auto",
    quantization: opt.Quantization = None,
    prepack: opt.Prepack = False,
    max_new_tokens: opt.MaxNewTokens = 256,
    repetition_penalty: opt.RepetitionPenalty = None,
    no_repeat_ngram_size: opt.NoRepeatNgramSize = None,
    cache_implementation: opt.CacheKind = opt.CacheImplementation.dynamic,
    do_sample: opt.DoSample = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    seed: opt.Seed = None,
    stats: opt.Stats = False,
) -> None:
    """Talk with an instruction-tuned model.

    Greedy unless a sampling option is given. The whole conversation lives in one cache; Ctrl-C ends an answer, and
    what was said of it stays. Over a pipe, every line of stdin is a turn.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("PROMPT is empty; leave it out, or give the first turn")
    extras: dict[str, Any] = {
        "tools": None if tools is None else _tools(tools),
        "contexts": [text for path in contexts for text in _contexts(path)] if contexts else None,
        "chat_template": None if chat_template is None else _read("--chat-template", chat_template),
    }

    name = locate(model)
    with status(f"loading {name}"):
        from transformers import set_seed

        from hymba.chat import Conversation, generation_settings

        network, tokenizer = load(name, dtype=dtype.value, device=device, revision=revision, quantization=quantization)
    sampling = (temperature, top_k, top_p, min_p)
    settings = generation_settings(
        network,
        tokenizer,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        # Greedy as the release is run, whatever the checkpoint's file says.
        do_sample=False if do_sample is None and all(option is None for option in sampling) else do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if seed is not None:
        set_seed(seed)
    static = cache_implementation is opt.CacheImplementation.static
    conversation = Conversation(
        network,
        tokenizer,
        system=system,
        max_length=network.config.max_position_embeddings if static else None,
        **extras,
    )
    if sys.stdin.isatty():
        typer.secho(f"{name}; /help lists the commands", dim=True, err=True)
    # The weights stay as they are, so that a new conversation need not run the meta tokens again.
    with packed(network, prepack), network.frozen_meta_state():
        _talk(conversation, settings, prompt, stats)


def _talk(conversation: Conversation, settings: GenerationConfig, first: str | None, stats: bool) -> None:
    """Turns until stdin ends or /quit. In a terminal an error leaves the conversation as it was; a pipe ends."""
    interactive = sys.stdin.isatty()
    for line in _turns(first, interactive):
        try:
            if not _turn(conversation, settings, line, stats):
                return
        except Exception as error:
            if not interactive:
                raise
            report(error)


def _turn(conversation: Conversation, settings: GenerationConfig, line: str, stats: bool) -> bool:
    """Do what a line asks for; False to leave."""
    command, _, rest = line.partition(" ")
    role = "user"
    if line.startswith("//"):
        line = line[1:]
    elif command in ("/quit", "/exit"):
        return False
    elif command == "/reset":
        conversation.reset()
        typer.secho("(a new conversation)", dim=True, err=True)
        return True
    elif command == "/help":
        for name, what in _HELP.items():
            typer.echo(f"  {name:<12}{what}", err=True)
        typer.echo(f"  {'//...':<12}a turn that starts with /", err=True)
        return True
    elif command == "/tool":
        role, line = "tool", rest
    elif command.startswith("/"):
        from hymba.config import nearest

        names = [name.split()[0] for name in _HELP]
        raise UsageError(
            f"{command} is not a command.{nearest(command, names)} Allowed: {', '.join(names)}; // starts a turn with /"
        )
    started = time.perf_counter()
    reply = conversation.send(line, role=role, on_text=_Answer().say, settings=settings)
    say("\n")
    seconds = time.perf_counter() - started
    if reply.finish == "interrupted":
        if not sys.stdin.isatty():
            raise typer.Exit(INTERRUPTED)
        kept = "what was said stays" if reply.tokens else "the turn is taken back"
        typer.secho(f"(interrupted; {kept})", dim=True, err=True)
    elif reply.finish == "length":
        typer.secho(f"(cut after {len(reply.tokens)} tokens; --max-new-tokens allows more)", dim=True, err=True)
    if stats:
        rate = len(reply.tokens) / seconds
        typer.secho(
            f"({reply.prompt_tokens} + {len(reply.tokens)} tokens in {seconds:.2f} s, {rate:.1f} tokens/s; "
            f"{len(conversation.ids):,} in the conversation, {conversation.cache.nbytes():,} bytes of cache)",
            dim=True,
            err=True,
        )
    return True


class _Answer:
    """Prints an answer without the white space that it may begin with."""

    begun = False

    def say(self, text: str) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        say(text)


def _turns(first: str | None, interactive: bool) -> Iterator[str]:
    """The first turn, then what the user types; lines of white space do not count."""
    if first is not None:
        if interactive:
            typer.echo(f"> {first}")
        yield first.strip()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
    interrupts = 0
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            interrupts += 1
            typer.echo()
            if interrupts > 1:
                return
            typer.secho("(Ctrl-C again, Ctrl-D or /quit to leave)", dim=True, err=True)
            continue
        interrupts = 0
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


# Files.


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text (byte {error.start})") from error


def _json(option: str, path: Path) -> Any:
    try:
        return json.loads(_read(option, path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{option} {path}: not JSON: {error}") from error


def _tools(path: Path) -> list[dict[str, Any]]:
    value = _json("--tools", path)
    if not isinstance(value, list) or not value or not all(isinstance(tool, dict) for tool in value):
        raise UsageError(f"--tools {path}: allowed: a JSON list of objects, one for each tool")
    return value


def _contexts(path: Path) -> list[str]:
    if path.suffix != ".json":
        text = _read("--contexts", path)
        if not text.strip():
            raise UsageError(f"--contexts {path}: empty; allowed: a text, or a JSON list of texts")
        return [text]
    value = _json("--contexts", path)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise UsageError(f"--contexts {path}: allowed: a JSON list of texts that are not empty")
    return value
