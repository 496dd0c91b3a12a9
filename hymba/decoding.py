"""Decoding without Python in the way: one step over fixed addresses, replayed as a CUDA graph.

A step reads the current token of every row, runs all layers on a static `HymbaCache` and leaves logits. Two versions
with one meaning: `modules` runs the model as it stands (hooks, adapters and quantised layers included); `fused` runs
few kernels per layer over plain weights. Neither reads anything back from the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hymba.cache import HymbaCache
from hymba.nn import HybridHeads, HymbaBlock, MambaHeads, Span

if TYPE_CHECKING:
    from hymba.model import HymbaForCausalLM


def why_not_fused(model: HymbaForCausalLM) -> str | None:
    """Why the fused step cannot serve this model, or `None`."""
    dtypes = {p.dtype for p in model.parameters()}
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        return f"weights on {len(devices)} devices"
    if len(dtypes) > 1:
        return f"weights of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has a forward hook"
        if "forward" in vars(module):
            return f"{name} has a forward of its own"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    for block in model.model.layers:
        if not isinstance(block, HymbaBlock) or type(block.mixer) is not HybridHeads:
            mixer = getattr(block, "mixer", block)
            return f"a layer with the mixer {type(mixer).__name__}"
        if block.mixer.fusion != "mean":
            return f"fusion={block.mixer.fusion!r}"
        if type(block.mixer.mamba) is not MambaHeads:
            return f"a layer with {type(block.mixer.mamba).__name__}"
        linears = [block.mixer.in_proj, block.mixer.out_proj, block.mixer.mamba.x_proj, block.mixer.mamba.dt_proj]
        if any(type(linear) is not nn.Linear for linear in linears):
            return "a projection that is not a plain nn.Linear"
        attention = block.mixer.attention
        if attention.q_norm is not None:
            return "query/key norms"
        for name, size in (("head_dim", attention.head_dim), ("v_head_dim", attention.v_head_dim)):
            if size < 16 or size & (size - 1):
                return f"{name}={size}; powers of two from 16"
        if block.mixer.mamba.d_state & (block.mixer.mamba.d_state - 1):
            return f"d_state={block.mixer.mamba.d_state}; powers of two"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels, streams and graphs go to the tensor's device, whatever the current one is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class DecodeStep:
    """One decode step over fixed addresses.

    Args:
        model: the language model, in inference.
        cache: a static cache that has taken in a prompt.
        fused: use the fused kernels; see `why_not_fused`.

    Attributes:
        tokens: (b,) int64, the token that each row takes in next. active: (b,) bool, rows that take one in.
        logits: (b, vocab) float32, of the last step.
    """

    def __init__(self, model: HymbaForCausalLM, cache: HymbaCache, *, fused: bool) -> None:
        if cache.max_length is None or not cache.columns or cache.seen is None:
            raise ValueError("a decode step needs a static cache (max_length=...) that holds a prompt")
        rows = cache.batch_size
        assert rows is not None
        self.model, self.cache, self.rows, self.fused = model, cache, rows, fused
        device = cache.seen.device
        cache.seen = cache.seen.expand(rows).clone()
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, model.config.vocab_size, device=device)
        self._fused = None
        if fused:
            from hymba.fused_decoding import FusedStep

            self._fused = FusedStep(model, cache, tokens=self.tokens, active=self.active, logits=self.logits)

    def run(self) -> None:
        """Take in `tokens`, leave `logits`, move the cache on by one."""
        with torch.inference_mode(False), torch.no_grad(), _current(self.tokens):
            if self._fused is not None:
                self._fused()
            else:
                self._run_modules()
            assert self.cache.seen is not None
            self.cache.seen.add_(self.active)

    def _run_modules(self) -> None:
        body = self.model.model
        x = body.embed_tokens(self.tokens[:, None])
        assert self.cache.seen is not None
        span = Span.following(
            1,
            start=self.cache.seen.clone(),
            columns=self.cache.columns,
            lengths=self.active.long(),
            offset=self.model.config.num_memory_tokens,
        )
        x, _, _ = body._run(x, self.cache.layers.__getitem__, span, self.cache, False, False)
        self.logits.copy_(self.model.lm_head(body.final_norm(x))[:, 0])

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Steps inside leave the cache as it was: they only write the slot that the next real step writes again."""
        held = [t for state in self.cache.layers for t in (state.conv, state.ssm) if t is not None]
        assert self.cache.seen is not None
        held.append(self.cache.seen)
        before = [tensor.clone() for tensor in held]
        try:
            yield
        finally:
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)


def capture(
    advance: Callable[[], None], *, step: DecodeStep, held: Sequence[Tensor] = ()
) -> Callable[[], None]:  # pragma: gpu
    """`advance`, which runs `step`, as the replay of a CUDA graph.

    Args:
        held: further tensors that `advance` writes; they and the cache are left as they were.
    """
    with _current(step.tokens):
        before = [tensor.clone() for tensor in held]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    with step.untouched():
                        advance()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with _healed(step.tokens.device), torch.cuda.graph(graph):
                advance()
        finally:
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)
        return graph.replay


@contextlib.contextmanager
def _healed(device: torch.device) -> Iterator[None]:  # pragma: gpu
    """A capture that fails leaves its stream current, and the random generator thinking that it goes on."""
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[device.index or 0]
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        raise
