"""The kernels of a fused decode step against the blocks that they stand for, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import build, small_config

from hymba import HymbaCache
from hymba.decoding import DecodeStep
from hymba.nn import LayerState, MambaHeads, Span, rms_norm
from hymba.nn.state import slot_positions
from hymba.ops.attention import attention_ref
from hymba.ops.masks import Visibility

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from hymba.ops.triton.decode_attention import decode_attention
from hymba.ops.triton.decode_mamba import mamba_step
from hymba.ops.triton.small_linear import small_linear

FLOAT32 = 2e-5
"""Largest difference in float32 between two orders of the same sums."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("rows", "slots", "prefix", "window", "heads", "group", "d", "e", "splits"),
    [(2, 70, 5, 64, 2, 5, 16, 32, 3), (3, 33, 0, None, 1, 4, 16, 16, 1), (1, 200, 128, None, 2, 3, 32, 64, None)],
)
def test_attention_over_slots(
    rows: int, slots: int, prefix: int, window: int | None, heads: int, group: int, d: int, e: int, splits: int | None
) -> None:
    q = torch.randn(rows, 1, heads * group, d)
    k, v = torch.randn(rows, slots, heads, d), torch.randn(rows, slots, heads, e)
    pk = torch.randn(1, prefix, heads, d) if prefix else None
    pv = torch.randn(1, prefix, heads, e) if prefix else None
    seen = torch.randint(1, 3 * slots if window else slots + 1, (rows,))
    mask = Visibility((seen - 1)[:, None], slot_positions(seen, slots), window, prefix).dense()
    keys = k if pk is None else torch.cat([pk.expand(rows, -1, -1, -1), k], 1)
    values = v if pv is None else torch.cat([pv.expand(rows, -1, -1, -1), v], 1)
    expected, _ = attention_ref(q, keys, values, mask)
    out = decode_attention(q, k, v, seen - 1, window=window, prefix_k=pk, prefix_v=pv, splits=splits)
    assert (out - expected).abs().max() < FLOAT32


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_linear_layers_of_few_rows(rows: int) -> None:
    depth, features = 100, 70
    x, other, add = torch.randn(rows, depth), torch.randn(rows, depth), torch.randn(rows, features)
    weight, gate = (torch.randn(features, depth) / 10 for _ in range(2))
    norm, norm2, bias = torch.rand(depth) + 0.5, torch.rand(depth) + 0.5, torch.randn(features)
    blocks = (4, 64, 4) if rows == 1 else (16, 64, 4)
    a, b = rms_norm(x, norm, 1e-6), rms_norm(other, norm2, 1e-6)
    for out, expected in (
        (small_linear(x, weight, blocks=blocks), x @ weight.T),
        (small_linear(x, weight, norm=norm, bias=bias, blocks=blocks), a @ weight.T + bias),
        (small_linear(x, weight, norm=norm, gate=gate, blocks=blocks), F.silu(a @ gate.T) * (a @ weight.T)),
        (small_linear(x, weight, norm=norm, relu2=True, blocks=blocks), F.relu(a @ weight.T) ** 2),
        (
            small_linear(x, weight, norm=norm, merge=(other, norm2), add_to=add.clone(), blocks=blocks),
            add + (a + b) / 2 @ weight.T,
        ),
    ):
        assert (out - expected).abs().max() < FLOAT32


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_step_of_the_mamba_heads(rows: int) -> None:
    width = 40
    heads = MambaHeads(d_inner=width, d_state=8, d_conv=4, dt_rank=6)
    for parameter in heads.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    x, z = torch.randn(rows, width), torch.randn(rows, width)
    valid = torch.arange(rows) != 1
    expected = LayerState(conv=torch.randn(rows, 3, width), ssm=torch.randn(rows, width, 8), in_place=True)
    assert expected.conv is not None and expected.ssm is not None and heads.conv1d.bias is not None
    conv, ssm = expected.conv.clone(), expected.ssm.clone()
    y = heads(x[:, None], z[:, None], expected, span=Span.following(1, lengths=valid.long()))[:, 0]
    taps = heads.conv1d.weight[:, 0].contiguous()
    blocks = (1, 64, 4) if rows == 1 else (16, 64, 4)
    low = small_linear(x, heads.x_proj.weight, conv=(taps, heads.conv1d.bias, conv), blocks=blocks)
    out = mamba_step(
        x, z, low, conv_state=conv, conv_weight=taps, conv_bias=heads.conv1d.bias, dt_weight=heads.dt_proj.weight,
        dt_bias=heads.dt_bias, A_log=heads.A_log, D=heads.D, dt_norm=heads.dt_norm.weight,
        b_norm=heads.B_norm.weight, c_norm=heads.C_norm.weight, ssm_state=ssm, eps=1e-6,
        out=torch.empty(rows, width), valid=valid,
    )  # fmt: skip
    assert (out - y)[valid].abs().max() < FLOAT32
    assert torch.equal(conv, expected.conv)
    assert (ssm - expected.ssm).abs().max() < FLOAT32


@torch.no_grad()
def test_fused_steps_give_the_forward_pass() -> None:
    model = build(
        small_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3),
        dtype=torch.float32,
    )
    ids, mask = torch.randint(1, 41, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    cache = HymbaCache(model.config, max_length=14)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    step = DecodeStep(model, cache, fused=True)
    for t in range(8, 14):
        step.tokens.copy_(ids[:, t])
        step.run()
        assert (step.logits - whole[:, t]).abs().max() < 1e-3
