"""What a terminal shows, and what signals outside the main thread do."""

from __future__ import annotations

import io
import signal
import sys
import threading

import pytest
from transformers import TrainerControl, TrainerState

from hymba.experiments.callbacks import Progress, StopOnSignal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def state(step, total=10, zero=True):
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=zero)


def test_a_bar_with_loss_and_speed_on_a_terminal(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(None, state(4), control)
    progress.on_step_end(None, state(6), control)
    progress.on_log(None, state(6), control, logs={"loss": 1.23456, "tokens_per_second": 4321.0, "learning_rate": 1e-3})
    progress.on_log(None, state(6), control, logs={"bits_per_byte": 1.05})
    progress.on_train_end(None, state(6), control)
    progress.on_train_end(None, state(6), control)
    shown = terminal.getvalue() + capsys.readouterr().out
    for part in ("6/10", "loss 1.2346", "tok/s 4,321", "lr 1.00e-03", "held-out bits/byte 1.0500"):
        assert part in shown


def test_lines_without_a_terminal_and_silence_in_other_processes(capsys):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(None, state(0), control)
    progress.on_log(None, state(3), control, logs={"loss": 2.0})
    progress.on_log(None, state(3), control, logs={"other": 2.0})
    progress.on_log(None, state(3), control, logs=None)
    progress.on_log(None, state(3, zero=False), control, logs={"loss": 3.0})
    assert capsys.readouterr().out == "step 3/10  loss 2.0000\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_checkpoint_and_the_end(number, capsys):
    before, control = signal.getsignal(number), TrainerControl()
    with StopOnSignal() as stop:
        stop.on_step_end(None, state(1), control)
        assert not control.should_save
        signal.raise_signal(number)
        stop.on_step_end(None, state(2), control)
    assert control.should_save
    assert control.should_training_stop
    assert signal.getsignal(number) is before
    assert number.name in capsys.readouterr().err


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with StopOnSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
