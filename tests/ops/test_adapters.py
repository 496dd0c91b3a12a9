"""mamba-ssm and causal-conv1d behind our ops: values and every gradient, and what they refuse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from ops import package_fixtures as packages
from ops.op_cases import conv_case, row_options, scan_case, with_gradients, worst

from hymba.ops import (
    BackendError,
    adapters,
    available,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_ref,
    selective_state_update,
)
from hymba.ops.adapters import causal_conv1d as conv_adapter
from hymba.ops.adapters import mamba_ssm as scan_adapter

# The kernels take the fast exponential, and sum in an order of their own.
FLOAT32 = 1e-4
# One input twice: sums over steps and rows may be taken in another order.
AGAIN = 1e-5
BFLOAT16 = 1e-2


def where_it_runs(monkeypatch: pytest.MonkeyPatch, extension: str) -> Iterator[str]:
    """ "cuda" with the real package, else "cpu" with its stand-in."""
    packages.fresh(monkeypatch)
    if packages.real(extension):
        yield "cuda"
    else:
        packages.stand_in(monkeypatch)
        yield "cpu"
        packages.forget()


@pytest.fixture
def scan_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from where_it_runs(monkeypatch, "selective_scan_cuda")


@pytest.fixture
def conv_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from where_it_runs(monkeypatch, "causal_conv1d_cuda")


def double(case):
    return {k: None if v is None else v.double() for k, v in case.items()}


def reference_scan(*positional, **options):
    return selective_scan(*positional, backend="reference", **options)


def reference_conv(*positional, **options):
    return causal_conv1d(*positional, backend="reference", **options)


def package_scan(device):
    return packages.on(device, lambda *p, **o: selective_scan(*p, backend="mamba_ssm", **o))


def package_conv(device):
    return packages.on(device, lambda *p, **o: causal_conv1d(*p, backend="causal_conv1d", **o))


@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_scan_equals_reference(scan_device, length, states):
    case = scan_case(3, length, 8, 4, states=states, dtype=torch.float32)
    for options in row_options(3, length):
        if "seq_idx" not in options:
            want = with_gradients(reference_scan, double(case), **options)
            assert worst(with_gradients(package_scan(scan_device), case, **options), want) < FLOAT32


@pytest.mark.parametrize("states", [0, 1])
@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "D z dt_bias"])
def test_scan_without_its_options(scan_device, missing, states):
    case = scan_case(2, 17, 8, 4, states=states, dtype=torch.float32) | dict.fromkeys(missing.split())
    want = with_gradients(reference_scan, double(case))
    assert worst(with_gradients(package_scan(scan_device), case), want) < FLOAT32


@pytest.mark.parametrize("states", [0, 1])
def test_scan_over_several_chunks_of_the_kernel(scan_device, states):
    case = scan_case(1, 2060, 8, 2, states=states, dtype=torch.float32)
    want = with_gradients(reference_scan, double(case))
    assert worst(with_gradients(package_scan(scan_device), case), want) < FLOAT32


@pytest.mark.parametrize("states", [0, 1])
def test_scan_in_bfloat16(scan_device, states):
    case = scan_case(2, 60, 8, 4, states=states, dtype=torch.bfloat16)
    want = with_gradients(reference_scan, double(case))
    got = with_gradients(package_scan(scan_device), case)
    assert got["y"].dtype == got["dt"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["A"].dtype == torch.float32
    assert worst(got, want) < BFLOAT16


def test_scan_takes_mixed_dtypes(scan_device):
    # Norms under autocast leave B and C in float32 beside bfloat16 activations.
    case = scan_case(2, 30, 8, 4, states=0, dtype=torch.bfloat16)
    case |= {"B": case["B"].float(), "C": case["C"].float()}
    want = with_gradients(reference_scan, double(case))
    got = with_gradients(package_scan(scan_device), case)
    assert got["B"].dtype == torch.float32
    assert worst(got, want) < BFLOAT16


def test_scan_loads_the_initial_state_bit_for_bit(scan_device):
    case = scan_case(2, 5, 8, 16, dtype=torch.float32) | {"x": torch.zeros(2, 5, 8)}
    case["dt"] = torch.full((2, 5, 8), -1e4)  # a step size of 0: the state stays what it is
    _, final = package_scan(scan_device)(**case)
    assert torch.equal(final, case["initial_state"].expand(2, -1, -1))


def test_scan_gives_one_output_its_gradient(scan_device):
    case = scan_case(2, 9, 8, 4, dtype=torch.float32)
    for states in (0, 1):
        for which in (0, 1):
            got, want = (
                torch.autograd.grad(
                    op(**{k: v for k, v in leaves.items() if states or k != "initial_state"})[which].sum(), leaves["dt"]
                )[0]
                for op, leaves in (
                    (package_scan(scan_device), {k: v.clone().requires_grad_() for k, v in case.items()}),
                    (reference_scan, {k: v.clone().requires_grad_() for k, v in case.items()}),
                )
            )
            torch.testing.assert_close(got, want, atol=FLOAT32, rtol=FLOAT32)


def test_padding_never_enters_the_scan(scan_device):
    case = scan_case(2, 12, 8, 4, dtype=torch.float32)
    lengths = torch.tensor([12, 5])
    poisoned = {k: v.clone() for k, v in case.items()}
    for name in ("x", "dt", "B", "C", "z"):
        poisoned[name][1, 5:] = float("nan")
    got = with_gradients(package_scan(scan_device), poisoned, lengths=lengths)
    assert worst(got, with_gradients(package_scan(scan_device), case, lengths=lengths)) < AGAIN


@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_conv_equals_reference(conv_device, length, states):
    case = conv_case(3, length, 8, 4, states=states, dtype=torch.float32)
    for activation in ("silu", None):
        for options in row_options(3, length):
            if states and "seq_idx" in options:
                continue
            want = with_gradients(reference_conv, double(case), activation=activation, **options)
            got = with_gradients(package_conv(conv_device), case, activation=activation, **options)
            assert worst(got, want) < FLOAT32


def test_conv_of_a_slice_and_of_documents_with_one_number(conv_device):
    wide = torch.randn(2, 20, 40)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    numbers = torch.tensor([[0, 0, 1, 0, 0, 2, 0, *[3] * 13]] * 2).int()
    x = wide[:, :, 8:24]
    want, _ = reference_conv(x, weight, bias, seq_idx=numbers)
    got, _ = package_conv(conv_device)(wide[:, :, 8:24], weight, bias, seq_idx=numbers)
    torch.testing.assert_close(got, want, atol=FLOAT32, rtol=FLOAT32)


def test_conv_in_bfloat16(conv_device):
    case = conv_case(2, 60, 8, 4, dtype=torch.bfloat16)
    got = with_gradients(package_conv(conv_device), case)
    assert got["y"].dtype == got["initial_state"].dtype == torch.bfloat16
    assert got["weight"].dtype == torch.float32
    assert worst(got, with_gradients(reference_conv, double(case))) < BFLOAT16


def test_conv_without_bias(conv_device):
    case = conv_case(2, 20, 8, 3, dtype=torch.float32) | {"bias": None}
    assert (
        worst(with_gradients(package_conv(conv_device), case), with_gradients(reference_conv, double(case))) < FLOAT32
    )


def test_padding_never_enters_the_convolution(conv_device):
    case = conv_case(2, 12, 8, 4, dtype=torch.float32)
    lengths = torch.tensor([12, 2])
    poisoned = {k: v.clone() for k, v in case.items()}
    poisoned["x"][1, 2:] = float("nan")
    got = with_gradients(package_conv(conv_device), poisoned, lengths=lengths)
    assert worst(got, with_gradients(package_conv(conv_device), case, lengths=lengths)) < AGAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [True, False])
def test_steps_equal_the_scan(scan_device, options, dtype):
    case = scan_case(3, 6, 8, 4, states=3, dtype=dtype)
    if not options:
        case |= {"D": None, "z": None, "dt_bias": None}
    lengths = torch.tensor([6, 2, 0])
    want, final = reference_scan(**case, lengths=lengths)
    moved = {k: None if v is None else v.to(scan_device) for k, v in case.items()}
    state = moved.pop("initial_state").clone()
    address = state.data_ptr()
    for t in range(6):
        step = {k: v[:, t] if v is not None and v.dim() == 3 else v for k, v in moved.items()}
        valid = (t < lengths).to(scan_device)
        y = selective_state_update(state, **step, valid=valid, backend="mamba_ssm")
        torch.testing.assert_close(y.cpu(), want[:, t])
    torch.testing.assert_close(state.cpu(), final)
    assert state.data_ptr() == address
    before = state.clone()
    selective_state_update(state, **step, backend="mamba_ssm")
    assert not torch.equal(state, before)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_convolution(conv_device, dtype, state_dtype):
    x, weight, bias, state = (v.to(conv_device) for v in conv_case(3, 6, 8, 4, states=3, dtype=dtype).values())
    state = state.to(state_dtype)
    lengths = torch.tensor([6, 2, 0], device=conv_device)
    ours, address = state.clone(), state.data_ptr()
    for t in range(6):
        options = {"valid": t < lengths} if t % 2 else {}
        y = causal_conv1d_update(state, x[:, t], weight, bias, **options, backend="causal_conv1d")
        want = causal_conv1d_update(ours, x[:, t], weight, bias, **options, backend="torch")
        torch.testing.assert_close(y, want)
        assert torch.equal(state, ours)
    assert state.data_ptr() == address


def compiled(op, name):
    return torch.compile(lambda *p, **o: op(*p, backend=name, **o), backend="aot_eager", fullgraph=True)


def test_compiled_code_sees_one_scan(scan_device):
    case = scan_case(2, 9, 8, 4, dtype=torch.float32)
    got = with_gradients(packages.on(scan_device, compiled(selective_scan, "mamba_ssm")), case)
    assert worst(got, with_gradients(package_scan(scan_device), case)) < AGAIN


def test_compiled_code_sees_one_convolution(conv_device):
    case = conv_case(2, 9, 8, 4, dtype=torch.float32)
    got = with_gradients(packages.on(conv_device, compiled(causal_conv1d, "causal_conv1d")), case)
    assert worst(got, with_gradients(package_conv(conv_device), case)) < AGAIN


def test_scan_registration(scan_device):
    tensors = [v.to(scan_device).requires_grad_() for v in scan_case(2, 9, 8, 4, dtype=torch.float32).values()]
    lengths = torch.tensor([9, 4], device=scan_device)
    torch.library.opcheck(scan_adapter._scan, (*tensors, lengths, True, True))
    torch.library.opcheck(scan_adapter._scan, (*tensors[:8], None, None, False, True))
    step = [v[:, 0] if v.dim() == 3 else v for v in (t.detach() for t in tensors[:8])]
    state = torch.zeros(2, 8, 4, device=scan_device)
    torch.library.opcheck(scan_adapter.state_update, (state, *step, lengths > 5))


def test_conv_registration(conv_device):
    x, weight, bias, state = (v.to(conv_device) for v in conv_case(2, 3, 8, 4, states=2, dtype=torch.float32).values())
    torch.library.opcheck(conv_adapter.update, (state, x[:, 0], weight, bias, None, True))


def refusal(run) -> str:
    with pytest.raises(BackendError) as caught:
        run()
    return str(caught.value)


def test_what_the_scan_does_not_serve(scan_device, monkeypatch):
    scan = package_scan(scan_device)
    seq_idx = torch.tensor([[0, 0, 1]]).int()
    case = scan_case(1, 3, 8, 4, dtype=torch.float32)
    assert "no documents within a row" in refusal(lambda: scan(**case, seq_idx=seq_idx))
    assert "x is torch.float64" in refusal(lambda: scan(**scan_case(1, 3, 8, 4)))
    assert "x is empty" in refusal(lambda: scan(**scan_case(1, 0, 8, 4, dtype=torch.float32)))
    assert "up to 256 states" in refusal(lambda: scan(**scan_case(1, 2, 1, 257, dtype=torch.float32)))
    monkeypatch.setattr(adapters, "DEVICE", "elsewhere")
    assert "the tensors are on" in refusal(lambda: scan(**case))


def test_what_the_convolution_does_not_serve(conv_device, monkeypatch):
    conv = package_conv(conv_device)
    case = conv_case(1, 3, 8, 4, dtype=torch.float32)
    seq_idx = torch.tensor([[0, 0, 1]]).int()
    assert "start from zeros, not from the initial state" in refusal(lambda: conv(**case, seq_idx=seq_idx))
    assert "multiples of 8 channels, x has 12" in refusal(lambda: conv(**conv_case(1, 3, 12, 4, dtype=torch.float32)))
    assert "2 to 4 taps, the weight has 5" in refusal(lambda: conv(**conv_case(1, 3, 8, 5, dtype=torch.float32)))
    assert "x is torch.float64" in refusal(lambda: conv(**conv_case(1, 3, 8, 4)))
    monkeypatch.setattr(adapters, "DEVICE", "elsewhere")
    assert "the tensors are on" in refusal(lambda: conv(**case))


def rows() -> dict[tuple[str, str], str]:
    return {(row.op, row.backend): row.reason for row in available()}


def test_a_usable_scan_is_in_the_table(scan_device):
    reasons = rows()
    assert reasons["selective_scan", "mamba_ssm"] == reasons["selective_state_update", "mamba_ssm"] == ""


def test_a_usable_convolution_is_in_the_table(conv_device):
    reasons = rows()
    assert reasons["causal_conv1d", "causal_conv1d"] == reasons["causal_conv1d_update", "causal_conv1d"] == ""


@pytest.fixture
def stand_ins(monkeypatch):
    packages.fresh(monkeypatch)
    packages.stand_in(monkeypatch)
    yield monkeypatch
    packages.forget()


def without(monkeypatch, *names):
    """Let these modules be missing, however they are looked for."""
    found, imported = adapters.importlib.util.find_spec, importlib.import_module

    def import_module(name, package=None):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, package)

    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda n, p=None: None if n in names else found(n, p))
    monkeypatch.setattr(adapters.importlib, "import_module", import_module)


def test_a_missing_package_is_named(stand_ins):
    without(stand_ins, "mamba_ssm", "causal_conv1d")
    reasons = rows()
    assert reasons["selective_scan", "mamba_ssm"] == "mamba_ssm is not installed (pip install 'hymba[cuda]')"
    assert "causal_conv1d is not installed" in reasons["causal_conv1d", "causal_conv1d"]
    assert "is forced and cannot serve: mamba_ssm is not installed" in refusal(
        lambda: selective_scan(**scan_case(1, 3, 8, 4, dtype=torch.float32), backend="mamba_ssm")
    )


def test_a_missing_extension_is_named(stand_ins):
    without(stand_ins, "selective_scan_cuda", "causal_conv1d_cuda")
    reasons = rows()
    wanted = "mamba_ssm is installed without its compiled extension selective_scan_cuda"
    assert reasons["selective_scan", "mamba_ssm"] == wanted
    assert "without its compiled extension causal_conv1d_cuda" in reasons["causal_conv1d", "causal_conv1d"]


def test_an_extension_built_for_another_torch_is_named(stand_ins, tmp_path):
    (tmp_path / "causal_conv1d_cuda.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    stand_ins.syspath_prepend(str(tmp_path))
    reason = rows()["causal_conv1d", "causal_conv1d"]
    assert reason == "causal_conv1d_cuda does not import: ImportError: undefined symbol: _ZN3c10"
    sys.modules.pop("causal_conv1d_cuda", None)


def test_a_package_without_its_step_keeps_its_scan(stand_ins):
    without(stand_ins, scan_adapter.UPDATE)
    reasons = rows()
    assert reasons["selective_scan", "mamba_ssm"] == ""
    assert "selective_state_update does not import" in reasons["selective_state_update", "mamba_ssm"]


def test_a_machine_without_a_gpu_is_named(stand_ins):
    stand_ins.setattr(adapters, "DEVICE", "cuda")
    stand_ins.setattr(torch.cuda, "is_available", lambda: False)
    assert rows()["selective_scan", "mamba_ssm"] == "no CUDA device"


def test_a_kernel_that_fails_is_replaced_unless_forced(stand_ins):
    import selective_scan_cuda

    from hymba.ops import backend

    def fail(*_):
        raise RuntimeError("no kernel image is available")

    stand_ins.setattr(selective_scan_cuda, "fwd", fail)
    case = scan_case(1, 3, 8, 4, dtype=torch.float32)
    assert "is forced and failed: RuntimeError: no kernel image" in refusal(
        lambda: selective_scan(**case, backend="mamba_ssm")
    )
    table = backend._TABLE["selective_scan"]
    stand_ins.setitem(
        backend._TABLE,
        "selective_scan",
        {"mamba_ssm": backend._Backend(table["mamba_ssm"].probe, table["mamba_ssm"].serves), "torch": table["torch"]},
    )
    with pytest.warns(UserWarning, match="the mamba_ssm kernel failed"):
        y, _ = selective_scan(**case)
    torch.testing.assert_close(y, selective_scan_ref(**case)[0])
