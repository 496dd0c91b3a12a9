"""The `hymba` command. Subcommands import torch when they are called, so that help is immediate."""

from __future__ import annotations

from typing import Annotated

import typer

from hymba.commands.ablate import ablate
from hymba.commands.analyze import analyze
from hymba.commands.chat import chat
from hymba.commands.convert import convert
from hymba.commands.env import env
from hymba.commands.errors import DEBUG, Commands
from hymba.commands.eval import evaluate
from hymba.commands.finetune import finetune, merge
from hymba.commands.generate import generate
from hymba.commands.inspect import inspect
from hymba.commands.serve import serve
from hymba.commands.train import train

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Paragraphs of the docstrings flow with the terminal's width.
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hymba, the hybrid-head model: generate, chat, serve, train, fine-tune, ablate, eval, analyze, convert.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from hymba import __version__

        typer.echo(f"hymba {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Options of the command itself; `Commands` takes `--debug` out before they are parsed."""


for command in (generate, chat, serve, inspect, train, finetune, merge, ablate, convert, env):
    app.command()(command)
# Options as the harness writes them (--num_fewshot) and as the other commands do.
app.command("eval", context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(evaluate)
app.add_typer(analyze, name="analyze")

if __name__ == "__main__":
    app()
