"""`hymba inspect`: what a checkpoint is and what it costs, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError
from hymba.commands.models import load_config, locate
from hymba.commands.terminal import note

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hymba.config import HymbaConfig
    from hymba.layout import LayerSpec

_COST = "Cost"
_WORK = {
    "generation": "prompt in one piece, and the cache",
    "training_step_none": "training step",
    "training_step_selective": "training step, activation_checkpointing: selective",
    "training_step_full": "training step, activation_checkpointing: full",
}
# What the release sets and a reader compares; the lists of layers are in the map.
_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads v_head_dim intermediate_size mlp_hidden_act "
    "vocab_size mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank mamba_proj_bias num_memory_tokens sliding_window "
    "max_position_embeddings orig_max_position_embeddings rope_type rope_theta kq_norm rms_norm_eps tie_word_embeddings"
).split()


def inspect(
    model: opt.Model = None,
    revision: opt.Revision = None,
    length: Annotated[
        int, typer.Option(min=0, metavar="N", help="Text tokens in the cache.", rich_help_panel=_COST)
    ] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows.", rich_help_panel=_COST)] = 1,
    dtype: Annotated[
        opt.DType,
        typer.Option(
            metavar="NAME", help="Of weights and cache: auto, float32, bfloat16, float16.", rich_help_panel=_COST
        ),
    ] = opt.DType.auto,
    cache_implementation: Annotated[
        opt.CacheImplementation,
        typer.Option(metavar="KIND", help="dynamic, or static with room for --length.", rich_help_panel=_COST),
    ] = opt.CacheImplementation.dynamic,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also draw the architecture into this folder: masks, layers, hybrid head (SVG, PNG).",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Print what a model is and what it costs.

    Configuration, layer map, parameters, FLOPs per token and cache bytes, from config.json alone: no weights are loaded
    or fetched.
    """
    name = locate(model)
    config = load_config(name, revision=revision)
    if figures is not None:
        _draw(config, figures, length)
    static = cache_implementation is opt.CacheImplementation.static
    facts = describe(name, config, length=length, batch=batch_size, dtype=dtype.value, static=static)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(*_page(facts, config), sep="\n", highlight=False)


def _draw(config: HymbaConfig, folder: Path, length: int) -> None:
    """Write the figures of the architecture and say where.

    Raises:
        UsageError: matplotlib is not there.
    """
    try:
        from hymba.analysis.drawings import write_figures
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UsageError("--figures needs matplotlib: pip install 'hymba[plots]'") from error
    written = write_figures(config, folder, length=length)
    note(f"written: {', '.join(map(str, written))}")


def describe(name: str, config: HymbaConfig, *, length: int, batch: int, dtype: str, static: bool) -> dict[str, Any]:
    """Everything that `inspect` prints, as plain values."""
    from hymba import cost, hub, memory, quantization

    if dtype == "auto":
        dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
        dtype = dtype if dtype in cost.DTYPE_BYTES else "float32"
    parameters = cost.parameters(config)
    token = cost.flops_per_token(config, length)
    cache = cost.cache_bytes(config, length, batch=batch, dtype=dtype, static=static)
    quantised = quantization.method(config)
    # What rounding makes of a tensor is the quantiser's matter: its files say it, and on the hub nothing does.
    weights = parameters.total * cost.DTYPE_BYTES[dtype] if quantised is None else hub.stored_bytes(name)
    return {
        "model": name,
        "length": length,
        "batch_size": batch,
        "dtype": dtype,
        "quantization": quantised,
        "cache_implementation": "static" if static else "dynamic",
        "config": {field: getattr(config, field) for field in type(config).__annotations__},
        "layers": [{"layer": i, **_facts(spec)} for i, spec in enumerate(config.layers)],
        "parameters": {"total": parameters.total, **parameters.to_dict()},
        "weight_bytes": weights,
        "flops_per_token": {"total": token.total, **token.to_dict()},
        "flops_of_text": cost.flops_of_text(config, length).total,
        "cache_bytes": {"total": cache.total, **cache.to_dict()},
        "paper_cache_bytes": cost.paper_cache_bytes(config),
        "peak_bytes": {
            "generation": memory.generation_bytes(
                config, batch=batch, prompt=length, length=length, dtype=dtype, static=static, weights=weights
            ).total,
            **{
                f"training_step_{policy}": memory.training_bytes(
                    config, batch=batch, length=length, checkpointing=policy, fused_loss=True
                ).total
                for policy in (memory.POLICIES if quantised is None else ())  # rounded weights are not trained
            },
        },
    }


def _facts(spec: LayerSpec) -> dict[str, Any]:
    """The fields of a layer; those that only a `layer_pattern` sets where they are set."""
    plain = asdict(type(spec)())
    always = ("mixer", "window", "kv_from", "ffn")
    return {key: value for key, value in asdict(spec).items() if key in always or value != plain[key]}


