from __future__ import annotations

import time

import pytest
import torch
from ops.op_cases import row_options, scan_case, with_gradients, worst

from hymba.ops import selective_scan, selective_scan_ref, selective_state_update, use_backend
from hymba.ops.scan_op import _scan

FLOAT64 = 1e-11
FLOAT32 = 2e-5
BFLOAT16 = 1e-2


def reference(*positional, **options):
    return selective_scan(*positional, backend="reference", **options)


def chunked(*positional, **options):
    return selective_scan(*positional, backend="torch", **options)


@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_chunked_equals_reference(length, states, monkeypatch):
    monkeypatch.setattr("hymba.ops.scan_chunked.chunk_size", lambda numel: 16)
    case = scan_case(3, length, 5, 4, states=states)
    for options in row_options(3, length):
        want = with_gradients(reference, case, **options)
        assert worst(with_gradients(chunked, case, **options), want) < FLOAT64


def test_optional_inputs_may_be_missing():
    case = scan_case(2, 20, 5, 4, states=0) | {"D": None, "z": None, "dt_bias": None}
    assert worst(with_gradients(chunked, case), with_gradients(reference, case)) < FLOAT64


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, monkeypatch):
    monkeypatch.setattr("hymba.ops.scan_chunked.chunk_size", lambda numel: 3)
    case = scan_case(2, 7, 2, 2)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [4, 4, 4, 4, 5, 5, 5]]) if packed else None
    inputs = [v.requires_grad_() for v in case.values()]

    def run(*positional):
        *rest, state = positional
        return chunked(*rest, initial_state=state, lengths=torch.tensor([7, 5]), seq_idx=seq_idx)

    assert torch.autograd.gradcheck(run, inputs)


def test_one_output_alone_sends_gradients_back():
    case = scan_case(2, 9, 3, 2)
    x, *rest, state = (v.requires_grad_() for v in case.values())
    for pick in (0, 1):
        grads = [
            torch.autograd.grad(op(x, *rest, initial_state=state)[pick].square().sum(), (x, state))
            for op in (chunked, reference)
        ]
        for got, want in zip(*grads):
            torch.testing.assert_close(got, want)


