"""The feed-forward half of a block (section 2.2 of the specification)."""

from __future__ import annotations

from torch import Tensor, nn

from hymba.nn.init import initialise
from hymba.ops.gate import relu2, swiglu

ACTIVATIONS = ("silu", "relu2")


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, or `down(relu(up(x))^2)` with `activation="relu2"` (no gate projection).

    Args:
        hidden_size: width of input and output.
        intermediate_size: inner width.
        activation: `"silu"` or `"relu2"`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed: {', '.join(map(repr, ACTIVATIONS))}")
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if activation == "silu" else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, l, hidden_size); returns the same shape."""
        if self.gate_proj is None:
            return self.down_proj(relu2(self.up_proj(x)))
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
