"""The models that are measured, with random weights, and the check that comes before every number.

The released shape is configs/model/hymba-1.5b.json. `--toy` (the default on a CPU) is a small model of the same layout.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.ops import use_backend

RELEASE = Path(__file__).parent.parent / "configs" / "model" / "hymba-1.5b.json"
TOY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_memory_tokens": 8, "sliding_window": 32, "mamba_dt_rank": 4, "num_hidden_layers": 4, "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]], "v_head_dim": 32,
}  # fmt: skip
CHECK_LAYERS = 4
CHECK_LENGTH = 1100
"""Tokens of the check: past the window of 1,024."""
AS_GOOD_AS_PLAIN = 1.5
"""Distance of what is measured from float32, over the distance of plain PyTorch in the same dtype."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--layers` and `--toy`."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, help="the first layers of the release only")
    parser.add_argument("--toy", action="store_true", help="a small model of the same layout; the default on a CPU")


def needs_device(device: str) -> None:
    """End the command with one line when it was told to use a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs a toy model of the same layout", file=sys.stderr)
        sys.exit(2)


def hymba_config(layers: int | None = None, *, toy: bool = False) -> HymbaConfig:
    """The released configuration, whole or with its first `layers` layers, or the toy of the same layout."""
    fields: dict[str, Any] = json.loads(RELEASE.read_text())
    if toy:
        fields |= TOY
    if toy or layers is not None:
        fields["num_hidden_layers"] = layers = layers or TOY["num_hidden_layers"]
        fields["global_attn_idx"] = [i for i in fields["global_attn_idx"] if i < layers]
        fields["kv_reuse_group"] = [group for group in fields["kv_reuse_group"] if max(group) < layers] or None
        fields.pop("layer_type"), fields.pop("conv_dim")
    return HymbaConfig.from_dict(fields)


def build(config: Any, cls: Callable[[Any], Any] = HymbaForCausalLM, *, device: str, dtype: torch.dtype) -> Any:
    """A model with the initialisation of its library, made on the device in `dtype`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    # Buffers, such as rotary frequencies, keep the dtype that the model gives them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def random_ids(rows: int, length: int, vocab: int, device: str) -> Tensor:
    """(rows, length) token ids."""
    return torch.randint(3, vocab, (rows, length), device=device)


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Root mean square over the tensors of ||got - want|| / ||want||; nan when one is not finite."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(got, want, strict=True)
    ]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def check_against_plain(
    run: Callable[[Any, Tensor], list[Tensor]],
    *,
    device: str,
    dtype: torch.dtype,
    toy: bool,
    reference: Callable[[Any, Tensor], list[Tensor]] | None = None,
) -> tuple[float, float]:
    """Hold what will be measured to plain PyTorch, on a few layers; ends the command when it does not hold.

    Args:
        run: (model, ids) to tensors, by the path that is measured.
        reference: the same result in the simplest way; `run` itself by default. It is called with plain PyTorch ops
            and materialised attention scores, in `dtype` and in float32.

    Returns:
        The distances from float32 of the measured path and of the plain one.
    """
    config = hymba_config(CHECK_LAYERS, toy=toy)
    reference = run if reference is None else reference
    ids = random_ids(2, CHECK_LENGTH if not toy else 70, config.vocab_size, device)
    model = build(config, device=device, dtype=dtype)
    got = run(model, ids)
    model.set_attn_implementation("eager")
    with use_backend("torch"):
        plain = reference(model, ids)
        want = reference(model.float(), ids)
    measured, allowed = distance(got, want), AS_GOOD_AS_PLAIN * max(distance(plain, want), 1e-5)
    if not measured <= allowed:
        sys.exit(f"wrong: relative distance {measured:.2e} from float32, allowed {allowed:.2e}; no number")
    print(f"check: relative distance from float32 {measured:.2e}, plain PyTorch {distance(plain, want):.2e}")
    return measured, distance(plain, want)
