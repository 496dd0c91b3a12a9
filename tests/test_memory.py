"""Memory estimates, the refusals that follow from them, and GPUs that are missing or old; with made-up devices."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, some_ids
from test_cost import RELEASE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM, cost, memory
from hymba.commands import models
from hymba.commands.errors import UsageError
from hymba.memory import MemoryEstimateError, check_fits, generation_bytes, training_bytes
from hymba.ops import backend

GIB = 2**30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how much memory every device says is free."""

    def say(size: float) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(size))

    return say


# Estimates.


def test_generation_counts_weights_and_cache_exactly() -> None:
    need = generation_bytes(RELEASE, batch=128, prompt=8192, length=8292, static=True)
    assert need.weights == 3_045_595_648
    assert need.cache == cost.cache_bytes(RELEASE, 8292, batch=128, static=True).total
    assert need.total == sum(need.to_dict().values())


def test_chunks_bound_the_prefill() -> None:
    whole = generation_bytes(RELEASE, batch=1, prompt=131072, length=131072, static=True)
    cut = generation_bytes(RELEASE, batch=1, prompt=131072, length=131072, static=True, chunk=8192)
    assert whole.activations == 16 * cut.activations
    assert cut.cache == whole.cache


def test_a_cache_that_grows_needs_more_than_one_of_fixed_size() -> None:
    sizes = [generation_bytes(RELEASE, batch=1, prompt=10, length=8192, static=s).cache for s in (True, False)]
    assert sizes[0] < sizes[1] < 1.6 * sizes[0]


def test_training_counts_parameters_by_their_dtype() -> None:
    count = 1_522_797_824
    step = training_bytes(RELEASE, batch=2, length=8192)
    assert (step.weights, step.optimizer) == (6 * count, 8 * count)
    plain = training_bytes(RELEASE, batch=2, length=8192, parameter_dtype="bfloat16", optimizer=False)
    assert (plain.weights, plain.optimizer) == (2 * count, 0)
    assert plain.activations == step.activations
    # Gradients come as activations go; a short step ends with all of them.
    assert step.gradients == 0
    assert training_bytes(RELEASE, batch=1, length=64).gradients == 4 * count * 31 // 32


def test_policies_keep_less_and_a_fused_loss_needs_less() -> None:
    none, selective, full = (
        training_bytes(RELEASE, batch=2, length=8192, checkpointing=policy).activations for policy in memory.POLICIES
    )
    assert 0.5 * none < selective < 0.8 * none
    assert full < 0.2 * none
    logits = [training_bytes(RELEASE, batch=2, length=8192, fused_loss=f).logits for f in (False, True)]
    assert logits[1] < 0.2 * logits[0]
    with pytest.raises(ValueError, match="checkpointing='some': allowed: 'none', 'selective', 'full'"):
        training_bytes(RELEASE, batch=1, length=1, checkpointing="some")


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as a GPU's allocator would, weights left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops choose their kernels on the meta device too, where nothing runs: what is alive is what a GPU would hold."""
    always = backend._Backend()
    for table in backend._TABLE.values():
        if "triton" in table:
            monkeypatch.setitem(table, "triton", always)


def released(layers: int) -> Any:
    fields = RELEASE.to_dict() | {"num_hidden_layers": layers, "global_attn_idx": [0], "kv_reuse_group": [[1, 2]]}
    fields["kv_reuse_group"] = [[i, i + 1] for i in range(1, layers - 1, 2)]
    with torch.device("meta"):
        return HymbaForCausalLM(HymbaConfig.from_dict(fields)).to(torch.bfloat16)


WITHIN = 0.06
"""Largest relative difference of an estimate, weights left out, from the bytes that are alive at the peak."""


@pytest.mark.usefixtures("_kernels_everywhere")
@torch.no_grad()
def test_a_prefill_is_as_large_as_estimated() -> None:
    model = released(8).eval()
    ids = torch.zeros(2, 8192, dtype=torch.long, device="meta")
    with Live(model) as live:
        model(ids, past_key_values=HymbaCache(model.config, max_length=8200), logits_to_keep=1)
    need = generation_bytes(model.config, batch=2, prompt=8192, length=8200, static=True)
    assert need.total - need.weights == pytest.approx(live.peak, rel=WITHIN)


@pytest.mark.usefixtures("_kernels_everywhere")
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_training_step_is_as_large_as_estimated(policy: str) -> None:
    model = released(8).train()
    model.use_fused_loss()
    model.set_activation_checkpointing(policy)
    ids = torch.zeros(1, 8192, dtype=torch.long, device="meta")
    with Live(model) as live:
        model(ids, labels=ids, use_cache=False).loss.backward()
    need = training_bytes(
        model.config, batch=1, length=8192, parameter_dtype="bfloat16", optimizer=False, checkpointing=policy,
        fused_loss=True,
    )  # fmt: skip
    assert need.total - need.weights == pytest.approx(live.peak, rel=WITHIN)


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_shared_keys_and_values_go_with_their_last_borrower(use_cache: bool) -> None:
    groups = [[0, 1], [2, 3, 4], [5, 6]]
    model = build(num_hidden_layers=8, global_attn_idx=[], kv_reuse_group=groups)
    seen: list[weakref.ref[Any]] = []
    alive = []

    def note(module: Any, args: Any, output: Any) -> None:
        # Those of the meta tokens are few and stay.
        if output[0].shape[1] == 9 and not any(ref() is output[2] for ref in seen):
            seen.append(weakref.ref(output[2]))
        alive.append(sum(ref() is not None for ref in seen))

    for layer in model.model.layers:
        layer.register_forward_hook(note)
    model(some_ids(2, 9), use_cache=use_cache)
    # The group's, and for a moment those of the layer before.
    assert max(alive) <= 2


