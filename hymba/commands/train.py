"""`hymba train`: the training of a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hymba.commands.errors import INTERRUPTED, check_settings_file


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
    check_settings_file(config, overrides or [], examples="configs/train/", setting="run.steps=100")

    from hymba.experiments.train import main

    result = main(config, overrides or [])
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
