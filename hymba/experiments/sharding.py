"""FSDP2: a share of every parameter, gradient and moment on each device; checkpoints without a trace of it.

Sharded by torch's `fully_shard` itself, layer by layer. accelerate's way to it does not work between CPUs, casts every
parameter to bfloat16 (A and dt bias of the SSM among them) where autocast keeps them in float32, and puts the head
into a group with hooks, which the loss without logits would pass by.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hymba.model import HymbaForCausalLM


class Sharded(nn.Module):
    """Stands where a wrapper of data-parallel training stands: calls the sharded model."""

    def __init__(self, module: HymbaForCausalLM) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def shard(
    model: HymbaForCausalLM, device: torch.device, *, autocast: torch.dtype | None = None, reshard: bool = True
) -> Sharded:
    """Deal out the parameters of a model over all processes, in place; they move to ``device``.

    Args:
        autocast: dtype of the forward pass; the parameters keep theirs.
        reshard: let go of gathered parameters after each use, and gather them again in backward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # States and keys that a layer returns are views; nothing writes to them while gradients are on.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    # Embedding, meta tokens, last norm and head: used first and last, so gathered once per step.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if autocast is not None:
        model.forward = torch.autocast(device.type, dtype=autocast)(model.forward)
    return Sharded(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from all processes if it is dealt out."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def _at_rest(model: nn.Module) -> None:
    """Let go of gathered parameters, which a measurement without backward leaves behind."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def model_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The parameters by name, a tied one once. All processes take part; those without ``keep`` get an empty dict."""
    _at_rest(model)
    state = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter)
        if keep:
            state[name] = full
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Moments by parameter name and the groups' options, the same on any number of devices.

    All processes take part; those without ``keep`` get an empty state.
    """
    _at_rest(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = {key: whole(v) if isinstance(v, Tensor) else v for key, v in optimizer.state[parameter].items()}
            if keep:
                state[names[parameter]] = own
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"names": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over what :func:`optimizer_state` gave, dealt out as the parameters are.

    Raises:
        ValueError: other parameters than those of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    there = {name for group in saved["groups"] for name in group["names"]}
    if wanted != there:
        raise ValueError(f"the optimizer's state is of other parameters: {', '.join(sorted(wanted ^ there)[:3])}")
    options = {name: group for group in saved["groups"] for name in group["names"]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = saved["state"].get(names[parameter], {})
            optimizer.state[parameter] = {
                key: _placed(value, parameter) if isinstance(value, Tensor) else value for key, value in own.items()
            }
        if group["params"]:
            old = options[names[group["params"][0]]]
            group.update({key: value for key, value in old.items() if key not in ("params", "names")})


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment as the parameter lies; the step counter, which has no shape, goes along with it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if value.dim() == 0 or not isinstance(parameter, DTensor):
        return value.to(parameter.device, copy=True)
    # Every process has the whole: nothing is sent.
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
