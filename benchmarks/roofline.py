"""What the chip allows: counted bytes over a measured copy bandwidth, counted operations over a measured matrix rate.

A floor is the larger of the two. Operations are `hymba.cost`'s (every visible key, no masked ones); bytes are those
that have to move whatever the kernels do: weights once, the cache once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hymba.cost import DTYPE_BYTES, cache_bytes, flops_of_text, flops_per_token, kv_width, parameters

if TYPE_CHECKING:
    from hymba import HymbaConfig


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device: bytes read plus written per second, matrix operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def floor(self, moved: float, operations: float) -> float:
        """Seconds below which the work cannot be done."""
        return max(moved / self.bytes_per_s, operations / self.flops_per_s)

    def to_dict(self) -> dict[str, float]:
        return {"copy_bytes_per_s": self.bytes_per_s, "matrix_flops_per_s": self.flops_per_s}


def measured_ceilings(device: str) -> Ceilings | None:
    """The rates of this machine's GPU; `None` on a CPU, for which no floor is given."""
    if device != "cuda":
        return None
    from benchmarks.common import copy_bandwidth, matrix_rate

    return Ceilings(copy_bandwidth(), matrix_rate())


def weight_bytes(config: HymbaConfig, dtype: str) -> int:
    return parameters(config).total * DTYPE_BYTES[dtype]


def prefill(config: HymbaConfig, batch: int, length: int, dtype: str) -> tuple[int, int]:
    """Bytes and operations of a prefill that returns the last logits: weights read, cache written."""
    flops = flops_of_text(config, length)
    body = flops.total - flops.head
    # Also the meta tokens, once: a text of their length that has no meta tokens in front.
    meta = config.num_memory_tokens
    per_token = flops.projections // max(length, 1) + flops.mlp // max(length, 1) + flops.mamba // max(length, 1)
    operations = batch * (body + flops_per_token(config, length).head) + meta * per_token
    return weight_bytes(config, dtype) + cache_bytes(config, length, batch=batch, dtype=dtype).total, operations


def train(config: HymbaConfig, batch: int, length: int) -> tuple[int, int]:
    """Bytes and operations of forward and backward: every product has two in backward. Bytes are far from binding."""
    return 0, 3 * batch * flops_of_text(config, length).total


def decode(config: HymbaConfig, batch: int, length: int, dtype: str) -> tuple[int, int]:
    """Bytes and operations of one step: weights and cache read once, SSM states and convolution inputs written."""
    cache = cache_bytes(config, length, batch=batch, dtype=dtype, static=True)
    moved = weight_bytes(config, dtype) + cache.total + cache.ssm + cache.conv
    # A layer that borrows keys and values reads its lender's.
    borrowed = sum(
        _slots(config, spec, length) * kv_width(config, spec) for spec in config.layers if spec.kv_from is not None
    )
    return moved + batch * borrowed * DTYPE_BYTES[dtype], batch * flops_per_token(config, length).total


def _slots(config: HymbaConfig, spec: Any, length: int) -> int:
    return length if spec.window is None else min(length, spec.window + 1)
