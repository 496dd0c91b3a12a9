"""The kernels of the Mamba-2 scan in Triton's interpreter against the reference. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch
from ops.op_cases import row_options, with_gradients, worst
from ops.ssd_cases import BY_STEP, reference, ssd_case

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from hymba.nn import Mamba2Heads
from hymba.ops import BackendError, ssd_scan, ssd_state_update, use_backend
from hymba.ops.ssd_inputs import SsdInputs
from hymba.ops.triton import ssd, ssd_backward

FLOAT32 = 2e-5
BFLOAT16 = 1e-2


def kernels(*positional, **options):
    return ssd_scan(*positional, backend="triton", **options)


def exact(case):
    return {k: None if v is None else v.double() for k, v in case.items()}


def compare(case, tolerance, **options):
    got = with_gradients(kernels, case, **options)
    assert worst(got, with_gradients(reference, exact(case), **options)) < tolerance
    return got


@pytest.fixture
def chunks(monkeypatch):
    """Sets the steps of a chunk; two chunks make a segment."""

    def use(steps):
        monkeypatch.setattr("hymba.ops.ssd_op.TRITON_STRIDE", 2 * steps)
        for table in (ssd.FORWARD, ssd.STATES, ssd_backward.GRADIENT, ssd_backward.GROUPS):
            for size, tile in table.items():
                monkeypatch.setitem(table, size, tile._replace(steps=steps))

    use(16)
    return use


# Chunks of 64 that are cut, full, and more than one; four segments of 32, the last cut; one initial state for all
# rows, one for each, none; heads that share B and C, or do not.
@pytest.mark.parametrize(
    ("steps", "length", "states", "groups", "option"),
    [(64, 1, 1, 1, 0), (64, 63, 2, 2, 1), (64, 64, 1, 1, 2), (64, 65, 1, 2, 3), (16, 100, 1, 1, 3), (16, 40, 0, 2, 2)],
)
def test_scan(chunks, steps, length, states, groups, option):
    chunks(steps)
    case = ssd_case(2, length, 2, 5, groups, 6, states=states, dtype=torch.float32)
    compare(case, FLOAT32, **list(row_options(2, length))[option])


def test_nothing_optional(chunks):
    case = ssd_case(2, 18, 2, 3, 1, 4, states=0, dtype=torch.float32) | {"D": None, "dt_bias": None}
    compare(case, FLOAT32)


def test_bfloat16_from_slices(chunks):
    """As the layer makes them: x, B and C are parts of one tensor, and steps of dt are not whole vectors apart."""
    case = ssd_case(1, 40, 2, 16, 1, 20, dtype=torch.bfloat16)
    joint = torch.cat([case[k].flatten(2) for k in ("x", "B", "C")], -1)
    x, B, C = joint.split([32, 20, 20], -1)
    got = compare(case | {"x": x.unflatten(-1, (2, 16)), "B": B[:, :, None], "C": C[:, :, None]}, BFLOAT16)
    assert got["y"].dtype == got["dt"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["A"].dtype == torch.float32


def test_states_and_channels_in_several_blocks(chunks, monkeypatch):
    """More states than one program of the state kernels has, and more channels than a block."""
    for table in (ssd.FORWARD, ssd.STATES):
        monkeypatch.setitem(table, 4, table[4]._replace(channels=16))
    case = ssd_case(1, 20, 1, 18, 1, 70, dtype=torch.float32)
    compare(case, FLOAT32, seq_idx=(torch.arange(20) // 7)[None].int())


@pytest.mark.parametrize("packed", [False, True])
def test_segments_side_by_side(chunks, packed):
    case = ssd_case(2, 70, 2, 3, 1, 4, dtype=torch.float32)
    options = {"lengths": torch.tensor([70, 19])}
    if packed:
        options["seq_idx"] = (torch.arange(70) // torch.tensor([[9], [50]])).int()
    want = reference(*[v for k, v in exact(case).items() if k != "initial_state"],
                     initial_state=case["initial_state"].double(), **options)  # fmt: skip
    for parallel in (False, True):
        y, final, states = ssd.forward(SsdInputs(**case, **options), 32, True, parallel=parallel)
        assert worst({"y": y, "s": final}, {"y": want[0], "s": want[1]}) < FLOAT32
        assert states.shape == (3, 2, 1, 4, 2, 3)


def test_slabs_and_split_heads(chunks, monkeypatch):
    """Backward in more than one slab, and the heads of a group among several programs."""
    monkeypatch.setattr(ssd_backward, "_SLAB_BYTES", 1)
    monkeypatch.setattr(ssd_backward, "splits_of", lambda *_: 2)
    case = ssd_case(1, 40, 3, 3, 1, 4, dtype=torch.float32)
    compare(case, FLOAT32, seq_idx=(torch.arange(40) // 33)[None].int())


def test_strong_decay_loses_no_digits(chunks):
    chunks(64)
    case = ssd_case(1, 70, 2, 4, 1, 4, dtype=torch.float32)
    case["A"], case["dt"] = torch.tensor([-500.0, -0.02]), case["dt"].add(2)
    case["dt"][:, ::3] = -14
    compare(case, FLOAT32)


def test_padding_never_enters(chunks):
    case = ssd_case(1, 20, 2, 3, 1, 4, dtype=torch.float32)
    lengths = torch.tensor([7])
    poisoned = {k: v.clone() for k, v in case.items()}
    for name in BY_STEP:
        poisoned[name][0, 7:] = float("nan")
    got = with_gradients(kernels, poisoned, lengths=lengths)
    assert worst(got, with_gradients(kernels, case, lengths=lengths)) == 0
    assert got["y"][0, 7:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "valid"), [(1, None), (2, (True, False))])
def test_decode_steps(groups, valid, dtype):
    valid = None if valid is None else torch.tensor(valid)
    case = ssd_case(2, 1, 4, 18, groups, 5, states=2, dtype=dtype)
    steps = {k: v[:, 0] if k in BY_STEP else v for k, v in case.items() if k != "initial_state"}
    out = {}
    for name in ("torch", "triton"):
        state = case["initial_state"].clone()
        out[name] = {"y": ssd_state_update(state, **steps, valid=valid, backend=name), "state": state}
    assert worst(out["triton"], out["torch"]) < (FLOAT32 if dtype == torch.float32 else BFLOAT16)


def test_a_state_that_the_kernel_cannot_write_to():
    case = ssd_case(2, 1, 4, 3, 1, 5, states=2, dtype=torch.float32)
    steps = {k: v[:, 0] if k in BY_STEP else v for k, v in case.items() if k != "initial_state"}
    state = case["initial_state"].mT.contiguous().mT
    with pytest.raises(BackendError, match=r"forced and failed: ValueError: state is torch\.float32 with"):
        ssd_state_update(state, **steps, backend="triton")


def test_heads_on_kernels(chunks):
    """The layer, forward and backward."""
    heads = Mamba2Heads(d_inner=32, head_dim=16, d_state=16)
    x, z, weights = torch.randn(2, 20, heads.in_width), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    out = {}
    for name in ("torch", "triton"):
        heads.zero_grad()
        with use_backend(ssd_scan=name):
            y = heads(x, z)
            (y * weights).sum().backward()
        out[name] = {"y": y.detach()} | {k: p.grad.clone() for k, p in heads.named_parameters()}
    assert worst(out["triton"], out["torch"]) < FLOAT32


def test_kernels_compile_into_one_op(chunks):
    case = ssd_case(1, 5, 2, 3, 1, 2, dtype=torch.float32)
    with use_backend(ssd_scan="triton"):
        compiled = torch.compile(ssd_scan, backend="aot_eager", fullgraph=True)
        assert worst(with_gradients(compiled, case), with_gradients(ssd_scan, case)) == 0
