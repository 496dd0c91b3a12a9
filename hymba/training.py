"""What training asks of the model beyond its forward pass: a loss without all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hymba.nn.hooks import is_plain
from hymba.ops.loss import linear_cross_entropy

IGNORED_LABEL = -100


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
