"""`hymba generate`: continue one prompt as it is written, or a file of prompts in batches."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError
from hymba.commands.models import load, locate, packed
from hymba.commands.terminal import progress, say, status

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from hymba.model import HymbaForCausalLM

DEFAULT_NEW_TOKENS = 100
_BATCH = "Batch"


@dataclass(frozen=True)
class Prompt:
    """A prompt and the line of the file that it stands in (1 for the argument)."""

    text: str
    line: int


@dataclass(frozen=True)
class Result:
    """One continuation.

    Attributes:
        line, prompt: where it comes from. sequence: which of the prompt's continuations, from 0.
        text: the continuation alone. tokens: how many, an end token not counted.
        finish_reason: `"eos"`, `"stop"` (a stop string, which is part of the text) or `"length"`.
    """

    line: int
    sequence: int
    prompt: str
    text: str
    tokens: int
    finish_reason: str


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = opt.DType.auto,
    device: opt.Device = "auto",
    quantization: opt.Quantization = None,
    prepack: opt.Prepack = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most tokens to generate.",
            show_default=f"the checkpoint's, else {DEFAULT_NEW_TOKENS}",
            rich_help_panel="Decoding",
        ),
    ] = None,
    min_new_tokens: opt.MinNewTokens = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    no_repeat_ngram_size: opt.NoRepeatNgramSize = None,
    stop_strings: opt.StopStrings = None,
    num_return_sequences: opt.NumReturnSequences = None,
    cache_implementation: opt.CacheKind = None,
    do_sample: opt.DoSample = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    seed: opt.Seed = None,
    num_beams: opt.NumBeams = None,
    length_penalty: opt.LengthPenalty = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line; - for stdin.", rich_help_panel=_BATCH),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at a time.", rich_help_panel=_BATCH)] = 8,
    output_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there, all or nothing.", rich_help_panel=opt.OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for every result.", rich_help_panel=opt.OUTPUT)
    ] = False,
    no_return_full_text: Annotated[
        bool,
        typer.Option("--no-return-full-text", help="Leave the prompt out of the text.", rich_help_panel=opt.OUTPUT),
    ] = False,
    stats: opt.Stats = False,
) -> None:
    """Continue a text.

    One prompt is continued as it is written. A file of prompts is run in padded batches; every prompt gets what it
    would get alone.
    """
    prompts = _prompts(prompt, prompts_file)
    if stop_strings and not all(stop_strings):
        raise UsageError("--stop-strings '': a stop string needs at least one character")
    if output_file is not None:
        _check_output(output_file)
    sequences, beams = num_return_sequences or 1, num_beams or 1

    name = locate(model)
    with status(f"loading {name}"):
        from transformers import set_seed

        from hymba.chat import generation_settings

        network, tokenizer = load(name, dtype=dtype.value, device=device, revision=revision, quantization=quantization)
    settings = generation_settings(
        network,
        tokenizer,
        max_new_tokens=max_new_tokens or network.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS,
        min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        stop_strings=stop_strings or None,
        num_return_sequences=num_return_sequences,
        cache_implementation=_cache(cache_implementation, network, beams),
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    if sequences > 1 and beams == 1 and not settings.do_sample:
        raise UsageError(
            f"--num-return-sequences {sequences}: greedy decoding has one continuation; add --do-sample or --num-beams"
        )
    if sequences > beams > 1 and not settings.do_sample:
        raise UsageError(f"--num-return-sequences {sequences}: allowed: up to --num-beams {beams}")
    if seed is not None:
        set_seed(seed)

    alone = prompt is not None and sequences == 1 and beams == 1
    with packed(network, prepack):
        started = time.perf_counter()
        if alone and not as_json and output_file is None:
            tokens = _stream(network, tokenizer, settings, prompts[0], not no_return_full_text)
        else:
            tokens = 0
            with _writer(output_file) as out:
                # A bar would run into results that go to the same terminal.
                bar = out is not sys.stdout or not sys.stdout.isatty()
                for result in _batches(network, tokenizer, settings, prompts, batch_size, bar=bar):
                    tokens += result.tokens
                    headed = prompts_file is not None or sequences > 1
                    out.write(_shown(result, as_json, not no_return_full_text, sequences if headed else 0))
                    out.flush()
        if stats:
            seconds = time.perf_counter() - started
            typer.echo(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", err=True)


# Input.


def _cache(kind: opt.CacheImplementation | None, network: HymbaForCausalLM, beams: int) -> str | None:
    """The cache asked for, as `generate` takes it; by default the one that decodes fastest."""
    if kind is None:
        return "static" if network.device.type == "cuda" and beams == 1 else None
    return None if kind is opt.CacheImplementation.dynamic else kind.value


def _prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    if (prompt is None) == (file is None):
        given = "both" if prompt is not None else "neither"
        raise UsageError(f"give a PROMPT (- for stdin) or --prompts-file FILE, not {given}; try: hymba generate 'def '")
    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text:
            where = "stdin" if prompt == "-" else "PROMPT"
            raise UsageError(f"{where} is empty; a prompt needs at least one character")
        return [Prompt(text, 1)]
    assert file is not None
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--prompts-file {file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts-file {file}: not UTF-8 text (byte {error.start}); one prompt a line") from error
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    prompts = [Prompt(line, i) for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts-file {file}: no prompt in it; one prompt a line, empty lines do not count")
    return prompts


# One prompt.


def _stream(
    model: HymbaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    prompt: Prompt,
    full_text: bool,
) -> int:
    """Print the continuation as it comes; returns how many tokens it has."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    from hymba.chat import Detokenizer

    ids = _encode(tokenizer, prompt)
    pieces = Detokenizer(tokenizer, ids)
    ends = frozenset(settings.eos_token_id or ())
    count = 0

    class Printer(BaseStreamer):
        """generate() puts the prompt first, then each token."""

        in_prompt = True

        def put(self, value: Any) -> None:
            nonlocal count
            if self.in_prompt:
                self.in_prompt = False
                return
            for token in value.reshape(-1).tolist():
                if token not in ends:
                    count += 1
                    say(pieces.push(token))

        def end(self) -> None:
            say(pieces.flush())

    if full_text:
        say(prompt.text)
    try:
        rows = torch.tensor([ids], device=model.device)
        model.generate(rows, generation_config=settings, streamer=Printer(), tokenizer=tokenizer)
    finally:
        say("\n")
    return count


