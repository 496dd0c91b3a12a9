"""`hymba ablate`: variants of one training, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hymba.commands.errors import UsageError, check_settings_file


def ablate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/ablation/table1-tiny.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="VARIANT", help="This variant only; may be repeated.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(metavar="N", help="This seed only; may be repeated.")] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="This task only; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: as the file says, or one for each device.")] = 0,
    devices: Annotated[str, typer.Option(metavar="0,1,...", help="GPUs that the runs are dealt out over.")] = "",
    minutes: Annotated[
        float | None, typer.Option(min=0, help="After so long, save what is in progress and stop.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Build every variant, print the plan, train nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Write the table from what is there, train nothing.")] = False,
) -> None:
    """Train every variant of a YAML file on every task and seed, and print one table.

    What is done is skipped and what was cut goes on when the same command is given again; a run that fails is named
    in the table, and the exit status is 1. Shards of one file may run at the same time, on one machine or on several
    with a common folder: --only, --seed and --task select them.

    Example: hymba ablate configs/ablation/table1-tiny.yaml --jobs 2 seeds=[0,1]
    """
    check_settings_file(config, overrides or [], examples="configs/ablation/", setting="base.run.steps=100")
    if check and table:
        raise UsageError("--check and --table exclude each other")

    from hymba.experiments.ablation.command import main

    names = [name.strip() for name in devices.split(",") if name.strip()]
    code = main(
        config, overrides or [], only=only or [], seeds=seed or [], tasks=task or [], jobs=jobs, devices=names,
        minutes=minutes, mode="check" if check else "table" if table else "run",
    )  # fmt: skip
    if code:
        raise typer.Exit(code)