def test_two_calls_equal_one():
    case = scan_case(2, 50, 5, 4)
    whole, final = chunked(*list(case.values())[:-1], initial_state=case["initial_state"])
    state, parts = case["initial_state"], []
    for s, e in ((0, 17), (17, 18), (18, 50)):
        cut = {k: v[:, s:e] if k in ("x", "dt", "B", "C", "z") else v for k, v in case.items()}
        y, state = chunked(*list(cut.values())[:-1], initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_documents_apart():
    case = scan_case(1, 30, 5, 4)
    seq_idx = torch.tensor([0] * 11 + [7] * 2 + [3] * 17)[None]
    packed, final = chunked(*list(case.values())[:-1], initial_state=case["initial_state"], seq_idx=seq_idx)
    for s, e in ((0, 11), (11, 13), (13, 30)):
        cut = {k: v[:, s:e] if k in ("x", "dt", "B", "C", "z") else v for k, v in case.items()}
        y, state = chunked(*list(cut.values())[:-1], initial_state=case["initial_state"])
        torch.testing.assert_close(packed[:, s:e], y)
    torch.testing.assert_close(final, state)


def test_padding_never_enters():
    case = scan_case(2, 12, 5, 4)
    lengths = torch.tensor([12, 7])
    poisoned = {k: v.clone() for k, v in case.items()}
    for name in ("x", "dt", "B", "C", "z"):
        poisoned[name][1, 7:] = float("nan")
    got = with_gradients(chunked, poisoned, lengths=lengths)
    assert worst(got, with_gradients(chunked, case, lengths=lengths)) == 0
    assert got["y"][1, 7:].eq(0).all()


def test_steps_equal_the_scan():
    case = scan_case(3, 6, 5, 4, states=3, dtype=torch.float32)
    lengths = torch.tensor([6, 4, 0])
    want, final = selective_scan(*list(case.values())[:-1], initial_state=case["initial_state"], lengths=lengths)
    state = case["initial_state"].clone()
    address = state.data_ptr()
    for t in range(6):
        x, dt, B, C, z = (case[k][:, t] for k in ("x", "dt", "B", "C", "z"))
        y = selective_state_update(state, x, dt, case["A"], B, C, case["D"], z, case["dt_bias"], valid=t < lengths)
        torch.testing.assert_close(y, want[:, t])
    torch.testing.assert_close(state, final)
    assert state.data_ptr() == address


def test_bfloat16_activations_are_computed_in_float32():
    case = scan_case(2, 100, 8, 4, dtype=torch.bfloat16)
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    got = with_gradients(chunked, case)
    assert got["y"].dtype == got["dt"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["A"].dtype == torch.float32
    assert worst(got, want) < BFLOAT16
    assert worst({"s": got["final_state"]}, {"s": want["final_state"]}) < FLOAT32


def test_bfloat16_parameters_are_computed_in_float32():
    case = scan_case(2, 40, 8, 4, dtype=torch.bfloat16)
    case |= {k: case[k].bfloat16() for k in ("A", "D", "dt_bias")}
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    got = with_gradients(chunked, case)
    assert got["A"].dtype == torch.bfloat16
    assert worst(got, want) < BFLOAT16


def test_autocast_changes_nothing_inside():
    case = scan_case(2, 40, 8, 4, dtype=torch.float32)
    want = with_gradients(chunked, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(chunked, case)
    assert worst(got, want) == 0


def test_compiles_to_one_op():
    case = scan_case(2, 20, 5, 4, dtype=torch.float32)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    assert worst(with_gradients(compiled, case), with_gradients(selective_scan, case)) == 0


def test_op_registration():
    case = scan_case(2, 9, 3, 2)
    tensors = [v.requires_grad_() for v in case.values()]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    torch.library.opcheck(_scan, (*tensors, torch.tensor([9, 4]), seq_idx, 4, True, "torch", False))


def test_empty_sequence_returns_the_initial_state():
    case = scan_case(2, 0, 5, 4)
    for op in (chunked, reference):
        y, final = op(*list(case.values())[:-1], initial_state=case["initial_state"])
        assert y.shape == (2, 0, 5)
        torch.testing.assert_close(final, case["initial_state"].expand(2, 5, 4))


def test_inference_saves_no_states():
    case = scan_case(1, 9, 3, 2)
    with torch.no_grad():
        _, _, states = _scan(*case.values(), None, None, 4, False, "torch", False)
    assert states.numel() == 0


@pytest.mark.parametrize("op", [selective_scan_ref, chunked])
def test_backward_is_linear_in_length(op):
    def seconds(length):
        case = scan_case(1, length, 16, 8, dtype=torch.float32)
        leaves = [v.requires_grad_() for v in case.values()]
        best = float("inf")
        for _ in range(3):
            y, _ = op(*leaves[:-1], initial_state=leaves[-1])
            start = time.thread_time()
            torch.autograd.grad(y.sum(), leaves)
            best = min(best, time.thread_time() - start)
        return best

    # Four times the length: 16 times when quadratic, 4 when linear.
    assert seconds(2048) < 9 * seconds(512)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dt", torch.zeros(2, 9, 4), r"dt has shape \(2, 9, 4\); expected \(2, 9, 3\)"),
        ("A", torch.zeros(4, 2), r"A has shape \(4, 2\); expected \(3, states\)"),
        ("B", torch.zeros(2, 9, 3), "B has shape"),
        ("z", torch.zeros(2, 8, 3), "z has shape"),
        ("D", torch.zeros(2), "D has shape"),
        ("initial_state", torch.zeros(3, 3, 2), r"expected \(2, 3, 2\) or \(1, 3, 2\)"),
        ("lengths", torch.zeros(3, dtype=torch.int64), "lengths has shape"),
        ("lengths", torch.zeros(2), "lengths has dtype torch.float32"),
        ("seq_idx", torch.zeros(2, 8, dtype=torch.int32), "seq_idx has shape"),
        ("seq_idx", torch.zeros(2, 9), "seq_idx has dtype"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(scan_case(2, 9, 3, 2, dtype=torch.float32) | {name: value}))


def test_x_must_have_three_dimensions():
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\); expected \(batch, length, channels\)"):
        selective_scan(**(scan_case(2, 9, 3, 2) | {"x": torch.zeros(2, 3)}))


def test_context_chooses_the_reference():
    case = scan_case(2, 9, 3, 2)
    with use_backend(selective_scan="reference"):
        got = with_gradients(selective_scan, case)
    assert worst(got, with_gradients(reference, case)) == 0
