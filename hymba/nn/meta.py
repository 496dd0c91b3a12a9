"""Meta tokens: learned vectors before every sequence (section 2.3 of the paper), read as a learned initial state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hymba.nn.attention import SharedKV
from hymba.nn.init import initialise
from hymba.nn.state import LayerState, Span, map_tensors


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


class _Together(torch.autograd.Function):
    """The tensors as they are; their gradients go back at once, when all are there, zeros for those without one."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _tied(x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """Hidden states and state of a layer, such that backward reaches the layer through the hidden states first.

    Hooks on a layer's output (sharded parameters are gathered in one) see the hidden states. Those of the last layer
    have no gradient here, and the state alone would bring backward to parameters that nobody has gathered.
    """
    found: list[Tensor] = [x]
    map_tensors(state, lambda _, tensor: found.append(tensor))
    moved = iter(_Together.apply(*found))
    return next(moved), map_tensors(state, lambda _, tensor: next(moved))


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
            state = state.as_prefix()
            if torch.is_grad_enabled() and self.layers[i]._forward_hooks:
                x, state = _tied(x, state)
            self.states.append(state)
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
