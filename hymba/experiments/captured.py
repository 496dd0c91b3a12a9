"""Forward and backward of a training step as one CUDA graph: the host launches it once instead of every kernel.

Worth it where the host is slower than the device: small models, short rows, slow processors. The numbers are those of
the same kernels called one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from hymba.experiments.processes import uses_gpu
from hymba.experiments.settings import SettingsError

Batch = Mapping[str, Tensor]
Step = Callable[[Batch], Tensor]


def available(device: str) -> bool:
    """Whether steps with ``run.device`` can be captured on this machine."""
    return uses_gpu(device)


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:  # pragma: gpu
    """Record a step without doing it; returns what does it, and where its loss will be.

    Raises:
        SettingsError: something in the step waits for the device or cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = step()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        message = f"run.cuda_graph = True: this step cannot be captured: {reason}; leave run.cuda_graph out"
        raise SettingsError(message) from error
    return graph.replay, loss


class CapturedStep:
    """A step for batches of one shape. The first batch of a shape goes through as it is, and compiles what has to be
    compiled; the second is captured and replayed, as are all that follow.

    Args:
        step: forward and backward of a batch, which adds to the gradients of ``parameters``; returns the loss ().
        parameters: whose gradients the step makes. Their storage must stay where it is.
        accumulates: an optimizer step takes several batches. Gradients are then added up outside the graph's own.
    """

    def __init__(self, step: Step, parameters: Iterable[Parameter], *, accumulates: bool) -> None:
        self._step, self._parameters, self._accumulates = step, list(parameters), accumulates
        self._shapes: object = None
        self._replay: Callable[[], object] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss (); gradients are added to ``.grad``."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}
        if shapes != self._shapes:
            self._shapes, self._replay = shapes, None
            return self._step(batch)
        if self._replay is None:
            self._capture(batch)
            assert self._replay is not None
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._replay()
        self._hand_over()
        # The next replay writes over it.
        return self._loss.clone()

    def _capture(self, batch: Batch) -> None:
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            # Then backward writes its gradients into memory of the graph instead of adding to these.
            parameter.grad = None
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        self._replay, self._loss = capture(lambda: self._step(self._inputs))
        self._made = [parameter.grad for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, before):
            parameter.grad = gradient

    def _hand_over(self) -> None:
        """What the replay has made, to the parameters."""
        for parameter, made in zip(self._parameters, self._made):
            if made is None:
                continue
            if parameter.grad is not None:
                parameter.grad.add_(made)
            else:
                parameter.grad = made.clone() if self._accumulates else made
