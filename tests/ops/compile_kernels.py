"""Compile every kernel launch of the package for a GPU that need not be there, and print what each one uses.

    python tests/ops/compile_kernels.py 90 [--quick] [--states 64]

The wrappers run on small CPU tensors whose strides are those of the release, and every launch stops after ptxas. Says
nothing about values, which the interpreter's tests hold; it finds what only the compiler refuses, and spills.
`--states` is how many a channel of the selective scan has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime import driver as drivers

from hymba.ops.attention_op import Sources, padded_rows
from hymba.ops.scan_inputs import ScanInputs
from hymba.ops.ssd_inputs import SsdInputs
from hymba.ops.triton import (
    attention,
    attention_backward,
    conv,
    decode,
    decode_attention,
    decode_mamba,
    decode_rows,
    gate,
    gemv,
    loss,
    norm,
    rope,
    scan,
    scan_backward,
    split_norm,
    ssd,
    ssd_backward,
)


class _Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([path, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3])


def check_lanes(ttgir: str) -> None:
    """The sums by halves are written for one channel group to a lane; at run time another layout makes them NaN."""
    for line in ttgir.splitlines():
        if "shfl.sync.bfly" in line:
            layouts = re.findall(r"parent = (#\w+)}", line)
            assert layouts, line
            for layout in layouts:
                definition = re.search(rf"^{layout} = (.*)$", ttgir, re.MULTILINE)
                assert definition and "threadsPerWarp = [1, 1, 32, 1]" in definition[1], definition


def main(capability: int, quick: bool, states: int) -> None:
    drivers.set_active(_Absent(capability))
    seen: set[str] = set()

    def compile_only(self: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                registers, stack, shared = usage(kernel.asm["cubin"])
                check_lanes(kernel.asm["ttgir"])
                module = self.fn.__module__.rpartition(".")[2]
                warpgroups = "warpgroup products" if "wgmma.mma_async" in kernel.asm["ptx"] else ""
                used = f"{registers:4} registers {stack:5} stack {shared:6} shared {warpgroups}"
                print(f"{module:18} {self.fn.__name__:18} {used}")

        return launch

    JITFunction.__getitem__ = compile_only
    b, l, d, n, k = 2, 32, 3200, states, 4
    for dtype, rich, packed in (
        [(torch.bfloat16, True, False)]
        if quick
        else product((torch.bfloat16, torch.float32), (True, False), (False, True))
    ):
        projected = torch.zeros(b, l, 2 * d + 64, dtype=dtype)
        x, z = projected[..., :d], projected[..., d : 2 * d]
        dt, small = torch.zeros(b, l, d, dtype=dtype), torch.zeros(b, l, n, dtype=dtype)
        vector, state = torch.zeros(d), torch.zeros(b, d, n)
        lengths = torch.full((b,), l) if rich else None
        seq = torch.zeros(b, l, dtype=torch.int32) if packed else None
        options = (vector, z, vector, state, lengths) if rich else (None,) * 5
        inputs = ScanInputs(x, dt, torch.zeros(d, n), small, small, *options, seq)
        for parallel in (False, True):
            scan.forward(inputs, 256, True, parallel=parallel)
        scan_backward.backward(dt, state, inputs, torch.zeros(1, b, n, d), 256)
        init = torch.zeros(b, k - 1, d, dtype=dtype) if rich else None
        arguments = (x, torch.zeros(d, k), vector if rich else None, init, lengths, seq, True)
        conv.forward(*arguments)
        conv.backward(dt, *arguments)
        valid = torch.ones(b, dtype=torch.bool) if rich else None
        decode.conv_update(torch.zeros(b, k - 1, d, dtype=dtype), x[:, 0], arguments[1], arguments[2], valid, True)
        gate, bias = (z[:, 0], vector) if rich else (None, None)
        decode.state_update(state, x[:, 0], dt[:, 0], inputs.A, small[:, 0], small[:, 0], inputs.D, gate, bias, valid)
        fused(projected, x, dt, rich)
        heads(dtype, rich, packed)
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        decode_step(dtype, capability >= 90)
        many_queries(dtype, quick)


def heads(dtype: torch.dtype, rich: bool, packed: bool) -> None:
    """The scan of Mamba-2 and its step: 50 heads of 64 channels, 128 states, as slices of one projection."""
    b, l, h, p, g, n = 2, 128, 50, 64, 1, 128
    projected = torch.zeros(b, l, h * p + 2 * g * n, dtype=dtype)
    u, B, C = projected.split([h * p, g * n, g * n], dim=-1)
    x, B, C = u.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    dt, vector, state = torch.zeros(b, l, h, dtype=dtype), torch.zeros(h), torch.zeros(b, h, p, n)
    lengths = torch.full((b,), l) if rich else None
    seq = torch.zeros(b, l, dtype=torch.int32) if packed else None
    D, bias, initial = (vector, vector, state) if rich else (None,) * 3
    inputs = SsdInputs(x, dt, vector, B, C, D, bias, initial, lengths, seq)
    for parallel in (False, True):
        ssd.forward(inputs, 64, True, parallel=parallel)
    ssd_backward.backward(x, state, inputs, torch.zeros(2, b, g, n, h, p), 64)
    valid = torch.ones(b, dtype=torch.bool) if rich else None
    decode.head_state_update(state, x[:, 0], dt[:, 0], vector, B[:, 0], C[:, 0], D, bias, valid)


def many_queries(dtype: torch.dtype, quick: bool) -> None:
    """Attention of prefill and training: own keys in a window, packed, global, behind a ring, behind a buffer."""
    b, l, h, k, d, e, m = 2, 256, 25, 5, 64, 128, 128
    projected = torch.zeros(b, l, h * d + k * (d + e), dtype=dtype)
    q, keys, values = projected.split([h * d, k * d, k * e], dim=-1)
    q, keys, values = q.unflatten(2, (h, d)), keys.unflatten(2, (k, d)), values.unflatten(2, (k, e))
    meta = torch.zeros(1, m, k, d, dtype=dtype), torch.zeros(1, m, k, e, dtype=dtype)
    held = torch.zeros(b, 1024 + l, k, d, dtype=dtype), torch.zeros(b, 1024 + l, k, e, dtype=dtype)
    start, bounds = torch.zeros(1, dtype=torch.long), [torch.zeros(1, l, dtype=torch.int32)] * 2
    out, lse = torch.zeros(b, l, h * e, dtype=dtype), torch.zeros(b, k, padded_rows(l * h // k))
    cases = [
        Sources(q, keys, values, *meta, None, None, None, 1024, 0),
        Sources(q, keys, values, *meta, None, *bounds, None, 0),
        Sources(q, keys, values, *meta, None, None, None, None, 0),
        Sources(q, *held, *meta, start, None, None, 1024, 1024),
        Sources(q, *held, *meta, start, None, None, None, None),
    ]
    for case in cases[:1] if quick else cases:
        attention.forward(case)
        attention_backward.backward(case, out, lse, out)
    attention.forward(cases[3])


def decode_step(dtype: torch.dtype, dependent: bool) -> None:
    """The kernels of a fused decode step, in the widths of the release."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    for module in (gemv, decode_attention, decode_mamba, decode_rows):
        module.overlaps = lambda x: {"OVERLAPS": dependent, "launch_pdl": dependent}
    one, wide, inner = zeros(1, 1600), zeros(1, 3200), zeros(1, 5504)
    gemv.gemv(one, zeros(8960, 1600), norm=zeros(1600))
    gemv.gemv(wide, zeros(132, 3200), conv=(zeros(3200, 4), zeros(3200), zeros(1, 3, 3200)))
    gemv.gemv(wide, zeros(1600, 3200), norm=zeros(3200), merge=(wide, zeros(3200)), add_to=one)
    gemv.gemv(one, zeros(5504, 1600), norm=zeros(1600), gate=zeros(5504, 1600))
    gemv.gemv(inner, zeros(1600, 5504), add_to=one)
    gemv.gemv(one, zeros(320, 1600), norm=zeros(1600), out=torch.zeros(1, 320))
    for rows, window in ((1, 1024), (16, None)):
        position, count = torch.zeros(rows, dtype=torch.long), torch.zeros(rows * 5, dtype=torch.int32)
        table, valid = torch.zeros(2048, 32), torch.ones(rows, dtype=torch.bool)
        for own in (True, False):
            decode_attention.decode_attention(
                zeros(rows, 1600), zeros(rows, 320) if own else None, zeros(rows, 640) if own else None,
                keys=zeros(rows, 1025, 5, 64), values=zeros(rows, 1025, 5, 128), position=position, cos=table,
                sin=table, window=window, count=count, prefix_k=zeros(1, 128, 5, 64), prefix_v=zeros(1, 128, 5, 128),
                valid=valid, splits=4,
            )  # fmt: skip
        x = zeros(rows, 3200)
        conv = (zeros(3200, 4), zeros(3200), zeros(1, 3, 3200)) if rows == 1 else None
        decode_mamba.mamba_step(
            x, x, zeros(rows, 132), conv=conv, dt_weight=zeros(3200, 100), dt_bias=zeros(3200),
            A_log=torch.zeros(3200, 16), D=zeros(3200), dt_norm=zeros(100), b_norm=zeros(16), c_norm=zeros(16),
            ssm_state=torch.zeros(rows, 3200, 16), eps=1e-6, out=x, valid=valid,
        )  # fmt: skip
    decode_rows.norm_rows(x, zeros(3200), eps=1e-6, merge=(x, zeros(3200)))
    decode_rows.norm_rows(zeros(16, 1600), zeros(1600), eps=1e-6)
    decode_rows.gate_rows(zeros(16, 5504), zeros(16, 5504))


