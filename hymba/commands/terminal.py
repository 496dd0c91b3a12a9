"""What a command shows besides its results: text as it comes, a spinner, a bar."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Write to stdout at once. In a terminal, control characters that a model writes are shown, not obeyed."""
    if sys.stdout.isatty():
        text = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on stderr that a user should know and that changes nothing of the output."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on a terminal's stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(text, "dim")):
        yield


@contextmanager
def progress(total: int, *, shown: bool, what: str = "prompts") -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
