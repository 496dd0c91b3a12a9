"""What a command that cannot go on tells its user: one line, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"


class UsageError(ValueError):
    """Arguments or files that a command cannot work with; the message names the value and what is allowed."""


def check_settings_file(config: Path, overrides: Sequence[str], *, examples: str, setting: str) -> None:
    """Refuse a settings file that is not there and overrides that are no ``key=value``.

    Args:
        examples: the folder to name. setting: an override to name.

    Raises:
        UsageError: says which.
    """
    if not config.is_file():
        raise UsageError(f"CONFIG {config}: no such file; {examples} has examples")
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"{override!r} is not a setting; write KEY=VALUE, such as {setting}")


def exit_code(error: BaseException) -> int:
    """2 when what was asked for is at fault, 130 for Ctrl-C, else 1."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    # The library's own refusals are ValueErrors of its own; their modules are only imported when needed.
    refused = isinstance(error, (ValueError, TypeError)) and type(error).__module__.partition(".")[0] == "hymba"
    return USAGE if refused else FAILURE


def message(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """The error on one line. arguments: what the command was given, for the value of a wrong option."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    text = " ".join(text.split()) or "no message"
    if type(error).__module__.partition(".")[0] in ("hymba", "typer", "click"):
        option = _wrong_option(error, arguments)
        if option is not None:
            text = f"{option}: {str(getattr(error, 'message', text)).removeprefix('Value error, ')}"
        context = getattr(error, "ctx", None)
        return text if context is None else f"{text.rstrip('.')} (see '{context.command_path} --help')"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if isinstance(error, ImportError) and "pip install" in text:
        return text  # a missing extra, with what to do
    return f"{type(error).__name__}: {text} (run again with {DEBUG} to see where)"


def _wrong_option(error: BaseException, arguments: Sequence[str]) -> str | None:
    """The option that a usage error is about with its value, as given; typer's messages leave the value out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and name.startswith("-"):
            return f"{name} {value if equals else ''.join(arguments[i + 1 : i + 2])}"
    return None


def report(error: BaseException, arguments: Sequence[str] = ()) -> None:
    """Print the error's line to stderr.

    Processes that were started together refuse the same arguments: the first one says so for all. An error of another
    kind says in which process it was.
    """
    rank = os.environ.get("RANK", "0")
    if getattr(error, "silent", False) or (rank != "0" and exit_code(error) in (USAGE, INTERRUPTED)):
        return
    if rank != "0":
        typer.echo(f"process {rank}: ", nl=False, err=True)
    typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(message(error, arguments), err=True)


class Commands(TyperGroup):
    """The group of all subcommands: `--debug` anywhere shows tracebacks, otherwise every error is one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        debug = DEBUG in options
        given = [arg for i, arg in enumerate(given) if arg != DEBUG or i >= len(options)]
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # A model may write what the terminal's encoding lacks.
                stream.reconfigure(errors="replace")
        try:
            code = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra)
        except BaseException as error:
            if debug or isinstance(error, SystemExit) or not standalone_mode:
                raise
            report(error, given)
            code = exit_code(error)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)
