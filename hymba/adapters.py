"""What an adapter (LoRA, DoRA) is put on: the projections, by our names and by the release's."""

from __future__ import annotations

import sys
from collections.abc import Iterable

PROJECTIONS = ("in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of the network but its head: those of the mixers, then those of the MLP. Each is called as a
module in every path, so that an adapter on it takes effect; `dt_proj` has its bias in a parameter of its own."""
LMFLOW_PROJECTIONS = ("x_proj", "in_proj", "out_proj", "dt_proj")
"""The targets of LMFlow's recipe for the release (there `x_proj.0`, `in_proj`, `out_proj`, `dt_proj.0`)."""
_TABLE = "peft.utils.constants"


def target_name(name: str) -> str:
    """Our name of a projection given by either: the release's modules are lists of one (`x_proj.0`)."""
    bare = name.removesuffix(".0")
    return bare if bare in PROJECTIONS else name


def target_names(names: Iterable[str] = ()) -> list[str]:
    """Our names of projections; of all when none is given."""
    return list(dict.fromkeys(map(target_name, names))) or list(PROJECTIONS)


def name_default_targets() -> None:
    """Enter `PROJECTIONS` into PEFT's table of default targets, if PEFT has been imported.

    PEFT is not imported for it. An entry that is there already stays.
    """
    constants = sys.modules.get(_TABLE)
    table = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", None)
    if table is not None:
        table.setdefault("hymba", list(PROJECTIONS))
