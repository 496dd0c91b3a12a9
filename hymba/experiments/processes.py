"""The processes that a launcher (torchrun, accelerate launch) has started together: who decides, and who is told.

One process is the first; it alone checks, prepares and writes, and the others get its decision or its refusal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hymba.experiments.settings import SettingsError

Found = TypeVar("Found")

PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which reads and encodes the corpus."""
_ELSEWHERE = {"ACCELERATE_USE_FSDP": "fsdp2", "ACCELERATE_USE_DEEPSPEED": "fsdp2"}
_control: Any = None


class RefusedElsewhere(RuntimeError):
    """The first process has refused to go on, and has said why."""

    silent = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def rank() -> int:
    """Of this process among all that were started together."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes started together, each with a device of its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return rank() == 0


def uses_gpu(device: str) -> bool:
    """Whether ``run.device`` means a GPU on this machine."""
    return device != "cpu" and torch.cuda.is_available()


@contextlib.contextmanager
def together(*, cpu: bool) -> Iterator[None]:
    """Connect the processes, and part them again; nothing happens for a single one.

    Args:
        cpu: gloo between CPUs; otherwise what fits the GPUs.

    Raises:
        SettingsError: more processes than GPUs, or a launcher that would wrap the model its own way.
    """
    global _control
    for name, option in _ELSEWHERE.items():
        if os.environ.get(name, "false").lower() in ("1", "true"):
            raise SettingsError(
                f"{name} is set: accelerate's configuration would wrap the model; leave it out and set "
                f"run.distributed={option}"
            )
    if world_size() == 1:
        yield
        return
    # The two fields of the settings that Trainer would otherwise take from the launcher's environment.
    os.environ["ACCELERATE_USE_CPU"] = str(cpu).lower()
    if not cpu and torch.cuda.is_available():  # pragma: gpu
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise SettingsError(f"process {local} of this machine has no GPU: {there} are visible; start {there}")
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    PartialState(cpu=cpu, timeout=PATIENCE)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        _control = None
        # It would go on to answer for a group that is gone.
        AcceleratorState._reset_state(reset_partial_state=True)
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def control_group() -> Any:
    """A gloo group for what hosts tell each other, which no accelerator waits for; None for a single process."""
    return _control


def wait() -> None:
    """Until all processes are here."""
    if _control is not None:
        dist.barrier(group=_control)


def first_decides(decide: Callable[[], Found]) -> Found:
    """What ``decide`` returns in the first process, in all of them. It must be picklable.

    Raises:
        RefusedElsewhere: in the others, when it raises in the first.
    """
    if _control is None:
        return decide()
    message: list[Any] = [None]
    failure: BaseException | None = None
    if is_first():
        try:
            message = [("found", decide())]
        except BaseException as error:
            failure, message = error, [("failed", f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(message, src=0, group=_control)
    if failure is not None:
        raise failure
    kind, value = message[0]
    if kind == "failed":
        raise RefusedElsewhere(value, exit_code=1)
    return value


class StopVote:
    """Whether any process wants to stop, known to all at the same step, one step late: nobody waits for an answer."""

    def __init__(self) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def cast(self, wanted: bool) -> bool:
        """Take part in the vote of this step; the result is that of the step before."""
        if _control is None:
            return wanted
        stop = self.settle()
        self._flag = torch.tensor([int(wanted)], dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=_control, async_op=True)
        return stop

    def settle(self) -> bool:
        """Wait for the vote that is under way, if there is one."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag)
