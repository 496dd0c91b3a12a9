#!/usr/bin/env python
"""Writes configs/model/ARCHITECTURE-SIZE.yaml: the paper's architectures at its sizes, alike in parameters.

    python scripts/model_configs.py            # write
    python scripts/model_configs.py --check    # compare with what is there; exit status 1 where a file differs

Hymba's shape at each size is written below. Every other architecture has as many layers, and the free width (the MLP's,
or the model's where there is none) that brings its parameters closest to Hymba's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba import HymbaConfig
from hymba.cost import parameters

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "model"
TOLERANCE = 0.02
"""Largest relative difference of parameters inside a comparison."""
Fields = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Hymba at one size; ``source`` says which of it the paper publishes."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    window: int
    source: str
    mlp: int = 0
    """0: the width that comes closest to ``target`` parameters."""
    target: float = 0.0
    meta_tokens: int = 128
    vocabulary: int = 32001
    mamba2_states: int = 128
    mamba2_head: int = 64
    llama: Fields = field(default_factory=dict)
    """Fields of the Transformer that differ from Hymba's."""
    llama_source: str = ""
    more: Fields = field(default_factory=dict)
    """Further fields of every architecture."""


SIZES = {
    "tiny": Size(
        8, 128, 4, 2, 64, "for a laptop; ours", mlp=256, meta_tokens=16, vocabulary=2048, mamba2_states=32,
        mamba2_head=16,
        more={"mamba_d_state": 8, "rope_type": "default", "max_position_embeddings": 2048},
    ),
    "125m": Size(
        24, 512, 8, 4, 1024, "shape of table 11 of the paper; global layers and KV groups are ours (13 of 24 layers "
        "own keys and values, as the parameter count asks)", mlp=1664,
    ),
    "300m": Size(
        12, 1024, 16, 4, 256, "layers, widths, heads and window derived from the paper's tables 1 and 10; MLP width "
        "and vocabulary are ours", target=300e6,
        llama={"hidden_size": 1080, "num_attention_heads": 15, "num_key_value_heads": 15},
        llama_source="Layers and the 1,080 numbers of a key follow from the paper's table 10, row 6; rest ours.",
    ),
    "350m": Size(
        32, 768, 12, 4, 1024, "shape of table 11 of the paper; global layers and KV groups are the 1.5B release's",
        mlp=2432,
    ),
    "1b": Size(32, 1280, 20, 5, 1024, "the paper publishes no shape at this size; this one is ours", target=1e9),
    "1.5b": Size(32, 1600, 25, 5, 1024, "the released shape", mlp=5504),
}  # fmt: skip
NO_WIDTHS = "The paper gives no widths for its baselines: as many layers as Hymba, and the {} fills up the parameters."
UNUSED = "Without attention heads and MLPs, num_attention_heads and intermediate_size are not used."
MAMBA2 = "The paper does not give Mamba-2's heads: {} channels with {} states each, {}."


