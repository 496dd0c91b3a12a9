"""`hymba train`: the training of a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hymba.commands.errors import INTERRUPTED, UsageError


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/train/tiny.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's.")
    ] = None,
) -> None:
    """Train as a YAML file describes.

    A run that was stopped goes on from its last checkpoint when the same command is given again.

    Example: hymba train configs/train/tiny.yaml run.steps=100 run.output=runs/mine
    """
    if not config.is_file():
        raise UsageError(f"CONFIG {config}: no such file; configs/train/ has examples")
    for override in overrides or ():
        if "=" not in override:
            raise UsageError(f"{override!r} is not a setting; write KEY=VALUE, such as run.steps=100")

    from hymba.experiments.train import main

    result = main(config, overrides or [])
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
