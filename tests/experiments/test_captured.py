"""Steps as CUDA graphs: which batches are replayed, whose gradients those are, and the same losses as without.

A stand-in on the CPU does what a graph does: it works on the tensors that it was captured with and writes its gradients
over those of the replay before. The graph itself is tested in tests/gpu/test_captured_training.py.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers import losses_of

from hymba.experiments import captured
from hymba.experiments.captured import CapturedStep
from hymba.experiments.phases import plan_phases
from hymba.experiments.settings import SettingsError, train_settings
from hymba.experiments.train import main

MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
    "mamba_d_state": 4, "rope_type": "default", "max_position_embeddings": 64,
}  # fmt: skip


class Graphs:
    """In place of `captured.capture`; counts captures and replays."""

    def __init__(self):
        self.captures = self.replays = 0
        self.parameters = []

    def capture(self, step):
        self.captures += 1
        loss = step().clone()
        made = [p.grad for p in self.parameters]
        # Recorded, not done: what is in them now must not be used.
        for tensor in (loss, *(m for m in made if m is not None)):
            tensor.fill_(float("nan"))

        def replay():
            self.replays += 1
            before = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            loss.copy_(step())
            for p, own, old in zip(self.parameters, made, before):
                if own is not None:
                    own.copy_(p.grad)
                p.grad = old

        return replay, loss


@pytest.fixture
def graphs(monkeypatch):
    stand_in = Graphs()
    real = CapturedStep.__init__

    def begin(self, step, parameters, **options):
        stand_in.parameters = list(parameters)
        real(self, step, stand_in.parameters, **options)

    monkeypatch.setattr(CapturedStep, "__init__", begin)
    monkeypatch.setattr(captured, "capture", stand_in.capture)
    monkeypatch.setattr(captured, "available", lambda device: True)
    return stand_in


def run(folder, **sections):
    raw = {
        "model": MODEL,
        "data": {"task": {"name": "mqar", "pairs": [1, 2], "length": 16, "vocabulary": 16, "test_rows": 4}},
        "run": {"output": str(folder), "steps": 6, "batch_size": 4, "device": "cpu", "log_every": 1, "threads": 1,
                "tensorboard": False, **sections.pop("run", {})},
        **sections,
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return losses_of(main(path).output)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_gradient_norms_are_those_of_plain_steps(tmp_path, graphs, accumulation):
    plain = run(tmp_path / "plain", run={"gradient_accumulation": accumulation})
    assert (graphs.captures, len(plain)) == (0, 6)
    replayed = run(tmp_path / "replayed", run={"gradient_accumulation": accumulation, "cuda_graph": True})
    assert (graphs.captures, graphs.replays) == (1, 6 * accumulation - 1)
    assert replayed == plain


def test_a_phase_of_longer_rows_is_captured_anew(tmp_path, graphs):
    phases = [{"name": "long", "start": 0.5, "batch_size": 2, "task": {"length": 32}}]
    plain = run(tmp_path / "plain", phases=phases)
    assert run(tmp_path / "replayed", phases=phases, run={"cuda_graph": True}) == plain
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_a_batch_of_another_shape_goes_through_as_it_is(graphs):
    weight = torch.nn.Parameter(torch.ones(3))

    def step(batch):
        loss = (batch["x"] * weight).sum()
        loss.backward()
        return loss.detach()

    call = CapturedStep(step, [weight], accumulates=False)
    losses = []
    for value, rows in ((1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 2)):
        weight.grad = None
        losses.append(call({"x": torch.full((rows, 3), float(value))}))
        assert weight.grad.tolist() == [value * rows] * 3
    # Each is a tensor of its own, which the next replay leaves alone.
    assert [float(loss) for loss in losses] == [6, 12, 18, 12, 15, 36]
    assert (graphs.captures, graphs.replays) == (2, 3)


def test_without_a_gpu_steps_are_called_one_by_one(tmp_path):
    assert not captured.available("cpu")
    assert len(run(tmp_path / "run", run={"cuda_graph": True})) == 6


def test_several_processes_are_refused():
    settings = train_settings({"run": {"cuda_graph": True}}, where="here")
    with pytest.raises(SettingsError, match=r"run.cuda_graph = True: 2 processes .* allowed: one process"):
        plan_phases(settings, 2)
