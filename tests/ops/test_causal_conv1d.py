from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.op_cases import conv_case, row_options, with_gradients, worst

from hymba.ops import causal_conv1d, causal_conv1d_update
from hymba.ops.causal_conv1d import _conv

FLOAT64 = 1e-11
BFLOAT16 = 1e-2


def reference(*positional, **options):
    return causal_conv1d(*positional, backend="reference", **options)


def taps(*positional, **options):
    return causal_conv1d(*positional, backend="torch", **options)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 100])
def test_taps_equal_reference(length, states, activation):
    case = conv_case(3, length, 5, 4, states=states)
    for options in row_options(3, length):
        want = with_gradients(reference, case, activation=activation, **options)
        assert worst(with_gradients(taps, case, activation=activation, **options), want) < FLOAT64


def test_reference_is_a_convolution():
    case = conv_case(2, 20, 5, 4, states=0)
    y, final = reference(*list(case.values())[:-1], activation=None)
    want = F.conv1d(case["x"].mT, case["weight"][:, None], case["bias"], padding=3, groups=5)[..., :20].mT
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(final, case["x"][:, -3:])


def test_bias_may_be_missing():
    case = conv_case(2, 20, 5, 4) | {"bias": None}
    assert worst(with_gradients(taps, case), with_gradients(reference, case)) < FLOAT64


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    case = conv_case(2, 7, 2, 4)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [4, 4, 4, 4, 5, 5, 5]]) if packed else None
    inputs = [v.requires_grad_() for v in case.values()]

    def run(x, weight, bias, state):
        return taps(x, weight, bias, initial_state=state, lengths=torch.tensor([7, 2]), seq_idx=seq_idx)

    assert torch.autograd.gradcheck(run, inputs)


def test_two_calls_equal_one():
    x, weight, bias, state = conv_case(2, 30, 5, 4).values()
    whole, final = taps(x, weight, bias, initial_state=state)
    parts = []
    for s, e in ((0, 2), (2, 3), (3, 30)):
        y, state = taps(x[:, s:e], weight, bias, initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_documents_apart():
    x, weight, bias, state = conv_case(1, 30, 5, 4).values()
    seq_idx = torch.tensor([0] * 11 + [7] * 2 + [3] * 17)[None]
    packed, final = taps(x, weight, bias, initial_state=state, seq_idx=seq_idx)
    for s, e in ((0, 11), (11, 13), (13, 30)):
        y, last = taps(x[:, s:e], weight, bias, initial_state=state)
        torch.testing.assert_close(packed[:, s:e], y)
    torch.testing.assert_close(final, last)


def test_padding_never_enters():
    case = conv_case(2, 12, 5, 4)
    lengths = torch.tensor([12, 2])
    poisoned = {k: v.clone() for k, v in case.items()}
    poisoned["x"][1, 2:] = float("nan")
    got = with_gradients(taps, poisoned, lengths=lengths)
    assert worst(got, with_gradients(taps, case, lengths=lengths)) == 0
    assert got["y"][1, 2:].eq(0).all()


@pytest.mark.parametrize("activation", ["silu", None])
def test_steps_equal_the_convolution(activation):
    x, weight, bias, state = conv_case(3, 6, 5, 4, states=3, dtype=torch.float32).values()
    lengths = torch.tensor([6, 2, 0])
    want, final = causal_conv1d(x, weight, bias, initial_state=state, lengths=lengths, activation=activation)
    state = state.clone()
    address = state.data_ptr()
    for t in range(6):
        y = causal_conv1d_update(state, x[:, t], weight, bias, valid=t < lengths, activation=activation)
        torch.testing.assert_close(y, want[:, t])
    torch.testing.assert_close(state, final)
    assert state.data_ptr() == address


def test_bfloat16():
    case = conv_case(2, 60, 8, 4, dtype=torch.bfloat16)
    want = with_gradients(reference, {k: v.double() for k, v in case.items()})
    got = with_gradients(taps, case)
    assert got["y"].dtype == got["final_state"].dtype == got["initial_state"].dtype == torch.bfloat16
    assert got["weight"].dtype == torch.float32
    assert worst(got, want) < BFLOAT16


def test_autocast_changes_nothing_inside():
    case = conv_case(2, 40, 8, 4, dtype=torch.float32)
    want = with_gradients(taps, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(taps, case)
    assert worst(got, want) == 0


def test_compiles_to_one_op():
    case = conv_case(2, 20, 5, 4, dtype=torch.float32)
    compiled = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    assert worst(with_gradients(compiled, case), with_gradients(causal_conv1d, case)) == 0


def test_op_registration():
    tensors = [v.requires_grad_() for v in conv_case(2, 9, 3, 4).values()]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    torch.library.opcheck(_conv, (*tensors, torch.tensor([9, 4]), seq_idx, True, "torch", False))


def test_empty_sequence_returns_the_initial_state():
    x, weight, bias, state = conv_case(2, 0, 5, 4).values()
    for op in (taps, reference):
        y, final = op(x, weight, bias, initial_state=state)
        assert y.shape == (2, 0, 5)
        torch.testing.assert_close(final, state.expand(2, 3, 5))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(4, 4), r"weight has shape \(4, 4\); expected \(3, taps\)"),
        ("bias", torch.zeros(2), "bias has shape"),
        ("initial_state", torch.zeros(1, 4, 3), r"expected \(2, 3, 3\) or \(1, 3, 3\)"),
        ("lengths", torch.zeros(3, dtype=torch.int64), "lengths has shape"),
        ("activation", "gelu", "activation='gelu'; allowed: 'silu', None"),
    ],
)
def test_wrong_arguments_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(conv_case(2, 9, 3, 4) | {name: value}))
