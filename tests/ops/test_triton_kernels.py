"""The kernels in Triton's interpreter against the references. Needs the interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch
from ops.op_cases import conv_case, row_options, scan_case, with_gradients, worst

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from hymba.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, use_backend
from hymba.ops.scan_inputs import ScanInputs
from hymba.ops.triton import scan, scan_slices

FLOAT32 = 2e-6
BFLOAT16 = 1e-2


def exact(case):
    return {k: None if v is None else v.double() for k, v in case.items()}


def compare(op, case, tolerance, **options):
    want = with_gradients(op, exact(case), backend="reference", **options)
    assert worst(with_gradients(op, case, backend="triton", **options), want) < tolerance


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr("hymba.ops.scan_op.TRITON_CHUNK", 16)


@pytest.mark.parametrize("option", range(4))
def test_scan(option):
    # Two segments of two forward and four backward chunks, the last ones cut; two channel blocks, the last cut.
    case = scan_case(2, 21, 5, 3, states=1 + option % 2, dtype=torch.float32)
    compare(selective_scan, case, FLOAT32, **list(row_options(2, 21))[option])


@pytest.mark.parametrize(("option", "states"), [(0, 2), (3, 1)])
def test_scan_with_more_states_than_registers_hold(monkeypatch, option, states):
    monkeypatch.setattr(scan_slices, "MOST_STATES", 2)
    case = scan_case(2, 18, 4, 5, states=states, dtype=torch.float32)
    compare(selective_scan, case, FLOAT32, **list(row_options(2, 18))[option])


def test_forty_states_with_nothing_optional():
    case = scan_case(1, 9, 4, 40, states=0, dtype=torch.bfloat16) | {"D": None, "z": None, "dt_bias": None}
    compare(selective_scan, case, BFLOAT16)


def test_scan_with_nothing_optional():
    case = scan_case(2, 3, 4, 2, states=0, dtype=torch.float32) | {"D": None, "z": None, "dt_bias": None}
    compare(selective_scan, case, FLOAT32, seq_idx=torch.tensor([[0, 0, 1], [0, 1, 2]]))


def test_scan_in_bfloat16_from_slices():
    case = scan_case(1, 18, 4, 2, dtype=torch.bfloat16)
    joint = torch.cat([case["x"], case["z"]], -1)
    case |= {"x": joint[..., :4], "z": joint[..., 4:]}
    compare(selective_scan, case, BFLOAT16)


@pytest.mark.parametrize("packed", [False, True])
def test_scan_with_segments_side_by_side(packed):
    case = scan_case(2, 40, 4, 2, dtype=torch.float32)
    seq_idx = (torch.arange(40) // torch.tensor([[9], [50]])).int() if packed else None
    want = selective_scan(**exact(case), seq_idx=seq_idx, lengths=torch.tensor([40, 19]), backend="reference")
    inputs = ScanInputs(**case, seq_idx=seq_idx, lengths=torch.tensor([40, 19]))
    for parallel in (False, True):
        y, final, _ = scan.forward(inputs, 16, True, parallel=parallel)
        assert worst({"y": y, "s": final}, {"y": want[0], "s": want[1]}) < FLOAT32


@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_softplus_and_gate_over_their_whole_range(spread):
    case = scan_case(1, 9, 4, 2, dtype=torch.float32)
    case |= {"dt": case["dt"] * spread - 5, "z": case["z"] * spread}
    compare(selective_scan, case, FLOAT32)


@pytest.mark.parametrize("length", [1, 3, 21])
@pytest.mark.parametrize(("states", "activation"), [(0, "silu"), (1, "silu"), (3, "silu"), (1, None)])
def test_conv(length, states, activation):
    case = conv_case(3, length, 9, 4, states=states, dtype=torch.float32)
    for options in row_options(3, length):
        compare(causal_conv1d, case, FLOAT32, activation=activation, **options)


@pytest.mark.parametrize("taps", [2, 3])
def test_conv_with_fewer_taps(taps):
    case = conv_case(2, 9, 4, taps, dtype=torch.float32)
    for options in row_options(2, 9):
        compare(causal_conv1d, case, FLOAT32, **options)


def test_conv_in_bfloat16():
    compare(causal_conv1d, conv_case(2, 20, 8, 4, dtype=torch.bfloat16), BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("valid", [None, (True, False)])
def test_decode_steps(valid, dtype):
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    valid = None if valid is None else torch.tensor(valid)
    case = scan_case(2, 1, 70, 3, states=2, dtype=dtype)
    steps = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in case.items() if k != "initial_state"}
    conv = conv_case(2, 1, 70, 4, states=2, dtype=dtype)
    out = {}
    for name in ("torch", "triton"):
        with use_backend(name):
            state, window = case["initial_state"].clone(), conv["initial_state"].clone()
            y = selective_state_update(state, **steps, valid=valid)
            u = causal_conv1d_update(window, conv["x"][:, 0], conv["weight"], conv["bias"], valid=valid)
        out[name] = {"y": y, "u": u, "state": state, "window": window}
    assert worst(out["triton"], out["torch"]) < tolerance


def test_kernels_compile_into_one_op():
    case = scan_case(1, 5, 4, 2, dtype=torch.float32)
    with use_backend("triton"):
        compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
        assert worst(with_gradients(compiled, case), with_gradients(selective_scan, case)) == 0
