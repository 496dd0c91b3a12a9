#!/usr/bin/env python
"""Writes a checkpoint with random weights in the released layout, tensor by tensor.

    python scripts/random_checkpoint.py OUT                      the 1.5B configuration, bfloat16, one 3.05 GB file
    python scripts/random_checkpoint.py OUT --shards 4 --layers 8
    python scripts/random_checkpoint.py OUT --config FOLDER --dtype float32

Weights follow the initialisation table of `hymba.nn.init`. No more than one tensor is in memory at a time. OUT
appears at the end, complete, or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.hub import released_name
from hymba.nn.init import rule_for

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "model" / "hymba-1.5b.json"
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


def cut_layers(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same configuration with its first `layers` layers only."""
    whole = fields["num_hidden_layers"]
    if not 1 <= layers <= whole:
        raise SystemExit(f"error: --layers {layers}: allowed: 1 to {whole}")
    cut = dict(fields, num_hidden_layers=layers)
    cut["global_attn_idx"] = [i for i in fields.get("global_attn_idx") or [] if i < layers]
    groups = [[i for i in group if i < layers] for group in fields.get("kv_reuse_group") or []]
    cut["kv_reuse_group"] = [group for group in groups if len(group) > 1] or None
    if fields.get("layer_type"):
        cut["layer_type"] = fields["layer_type"][:layers]
    if fields.get("conv_dim"):
        cut["conv_dim"] = {str(i): width for i, width in fields["conv_dim"].items() if int(i) < layers}
    return cut


def parameters(config: HymbaConfig) -> list[tuple[str, str, torch.Size]]:
    """(our name, released name, shape) of every tensor in the file, in the file's order (by released name)."""
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    names = [
        (name, released_name(name), parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    ]
    return sorted(names, key=lambda entry: entry[1])


def partition(tensors: list[tuple[str, str, torch.Size]], shards: int) -> Iterator[list[tuple[str, str, torch.Size]]]:
    """Consecutive runs of about the same size; none is empty."""
    if not 1 <= shards <= len(tensors):
        raise SystemExit(f"error: --shards {shards}: allowed: 1 to {len(tensors)}, the number of tensors")
    left = sum(shape.numel() for _, _, shape in tensors)
    first = 0
    for shard in range(shards):
        others = shards - shard - 1
        last, size = first + 1, tensors[first][2].numel()
        while len(tensors) - last > others and (not others or size < left / (others + 1)):
            size += tensors[last][2].numel()
            last += 1
        yield tensors[first:last]
        left -= size
        first = last


def write_shard(file: BinaryIO, tensors: list[tuple[str, str, torch.Size]], *, dtype: str, std: float) -> int:
    """Write a safetensors file whose tensors are drawn while it is written; returns the bytes of its tensors."""
    code, torch_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, released, shape in tensors:
        begin, end = end, end + shape.numel() * torch_dtype.itemsize
        header[released] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format asks for data at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, _, shape in tensors:
        tensor = torch.empty(shape, dtype=torch.float32)
        rule_for(name)(tensor, std)
        file.write(memoryview(tensor.to(torch_dtype).view(torch.uint8).reshape(-1).numpy()))
    return end


def write_checkpoint(folder: Path, fields: dict[str, Any], *, dtype: str, shards: int) -> int:
    """Write configuration, weights and, for several shards, their index; returns the bytes of all tensors."""
    config = HymbaConfig.from_dict(fields)
    config.validate_architecture()
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": dtype}, indent=2) + "\n")
    generation = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in fields}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "use_cache": False}, indent=2) + "\n")
    total = 0
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(partition(parameters(config), shards)):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        with (folder / name).open("wb") as file:
            total += write_shard(file, tensors, dtype=dtype, std=config.initializer_range)
        weight_map.update((released, name) for _, released, _ in tensors)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="config.json, or a folder with one (default: the 1.5B one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of all tensors (bfloat16)")
    parser.add_argument("--shards", type=int, default=1, help="number of weight files (1)")
    parser.add_argument("--layers", type=int, help="keep this many layers, counted from the first (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    args = parser.parse_args(arguments)

    path = args.config / "config.json" if args.config.is_dir() else args.config
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --config {args.config}: {error}; allowed: a config.json or its folder") from None
    if args.layers is not None:
        fields = cut_layers(fields, args.layers)
    out: Path = args.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"error: OUT={args.out} exists and is not an empty folder; name another or remove it")

    torch.manual_seed(args.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        total = write_checkpoint(temporary, fields, dtype=args.dtype, shards=args.shards)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.out}: {total:,} bytes of tensors in {args.shards} file{'s' * (args.shards > 1)}", file=sys.stderr)


if __name__ == "__main__":
    main()
