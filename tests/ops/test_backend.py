from __future__ import annotations

import sys
import warnings

import pytest
import torch
from ops.op_cases import scan_case

from hymba.ops import BackendError, available, backend, selective_scan, use_backend


@pytest.fixture
def call():
    return backend.Call(torch.zeros(1, 2, 3), torch.zeros(3, 4))


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(backend.ENV, raising=False)
    monkeypatch.setattr(backend, "_FAILED", {})


def run(**options):
    case = scan_case(1, 5, 3, 2, dtype=torch.float32)
    return selective_scan(**case, **options)


def test_auto_takes_pytorch_on_the_cpu(call):
    for op in ("selective_scan", "causal_conv1d", "selective_state_update", "causal_conv1d_update", "attention"):
        assert backend.resolve(op, "auto", call) == backend.Choice("torch", False)


def test_table_has_a_reason_for_every_refusal():
    rows = available()
    assert {r.op for r in rows} == set(backend._TABLE)
    assert all(r.usable == (r.reason == "") for r in rows)
    assert all(r.usable for r in rows if r.backend in ("torch", "reference"))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"backend='cuda' for selective_scan; allowed: 'auto', 'triton'"):
        run(backend="cuda")
    with pytest.raises(ValueError, match="no op has a backend 'cuda'"), use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="'selective_scan=cuda' is unknown; selective_scan has triton"):
        use_backend(selective_scan="cuda").__enter__()
    with pytest.raises(ValueError, match="'scan=torch' is unknown; ops are"):
        use_backend(scan="torch").__enter__()


def test_forced_and_refused_says_why(monkeypatch):
    with pytest.raises(BackendError, match="'mamba_ssm' is forced and cannot serve: mamba_ssm"):
        run(backend="mamba_ssm")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="'triton' is forced and cannot serve"):
        run(backend="triton")


def test_argument_beats_context_beats_environment(call, monkeypatch):
    monkeypatch.setenv(backend.ENV, "reference")
    assert backend.resolve("selective_scan", "auto", call) == backend.Choice("reference", True)
    assert backend.resolve("selective_state_update", "auto", call) == backend.Choice("torch", False)
    with use_backend("torch"):
        assert backend.resolve("selective_scan", "auto", call).name == "torch"
        assert backend.resolve("selective_scan", "reference", call).name == "reference"
        with use_backend(selective_scan="reference"):
            assert backend.resolve("selective_scan", "auto", call).name == "reference"
            assert backend.resolve("causal_conv1d", "auto", call).name == "torch"
    assert backend.resolve("selective_scan", "auto", call).name == "reference"


def test_environment_takes_single_ops(call, monkeypatch):
    monkeypatch.setenv(backend.ENV, "selective_scan=reference, causal_conv1d=torch")
    assert backend.resolve("selective_scan", "auto", call) == backend.Choice("reference", True)
    assert backend.resolve("causal_conv1d", "auto", call) == backend.Choice("torch", True)
    assert backend.resolve("causal_conv1d_update", "auto", call) == backend.Choice("torch", False)


def test_misspelled_environment_is_refused(monkeypatch):
    monkeypatch.setenv(backend.ENV, "trition")
    with pytest.raises(ValueError, match=r"HYMBA_BACKEND: no op has a backend 'trition'; allowed: .*triton"):
        run()


def test_failed_kernel_hands_over_with_one_warning():
    with pytest.warns(
        UserWarning, match=r"selective_scan: the triton kernel failed \(RuntimeError: no ptxas\)"
    ) as seen:
        backend.kernel_failed("selective_scan", "triton", RuntimeError("no ptxas\nlong story"), was_forced=False)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.kernel_failed("selective_scan", "triton", RuntimeError("no ptxas"), was_forced=False)
    assert not backend.wants_kernel("selective_scan", "triton", False)
    row = next(r for r in available() if (r.op, r.backend) == ("selective_scan", "triton"))
    assert row.reason == "failed here: RuntimeError: no ptxas"


def test_failed_kernel_raises_when_forced():
    with pytest.raises(BackendError, match="is forced and failed: RuntimeError: no ptxas"):
        backend.kernel_failed("selective_scan", "triton", RuntimeError("no ptxas"), was_forced=True)


def test_out_of_memory_is_not_a_failed_kernel():
    with pytest.raises(torch.OutOfMemoryError):
        backend.kernel_failed("selective_scan", "triton", torch.OutOfMemoryError("full"), was_forced=False)
    assert backend.wants_kernel("selective_scan", "triton", False)


def test_the_op_hands_over_inside(monkeypatch):
    # As compiled code does that chose the kernel before it failed: the op gets its name and falls back.
    from hymba.ops import scan_op

    monkeypatch.setitem(sys.modules, "hymba.ops.triton", None)
    case = scan_case(1, 5, 3, 2, dtype=torch.float32)
    with pytest.warns(UserWarning, match="PyTorch takes its place"):
        y, _ = scan_op.run_scan(scan_op.ScanInputs(**case), "triton", False)
    torch.testing.assert_close(y, selective_scan(**case)[0])
