"""`hymba env`: versions, devices, and which implementation of each op this machine can use."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from typing import Any

import typer

from hymba.commands import options as opt

_PACKAGES = (
    "hymba torch transformers tokenizers safetensors accelerate huggingface_hub numpy einops datasets peft trl "
    "lm-eval torchao bitsandbytes triton mamba-ssm causal-conv1d flash-attn flash-attn-4"
).split()


def env(as_json: opt.AsJson = False) -> None:
    """Print versions, devices and usable kernels.

    HYMBA_BACKEND forces one: HYMBA_BACKEND=torch, or HYMBA_BACKEND=selective_scan=triton,causal_conv1d=torch.
    """
    facts = describe()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    grid = Table.grid(padding=(0, 2))
    grid.add_row("python", f"{facts['python']} on {facts['platform']}")
    for package, version in facts["packages"].items():
        grid.add_row(package, version or "[dim]not installed[/dim]")
    grid.add_row("CPU threads", str(facts["threads"]))
    for device in facts["devices"] or ["[dim]no GPU[/dim]"]:
        grid.add_row("device", device)
    console.print(grid, highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("op", "backend", "version", "usable", "why not"):
        table.add_column(name, no_wrap=name != "why not")
    for row in facts["backends"]:
        usable = "[green]yes[/green]" if row["usable"] else "[dim]no[/dim]"
        table.add_row(row["op"], row["backend"], row["version"] or "", usable, Text(row["reason"]))
    console.print("", table, sep="\n", highlight=False)


def describe() -> dict[str, Any]:
    """What `env` prints, as plain values."""
    import torch

    import hymba.ops
    from hymba.ops import backend

    assert hymba.ops
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": [dataclasses.asdict(row) for row in backend.available()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
