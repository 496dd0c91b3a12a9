"""`hymba convert`: a checkpoint in another dtype, number of files or layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError


class Layout(StrEnum):
    """For whom a folder is written."""

    released = "released"
    remote_code = "remote-code"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder, in either layout.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    dtype: Annotated[
        opt.DType, typer.Option(metavar="NAME", help="auto (each tensor's own), float32, bfloat16, float16.")
    ] = opt.DType.auto,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="As many files as that takes, such as 2GB.", show_default="a single file"),
    ] = None,
    layout: Annotated[
        Layout,
        typer.Option(metavar="NAME", help="released (the reference reads it) or remote-code (imports this package)."),
    ] = Layout.released,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, a checkpoint folder.")] = False,
) -> None:
    """Write a checkpoint in another dtype, number of files or layout.

    Where no dtype changes, every tensor stays the same to the last bit. OUTPUT appears complete or not at all.

    Example: hymba convert runs/tiny/model exported --dtype bfloat16 --layout remote-code
    """
    from transformers.utils import logging

    from hymba import conversion
    from hymba.commands.terminal import note

    logging.disable_progress_bar()
    try:
        made = conversion.convert(
            source,
            output,
            dtype=None if dtype is opt.DType.auto else dtype.value,
            max_shard_size=max_shard_size,
            layout=layout.value,
            overwrite=overwrite,
        )
    except conversion.ConversionError as error:
        # Fields of the function are arguments and options here.
        text = str(error)
        for name, shown in (("source=", "SOURCE "), ("output=", "OUTPUT "), ("overwrite (--overwrite)", "--overwrite")):
            text = text.replace(name, shown)
        text = text.replace("max_shard_size=", "--max-shard-size ").replace("dtype=", "--dtype ")
        raise UsageError(text) from error
    for line in made.notes:
        note(line)
    dtypes = ", ".join(f"{count} tensors in {name}" for name, count in made.dtypes.items())
    files = made.files[0] if len(made.files) == 1 else f"{len(made.files)} files"
    typer.echo(f"{output}: {layout.value} layout, {files}, {made.bytes / 1e6:,.1f} MB, {dtypes}")
