"""The sequence ops: both scans and the causal convolution, forward and backward, against their floors.

    python -m benchmarks.ops                        # the released widths, 8 x 8192, bf16, on the GPU
    python -m benchmarks.ops --sweep                # the same with other tiles and register limits
    python -m benchmarks.ops --device cpu --batch 16 --length 256 --channels 320 --dtype float32

Checks every backend first, values and every gradient, against the float64 reference on a small case of the same
width; prints no number for one that fails. Where mamba-ssm is installed, its scans run in the same process.

The floors: bytes that must move (each input read once, each output written once) over a measured copy bandwidth, and
for the scan of Mamba-1 one exponential per step, channel and state, in backward a second one, over 16 per clock and SM.
The scan of Mamba-2 has products instead: hymba/ops/triton/ssd.py and ssd_backward.py count them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import copy_bandwidth, report, spread, times
from hymba.ops import BackendError, available, causal_conv1d, selective_scan, ssd_scan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""||got - want|| / ||want|| of outputs and gradients against float64."""


def scan_inputs(b: int, l: int, d: int, n: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs in the shapes and ranges that the model gives them; x and z are slices of one projection."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, z = normal(b, l, 2 * d).chunk(2, -1)
    A = -torch.arange(1.0, n + 1, device=device).repeat(d, 1)
    named = {"x": x, "dt": normal(b, l, d), "A": A, "B": normal(b, l, n), "C": normal(b, l, n)}
    named |= {"D": torch.randn(d, device=device), "z": z, "dt_bias": torch.randn(d, device=device) - 3}
    return named | {"initial_state": torch.randn(1, d, n, device=device)}


def conv_inputs(b: int, l: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    x = torch.randn(b, l, 2 * d, device=device, dtype=dtype)[..., :d]
    weight, bias = torch.randn(d, 4, device=device), torch.randn(d, device=device)
    state = torch.randn(1, 3, d, device=device, dtype=dtype)
    return {"x": x, "weight": weight, "bias": bias, "initial_state": state}


def ssd_inputs(b: int, l: int, d: int, n: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Heads of 64 channels, one group, as the layer gives them: x, B and C are slices of the convolution's output."""
    h = d // 64
    x, B, C = torch.randn(b, l, d + 2 * n, device=device, dtype=dtype).split([d, n, n], -1)
    named = {"x": x.unflatten(-1, (h, 64)), "dt": torch.randn(b, l, h, device=device, dtype=dtype)}
    named |= {"A": -1 - 15 * torch.rand(h, device=device), "B": B[:, :, None], "C": C[:, :, None]}
    named |= {"D": torch.ones(h, device=device), "dt_bias": torch.randn(h, device=device) - 3}
    return named | {"initial_state": torch.randn(1, h, 64, n, device=device)}


def gradients(op: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input, under weights that depend on nothing but the shapes."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, final = op(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(v.shape, generator=generator).to(v) for v in (y, final)]
    grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
    return {"y": y, "final_state": final} | dict(zip(leaves, grads, strict=True))


def worst_error(op: Callable[..., Any], inputs: dict[str, Tensor], backend: str, **options: Any) -> float:
    """Largest relative error over outputs and gradients, against the reference in float64."""
    got = gradients(op, inputs, backend=backend, **options)
    want = gradients(op, {k: v.double() for k, v in inputs.items()}, backend="reference", **options)
    errors = [((got[k].double() - v).norm() / v.norm()).item() for k, v in want.items()]
    return max(errors) if all(e == e for e in errors) else float("nan")


def check(op: Callable[..., Any], make: Callable[[int, int], dict[str, Tensor]], backend: str) -> float:
    """The worst error over plain and over padded and packed rows; 300 steps cross a segment and end inside a chunk.

    A package that has no documents within a row is checked on plain rows alone.
    """
    worst = 0.0
    for lengths, packed in ((False, False), (True, True)):
        inputs = make(2, 300)
        device = inputs["x"].device
        options: dict[str, Any] = {}
        if lengths:
            options["lengths"] = torch.tensor([300, 157], device=device)
        if packed:
            options["seq_idx"] = (torch.arange(300, device=device) // 41).int().expand(2, 300).contiguous()
        try:
            error = worst_error(op, inputs, backend, **options)
        except BackendError:
            if not packed:
                raise
            continue
        worst = error if error != error else max(worst, error)
    return worst


def measure(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds: median, 10th and 90th percentile."""
    if device == "cuda":
        return spread(times(run))
    run()
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return spread(samples)


def time_op(op: Callable[..., Any], inputs: dict[str, Tensor], device: str, **options: Any) -> dict[str, Any]:
    """Forward without gradients, and backward alone from a graph that is kept."""
    with torch.no_grad():
        forward = measure(lambda: op(**inputs, **options), device)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, _ = op(**leaves, **options)
    dy = torch.randn_like(y)

    def run_backward() -> Any:
        return torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)

    out: dict[str, Any] = {"forward": forward, "backward": measure(run_backward, device)}
    if device == "cuda":
        with torch.no_grad():
            out["forward_kernels"] = kernel_times(lambda: op(**inputs, **options))
        out["backward_kernels"] = kernel_times(run_backward)
    return out


def kernel_times(run: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Seconds of device time in every kernel of one run, the longest first, from torch's profiler."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [(e.key, e.self_device_time_total / 1e6 / repeats) for e in profiler.key_averages()]
    return {name: seconds for name, seconds in sorted(events, key=lambda e: -e[1]) if seconds > 0}


def mamba_ssm_scan() -> Callable[..., tuple[Tensor, None]] | None:
    """mamba-ssm's CUDA scan on (batch, channels, length) inputs, transposed outside the timed region.

    Its compiled extension is enough: the Python package asks for more at import than the scan needs.
    """
    try:
        import selective_scan_cuda
    except ImportError:
        return None

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
            B, C = B[:, None], C[:, None]
            out, states, y = selective_scan_cuda.fwd(x, dt, A, B, C, D, z, dt_bias, True)
            ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, states, out)
            return y

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            x, dt, A, B, C, D, z, dt_bias, states, out = ctx.saved_tensors
            dx, ddt, dA, dB, dC, dD, dbias, dz = selective_scan_cuda.bwd(
                x, dt, A, B, C, D, z, dt_bias, dy.contiguous(), states, out, None, True, False
            )
            return dx, ddt, dA, dB[:, 0], dC[:, 0], dD, dz, dbias

    return lambda **inputs: (Scan.apply(*(inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))), None)


def mamba_ssm_ssd() -> Callable[..., tuple[Tensor, None]] | None:
    """mamba-ssm's Triton scan of Mamba-2 on our inputs, all rows from the same initial state."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None

    def run(*, x, dt, A, B, C, D, dt_bias, initial_state, chunk_size=256):  # type: ignore[no-untyped-def]
        start = initial_state.expand(x.shape[0], -1, -1, -1).contiguous()
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "initial_states": start}
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options), None

    return run


def ssd_peer_error(peer: Callable[..., tuple[Tensor, None]], inputs: dict[str, Tensor]) -> float:
    """Largest relative error of y and its gradients against the reference in float64."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    got, _ = peer(**leaves)
    want, _ = ssd_scan(**exact, backend="reference")
    dy = torch.randn_like(want)
    pairs = zip(
        (got, *torch.autograd.grad(got, list(leaves.values()), dy.to(got))),
        (want, *torch.autograd.grad(want, list(exact.values()), dy)),
        strict=True,
    )
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def channels_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as mamba-ssm takes them; it takes no initial state."""
    kept = {k: v for k, v in inputs.items() if k != "initial_state"}
    return {k: v.mT.contiguous() if v.dim() == 3 else v for k, v in kept.items()}


def peer_error(peer: Callable[..., tuple[Tensor, None]], inputs: dict[str, Tensor]) -> float:
    """Largest relative error of y and its gradients against the reference in float64."""
    leaves = {k: v.requires_grad_() for k, v in channels_first(inputs).items()}
    y, _ = peer(**leaves)
    exact = {k: inputs[k].detach().double().requires_grad_() for k in leaves}
    want, _ = selective_scan(**exact, backend="reference")
    dy = torch.randn_like(want)
    got_grads = torch.autograd.grad(y, list(leaves.values()), dy.mT.to(y))
    want_grads = torch.autograd.grad(want, list(exact.values()), dy)
    errors = []
    for got, expected in zip((y, *got_grads), (want, *want_grads), strict=True):
        got = (got.mT if got.dim() == 3 else got).double()
        errors.append(((got - expected).norm() / expected.norm()).item())
    return max(errors)


@contextmanager
def tiles(**values: Any) -> Iterator[None]:
    """Other tile sizes and register limits for the kernels: module constants by name, as scan__BD_FWD=64."""
    from hymba.ops.triton import conv, scan, scan_backward, ssd, ssd_backward

    modules = {"scan": scan, "scan_backward": scan_backward, "conv": conv, "ssd": ssd, "ssd_backward": ssd_backward}
    before = {}
    for key, value in values.items():
        module, name = key.split("__")
        before[key] = getattr(modules[module], name)
        if isinstance(value, dict):  # tiles by operand size: those not named stay
            value = before[key] | {size: ssd.Tile(*tile) for size, tile in value.items()}
        setattr(modules[module], name, value)
    try:
        yield
    finally:
        for key, value in before.items():
            module, name = key.split("__")
            setattr(modules[module], name, value)


SWEEP: list[dict[str, Any]] = [
    {"scan__T_FWD": 4},
    {"scan__PREFETCH": 0},
    {"scan__PREFETCH": 2},
    {"scan_backward__PREFETCH": 0},
    {"scan_backward__PREFETCH": 2},
    {"scan_backward__MAX_REGISTERS": 168},
    {"scan_backward__MAX_REGISTERS": 208},
    {"scan_backward__UNROLL": 1},
    {"scan_backward__T_STATES": 4},
    {"conv__U": 4},
    {"conv__BD": 256},
    {"conv__STEPS": 64},
    {"conv__STEPS": 256},
    {"conv__MAX_REGISTERS": 128},
    *({"ssd__FORWARD": {2: tile}} for tile in ((64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2, 168), (128, 64, 8, 2))),
    *({"ssd_backward__GRADIENT": {2: tile}} for tile in ((64, 64, 4, 1), (64, 64, 8, 2), (64, 64, 8, 1))),
    *({"ssd_backward__GROUPS": {2: tile}} for tile in ((64, 64, 4, 3), (64, 64, 8, 3))),
]
SWEPT = {"conv": "causal_conv1d", "ssd": "ssd_scan", "ssd_backward": "ssd_scan"}
"""The op that a module's constants belong to, if not the selective scan."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    for name, value in (("batch", 8), ("length", 8192), ("channels", 3200), ("states", 16), ("head-states", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--backends", nargs="*", help="default: every usable one but the reference and, on a GPU, torch"
    )
    parser.add_argument("--sweep", action="store_true", help="also time other tiles and register limits")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu measures the CPU path", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    b, l, d, n, device, dtype = (
        args.batch, args.length, args.channels, args.states, args.device, getattr(torch, args.dtype)
    )  # fmt: skip

    def scan_case(rows: int, steps: int) -> dict[str, Tensor]:
        return scan_inputs(rows, steps, d, n, dtype, device)

    def conv_case(rows: int, steps: int) -> dict[str, Tensor]:
        return conv_inputs(rows, steps, d, dtype, device)

    def ssd_case(rows: int, steps: int) -> dict[str, Tensor]:
        return ssd_inputs(rows, steps, d, args.head_states, dtype, device)

    cases = {
        "selective_scan": (selective_scan, scan_case),
        "ssd_scan": (ssd_scan, ssd_case),
        "causal_conv1d": (causal_conv1d, conv_case),
    }
    plane = b * l * d * dtype.itemsize
    shared = 2 * b * l * args.head_states * dtype.itemsize
    moved = {  # planes of (b, l, d): read x dt z, write y; read x dt z dy, write dx ddt dz; the conv has no dt and z
        "selective_scan": {"forward": 4 * plane, "backward": 7 * plane},
        # x y, B C; x dy dx, B C dB dC.
        "ssd_scan": {"forward": 2 * plane + shared, "backward": 3 * plane + 2 * shared},
        "causal_conv1d": {"forward": 2 * plane, "backward": 3 * plane},
    }
    facts: dict[str, Any] = {"batch": b, "length": l, "channels": d, "states": n, "dtype": args.dtype}
    facts["head_states"] = args.head_states
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 1_980_000) * 1e3
        facts["copy_bytes_per_second"] = copy_bandwidth()
        facts["exponentials_per_second"] = 16 * properties.multi_processor_count * clock
    rows: list[dict[str, Any]] = []
    failed = False

    def add(name: str, backend: str, variant: dict[str, Any]) -> None:
        nonlocal failed
        op, make = cases[name]
        error = check(op, make, backend)
        row: dict[str, Any] = {"op": name, "backend": backend, "variant": variant, "worst_error": error}
        if error < TOLERANCE[dtype]:
            row |= time_op(op, make(b, l), device, backend=backend)
            row["tokens_per_second"] = b * l / (row["forward"]["median"] + row["backward"]["median"])
            print_row(row)
        else:
            failed = True
            print(f"{name} {backend} {variant}: WRONG, relative error {error:.1e}", flush=True)
        rows.append(row)

    def print_row(row: dict[str, Any]) -> None:
        line = f"{row['op']:15} {row['backend']:9} "
        for way in ("forward", "backward"):
            line += f"{way} {1e3 * row[way]['median']:8.3f} ms "
            if device == "cuda":
                floor = moved[row["op"]][way] / facts["copy_bytes_per_second"]
                line += f"(bytes {1e3 * floor:.2f}) "
        print(f"{line} error {row.get('worst_error', float('nan')):.0e} {row['variant'] or ''}", flush=True)
        for way in ("forward", "backward"):
            kernels = [f"{name[:32]} {1e3 * seconds:.3f}" for name, seconds in row.get(f"{way}_kernels", {}).items()]
            if kernels:
                print(f"    {way}: {', '.join(kernels[:6])}", flush=True)

    for name in cases:
        usable = [r.backend for r in available() if r.op == name and r.usable and r.backend != "reference"]
        if device == "cpu":
            usable = [r for r in usable if r == "torch"]
        for backend in args.backends or [r for r in usable if device == "cpu" or r != "torch"]:
            if backend in usable:
                add(name, backend, {})
    if device == "cuda" and (peer := mamba_ssm_scan()) is not None:
        error = peer_error(peer, scan_case(2, 304))
        row = {"op": "selective_scan", "backend": "mamba_ssm", "variant": {}, "worst_error": error}
        row |= time_op(peer, channels_first(scan_case(b, l)), device)
        print_row(row)
        rows.append(row)
    if device == "cuda" and (peer := mamba_ssm_ssd()) is not None:
        row = {"op": "ssd_scan", "backend": "mamba_ssm", "variant": {}}
        row |= {"worst_error": ssd_peer_error(peer, ssd_case(2, 300))} | time_op(peer, ssd_case(b, l), device)
        print_row(row)
        rows.append(row)
    if args.sweep and device == "cuda":
        for variant in SWEEP:
            with tiles(**variant):
                add(SWEPT.get(next(iter(variant)).split("__")[0], "selective_scan"), "triton", variant)
    if device == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    report("ops", rows, **facts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
