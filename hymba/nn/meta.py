"""Meta tokens: learned vectors before every sequence (section 2.3 of the paper), read as a learned initial state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hymba.nn.attention import SharedKV
from hymba.nn.init import initialise
from hymba.nn.state import LayerState, Span


class MetaTokens(nn.Module):
    """The learned vectors.

    Args:
        num_tokens: how many. hidden_size: their width.
    """

    def __init__(self, *, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self)

    def forward(self) -> Tensor:
        """The vectors, (num_tokens, hidden_size)."""
        return self.weight

    def prepend(self, x: Tensor) -> Tensor:
        """The prepended form, for use in another model: (b, l, d) to (b, num_tokens + l, d)."""
        return torch.cat([self().to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def run_prefix(
    layers: Iterable[nn.Module], tokens: Tensor, *, lenders: Sequence[int | None]
) -> tuple[list[LayerState], list[Tensor]]:
    """Run meta tokens through all layers once, from the empty state.

    What they leave behind (keys and values, convolution window, SSM state) depends on the weights alone and is where
    every row and every packed document starts: exactly the prepended form, at the cost of one short row.

    Args:
        layers: blocks in order.
        tokens: (m, hidden_size).
        lenders: for each layer the one whose keys and values it borrows, or `None`.

    Returns:
        one state per layer, batch 1, with gradients to `tokens` and the weights; and the hidden states
        (1, m, hidden_size) before the first and after each layer.
    """
    x = tokens[None]
    span = Span.following(tokens.shape[0], in_prefix=True, device=tokens.device)
    states: list[LayerState] = []
    hidden = [x]
    shared: dict[int, SharedKV] = {}
    lends = set(lenders)
    for i, layer in enumerate(layers):
        lender = lenders[i]
        kv = None if lender is None else shared[lender]
        x, state, kv = layer(x, None, span=span, kv=kv)
        if i in lends:
            shared[i] = kv
        states.append(state.as_prefix())
        hidden.append(x)
    return states, hidden
