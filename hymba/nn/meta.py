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


class PrefixRun:
    """Runs meta tokens through the layers from the empty state, each layer when its state is first asked for.

    What they leave behind (keys and values, convolution window, SSM state) depends on the weights alone and is where
    every row and every packed document starts: exactly the prepended form, at the cost of one short row.

    Asked for layer by layer between the layers of the text, the short row costs an accelerator next to nothing: its
    launches, of which there are as many as the text has, are made while the text is being computed.

    Args:
        layers: blocks in order.
        tokens: (m, hidden_size).
        lenders: for each layer the one whose keys and values it borrows, or `None`.

    Attributes:
        states: of the layers run so far, batch 1, with gradients to `tokens` and the weights.
        hidden: the hidden states (1, m, hidden_size) before the first and after each of those layers.
    """

    def __init__(self, layers: Iterable[nn.Module], tokens: Tensor, *, lenders: Sequence[int | None]) -> None:
        self.layers = list(layers)
        self.lenders = lenders
        self.lends = set(lenders)
        self.span = Span.following(tokens.shape[0], in_prefix=True, device=tokens.device)
        self.shared: dict[int, SharedKV] = {}
        self.states: list[LayerState] = []
        self.hidden = [tokens[None]]

    def __getitem__(self, index: int) -> LayerState:
        """The state of a layer after the meta tokens."""
        for i in range(len(self.states), index + 1):
            lender = self.lenders[i]
            kv = None if lender is None else self.shared[lender]
            x, state, kv = self.layers[i](self.hidden[i], None, span=self.span, kv=kv)
            if i in self.lends:
                assert kv is not None
                self.shared[i] = kv
            self.states.append(state.as_prefix())
            self.hidden.append(x)
        return self.states[index]

    def finish(self) -> list[LayerState]:
        """The states of all layers."""
        return [self[i] for i in range(len(self.layers))]


def run_prefix(
    layers: Iterable[nn.Module], tokens: Tensor, *, lenders: Sequence[int | None]
) -> tuple[list[LayerState], list[Tensor]]:
    """A `PrefixRun` to its end.

    Args:
        layers: blocks in order. tokens: (m, hidden_size) meta tokens.
        lenders: for each layer the one whose keys and values it borrows, or `None`.

    Returns:
        the states of all layers, batch 1, and the hidden states (1, m, hidden_size) before the first and after each.
    """
    run = PrefixRun(layers, tokens, lenders=lenders)
    return run.finish(), run.hidden
