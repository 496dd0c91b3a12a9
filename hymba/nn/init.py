"""Parameter initialisation as data, in one place.

Each rule names a parameter by the end of its dotted name; the first match wins. `std` is the configuration's
`initializer_range`. Sources: the paper gives none, so these are the usual ones of its parts: normal(0, 0.02) for
projections, the real S4D spectrum and a log-uniform step size for Mamba (arXiv 2312.00752, section 3.6), one decay per
head in a range for Mamba-2 (arXiv 2405.21060), and unit normal meta tokens (PAPER.md, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

STEP_SIZES = (1e-3, 1e-1)
"""Range of the initial step sizes softplus(dt_bias), log-uniform."""

EMBEDDING = "embed_tokens"
"""End of the dotted name of the embeddings, which may have a standard deviation of their own."""

DECAYS = (1.0, 16.0)
"""Range of the initial -A of Mamba-2's heads, uniform."""


def _normal(tensor: Tensor, std: float) -> None:
    tensor.normal_(0.0, std)


def _zeros(tensor: Tensor, std: float) -> None:
    tensor.zero_()


def _ones(tensor: Tensor, std: float) -> None:
    tensor.fill_(1.0)


def _unit_normal(tensor: Tensor, std: float) -> None:
    tensor.normal_(0.0, 1.0)


def _fan_in_uniform(tensor: Tensor, std: float) -> None:
    """Uniform in +-1/sqrt(inputs): a depthwise convolution's taps, or the rank of the step-size projection."""
    bound = tensor.shape[-1] ** -0.5
    tensor.uniform_(-bound, bound)


def _log_decays(tensor: Tensor, std: float) -> None:
    """A = -(1, 2, ..., n) in every channel of Mamba-1; in Mamba-2, one number per head, uniform in DECAYS."""
    if tensor.dim() == 1:
        tensor.uniform_(*DECAYS).log_()
        return
    states = torch.arange(1, tensor.shape[-1] + 1, dtype=torch.float32, device=tensor.device)
    tensor.copy_(states.log().expand_as(tensor))


def _step_sizes(tensor: Tensor, std: float) -> None:
    """softplus(bias) log-uniform in STEP_SIZES."""
    low, high = map(math.log, STEP_SIZES)
    step = torch.empty_like(tensor, dtype=torch.float32).uniform_(low, high).exp()
    tensor.copy_(step + torch.log(-torch.expm1(-step)))


RULES: tuple[tuple[str, Callable[[Tensor, float], None]], ...] = (
    (".A_log", _log_decays),
    (".D", _ones),
    (".dt_bias", _step_sizes),
    ("dt_proj.weight", _fan_in_uniform),
    ("conv1d.weight", _fan_in_uniform),
    ("causalconv.weight", _fan_in_uniform),
    ("meta_tokens.weight", _unit_normal),
    ("metatokens.weight", _unit_normal),
    ("norm.weight", _ones),
    (".bias", _zeros),
    (".weight", _normal),
)


def rule_for(name: str) -> Callable[[Tensor, float], None]:
    """The rule of the parameter with this dotted name."""
    for ending, rule in RULES:
        if name.endswith(ending):
            return rule
    raise KeyError(f"no initialisation rule for parameter {name!r}")


@torch.no_grad()
def initialise(
    module: nn.Module,
    *,
    std: float = 0.02,
    embedding_std: float | None = None,
    skip: Callable[[Tensor], bool] | None = None,
) -> None:
    """Initialise the parameters of a module and its children in place.

    Args:
        module: any module of `hymba.nn` (or a whole model).
        std: standard deviation of projections and embeddings.
        embedding_std: of embeddings, where it is another one.
        skip: parameters to leave alone (loaded ones).
    """
    for prefix, child in module.named_modules():
        # A block used alone has no dotted name; its class stands for it.
        prefix = prefix or type(child).__name__.lower()
        for name, parameter in child.named_parameters(recurse=False):
            if not parameter.is_meta and not (skip is not None and skip(parameter)):
                width = embedding_std if embedding_std is not None and prefix.endswith(EMBEDDING) else std
                rule_for(f"{prefix}.{name}")(parameter, width)
