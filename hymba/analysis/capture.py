"""Reads attention maps, scan operators and branch outputs while a model runs, through hooks on its modules.

No forward is written a second time. Modules are found by their kind inside each layer, so a layer may lack one of the
branches. The meta tokens run before the text, through the same modules, and what the scan reads in both runs is put
together: the operator over [meta | text] says what of the initial state, that the meta tokens leave, each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.analysis.operator import HeadScanOperator, Operator, ScanOperator
from hymba.config import HymbaConfig
from hymba.model import HymbaForCausalLM
from hymba.nn import AttentionHeads, Collected, Mamba2Heads, MambaHeads, SharedKV


class AnalysisError(ValueError):
    """A model or text that an analysis cannot work with; the message says why and what would do."""


@dataclass
class Reading:
    """What was read of one layer.

    Attributes:
        layer: its index. heads: attention heads. slices: of the SSM's channels, that count as its heads; in Mamba-2 its
            own heads. window: of its attention.
        attention: (heads, l, m + tokens so far) weights of the last call, float32; `None` if not wanted or there.
        outputs: (l, d_inner) of the last call by name: "attention" and "ssm" as the branches put them out, with
            " normed" behind their norms, and "gate", the SSM's gate.
    """

    layer: int
    heads: int = 0
    slices: int = 0
    window: int | None = None
    attention: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    # Of the calls so far, meta tokens first: (1, tokens, width) each.
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {"dt": [], "B": [], "C": [], "x": []})
    mamba: MambaHeads | Mamba2Heads | None = None
    on_text: bool = False

    def operator(self) -> Operator | None:
        """The scan over all tokens so far; `None` for a layer without one."""
        if self.mamba is None or not self.parts["dt"]:
            return None
        dt, B, C = (torch.cat(self.parts[name], dim=1)[0] for name in ("dt", "B", "C"))
        compute = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(compute) + self.mamba.dt_bias.detach().to(compute))
        A = -torch.exp(self.mamba.A_log.detach().to(compute))
        kind = HeadScanOperator if isinstance(self.mamba, Mamba2Heads) else ScanOperator
        return kind(dt, A, B.to(compute), C.to(compute))

    def scan_input(self) -> Tensor:
        """(tokens so far, d_inner) what the scan mixes: the convolution's output."""
        return torch.cat(self.parts["x"], dim=1)[0]

    def clear(self) -> None:
        """Forget what was read."""
        self.attention = None
        self.outputs.clear()
        for calls in self.parts.values():
            calls.clear()


@contextmanager
def reading(
    model: HymbaForCausalLM,
    *,
    attention: bool = False,
    scan: bool = False,
    scan_input: bool = False,
    outputs: bool = False,
    visit: Callable[[Reading], None] | None = None,
) -> Iterator[list[Reading]]:
    """Read every call of the model inside the block; texts of one row, without padding and not packed.

    Args:
        model: its mode is evaluation inside the block, without gradients.
        attention, scan, scan_input, outputs: what to read.
        visit: called with each layer's reading when the layer has seen the text; what was read is forgotten behind it,
            so that one layer's maps exist at a time. Without it the readings are kept.

    Yields:
        One reading per layer.
    """
    training = model.training
    config = model.config
    found = []
    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.train, training)
        model.eval()

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        for i, layer in enumerate(model.model.layers):
            one = Reading(i, heads_of(layer, "attention", config), heads_of(layer, "ssm", config))
            found.append(one)
            hook(layer.register_forward_pre_hook(_before_layer(one), with_kwargs=True))
            for name, module in layer.named_modules():
                if isinstance(module, AttentionHeads):
                    one.window = module.window
                    if attention:
                        hook(module.register_forward_pre_hook(_ask_for_weights(one), with_kwargs=True))
                        hook(module.register_forward_hook(_take_weights(one), with_kwargs=True))
                    if outputs:
                        hook(module.register_forward_hook(_take_output(one, "attention")))
                elif isinstance(module, MambaHeads | Mamba2Heads):
                    one.mamba = module
                    if isinstance(module, Mamba2Heads):
                        if scan:
                            hook(module.register_forward_pre_hook(_take_steps(one, module)))
                        if scan or scan_input:
                            hook(module.conv1d.register_forward_hook(_take_convolved(one, module, scan, scan_input)))
                    elif scan_input:
                        hook(module.conv1d.register_forward_hook(_take_part(one, "x", first=True)))
                    if scan and isinstance(module, MambaHeads):
                        hook(module.dt_proj.register_forward_hook(_take_part(one, "dt")))
                        hook(module.B_norm.register_forward_hook(_take_part(one, "B")))
                        hook(module.C_norm.register_forward_hook(_take_part(one, "C")))
                    if outputs:
                        hook(module.register_forward_hook(_take_output(one, "ssm")))
                        hook(module.register_forward_pre_hook(_take_gate(one)))
                elif outputs and name.rpartition(".")[2] in BRANCH_NORMS.values():
                    branch = next(b for b, norm in BRANCH_NORMS.items() if name.endswith(norm))
                    hook(module.register_forward_hook(_take_output(one, f"{branch} normed")))
            # After the hooks on what is inside.
            hook(layer.register_forward_hook(_after_layer(one, visit)))
        yield found


