#!/usr/bin/env python
"""Turns the pickled weights of a checkpoint folder into safetensors files, which cannot run code when opened.

    python scripts/bin_to_safetensors.py FOLDER

Reads pytorch_model.bin, or the shards of pytorch_model.bin.index.json, with PyTorch's restricted unpickler: a file
that holds anything but tensors is refused. The new files stand beside the old ones, which are left as they are, and
take their names only when all of them are written and read back.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TIED = "lm_head.weight"


class Refused(SystemExit):
    """What cannot be converted, and what to do; ends the program with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")


def find(folder: Path) -> list[Path]:
    """The pickled files of a checkpoint, in order."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise Refused(f"{index}: not a shard index ({error})") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise Refused(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    single = folder / "pytorch_model.bin"
    if single.is_file():
        return [single]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise Refused(f"{folder}: no {single.name} and no {index.name}; found: {there or 'nothing'}")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, without those that only repeat a tied embedding."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before PyTorch 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise Refused(f"{path}: not a file of tensors alone ({str(error).strip().splitlines()[0]})") from None
    if isinstance(loaded, dict) and set(loaded) == {"state_dict"}:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise Refused(f"{path}: holds a {type(loaded).__name__}; needed: tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Refused(f"{path}: entry {name!r} is a {type(tensor).__name__}; allowed: tensors by name")

    tensors: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    for name, tensor in loaded.items():
        place = tensor.untyped_storage().data_ptr()
        if place in places:
            if name == TIED and tensor.shape == loaded[places[place]].shape:
                continue
            # A safetensors file holds every tensor once, in memory of its own.
            tensor = tensor.clone()
        places.setdefault(place, name)
        tensors[name] = tensor.contiguous()
    return tensors


def write(tensors: dict[str, Tensor], path: Path) -> int:
    """Write a safetensors file and hold it against the tensors; returns their bytes."""
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            written = file.get_tensor(name)
            if written.dtype != tensor.dtype or not torch.equal(written.view(torch.uint8), tensor.view(torch.uint8)):
                raise Refused(f"{path}: {name} reads back differently; is the disk full or broken?")
    return sum(tensor.nbytes for tensor in tensors.values())


def convert(folder: Path) -> list[Path]:
    """Convert a folder; returns the new files."""
    sources = find(folder)
    present = sorted(path.name for path in folder.glob("model*.safetensors*"))
    if present:
        raise Refused(f"{folder}: has {', '.join(present)} already; move it away to convert again")
    count = len(sources)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    moves: list[tuple[Path, Path]] = []
    weight_map: dict[str, str] = {}
    total = 0
    try:
        for source, name in zip(sources, names, strict=True):
            tensors = read(source)
            again = [tensor for tensor in tensors if tensor in weight_map]
            if again:
                raise Refused(f"{source}: {again[0]} is in {weight_map[again[0]]} as well")
            moves.append((folder / f".{name}.{os.getpid()}.tmp", folder / name))
            total += write(tensors, moves[-1][0])
            weight_map.update(dict.fromkeys(tensors, name))
        if count > 1:
            index = folder / "model.safetensors.index.json"
            moves.append((folder / f".{index.name}.{os.getpid()}.tmp", index))
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            moves[-1][0].write_text(text + "\n", "utf-8")
        # The index comes last: without it the shards are no checkpoint yet.
        for temporary, final in moves:
            os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{folder}: {error}; nothing was changed") from None
    finally:
        for temporary, _ in moves:
            temporary.unlink(missing_ok=True)
    return [final for _, final in moves]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder with pytorch_model*.bin")
    args = parser.parse_args(arguments)
    files = convert(args.folder)
    print(f"{args.folder}: wrote {', '.join(path.name for path in files)}; the .bin files can go")


if __name__ == "__main__":
    main()