def layer_map(layers: tuple[LayerSpec, ...]) -> list[tuple[str, str, str, str]]:
    """Rows (layers, mixer, what attention sees, whose keys and values) with like neighbours on one row."""
    borrowers: dict[int, list[int]] = {}
    for i, spec in enumerate(layers):
        if spec.kv_from is not None:
            borrowers.setdefault(spec.kv_from, []).append(i)

    rows: list[tuple[int, int, str]] = []
    i = 0
    while i < len(layers):
        last, spec = i, layers[i]
        lent = borrowers.get(i, [])
        if (
            lent == list(range(i + 1, i + 1 + len(lent)))
            and lent
            and all(_mixer(layers[j]) == _mixer(spec) for j in lent)
        ):
            last = borrowers[i][-1]
            kv = f"{i} has them, {_listed(borrowers[i])} borrow{'s' if last == i + 1 else ''}"
        elif i in borrowers:
            kv = f"own, lent to {_listed(borrowers[i])}"
        elif spec.kv_from is not None:
            kv = f"borrowed from {spec.kv_from}"
        else:
            kv = "own" if spec.attends else "none"
            while last + 1 < len(layers) and layers[last + 1] == spec and last + 1 not in borrowers:
                last += 1
        rows.append((i, last, kv))
        i = last + 1
    return [
        (
            f"{first}" if first == last else f"{first}-{last}",
            _mixer(layers[first]),
            _sees(layers[first]),
            kv,
        )
        for first, last, kv in rows
    ]


def _mixer(spec: LayerSpec) -> str:
    """The mixer, with what only a `layer_pattern` says about it."""
    notes = ["Mamba-2 heads"] * (spec.scans and spec.ssm == "mamba2")
    notes += [f"{spec.heads} heads"] * (spec.heads is not None) + ["concatenated"] * (spec.fusion == "concat")
    notes += ["no MLP"] * (not spec.ffn)
    return ", ".join([spec.mixer, *notes])


def _sees(spec: LayerSpec) -> str:
    if not spec.attends:
        return "nothing: its state"
    return "all tokens" if spec.window is None else f"the last {spec.window:,}"


def _listed(layers: list[int]) -> str:
    return " and ".join([", ".join(map(str, layers[:-1]))] * bool(layers[:-1]) + [str(layers[-1])])


def _page(facts: dict[str, Any], config: HymbaConfig) -> list[RenderableType]:
    from rich.text import Text

    layers = config.layers
    globals_, windowed = (sum(spec.attends and (spec.window is None) == g for spec in layers) for g in (True, False))
    borrow = sum(spec.kv_from is not None for spec in layers)
    alone = len(layers) - globals_ - windowed
    dtype, length = facts["dtype"], facts["length"]
    parameters, cache, flops = facts["parameters"], facts["cache_bytes"], facts["flops_per_token"]
    rows = facts["batch_size"]

    def title(text: str, after: str = "") -> Text:
        return Text.assemble("\n", (text, "bold"), (f"  {after}" if after else "", "dim"))

    meta = config.num_memory_tokens
    return [
        Text.assemble((str(facts["model"]), "bold cyan")),
        Text(
            f"{parameters['total']:,} parameters, {_weights(facts)}\n"
            f"{len(layers)} layers: {globals_} global, {windowed} windowed, "
            + (f"{alone} without attention, " if alone else "")
            + f"{borrow} borrow keys and values"
        ),
        title("Configuration"),
        _pairs([(field, _value(getattr(config, field))) for field in _FIELDS]),
        title("Layers", f"attention sees the {meta} meta tokens, its own token and:" if meta else "attention sees:"),
        _table(["layers", "heads", "attention sees", "keys and values"], layer_map(layers)),
        title("Parameters"),
        _shares(parameters, {}),
        title("FLOPs per token", f"forward, after {length:,} text tokens; a multiply-add counts two"),
        _shares(flops, {"attention": "attention (grows with the length)"}),
        Text(f"the whole text of {length:,} tokens: {_flops(facts['flops_of_text'])}", "dim"),
        title(
            "Cache bytes",
            f"{length:,} text tokens, {rows} row{'s' if rows > 1 else ''}, {dtype}, {facts['cache_implementation']}",
        ),
        _shares(
            cache,
            {
                "global_kv": "keys and values, global layers",
                "windowed_kv": "keys and values, windowed layers",
                "meta_kv": "keys and values, meta tokens (once)",
                "conv": "convolution inputs",
                "ssm": "SSM states (float32)",
            },
        ),
        Text(f"the paper's arithmetic, 1 row of 8,000 tokens: {facts['paper_cache_bytes'] / 1e6:.2f} MB", "dim"),
        title(
            "Memory at the peak, estimated",
            f"on a GPU, {rows} row{'s' if rows > 1 else ''} of {length:,} tokens; bfloat16 over float32, AdamW",
        ),
        _table(
            ["work", "GiB"],
            [(_WORK[work], f"{size / 2**30:.1f}") for work, size in facts["peak_bytes"].items()],
        ),
    ]


def _weights(facts: dict[str, Any]) -> str:
    """The size of the weights in words."""
    size, quantised, dtype = facts["weight_bytes"], facts["quantization"], facts["dtype"]
    if quantised is None:
        return f"{size:,} bytes in {dtype}"
    held = "a size that only its files say" if size is None else f"{size:,} bytes"
    return f"quantised ({quantised}): {held}, {dtype} around them"


def _pairs(items: list[tuple[str, str]]) -> RenderableType:
    """Names and values in two columns of pairs, read downwards."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    half = -(-len(items) // 2)
    for left, right in zip(items[:half], [*items[half:], ("", "")], strict=False):
        grid.add_row(left[0], f"[cyan]{left[1]}[/cyan]", right[0], f"[cyan]{right[1]}[/cyan]")
    return grid


def _table(head: list[str], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _shares(parts: dict[str, int], names: dict[str, str]) -> RenderableType:
    """Parts with their share of the total, the total last."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    total = parts["total"]
    for part, value in parts.items():
        if part != "total" and value:
            table.add_row(names.get(part, part.replace("_", " ")), f"{value:,}", f"{value / total:.1%}")
    table.add_row("[bold]total[/bold]", f"[bold]{total:,}[/bold]", "")
    return table


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flops(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} FLOP"
