"""Every op at the released width against its reference in float64, and what happens when a kernel does not build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.on_gpu import needs_gpu
from helpers import relative
from ops.op_cases import conv_case, row_options, scan_case, with_gradients, worst
from ops.ssd_cases import BY_STEP, ssd_case

from hymba.ops import (
    available,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
    ssd_scan,
    ssd_state_update,
)
from hymba.ops.attention import attention, attention_ref
from hymba.ops.masks import Visibility

pytestmark = needs_gpu

FLOAT32 = 2e-5
BFLOAT16 = 1e-2
WIDTH, STATES, LENGTH = 3200, 16, 300
TOLERANCES = [pytest.param(torch.float32, FLOAT32, id="float32"), pytest.param(torch.bfloat16, BFLOAT16, id="bfloat16")]


def _usable(op: str) -> list[str]:
    return [r.backend for r in available() if r.op == op and r.usable and r.backend != "reference"]


def _on_gpu(case):
    return {k: None if v is None else v.to("cuda") for k, v in case.items()}


def _exact(case):
    return {k: None if v is None else v.double() for k, v in case.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("options", "states"), [(0, STATES), (3, STATES), (3, 4 * STATES)], ids=["plain", "cut-and-packed", "many-states"]
)
def test_selective_scan(dtype, tolerance, options, states):
    case = _on_gpu(scan_case(2, LENGTH, WIDTH, states, dtype=dtype))
    keywords = {k: v.to("cuda") for k, v in list(row_options(2, LENGTH))[options].items()}
    want = with_gradients(selective_scan, _exact(case), backend="reference", **keywords)
    for backend in _usable("selective_scan"):
        assert worst(with_gradients(selective_scan, case, backend=backend, **keywords), want) < tolerance, backend


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("options", [0, 3], ids=["plain", "cut-and-packed"])
@pytest.mark.parametrize(("groups", "states"), [(1, 128), (5, 16)])
def test_ssd_scan(dtype, tolerance, options, groups, states):
    """50 heads of 64 channels. The gradient of A is a sum over all steps in which terms cancel: it is held to what
    rounding y, and with it the gradient that comes in, does to the float32 scan."""
    length = 1200
    case = _on_gpu(ssd_case(2, length, WIDTH // 64, 64, groups, states, dtype=dtype))
    keywords = {k: v.to("cuda") for k, v in list(row_options(2, length))[options].items()}
    want = with_gradients(ssd_scan, _exact(case), backend="reference", **keywords)
    plain = with_gradients(ssd_scan, case, backend="torch", **keywords)
    for backend in _usable("ssd_scan"):
        got = with_gradients(ssd_scan, case, backend=backend, **keywords)
        limit = max(tolerance, 3 * worst({"A": plain["A"]}, {"A": want["A"]}))
        assert worst({"A": got.pop("A")}, {"A": want["A"]}) < limit, backend
        assert worst(got, {k: v for k, v in want.items() if k != "A"}) < tolerance, backend


def test_ssd_segments_side_by_side():
    """One row of few heads fills the device only when its segments run next to each other."""
    case = _on_gpu(ssd_case(1, 3000, 4, 64, 1, 128, dtype=torch.float32))
    want = with_gradients(ssd_scan, _exact(case), backend="reference")
    assert worst(with_gradients(ssd_scan, case, backend="triton"), want) < FLOAT32


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_ssd_single_steps(dtype, tolerance):
    case = _on_gpu(ssd_case(3, 1, WIDTH // 64, 64, 2, 128, states=3, dtype=dtype))
    steps = {k: v[:, 0] if k in BY_STEP else v for k, v in case.items() if k != "initial_state"}
    valid = torch.tensor([True, False, True], device="cuda")
    exact = case["initial_state"].double()
    want = {"y": ssd_state_update(exact, **_exact(steps), valid=valid, backend="torch"), "state": exact}
    for name in _usable("ssd_state_update"):
        state = case["initial_state"].clone()
        got = {"y": ssd_state_update(state, **steps, valid=valid, backend=name), "state": state}
        assert worst(got, want) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("options", [0, 3], ids=["plain", "cut-and-packed"])
def test_causal_conv1d(dtype, tolerance, options):
    case = _on_gpu(conv_case(2, LENGTH, WIDTH, 4, dtype=dtype))
    keywords = {k: v.to("cuda") for k, v in list(row_options(2, LENGTH))[options].items()}
    want = with_gradients(causal_conv1d, _exact(case), backend="reference", **keywords)
    for backend in _usable("causal_conv1d"):
        assert worst(with_gradients(causal_conv1d, case, backend=backend, **keywords), want) < tolerance, backend


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_single_steps(dtype, tolerance):
    case = _on_gpu(scan_case(3, 1, WIDTH, STATES, states=3, dtype=dtype))
    steps = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in case.items() if k != "initial_state"}
    conv = _on_gpu(conv_case(3, 1, WIDTH, 4, states=3, dtype=dtype))
    valid = torch.tensor([True, False, True], device="cuda")
    results = {}
    for name in ("exact", *_usable("selective_state_update")):
        change = _exact if name == "exact" else dict
        backend = "torch" if name == "exact" else name
        state, window = case["initial_state"].clone(), conv["initial_state"].clone()
        held = change({"state": state, "window": window})
        y = selective_state_update(held["state"], **change(steps), valid=valid, backend=backend)
        inputs = change({"x": conv["x"][:, 0], "weight": conv["weight"], "bias": conv["bias"]})
        u = causal_conv1d_update(held["window"], **inputs, valid=valid, backend=backend)
        results[name] = {"y": y, "u": u} | held
    for name, got in results.items():
        assert worst(got, results["exact"]) < tolerance, name


@pytest.mark.parametrize("length", [1, 700, 1500])
@pytest.mark.parametrize("window", [1024, None], ids=["window", "global"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_attention(dtype, tolerance, window, length):
    """Queries at the end of 1,500 keys behind 128 meta keys, values and gradients."""
    keys, prefix = 1500, 128

    def normal(rows, steps, heads, width):
        return torch.randn(rows, steps, heads, width, device="cuda", dtype=dtype).requires_grad_()

    inputs = [normal(2, length, 25, 64), normal(2, keys, 5, 64), normal(2, keys, 5, 128)]
    inputs += [normal(1, prefix, 5, 64), normal(1, prefix, 5, 128)]
    at = torch.arange(keys, device="cuda")[None]
    start = torch.tensor([keys - length], device="cuda")
    seen = Visibility(at[:, keys - length :], at, window, prefix, own_keys=keys - length, start=start)
    dy = torch.randn(2, length, 3200, device="cuda", dtype=dtype)
    q, k, v, pk, pv = (t.detach().double().requires_grad_() for t in inputs)
    joined = [torch.cat([p.expand(2, -1, -1, -1), t], 1) for p, t in ((pk, k), (pv, v))]
    want = attention_ref(q, *joined, seen.dense())[0]
    want = [want, *torch.autograd.grad(want, [q, k, v, pk, pv], dy.double())]
    q, k, v, pk, pv = inputs
    for backend in _usable("attention"):
        got = attention(q, k, v, seen, prefix_k=pk, prefix_v=pv, backend=backend)[0]
        got = [got, *torch.autograd.grad(got, inputs, dy)]
        for name, a, b in zip(("out", "q", "k", "v", "prefix_k", "prefix_v"), got, want):
            assert relative(a.detach().double(), b.detach()) < tolerance, (backend, name)


BROKEN = """
import warnings, torch
from hymba import HymbaForCausalLM
from hymba.ops import BackendError, selective_scan, use_backend

model = HymbaForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16).to("cuda")
ids = torch.randint(3, 60, (2, 70), device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        got = model.train()(ids, labels=ids)
        got.loss.backward()
        model.eval().generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    with use_backend("torch"), torch.no_grad():
        want = model(ids).logits
failed = [str(w.message).split(":")[0] for w in caught if "takes its place" in str(w.message)]
assert failed, "no kernel failed: the fault was not planted"
assert len(failed) == len(set(failed)), failed
assert (got.logits - want).norm() / want.norm() < 0.04
print("fell back:", " ".join(failed))
try:
    with use_backend("triton"):
        model(ids)
except BackendError as error:
    print("forced:", error)
"""


def test_kernels_that_do_not_build(tmp_path: Path) -> None:
    """With an assembler that fails: one warning for each op and the plain path's numbers; forced, an error."""
    assembler = tmp_path / "ptxas"
    assembler.write_text(
        "#!/bin/sh\ncase \"$*\" in *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.48' ;;\n"
        "*) echo planted fault >&2; exit 255 ;; esac\n"
    )
    assembler.chmod(0o755)
    folder = Path(__file__).parents[1] / "parity" / "golden" / "released-layout"
    environment = os.environ | {"TRITON_PTXAS_PATH": str(assembler), "TRITON_CACHE_DIR": str(tmp_path / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN.format(folder=str(folder))], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "selective_scan" in done.stdout and "forced:" in done.stdout and "planted" in done.stdout, done.stdout
