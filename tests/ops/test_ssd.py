"""The scan of Mamba-2: the chunked form against the time loop, and the contract that it shares with Mamba-1's."""

from __future__ import annotations

import time

import pytest
import torch
from ops.op_cases import row_options, with_gradients, worst
from ops.ssd_cases import BY_STEP, apply, chunked, reference, ssd_case, steps

from hymba.ops import BackendError, selective_scan, ssd_scan, ssd_scan_ref, ssd_state_update, use_backend
from hymba.ops.ssd_op import _scan

FLOAT64 = 1e-11
FLOAT32 = 2e-5
BFLOAT16 = 1e-2


@pytest.fixture
def _small(monkeypatch):
    """Chunks of 8 steps, two of them per block."""
    monkeypatch.setattr("hymba.ops.ssd_chunked.CHUNK", 8)
    monkeypatch.setattr("hymba.ops.ssd_chunked.stride", lambda rows: 16)


def test_reference_is_the_recurrence():
    """Written out over scalars."""
    case = ssd_case(1, 5, 4, 2, 2, 3)
    y, final = apply(ssd_scan_ref, case)
    x, dt, A, B, C, D, bias, h0 = (v[0] if k in (*BY_STEP, "initial_state") else v for k, v in case.items())
    step = torch.log1p(torch.exp(dt + bias))
    for head in range(4):
        h = h0[head].clone()
        for t in range(5):
            for i in range(2):
                for j in range(3):
                    h[i, j] = (
                        torch.exp(step[t, head] * A[head]) * h[i, j]
                        + step[t, head] * x[t, head, i] * B[t, head // 2, j]
                    )
                out = (h[i] * C[t, head // 2]).sum() + D[head] * x[t, head, i]
                torch.testing.assert_close(y[0, t, head, i], out)
        torch.testing.assert_close(final[0, head], h)


def test_one_head_per_channel_is_mamba_1():
    """With heads of one channel and one A for all states, the scans are the same."""
    case = ssd_case(2, 20, 6, 1, 1, 4)
    y, final = apply(ssd_scan, case)
    state = case["initial_state"][:, :, 0]
    want, end = selective_scan(
        case["x"][..., 0],
        case["dt"],
        case["A"][:, None].expand(-1, 4).contiguous(),
        case["B"][:, :, 0],
        case["C"][:, :, 0],
        case["D"],
        None,
        case["dt_bias"],
        initial_state=state,
    )
    torch.testing.assert_close(y[..., 0], want)
    torch.testing.assert_close(final[:, :, 0], end)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize(("length", "groups"), [(1, 1), (16, 2), (43, 4), (43, 1)])
def test_chunked_equals_reference(length, groups, states):
    case = ssd_case(3, length, 4, 3, groups, 5, states=states)
    for options in row_options(3, length):
        want = with_gradients(reference, case, **options)
        assert worst(with_gradients(chunked, case, **options), want) < FLOAT64


def test_chunks_of_the_usual_size():
    case = ssd_case(2, 150, 4, 8, 2, 16, dtype=torch.float32)
    for options in row_options(2, 150):
        want = with_gradients(reference, {k: v.double() for k, v in case.items()}, **options)
        assert worst(with_gradients(chunked, case, **options), want) < FLOAT32


def test_strong_decay_loses_no_digits():
    """Log decays that add up to thousands in a chunk: what remains is the difference of two such sums."""
    case = ssd_case(1, 128, 2, 4, 1, 4, dtype=torch.float32)
    case["A"], case["dt"] = torch.tensor([-500.0, -0.02]), case["dt"].add(2)
    case["dt"][:, ::3] = -14
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    assert worst(with_gradients(chunked, case), want) < FLOAT32


def test_optional_inputs_may_be_missing():
    case = ssd_case(2, 20, 4, 3, 2, 4, states=0) | {"D": None, "dt_bias": None}
    assert worst(with_gradients(chunked, case), with_gradients(reference, case)) < FLOAT64


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, monkeypatch):
    monkeypatch.setattr("hymba.ops.ssd_chunked.CHUNK", 2)
    monkeypatch.setattr("hymba.ops.ssd_chunked.stride", lambda rows: 4)
    case = ssd_case(1, 5, 2, 1, 1, 2)
    seq_idx = torch.tensor([[0, 0, 1, 2, 2]]) if packed else None
    inputs = [v.requires_grad_() for v in case.values()]

    def run(*positional):
        *rest, state = positional
        return chunked(*rest, initial_state=state, lengths=torch.tensor([4]), seq_idx=seq_idx)

    assert torch.autograd.gradcheck(run, inputs)


def test_one_output_alone_sends_gradients_back():
    case = ssd_case(2, 9, 2, 3, 1, 2)
    x, *rest, state = (v.requires_grad_() for v in case.values())
    for pick in (0, 1):
        grads = [
            torch.autograd.grad(op(x, *rest, initial_state=state)[pick].square().sum(), (x, state))
            for op in (chunked, reference)
        ]
        for got, want in zip(*grads):
            torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("_small")
def test_two_calls_equal_one():
    case = ssd_case(2, 50, 4, 3, 2, 4)
    whole, final = apply(chunked, case)
    state, parts = case["initial_state"], []
    for s, e in ((0, 17), (17, 18), (18, 50)):
        y, state = apply(chunked, steps(case, s, e) | {"initial_state": state})
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.usefixtures("_small")
def test_packed_documents_equal_documents_apart():
    case = ssd_case(1, 30, 4, 3, 2, 4)
    seq_idx = torch.tensor([0] * 11 + [7] * 2 + [3] * 17)[None]
    packed, final = apply(chunked, case, seq_idx=seq_idx)
    for s, e in ((0, 11), (11, 13), (13, 30)):
        y, state = apply(chunked, steps(case, s, e))
        torch.testing.assert_close(packed[:, s:e], y)
    torch.testing.assert_close(final, state)


@pytest.mark.parametrize("op", [chunked, reference])
def test_padding_never_enters(op):
    case = ssd_case(2, 12, 4, 3, 2, 4)
    lengths = torch.tensor([12, 7])
    poisoned = {k: v.clone() for k, v in case.items()}
    for name in BY_STEP:
        poisoned[name][1, 7:] = float("nan")
    got = with_gradients(op, poisoned, lengths=lengths)
    assert worst(got, with_gradients(op, case, lengths=lengths)) == 0
    assert got["y"][1, 7:].eq(0).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_steps_equal_the_scan(groups):
    case = ssd_case(3, 6, 4, 5, groups, 3, states=3, dtype=torch.float32)
    lengths = torch.tensor([6, 4, 0])
    want, final = apply(ssd_scan, case, lengths=lengths)
    state = case["initial_state"].clone()
    address = state.data_ptr()
    for t in range(6):
        x, dt, B, C = (torch.where((t < lengths).view(3, *[1] * (case[k].dim() - 2)), case[k][:, t], float("nan"))
                       for k in BY_STEP)  # fmt: skip
        y = ssd_state_update(state, x, dt, case["A"], B, C, case["D"], case["dt_bias"], valid=t < lengths)
        torch.testing.assert_close(y, want[:, t])
    torch.testing.assert_close(state, final)
    assert state.data_ptr() == address


def test_a_step_writes_into_a_view_and_into_bfloat16():
    case = ssd_case(2, 1, 4, 5, 2, 3, states=2, dtype=torch.float32)
    want, final = apply(ssd_scan, case)
    args = [case[k][:, 0] if k in BY_STEP else case[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    wide = torch.zeros(2, 4, 3, 5).transpose(2, 3)
    wide.copy_(case["initial_state"])
    torch.testing.assert_close(ssd_state_update(wide, *args), want[:, 0])
    torch.testing.assert_close(wide, final)
    low = case["initial_state"].bfloat16()
    ssd_state_update(low, *args)
    assert low.dtype == torch.bfloat16 and worst({"s": low}, {"s": final}) < BFLOAT16


def test_bfloat16_activations_are_computed_in_float32():
    case = ssd_case(2, 100, 4, 8, 2, 4, dtype=torch.bfloat16)
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    got = with_gradients(chunked, case)
    assert got["y"].dtype == got["dt"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["A"].dtype == torch.float32
    assert worst(got, want) < BFLOAT16
    assert worst({"s": got["final_state"]}, {"s": want["final_state"]}) < FLOAT32


def test_bfloat16_parameters_are_computed_in_float32():
    case = ssd_case(2, 40, 4, 8, 1, 4, dtype=torch.bfloat16)
    case |= {k: case[k].bfloat16() for k in ("A", "D", "dt_bias")}
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    got = with_gradients(chunked, case)
    assert got["A"].dtype == torch.bfloat16
    assert worst(got, want) < BFLOAT16


def test_autocast_changes_nothing_inside():
    case = ssd_case(2, 40, 4, 8, 1, 4, dtype=torch.float32)
    want = with_gradients(chunked, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(chunked, case)
    assert worst(got, want) == 0


def test_compiles_to_one_op():
    case = ssd_case(2, 20, 4, 5, 2, 4, dtype=torch.float32)
    compiled = torch.compile(ssd_scan, backend="aot_eager", fullgraph=True)
    assert worst(with_gradients(compiled, case), with_gradients(ssd_scan, case)) == 0


def test_op_registration():
    case = ssd_case(2, 9, 2, 3, 1, 2)
    tensors = [v.requires_grad_() for v in case.values()]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    op = torch.ops.hymba.ssd_scan.default
    torch.library.opcheck(op, (*tensors, torch.tensor([9, 4]), seq_idx, 64, True, "torch", False))


def test_empty_sequence_returns_the_initial_state():
    case = ssd_case(2, 0, 4, 5, 2, 4)
    for op in (chunked, reference):
        y, final = apply(op, case)
        assert y.shape == (2, 0, 4, 5)
        torch.testing.assert_close(final, case["initial_state"].expand(2, 4, 5, 4))
    assert with_gradients(chunked, case)["initial_state"].shape == (1, 4, 5, 4)


def test_inference_saves_no_states():
    case = ssd_case(1, 9, 2, 3, 1, 2)
    with torch.no_grad():
        _, _, states = _scan(*case.values(), None, None, 64, False, "torch", False)
    assert states.numel() == 0


def test_a_shape_alone_is_enough():
    """Fake and meta tensors: nothing reads a value."""
    case = {k: v.to("meta") for k, v in ssd_case(2, 150, 4, 5, 2, 4, dtype=torch.float32).items()}
    lengths, seq_idx = (
        torch.empty(2, dtype=torch.long, device="meta"),
        torch.empty(2, 150, dtype=torch.int, device="meta"),
    )
    leaves = {k: v.requires_grad_() for k, v in case.items()}
    y, final = apply(chunked, leaves, lengths=lengths, seq_idx=seq_idx)
    grads = torch.autograd.grad(y.sum() + final.sum(), list(leaves.values()))
    assert [g.shape for g in grads] == [v.shape for v in case.values()]


# A block of the chunked form is 1024 steps here.
@pytest.mark.parametrize(("op", "short"), [(ssd_scan_ref, 512), (chunked, 2048)])
def test_backward_is_linear_in_length(op, short):
    def seconds(length):
        case = ssd_case(1, length, 2, 8, 1, 8, dtype=torch.float32)
        leaves = [v.requires_grad_() for v in case.values()]
        best = float("inf")
        for _ in range(3):
            y, _ = op(*leaves[:-1], initial_state=leaves[-1])
            start = time.thread_time()
            torch.autograd.grad(y.sum(), leaves)
            best = min(best, time.thread_time() - start)
        return best

    # Four times the length: 16 times when quadratic, 4 when linear.
    assert seconds(4 * short) < 9 * seconds(short)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 9, 4), r"expected \(batch, length, heads, channels\)"),
        ("dt", torch.zeros(2, 9, 3), r"dt has shape \(2, 9, 3\); expected \(2, 9, 4\)"),
        ("A", torch.zeros(4, 2), r"A has shape \(4, 2\); expected \(4,\)"),
        ("B", torch.zeros(2, 9, 3), r"B has shape \(2, 9, 3\); expected \(2, 9, groups, states\)"),
        ("B", torch.zeros(2, 9, 3, 5), "B has 3 groups; allowed: divisors of the 4 heads"),
        ("C", torch.zeros(2, 9, 1, 5), "C has shape"),
        ("D", torch.zeros(2), "D has shape"),
        ("initial_state", torch.zeros(3, 4, 3, 5), r"expected \(2, 4, 3, 5\) or \(1, 4, 3, 5\)"),
        ("lengths", torch.zeros(3, dtype=torch.int64), "lengths has shape"),
        ("lengths", torch.zeros(2), "lengths has dtype torch.float32"),
        ("seq_idx", torch.zeros(2, 8, dtype=torch.int32), "seq_idx has shape"),
    ],
)
def test_bad_arguments(name, value, message):
    arguments = ssd_case(2, 9, 4, 3, 2, 5) | {name: value}
    with pytest.raises(ValueError, match=message):
        ssd_scan(**arguments)


def test_bad_arguments_of_a_step():
    case = {k: v[:, 0] if k in BY_STEP else v for k, v in ssd_case(2, 1, 4, 3, 2, 5, states=2).items()}
    state = case.pop("initial_state")
    for name, value, message in (
        ("x", torch.zeros(2, 4, 4), "x has shape"),
        ("B", torch.zeros(2, 3, 5), r"B has shape \(2, 3, 5\); expected \(2, a divisor of 4, 5\)"),
        ("dt", torch.zeros(2, 4, 1), "dt has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd_state_update(state, **(case | {name: value}))


def test_the_seam_forces_and_refuses():
    case = ssd_case(1, 5, 2, 3, 1, 2)
    with use_backend(ssd_scan="reference"):
        torch.testing.assert_close(apply(ssd_scan, case)[0], apply(ssd_scan_ref, case)[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"backend='mamba_ssm' for ssd_scan; allowed: 'auto', 'triton', 'torch'"):
        ssd_scan(**case, backend="mamba_ssm")
    assert issubclass(BackendError, RuntimeError)
