"""The kernels of a fused decode step against the blocks that they stand for, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import build, small_config

from hymba import HymbaCache
from hymba.decoding import DecodeStep
from hymba.nn import LayerState, MambaHeads, Span, rms_norm, rope_tables
from hymba.nn.rope import apply_rope
from hymba.nn.state import slot_positions
from hymba.ops.attention import attention_ref
from hymba.ops.masks import Visibility

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from hymba.ops.triton.decode import conv_update
from hymba.ops.triton.decode_attention import decode_attention
from hymba.ops.triton.decode_mamba import mamba_step
from hymba.ops.triton.decode_rows import gate_rows, norm_rows
from hymba.ops.triton.gemv import gemv

FLOAT32 = 2e-5
"""Largest difference in float32 between two orders of the same sums."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("rows", "slots", "prefix", "window", "heads", "group", "d", "e", "splits"),
    [(2, 70, 5, 64, 2, 5, 16, 32, 3), (3, 33, 0, None, 1, 4, 16, 16, 1), (1, 200, 128, None, 2, 3, 32, 64, None)],
)
@pytest.mark.parametrize("own", [True, False])
def test_attention_over_slots(
    rows: int, slots: int, prefix: int, window: int | None, heads: int, group: int, d: int, e: int,
    splits: int | None, own: bool,
) -> None:  # fmt: skip
    positions = (3 * slots if window else slots) + 1
    cos, sin = (t[0] for t in rope_tables(torch.arange(positions)[None] + prefix, head_dim=d, base=1e4))
    q, k, v = torch.randn(rows, heads * group * d), torch.randn(rows, heads * d), torch.randn(rows, heads * e)
    keys, values = torch.randn(rows, slots, heads, d), torch.randn(rows, slots, heads, e)
    pk = torch.randn(1, prefix, heads, d) if prefix else None
    pv = torch.randn(1, prefix, heads, e) if prefix else None
    position = torch.randint(0, positions - 1, (rows,))
    valid = torch.arange(rows) != 1

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x.unflatten(1, (-1, d))[:, None], cos[position][:, None], sin[position][:, None])

    row, slot = torch.arange(rows), position % slots
    full, full_values = keys.clone(), values.clone()
    if own:
        full[row, slot], full_values[row, slot] = rotated(k)[:, 0], v.unflatten(1, (-1, e))
    mask = Visibility(position[:, None], slot_positions(position + 1, slots), window, prefix).dense()
    all_keys = full if pk is None else torch.cat([pk.expand(rows, -1, -1, -1), full], 1)
    all_values = full_values if pv is None else torch.cat([pv.expand(rows, -1, -1, -1), full_values], 1)
    expected, _ = attention_ref(rotated(q), all_keys, all_values, mask)
    count = torch.zeros(rows * heads, dtype=torch.int32)
    written, written_values = keys.clone(), values.clone()
    for _ in range(2):
        # Again on the same slot: what the first call wrote is replaced, the count stands at zero again.
        out = decode_attention(
            q, k if own else None, v if own else None, keys=written, values=written_values, position=position,
            cos=cos, sin=sin, window=window, count=count, prefix_k=pk, prefix_v=pv, valid=valid, splits=splits,
        )  # fmt: skip
        assert (out - expected[:, 0]).abs().max() < FLOAT32
        assert not count.any()
    assert (written - full)[valid].abs().max() < FLOAT32 and torch.equal(written_values[valid], full_values[valid])
    assert torch.equal(written[~valid], keys[~valid])


def test_linear_layers_of_one_row() -> None:
    depth, features = 100, 70
    x, other, add = torch.randn(1, depth), torch.randn(1, depth), torch.randn(1, features)
    weight, gate = (torch.randn(features, depth) / 10 for _ in range(2))
    norm, norm2, bias = torch.rand(depth) + 0.5, torch.rand(depth) + 0.5, torch.randn(features)
    a, b = rms_norm(x, norm, 1e-6), rms_norm(other, norm2, 1e-6)
    for blocks in ((4, 4, 0), (8, 4, 2), None):
        for out, expected in (
            (gemv(x, weight, blocks=blocks), x @ weight.T),
            (gemv(x, weight, norm=norm, bias=bias, blocks=blocks), a @ weight.T + bias),
            (gemv(x, weight, norm=norm, gate=gate, blocks=blocks), F.silu(a @ gate.T) * (a @ weight.T)),
            (gemv(x, weight, norm=norm, relu2=True, blocks=blocks), F.relu(a @ weight.T) ** 2),
            (
                gemv(x, weight, norm=norm, merge=(other, norm2), add_to=add.clone(), blocks=blocks),
                add + (a + b) / 2 @ weight.T,
            ),
        ):
            assert (out - expected).abs().max() < FLOAT32
    with pytest.raises(ValueError, match=r"expected \(1, 100\)"):
        gemv(torch.randn(2, depth), weight)


def test_what_stands_between_products_of_rows() -> None:
    x, other, gate = (torch.randn(5, 100) for _ in range(3))
    norm, norm2 = torch.rand(100) + 0.5, torch.rand(100) + 0.5
    a, b = rms_norm(x, norm, 1e-6), rms_norm(other, norm2, 1e-6)
    assert (norm_rows(x, norm, eps=1e-6) - a).abs().max() < FLOAT32
    assert (norm_rows(x, norm, eps=1e-6, merge=(other, norm2)) - (a + b) / 2).abs().max() < FLOAT32
    assert (gate_rows(x.clone(), gate) - F.silu(gate) * x).abs().max() < FLOAT32
    assert (gate_rows(x.clone(), None) - F.relu(x) ** 2).abs().max() < FLOAT32


@pytest.mark.parametrize("rows", [1, 3, 18])
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
    window, ssm = expected.conv.clone(), expected.ssm.clone()
    y = heads(x[:, None], z[:, None], expected, span=Span.following(1, lengths=valid.long()))[:, 0]
    taps = heads.conv1d.weight[:, 0].contiguous()
    conv = None
    if rows == 1:
        conv = (taps, heads.conv1d.bias, window)
        low = gemv(x, heads.x_proj.weight, conv=conv)
    else:
        x = conv_update(window, x, taps, heads.conv1d.bias, valid, silu=True)
        low = x @ heads.x_proj.weight.T
    out = mamba_step(
        x, z, low, conv=conv, dt_weight=heads.dt_proj.weight, dt_bias=heads.dt_bias, A_log=heads.A_log, D=heads.D,
        dt_norm=heads.dt_norm.weight, b_norm=heads.B_norm.weight, c_norm=heads.C_norm.weight, ssm_state=ssm, eps=1e-6,
        out=torch.empty(rows, width), valid=valid,
    )  # fmt: skip
    assert (out - y)[valid].abs().max() < FLOAT32
    assert torch.equal(window, expected.conv)
    assert (ssm - expected.ssm).abs().max() < FLOAT32


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 2)])
@torch.no_grad()
def test_fused_steps_give_the_forward_pass(rows: slice) -> None:
    model = build(
        small_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3),
        dtype=torch.float32,
    )
    ids, mask = torch.randint(1, 41, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    ids, mask = ids[rows], mask[rows]
    whole = model(ids, attention_mask=mask).logits
    cache = HymbaCache(model.config, max_length=14)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    step = DecodeStep(model, cache, fused=True)
    for t in range(8, 14):
        step.tokens.copy_(ids[:, t])
        step.run()
        assert (step.logits - whole[:, t]).abs().max() < 1e-3
