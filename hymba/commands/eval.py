"""`hymba eval`: tasks of lm-evaluation-harness on a checkpoint, beside the paper's figures."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError
from hymba.commands.models import load_tokenizer, locate, plan
from hymba.commands.terminal import note

if TYPE_CHECKING:
    from hymba.eval.presets import Preset

_TASKS, _RUN, _PROMPTS = "Tasks", "Run", "Prompts"
# What the harness says of every such run, whatever the user could do.
_SAID_ANYWAY = ("Overwriting default num_fewshot", "Custom kwargs can be passed", "generation_kwargs: ")


def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            metavar="NAME[,NAME]",
            help="Tasks, groups, tags or patterns of the harness, or YAML files; may be repeated.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="offline, table2, table3, table4, table9 (the paper's), or a YAML file of the same form. "
            "[default: offline, without --tasks]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", "-f", min=0, metavar="N", help="Examples in the prompt, for all tasks.",
                     rich_help_panel=_TASKS),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", "-L", metavar="N|SHARE", help="The first N examples of each task, or a share below 1.",
                     rich_help_panel=_TASKS),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Further tasks, as YAML files; may be repeated.", rich_help_panel=_TASKS),
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help="For tasks that take some.", rich_help_panel=_TASKS)
    ] = None,
    unsafe_code: Annotated[
        bool,
        typer.Option("--confirm-run-unsafe-code", help="Run tasks that execute what the model writes.",
                     rich_help_panel=_TASKS),
    ] = False,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = opt.DType.auto,
    device: opt.Device = "auto",
    quantization: opt.Quantization = None,
    peft: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB-ID", help="Adapter on top of the model.", rich_help_panel="Model"),
    ] = None,
    model_args: Annotated[
        list[str] | None,
        typer.Option(
            "--model-args",
            "-a",
            metavar="KEY=VALUE[,...]",
            help="Further arguments of the harness's model class (max_length, add_bos_token, ...); may be repeated.",
            rich_help_panel="Model",
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option("--batch-size", "-b", metavar="N|auto", help="Rows of a forward pass; changes no result.",
                     rich_help_panel=_RUN),
    ] = "auto",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most rows that auto takes. [default: 64]",
                                 rich_help_panel=_RUN, show_default=False)
    ] = None,
    seed: Annotated[
        str,
        typer.Option(metavar="N|N,N,N,N", help="Of Python, NumPy, torch and few-shot examples; None leaves one alone.",
                     rich_help_panel=_RUN),
    ] = "0,1234,1234,1234",
    use_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep answers in this file, and do not ask the model twice.",
                     rich_help_panel=_RUN),
    ] = None,
    gen_kwargs: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE[,...]", help="Generation arguments over the tasks'; may be repeated.",
                     rich_help_panel=_PROMPTS),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as turns of a chat.", rich_help_panel=_PROMPTS)
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(help="Examples as turns of their own; with a chat template, by default.", show_default=False,
                     rich_help_panel=_PROMPTS),
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt.", rich_help_panel=_PROMPTS)
    ] = None,
    write_out: Annotated[
        bool, typer.Option("--write-out", "-w", help="Show the first prompts.", rich_help_panel=_PROMPTS)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--output-path", "-o", metavar="FOLDER", help="For the harness's results file.",
                     rich_help_panel=opt.OUTPUT),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option("--log-samples", "-s", help="Write every prompt and answer too.", rich_help_panel=opt.OUTPUT),
    ] = False,
    predict_only: Annotated[
        bool,
        typer.Option("--predict-only", "-x", help="Write prompts and answers, score nothing.",
                     rich_help_panel=opt.OUTPUT),
    ] = False,
    as_json: opt.AsJson = False,
) -> None:  # fmt: skip
    """Evaluate a checkpoint on lm-evaluation-harness.

    Without --tasks: bits per byte on the held-out files of the default corpus, which needs no network. Options have
    the harness's names, with - or _ in them.

    Example: hymba eval --tasks arc_easy,piqa --model nvidia/Hymba-1.5B-Base --batch-size auto --output results
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("hymba eval: lm-evaluation-harness is not installed; pip install 'hymba[eval]' brings it")
    chosen, wanted = _tasks(tasks, preset)
    share = _limit(limit)
    rows = _batch_size(batch_size)
    seeds = _seeds(seed)
    more = _json(metadata)
    if fewshot_as_multiturn and not apply_chat_template:
        raise UsageError("--fewshot-as-multiturn: only with --apply-chat-template")
    if predict_only and output is None:
        raise UsageError("--predict-only needs --output FOLDER to write the answers to")

    given, generation = _pairs("--model-args", model_args), _pairs("--gen-kwargs", gen_kwargs)
    name = locate(model)
    if dtype is not opt.DType.auto:
        given["dtype"] = dtype.value
    _, where, given["dtype"], _ = plan(
        name, dtype=str(given.get("dtype", "auto")), device=device, revision=revision, quantization=quantization
    )
    load_tokenizer(name, revision=revision)
    given["pretrained"] = name
    # The harness says "main" where nobody did, also for folders.
    optional = {"revision": revision, "peft": peft, "quantization": quantization and str(quantization)}
    given |= {key: value for key, value in optional.items() if value is not None}
    if peft is not None:
        if importlib.util.find_spec("peft") is None:
            raise UsageError("--peft: peft is not installed; pip install 'hymba[finetune]' brings it")
        folder = Path(peft).expanduser()
        if (folder.is_dir() or folder.is_absolute()) and not (folder / "adapter_config.json").is_file():
            raise UsageError(f"--peft {peft}: no adapter_config.json there; give the folder of an adapter, or a hub id")

    from hymba.eval import run
    from hymba.eval.table import render, table

    # What the harness prints on the way: batch sizes it finds, and prompts when asked for.
    with _said_once(), _naming(model_args), redirect_stdout(sys.stderr if write_out else io.StringIO()):
        found = run.evaluate(
            wanted,
            model_args=given,
            include_path=include_path or (),
            num_fewshot=num_fewshot,
            batch_size=rows,
            seeds=seeds,
            output=output,
            log_samples=log_samples or predict_only,
            metadata=more,
            model_name="hymba" if model is None and peft is None else None,
            device=where,
            max_batch_size=max_batch_size,
            limit=share,
            gen_kwargs=generation or None,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn,
            system_instruction=system_instruction,
            use_cache=None if use_cache is None else str(use_cache),
            write_out=write_out,
            predict_only=predict_only,
            confirm_run_unsafe_code=unsafe_code,
        )
    if found is None:
        return
    if as_json:
        from lm_eval.utils import handle_non_serializable

        typer.echo(json.dumps(found.results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(render(table(found, chosen)))
        for line in () if chosen is None or not chosen.paper else chosen.guesses:
            typer.echo(f"assumed: {' '.join(line.split())}")
    if share is not None:
        note(f"--limit {limit:g}: measured on a part of each task, which compares with nothing")
    if found.files and not as_json:
        typer.echo(f"written: {', '.join(map(str, found.files))}")


def _tasks(tasks: list[str] | None, preset: str | None) -> tuple[Preset | None, list[Any]]:
    from hymba.eval.presets import DEFAULT, TaskShots, load_preset

    names = [name.strip() for item in tasks or () for name in item.split(",") if name.strip()]
    if tasks and not names:
        raise UsageError(f"--tasks {tasks[0]!r}: no name in it; allowed: NAME or NAME,NAME")
    if names and preset is not None:
        raise UsageError("--tasks and --preset exclude each other; a preset's YAML file can list the tasks")
    if names:
        return None, [TaskShots(name) for name in dict.fromkeys(names)]
    chosen = load_preset(DEFAULT if preset is None else preset)
    return chosen, list(chosen.tasks)


def _pairs(option: str, items: list[str] | None) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    found: dict[str, Any] = {}
    for item in items or ():
        try:
            parsed = simple_parse_args_string(item)
        except (ValueError, SyntaxError):
            parsed = {}
        if not parsed or "=" not in item:
            raise UsageError(f"{option} {item}: write KEY=VALUE or KEY=VALUE,KEY=VALUE")
        found |= parsed
    return found


def _limit(limit: float | None) -> float | None:
    """The harness takes a number below 1 as a share."""
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise UsageError(f"--limit {limit:g}: allowed: 1, 2, 3, ... examples, or a share between 0 and 1")
    return limit


def _batch_size(text: str) -> int | str:
    head, _, rest = text.partition(":")
    if head == "auto" and (not rest or rest.isdigit()):
        return text
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: allowed: 1, 2, 3, ..., auto, or auto:N to find it N times anew")
    return int(text)


def _seeds(text: str) -> list[int | None]:
    try:
        found = [None if part.strip().lower() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        found = []
    found = found * 4 if len(found) == 1 else found
    if len(found) != 4 or any(seed is not None and seed < 0 for seed in found):
        raise UsageError(f"--seed {text}: allowed: one number from 0 on, or four (or None) with commas between them")
    return found


def _json(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--metadata {text}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--metadata {text}: needed: a JSON object")
    return found


@contextmanager
def _naming(model_args: list[str] | None) -> Iterator[None]:
    """An argument that the model's class does not know was an option's."""
    try:
        yield
    except TypeError as error:
        if not model_args or "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(f"--model-args {','.join(model_args)}: {error}") from error


@contextmanager
def _said_once() -> Iterator[None]:
    """The harness's warnings as notes, each once, and no bars of `datasets` in a file."""
    import datasets
    from transformers.utils import logging as transformers_logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if text not in said and not any(part in text for part in _SAID_ANYWAY):
                said.add(text)
                note(text)

    said: set[str] = set()
    logger, handler = logging.getLogger("lm_eval"), Notes(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    bars = datasets.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
        if bars:
            datasets.enable_progress_bars()
