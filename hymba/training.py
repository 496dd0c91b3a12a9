"""What training asks of the model beyond its forward pass: fewer activations kept, a loss without all logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from hymba.nn.hooks import is_plain
from hymba.ops.loss import linear_cross_entropy

IGNORED_LABEL = -100
POLICIES = ("none", "selective", "full")


class ActivationMixin:
    """Which activations a training step keeps for backward."""

    def set_activation_checkpointing(self, policy: str) -> None:
        """Trade memory against work in training mode; no number changes.

        Args:
            policy: `"none"` keeps everything. `"selective"` makes norms, gates, the convolution and the step sizes
                again in backward and keeps the rest: about a third less memory for a few percent of the time (under
                `torch.compile` the compiler makes this choice). `"full"` keeps the input of each layer and runs the
                layer again, as `activation_checkpointing_enable()` of transformers does.

        Raises:
            ValueError: another policy.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: allowed: {', '.join(map(repr, POLICIES))}")
        self._set_gradient_checkpointing(enable=policy == "full")
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "selective_checkpointing"):
                module.selective_checkpointing = policy == "selective"

    def freeze_unused_parameters(self) -> None:
        """Ask for no gradient of what no output depends on: the key norm of a layer that borrows its keys.

        The released layout has that tensor. Data-parallel training waits for the gradient of every parameter that
        asks for one.
        """
        for module in self.modules():  # type: ignore[attr-defined]
            if getattr(module, "borrows_kv", False) and module.attention.k_norm is not None:
                module.attention.k_norm.requires_grad_(False)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As in transformers, non-reentrant only: the re-entrant form drops gradients through states and shared KV."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("gradient_checkpointing_kwargs={'use_reentrant': True}: allowed: use_reentrant=False")
        gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable, gradient_checkpointing_func, every_n_layers
        )
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "_checkpoint_every"):
                module._checkpoint_every = every_n_layers


def can_fuse_loss(head: nn.Module, loss_function: Any) -> bool:
    """Whether head and loss are the model's own: an adapter, a hook or a custom loss needs the logits."""
    return is_plain(head, nn.Linear) and head.bias is None and loss_function is ForCausalLMLoss


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """transformers' causal language-model loss from hidden states.

    Args:
        hidden: (b, l, d). weight: (vocab, d) of the head. labels: (b, l), -100 to leave out; shifted inside.
        num_items_in_batch: divides the sum over targets; by default their number.
        shift_labels: (b, l) targets already shifted, which take the place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
    targets = shift_labels.to(hidden.device).reshape(-1)
    total = linear_cross_entropy(hidden.flatten(0, 1), weight, targets, ignore_index=IGNORED_LABEL)
    if num_items_in_batch is None:
        return total / (targets != IGNORED_LABEL).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