# Many prompts.


def _batches(
    model: HymbaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    prompts: list[Prompt],
    size: int,
    *,
    bar: bool,
) -> Iterator[Result]:
    """Continuations in the order of the prompts."""
    import torch

    sequences = settings.num_return_sequences or 1
    ends = frozenset(settings.eos_token_id or ())
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    with model.frozen_meta_state(), progress(len(prompts), shown=bar and len(prompts) > size) as advance:
        for first in range(0, len(prompts), size):
            rows = encoded[first : first + size]
            length = max(map(len, rows))
            # The mask alone says what is padding, so that any id will do.
            ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=model.device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
            output = model.generate(ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer)
            stopped = _stopped(tokenizer, settings, output, length)
            for i, row in enumerate(output[:, length:].tolist()):
                prompt, tokens = prompts[first + i // sequences], encoded[first + i // sequences]
                # What follows a stop string is padding, which may look like an end token.
                row = row[: stopped[i]]
                end = next((at for at, token in enumerate(row) if token in ends), None)
                new = row[:end]
                yield Result(
                    line=prompt.line,
                    sequence=i % sequences,
                    prompt=prompt.text,
                    text=_continuation(tokenizer, tokens, new),
                    tokens=len(new),
                    finish_reason="eos" if end is not None else "length" if stopped[i] is None else "stop",
                )
            advance(len(rows))


def _stopped(
    tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig, output: Tensor, prompt_length: int
) -> list[int | None]:
    """How many new tokens each row has up to the one that completes a stop string; None where none does."""
    counts: list[int | None] = [None] * len(output)
    if settings.stop_strings:
        from transformers.generation import StopStringCriteria

        completed = StopStringCriteria(tokenizer, settings.stop_strings)
        for new in range(1, output.shape[1] - prompt_length + 1):
            for i, stops in enumerate(completed(output[:, : prompt_length + new], None).tolist()):
                if stops and counts[i] is None:
                    counts[i] = new
    return counts


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    ids = list(tokenizer(prompt.text)["input_ids"])
    if not ids:
        raise UsageError(f"line {prompt.line}: {prompt.text!r} has no tokens in this model's tokenizer")
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    from hymba.chat import Detokenizer

    pieces = Detokenizer(tokenizer, prompt)
    return "".join(pieces.push(token) for token in new) + pieces.flush()


# Output.


def _shown(result: Result, as_json: bool, full_text: bool, sequences: int) -> str:
    if as_json:
        return json.dumps(asdict(result), ensure_ascii=False) + "\n"
    head = ""
    if sequences:
        head = f"==> {result.line}{f'.{result.sequence + 1}' if sequences > 1 else ''} <==\n"
    return f"{head}{result.prompt if full_text else ''}{result.text}\n"


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--output-file {path}: a folder; give a file's name in it")
    if not path.parent.is_dir():
        raise UsageError(f"--output-file {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output-file {path}: the folder {path.parent} cannot be written to")


@contextmanager
def _writer(path: Path | None) -> Iterator[TextIO]:
    """stdout, or a file that takes its name when everything is in it."""
    if path is None:
        yield sys.stdout
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