def fused(projected: torch.Tensor, x: torch.Tensor, other: torch.Tensor, rich: bool) -> None:
    """The kernels around the products. rich: with their optional inputs."""
    weight = torch.zeros(x.shape[-1])
    residual = other if rich else None
    norm.forward(x, residual, weight, 1e-6, x.dtype)
    norm.backward(other, x, weight, residual, 1e-6)
    norm.mean(x, other, weight, weight, 1e-6)
    norm.mean_backward(other, x, other, weight, weight, 1e-6)
    gate.forward(residual, other)
    gate.backward(other, residual, other)
    angles = torch.zeros(1, x.shape[1], 32)
    rope.rotate(projected[..., :1600].unflatten(-1, (25, 64)), angles, angles, not rich)
    small = torch.zeros(*x.shape[:-1], 136, dtype=x.dtype)
    split = split_norm.forward(small, torch.zeros(100), torch.zeros(16), torch.zeros(16), 1e-6, 104)
    split_norm.backward(*split, small, torch.zeros(100), torch.zeros(16), torch.zeros(16), 1e-6)
    logits = torch.zeros(4, 32064, dtype=x.dtype)[:, :32001]
    loss.rows(logits, torch.zeros(4, dtype=torch.long), -100, rich)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--quick", action="store_true", help="bfloat16 alone, with every option")
    parser.add_argument("--states", type=int, default=16)
    main(**vars(parser.parse_args()))