BRANCH_NORMS = {"attention": "attention_norm", "ssm": "mamba_norm"}
"""The module whose weights scale a branch in the fusion (the paper's beta), by branch."""


def heads_of(layer: nn.Module, branch: str, config: HymbaConfig) -> int:
    """Heads of a layer's branch; 0 where it lacks the branch.

    Mamba-2 has heads of its own. Mamba-1 has as many as the layer has attention heads, or as the configuration names,
    where its channels can be cut into so many equal slices; otherwise one.
    """
    attention = next((m.num_heads for m in layer.modules() if isinstance(m, AttentionHeads)), 0)
    if branch == "attention":
        return attention
    own = next((m.num_heads for m in layer.modules() if isinstance(m, Mamba2Heads)), 0)
    if own:
        return own
    width = next((m.d_inner for m in layer.modules() if isinstance(m, MambaHeads)), 0)
    wanted = (attention, config.num_attention_heads, 1)
    return next(heads for heads in wanted if heads and width % heads == 0) if width else 0


def branch_norm(layer: nn.Module, branch: str) -> nn.Module | None:
    """The norm of a branch, "attention" or "ssm", in a layer that fuses both; else `None`."""
    mixer = getattr(layer, "mixer", None)
    return getattr(mixer, BRANCH_NORMS[branch], None)


def _before_layer(one: Reading) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        one.on_text = not kwargs["span"].in_prefix

    return hook


def _after_layer(one: Reading, visit: Callable[[Reading], None] | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if one.on_text and visit is not None:
            visit(one)
            one.clear()

    return hook


def _ask_for_weights(one: Reading) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if one.on_text and kwargs.get("weights") is None:
            return args, {**kwargs, "weights": Collected()}
        return None

    return hook


def _take_weights(one: Reading) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if not one.on_text:
            return
        kv: SharedKV = args[1]
        (weights,) = kwargs["weights"].tensors
        # Keys from a cache may stand in a ring; each has its position.
        key = kv.visibility.key[0].to(weights.device)
        meta = weights.shape[-1] - key.shape[0]
        rows, columns = weights[0], int(key.max()) + 1
        if key.shape[0] != columns or bool((key != torch.arange(columns, device=key.device)).any()):
            text = rows.new_zeros(*rows.shape[:2], columns)
            # Empty slots have negative positions and no weight.
            text.index_add_(2, key.clamp(min=0), rows[..., meta:])
            rows = torch.cat([rows[..., :meta], text], dim=2)
        one.attention = rows

    return hook


def _take_part(one: Reading, name: str, *, first: bool = False) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        one.parts[name].append((out[0] if first else out).detach())

    return hook


def _take_steps(one: Reading, module: Mamba2Heads) -> Callable[..., None]:
    """The step sizes are the last columns of what the layer's projection gives the branch."""

    def hook(_: nn.Module, args: Any) -> None:
        one.parts["dt"].append(args[0][..., -module.num_heads :].detach())

    return hook


def _take_convolved(one: Reading, module: Mamba2Heads, scan: bool, scan_input: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, out: Any) -> None:
        x, B, C = out[0].detach().split(module.splits[:3], dim=-1)
        if scan:
            for name, part in (("B", B), ("C", C)):
                one.parts[name].append(part.unflatten(-1, (module.n_groups, module.d_state)))
        if scan_input:
            one.parts["x"].append(x)

    return hook


def _take_output(one: Reading, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        if one.on_text:
            one.outputs[name] = out[0].detach()

    return hook


def _take_gate(one: Reading) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        if one.on_text:
            one.outputs["gate"] = F.silu(args[1][0].detach().float())

    return hook


@contextmanager
def without_meta_tokens(model: HymbaForCausalLM) -> Iterator[None]:
    """Inside the block every text starts from the empty state.

    Raises:
        AnalysisError: the model has no meta tokens.
    """
    tokens = model.model.meta_tokens
    if tokens is None:
        raise AnalysisError("the model has no meta tokens (num_memory_tokens=0) to leave out")
    model.model.meta_tokens = None
    try:
        yield
    finally:
        model.model.meta_tokens = tokens