# Refusals.


def test_a_refusal_says_what_is_needed_free_and_would_fit(free: Any) -> None:
    free(12 * GIB)

    def need(batch: int, length: int) -> memory.MemoryBytes:
        return memory.MemoryBytes(weights=3 * GIB, cache=batch * length * GIB // 1024)

    check_fits("generation", need, batch=12, length=1024, device="cuda:0", held=3 * GIB)
    with pytest.raises(MemoryEstimateError) as error:
        check_fits("generation", need, batch=13, length=1024, device="cuda:0", held=3 * GIB, advice="or wait")
    assert str(error.value) == (
        "generation of 13 rows of 1,024 tokens needs about 16.0 GiB (weights 3.0, cache 13.0), of which 3.0 are there, "
        "and cuda:0 has 12.0 GiB free; would fit: 12 of 13 rows or 945 of 1,024 tokens a row; or wait "
        "(HYMBA_MEMORY_CHECK=off tries anyway)"
    )
    free(0)
    with pytest.raises(MemoryEstimateError, match="would fit: not one row of one token"):
        check_fits("generation", need, batch=1, length=1024, device="cuda:0", held=3 * GIB)


def test_the_check_can_be_switched_off(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(0)
    monkeypatch.setenv(memory.ENV, "off")
    check_fits("x", lambda b, n: memory.MemoryBytes(cache=1), batch=1, length=1, device="cuda")


def test_a_cpu_says_nothing() -> None:
    assert memory.free_bytes("cpu") is None


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_generate_refuses_before_it_allocates(free: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = build(dtype=torch.float32)
    ids = some_ids(4, 9)
    expected = model.generate(ids, max_new_tokens=3, cache_implementation=kind, do_sample=False)
    free(1 << 40)
    assert torch.equal(model.generate(ids, max_new_tokens=3, cache_implementation=kind, do_sample=False), expected)
    begun = []
    monkeypatch.setattr(HymbaCache, "begin", lambda *_: begun.append(1))
    need = generation_bytes(model.config, batch=4, prompt=9, length=11, dtype=torch.float32, static=kind == "static")
    free(need.total - need.weights - 1)
    with pytest.raises(MemoryEstimateError, match=r"generation of 4 rows of 11 tokens .* would fit: 3 of 4 rows"):
        model.generate(ids, max_new_tokens=3, cache_implementation=kind, do_sample=False)
    assert not begun


def test_weights_that_do_not_fit_are_not_read(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(1000)
    monkeypatch.setattr("hymba.model.HymbaForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(MemoryEstimateError, match=r"the weights need .* GiB in float32 and cpu has 0.0 GiB free; --dt"):
        models.load(models.locate(None), dtype="float32", device="cpu")


def test_the_command_ends_with_one_line(free: Any) -> None:
    from hymba.cli import app

    free(10_000_000)
    result = CliRunner().invoke(app, ["generate", "def ", "--max-new-tokens", "100000"])
    assert result.exit_code == 2
    assert "generation of 1 rows of 100," in result.output and "Traceback" not in result.output


def test_training_refuses_before_it_writes(free: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hymba.experiments.settings import DataSettings, RunSettings, SettingsError, TrainSettings
    from hymba.experiments.train import check_device

    def settings(**run: Any) -> Any:
        data = DataSettings(sequence_length=64)
        return TrainSettings(model={}, data=data, run=RunSettings(batch_size=4, **run))

    model = build(dtype=torch.float32)
    free(0)
    check_device(settings(device="cpu"), model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(
        MemoryEstimateError, match=r"a training step of 4 rows .*run.activation_checkpointing=full takes"
    ):
        check_device(settings(), model)
    free(1 << 40)
    check_device(settings(precision="bfloat16"), model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    check_device(settings(), model)
    with pytest.raises(
        SettingsError, match=r"run.precision = 'bfloat16': Tesla T4 \(compute capability 7.5\) has none"
    ):
        check_device(settings(precision="bfloat16"), model)


# GPUs that are not there, or too old.


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = models.load_config(models.locate(None))
    config.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    assert models._dtype_there("auto", config, "cuda") == "float32"
    line = capsys.readouterr().err
    assert "Tesla T4 (compute capability 7.5) has no bfloat16: running in float32; --dtype float16" in line
    assert models._dtype_there("float16", config, "cuda") == "float16"
    assert models._dtype_there("auto", config, "cpu") == "auto"
    with pytest.raises(UsageError, match=r"--dtype bfloat16: Tesla T4 .* allowed there: float32, float16"):
        models._dtype_there("bfloat16", config, "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert models._dtype_there("bfloat16", config, "cuda") == "bfloat16"


def test_no_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UsageError, match=r"--device cuda: this PyTorch \(.*\) is built without CUDA; use auto or cpu"):
        models._device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(UsageError, match=r"--device cuda: this machine has no CUDA device that PyTorch can use"):
        models._device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--device cuda:2: this machine has 2 CUDA devices, numbered from 0"):
        models._device("cuda:2")
    assert models._device("cuda:1") == "cuda:1"
