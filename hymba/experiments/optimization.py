"""Parameter groups and the warm-up, stable, decay schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hymba.experiments.settings import OptimizerSettings, ScheduleSettings

_NEVER_DECAYED = frozenset({"A_log", "D", "dt_bias", "bias", "meta_tokens"})


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter with this dotted name.

    It pulls towards zero, a neutral place only for the weights of a projection, an embedding or a convolution:
    not for scales, biases, the spectrum, the skip, or meta tokens, which are an initial state.
    """
    return parameter.dim() >= 2 and "norm" not in name and _NEVER_DECAYED.isdisjoint(name.split("."))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups over the trainable parameters, with and without decay; a tied tensor is in one, once."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; fused, which is one kernel instead of several per parameter."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def wsd(settings: ScheduleSettings, steps: int) -> Callable[[int], float]:
    """The schedule as a factor on the peak learning rate, for step 0 to ``steps - 1``.

    Linear warm-up over ``warmup * steps`` steps (its first step is not zero), the peak, then over the last
    ``decay * steps`` steps down to ``floor``, which the last step reaches.
    """
    warmup = math.ceil(settings.warmup * steps)
    decay = math.ceil(settings.decay * steps)
    stable_end = max(steps - decay, warmup)
    decay = steps - stable_end

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < stable_end:
            return 1.0
        left = max(steps - 1 - step, 0) / decay if decay else 0.0
        if settings.shape == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        elif settings.shape == "sqrt":
            left = 1.0 - math.sqrt(1.0 - left)
        return settings.floor + (1.0 - settings.floor) * left

    return factor


def build_scheduler(optimizer: torch.optim.Optimizer, settings: ScheduleSettings, steps: int) -> LambdaLR:
    """:func:`wsd` as a torch scheduler."""
    return LambdaLR(optimizer, wsd(settings, steps))
