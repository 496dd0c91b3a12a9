"""`hymba finetune`: SFT or DPO as a YAML file describes, and `hymba merge`: an adapter into its base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from hymba.commands.errors import INTERRUPTED, UsageError, check_settings_file
from hymba.commands.models import locate
from hymba.commands.options import DType


def finetune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/finetune/tiny-sft.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's.")
    ] = None,
) -> None:
    """Fine-tune as a YAML file describes: SFT or DPO, every weight or an adapter (LoRA, DoRA).

    Measures held-out examples before and after, and writes the adapter and a checkpoint with it merged. A run that was
    stopped goes on from its last checkpoint when the same command is given again.

    Example: hymba finetune configs/finetune/tiny-sft.yaml run.output=runs/mine
    """
    check_settings_file(config, overrides or [], examples="configs/finetune/", setting="run.steps=100")

    from hymba.finetuning.run import main

    result = main(config, overrides or [])
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA or DoRA adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the checkpoint is written.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="FOLDER|HUB-ID", help="The base.", show_default="as the adapter says"),
    ] = None,
    dtype: Annotated[
        DType, typer.Option("--dtype", metavar="NAME", help="float32, bfloat16, float16; auto: the base's.")
    ] = DType.auto,
) -> None:
    """Merge an adapter into its base: a checkpoint in the released layout, with a tokenizer.

    Example: hymba merge runs/tiny-sft/adapter --output merged --dtype bfloat16
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UsageError(f"ADAPTER {adapter}: no adapter_config.json in it; give the folder of an adapter")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UsageError(f"--output {output}: is there already; choose a new folder")

    base = None if model is None else locate(model)

    from transformers.utils import logging

    from hymba.finetuning.merge import merge_adapter
    from hymba.finetuning.run import require_packages

    require_packages()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # What the libraries will rename in each other is none of the user's business.
        warnings.simplefilter("ignore", FutureWarning)
        typer.echo(f"merged: {merge_adapter(adapter, output, base=base, dtype=str(dtype))}")
