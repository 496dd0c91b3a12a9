"""Whether full attention maps of a text fit into memory, found out before they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba.config import HymbaConfig
from hymba.memory import ENV, MemoryEstimateError, enabled, free_bytes

_MAPS_AT_ONCE = 4
"""Scores, masked scores, weights, and what a measure makes of them."""
_BLOCKS_AT_ONCE = 5
_BLOCK_BYTES = 4 << 23


def map_bytes(config: HymbaConfig, length: int, *, meta: int | None = None) -> int:
    """Bytes at the peak of reading one layer's maps of `length` text tokens; one layer's exist at a time."""
    meta = config.num_memory_tokens if meta is None else meta
    one = 4 * length * (length + meta)
    return _MAPS_AT_ONCE * config.num_attention_heads * one + _BLOCKS_AT_ONCE * max(_BLOCK_BYTES, one)


def check_maps_fit(config: HymbaConfig, length: int, device: Any) -> None:
    """Refuse maps that will not fit into what is free.

    Raises:
        MemoryEstimateError: they will not; the message says what would. Where a machine does not say what is free,
            and with `HYMBA_MEMORY_CHECK=off`, nothing is refused.
    """
    free = (_free_on_host() if str(device) == "cpu" else free_bytes(device)) if enabled() else None
    need = map_bytes(config, length)
    if free is None or need <= free:
        return
    fits, above = 1, length
    while above - fits > 1:
        middle = (fits + above) // 2
        fits, above = (middle, above) if map_bytes(config, middle) <= free else (fits, middle)
    raise MemoryEstimateError(
        f"attention maps of {length:,} tokens need about {need / 2**30:.1f} GiB and {device} has "
        f"{free / 2**30:.1f} GiB free; about {fits:,} tokens would fit ({ENV}=off tries anyway)"
    )


def _free_on_host() -> int | None:
    """Bytes of main memory that are free or held by caches; `None` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