def global_layers(layers: int) -> list[int]:
    """The first, a middle one and the last (section 2.2); of 32 layers the release's."""
    return [0, 15, 31] if layers == 32 else [0, layers // 2 - 1, layers - 1]


def kv_groups(layers: int) -> list[list[int]]:
    """Every two windowed layers in a row, three where their number is odd; of 32 layers the release's."""
    groups: list[list[int]] = []
    start = 0
    for last in [*global_layers(layers), layers]:
        run = list(range(start, last))
        start = last + 1
        while len(run) > 1:
            # The release has its triple first, right behind the middle global layer.
            triple = len(run) % 2 and (layers == 32 or len(run) == 3)
            groups.append(run[: 3 if triple else 2])
            run = run[3 if triple else 2 :]
    return groups


def closest(make: Callable[[int], Fields], target: float, step: int, most: int = 30000) -> Fields:
    """The fields whose parameters come closest to `target`, of the widths that are multiples of `step`."""
    low, high = 1, most // step
    while low < high:
        middle = (low + high) // 2
        if count(make(middle * step)) < target:
            low = middle + 1
        else:
            high = middle
    return min((make(low * step), make(max(1, low - 1) * step)), key=lambda fields: abs(count(fields) - target))


def count(fields: Fields) -> int:
    """Parameters of a model with these fields."""
    return parameters(HymbaConfig(**fields)).total


def architectures(size: str) -> dict[str, tuple[list[str], Fields]]:
    """Name to the lines of the header and the fields, `hymba` first."""
    of = SIZES[size]
    base: Fields = dict(
        hidden_size=of.width, num_hidden_layers=of.layers, num_attention_heads=of.heads,
        num_key_value_heads=of.kv_heads, vocab_size=of.vocabulary, **of.more,
    )  # fmt: skip
    released: Fields = dict(
        num_memory_tokens=of.meta_tokens, sliding_window=of.window, global_attn_idx=global_layers(of.layers),
        kv_reuse_group=kv_groups(of.layers),
    )  # fmt: skip
    hymba = {**base, "intermediate_size": of.mlp, **released}
    if not of.mlp:
        hymba = closest(lambda width: {**base, "intermediate_size": width, **released}, of.target, 32)
    total = count(hymba)
    made: dict[str, tuple[list[str], Fields]] = {"hymba": ([f"Hymba, {of.source}:"], hymba)}

    def add(name: str, what: str, pattern: Sequence[Fields], *notes: str, **fields: Any) -> None:
        """Layers with MLPs, whose width is free."""

        def with_width(width: int) -> Fields:
            start = {**base, **fields, "intermediate_size": width}
            return {**start, "num_memory_tokens": 0, "sliding_window": None, "layer_pattern": list(pattern)}

        made[name] = ([f"{what},", *notes], closest(with_width, total, 8 if size == "tiny" else 32))

    def add_alone(name: str, what: str, layer: Fields, step: int, *notes: str, **fields: Any) -> None:
        """Layers without MLPs: the model's width is free."""
        pattern = [{**layer, "ffn": False, "repeat": of.layers}]

        def with_width(width: int) -> Fields:
            start = {**base, **fields, "hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1}
            start |= {"intermediate_size": width, "num_memory_tokens": 0, "sliding_window": None}
            return {**start, "layer_pattern": pattern}

        made[name] = ([f"{what},", *notes, UNUSED], closest(with_width, total, step, 8000))

    mlp, model = NO_WIDTHS.format("MLP"), NO_WIDTHS.format("width")
    half = of.layers // 2
    states = {"mamba_d_state": of.mamba2_states}
    whose = "ours" if size == "tiny" else "the defaults of Mamba-2's authors"
    mamba2 = MAMBA2.format(of.mamba2_head, of.mamba2_states, whose)
    add("llama", "Transformer in the style of Llama", [{"mixer": "attention", "repeat": of.layers}],
        of.llama_source or mlp, **of.llama)  # fmt: skip
    add_alone("mamba", "Mamba layers without MLPs", {"mixer": "mamba"}, 8 if size == "tiny" else 16, model)
    add("mamba-ffn", "Mamba layers with MLPs", [{"mixer": "mamba", "repeat": of.layers}], mlp)
    second: Fields = {"mixer": "mamba", "ssm": "mamba2"}
    if of.mamba2_head != 64:
        second["ssm_head_dim"] = of.mamba2_head
    add_alone("mamba2", "Mamba-2 layers without MLPs", second, of.mamba2_head // 2, model, mamba2, **states)
    add("mamba2-ffn", "Mamba-2 layers with MLPs", [{**second, "repeat": of.layers}], mlp, mamba2, **states)
    turns: list[Fields] = [{"mixer": "mamba"}, {"mixer": "attention", "window": of.window}]
    add("samba", "Samba: Mamba, MLP, windowed attention, MLP", [{"repeat": half, "layers": turns}], mlp)
    turns = [{"mixer": "mamba"}, {"mixer": "attention"}]
    add("sequential", "Sequential hybrid: Mamba and attention layers in turn, each with an MLP",
        [{"repeat": half, "layers": turns}], mlp)  # fmt: skip
    for name, (header, fields) in made.items():
        number = f"{count(fields) / 1e6:,.1f} million parameters"
        apart = count(fields) / total - 1
        if abs(apart) > TOLERANCE:
            raise SystemExit(f"{name}-{size}: {apart:+.1%} parameters against hymba-{size}")
        header.insert(1, f"{number}." if name == "hymba" else f"{number}, {100 * apart:+.1f}% of hymba-{size}.")
    return made


def text(header: Sequence[str], fields: Mapping[str, Any]) -> str:
    """The YAML file: comment lines, then a line for each field and each entry of the pattern."""
    lines = [f"# {line}" for line in header]
    for key, value in fields.items():
        if key != "layer_pattern":
            lines.append(f"{key}: {plain(value)}")
            continue
        lines.append("layer_pattern:")
        for entry in value:
            if "layers" in entry:
                lines += [f"  - repeat: {entry['repeat']}", "    layers:"]
                lines += [f"      - {plain(layer)}" for layer in entry["layers"]]
            else:
                lines.append(f"  - {plain(entry)}")
    return "\n".join(lines) + "\n"


def plain(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def main() -> int:
    """Write the files, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file differs")
    check = parser.parse_args().check
    different = 0
    for size in SIZES:
        for name, (header, fields) in architectures(size).items():
            path, wanted = FOLDER / f"{name}-{size}.yaml", text(header, fields)
            if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
                different += 1
                print(path.name, "differs" if check else "written")
                if not check:
                    path.write_text(wanted, encoding="utf-8")
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
