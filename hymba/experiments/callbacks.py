"""What happens around training steps: a clean stop, a progress bar, TensorBoard, held-out measurements."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba.experiments.processes import StopVote, is_first, world_size

_ONE_SIGNAL = 2.0
"""Seconds in which signals to several processes count as one."""
HELD_OUT = {
    "bits_per_byte": ("held-out bits/byte", ".4f"),
    "accuracy": ("held-out accuracy", ".4f"),
    "held_out_loss": ("held-out loss", ".4f"),
    "preference_accuracy": ("held-out preferences", ".4f"),
}
"""The figures that are measured on held-out data: how a progress line shows them."""


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second signal stops at once, unsaved.

    Several processes stop at the same step, one after the signal: they vote at each step and read the votes at the
    next. A launcher passes on what the terminal has sent already, so for them what comes within two seconds counts as
    one signal.

    Use as a context manager around ``trainer.train()``; handlers are put back on leaving. Signals reach the main
    thread only, so elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._vote = StopVote()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if world_size() > 1 and time.monotonic() - self._at < _ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self.received, self._at = signal.Signals(number), time.monotonic()
        if is_first():
            print(
                f"\n{self.received.name}: stopping after this step; saving a checkpoint (again: stop at once)",
                file=sys.stderr,
                flush=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._vote.cast(self.received is not None):
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._vote.settle()

    def agreed(self) -> bool:
        """Whether any process has received a signal; all processes ask, and wait for each other."""
        before = self._vote.cast(self.received is not None)
        return self._vote.settle() or before


class Meter(TrainerCallback):
    """Seconds of training: steps and fetching their rows, until the device is done with them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def take(self) -> float:
        """Seconds since the last call, without those paused."""
        with self.paused():
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count; ``paused()`` also wraps a function. Waits for the device on entering."""
        counting = self._since is not None
        self._stop()
        yield
        if counting:
            self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is None:
            return
        if torch.cuda.is_initialized():
            # The host asks for a step and goes on, so that by its clock alone steps would take no time.
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()


class Progress(TrainerCallback):
    """A bar with loss and tokens/s on a terminal; otherwise one line per log entry. ``steps``: of the whole run."""

    def __init__(self, steps: int | None = None) -> None:
        self._bar: Any = None
        self._steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps or state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                desc="train",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = {
            "loss": ("loss", ".4f"),
            "tokens_per_second": ("tok/s", ",.0f"),
            "learning_rate": ("lr", ".2e"),
            **HELD_OUT,
        }
        parts = [f"{name} {logs[key]:{form}}" for key, (name, form) in shown.items() if key in logs]
        if not parts:
            return
        if self._bar is None:
            print(f"step {state.global_step}/{self._steps or state.max_steps}  " + "  ".join(parts), flush=True)
        elif not HELD_OUT.keys().isdisjoint(logs):
            self._bar.write(f"step {state.global_step}  " + "  ".join(parts))
        else:
            self._bar.set_postfix_str("  ".join(parts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoard(TrainerCallback):
    """Every number that is logged, as a curve; a resumed run replaces what lies beyond its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._writer is None:
            return
        for key, value in (logs or {}).items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, state.global_step)
        self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class HeldOut(TrainerCallback):
    """Measures on held-out data every ``every`` steps and logs the figure as ``name``, one of :data:`HELD_OUT`."""

    def __init__(
        self,
        every: int,
        measure: Callable[[], float],
        log: Callable[[dict[str, float]], None],
        name: str = "bits_per_byte",
        steps: int | None = None,
    ) -> None:
        """``steps``: of the whole run, whose last step is measured when all is done."""
        self._every, self._measure, self._log, self._name = every, measure, log, name
        self._steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 and state.global_step < (self._steps or state.max_steps):
            self._log({self._name: self._measure()})
