"""Blocks on their own: keyword arguments in, state in and state out, the formulas of the specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import largest, randomise, relative
from tolerances import FLOAT64, FLOAT64_GRADIENT
from torch import Tensor, nn

import hymba.ops.attention as attention_module
from hymba import HymbaConfig, HymbaForCausalLM
from hymba.config import ConfigError
from hymba.nn import (
    MLP,
    AttentionHeads,
    HeadNorm,
    HybridHeads,
    HymbaBlock,
    LayerState,
    MambaHeads,
    MetaTokens,
    RMSNorm,
    SharedKV,
    Span,
    apply_rope,
    rope_tables,
    run_prefix,
)
from hymba.nn.init import RULES, initialise, rule_for
from hymba.ops.attention import attention, attention_ref
from hymba.ops.masks import Visibility, visible


def _random(module: nn.Module, seed: int = 0) -> Any:
    randomise(module, seed)
    return module.double()


def _x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MIXER: dict[str, Any] = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "d_state": 4, "dt_rank": 3}


# One block, any split, any padding.


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cuts", [[1] * 17, [5, 1, 11], [16, 1], [2, 2, 2, 11]], ids=str)
def test_a_mixer_unrolled_from_its_state(window: int | None, cuts: list[int]) -> None:
    mixer = _random(HybridHeads(**MIXER, window=window))
    x = _x(2, 17, 16)
    whole, end, _ = mixer(x)
    state, parts = None, []
    for part in x.split(cuts, dim=1):
        out, state, _ = mixer(part, state)
        parts.append(out)
    assert largest(torch.cat(parts, dim=1), whole) <= FLOAT64
    assert largest(state.ssm, end.ssm) <= FLOAT64 and largest(state.conv, end.conv) <= FLOAT64
    assert state.columns == end.columns == 17


def test_a_state_is_left_alone() -> None:
    """The state that is passed in can be used again: two continuations of one beginning."""
    mixer = _random(HybridHeads(**MIXER, window=3))
    _, state, _ = mixer(_x(1, 9, 16))
    first, *_ = mixer(_x(1, 4, 16, seed=1), state)
    mixer(_x(1, 7, 16, seed=2), state)
    again, *_ = mixer(_x(1, 4, 16, seed=1), state)
    assert torch.equal(first, again)


def test_gradients_through_a_state() -> None:
    """Back-propagation through time over chunks is that of the whole."""
    mixer = _random(HybridHeads(**MIXER, window=4))
    x = _x(2, 14, 16).requires_grad_()
    mixer(x)[0].pow(2).sum().backward()
    want = [x.grad, *(p.grad for p in mixer.parameters())]
    x.grad = None
    mixer.zero_grad()
    state, total = None, torch.zeros((), dtype=torch.float64)
    for part in x.split([3, 1, 6, 4], dim=1):
        out, state, _ = mixer(part, state)
        total = total + out.pow(2).sum()
    total.backward()
    for got, expected in zip([x.grad, *(p.grad for p in mixer.parameters())], want, strict=True):
        assert relative(got, expected) <= FLOAT64_GRADIENT


def test_lengths_of_rows() -> None:
    """Real tokens first: each row is what it is alone, its state ends with its own last token."""
    mixer = _random(HybridHeads(**MIXER, window=3))
    x, lengths = _x(3, 8, 16), torch.tensor([8, 1, 5])
    out, state, _ = mixer(x, span=Span.following(8, lengths=lengths))
    more, _, _ = mixer(_x(3, 2, 16, seed=1), state)
    for row, length in enumerate(lengths.tolist()):
        alone, end, _ = mixer(x[row : row + 1, :length])
        assert largest(out[row : row + 1, :length], alone) <= FLOAT64
        assert largest(state.ssm[row : row + 1], end.ssm) <= FLOAT64
        assert largest(state.conv[row : row + 1], end.conv) <= FLOAT64
        after, _, _ = mixer(_x(3, 2, 16, seed=1)[row : row + 1], end)
        assert largest(more[row : row + 1], after) <= FLOAT64


def test_a_borrowing_block() -> None:
    """A stack by hand: the lender's keys and values reach the borrower; its own branch state stays its own."""
    lender = _random(HymbaBlock(**MIXER, intermediate_size=12))
    borrower = _random(HymbaBlock(**MIXER, intermediate_size=None, borrows_kv=True), seed=1)
    assert borrower.mlp is None and borrower.ffn_norm is None
    assert borrower.mixer.in_proj.out_features == lender.mixer.in_proj.out_features - 2 * (4 + 8)
    x = _x(2, 11, 16)

    def both(part: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        hidden, first, kv = lender(part, states[0])
        span = Span.following(part.shape[1], columns=0 if states[0] is None else states[0].columns)
        hidden, second, same = borrower(hidden, states[1], kv=kv, span=span)
        assert same is kv and second.kv is None
        return hidden, [first, second]

    whole, _ = both(x, [None, None])
    states: list[Any] = [None, None]
    parts = []
    for part in x.split([4, 1, 6], dim=1):
        out, states = both(part, states)
        parts.append(out)
    assert largest(torch.cat(parts, dim=1), whole) <= FLOAT64


def test_meta_tokens_as_a_prefix() -> None:
    """`prepend` and `run_prefix` are the same thing."""
    blocks = nn.ModuleList(HymbaBlock(**MIXER, intermediate_size=12, window=w) for w in (None, 3))
    _random(blocks)
    meta = MetaTokens(num_tokens=5, hidden_size=16).double()
    x = _x(2, 9, 16)
    wide = meta.prepend(x)
    # Without windows in the prepended form, which has no place for "always visible": text shorter than the window.
    short = wide[:, : 5 + 3]
    for block in blocks:
        short, _, _ = block(short)
    states, hidden = run_prefix(blocks, meta(), lenders=[None, None])
    assert [state.prefix for state in states] == [5, 5] and len(hidden) == 3
    out = x[:, :3]
    span = Span.following(3, offset=5)
    for block, state in zip(blocks, states, strict=True):
        out, _, _ = block(out, state, span=span)
    # The meta tokens of a windowed layer see each other all, as text would not.
    assert largest(hidden[1].expand(2, -1, -1), _first_layer(blocks[0], wide)[:, :5]) <= FLOAT64
    assert largest(out, _windowed_by_hand(blocks, wide[:, :8], 5)[:, 5:]) <= FLOAT64


def _first_layer(block: Any, x: Tensor) -> Tensor:
    return block(x)[0]


def _windowed_by_hand(blocks: Any, x: Tensor, meta: int) -> Tensor:
    for block in blocks:
        span = Span.following(x.shape[1])
        window = block.mixer.attention.window
        q, k = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        seen = (k <= q) & (torch.full_like(k, window is None) | (q - k <= (window or 0)) | (k < meta)).bool()
        span._memo[("visibility", window, 0, 0, False, None)] = Visibility(
            query=span.positions, key=span.positions, window=window, own_keys=0, _dense=seen[None]
        )
        x, _, _ = block(x, LayerState(), span=span)
    return x


# Parts against their formulas.


def test_rms_norm() -> None:
    norm = _random(RMSNorm(6, eps=1e-3))
    x = _x(2, 3, 6)
    assert largest(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight) <= FLOAT64
    low = norm.to(torch.bfloat16)
    rounded = x.to(torch.bfloat16)
    # Normed in float32, rounded, then multiplied: not rounded in between any more often.
    f = rounded.float()
    want = (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-3)).to(torch.bfloat16) * low.weight
    assert torch.equal(low(rounded), want)
    assert low.float()(rounded).dtype == torch.bfloat16


def test_head_norms() -> None:
    x = _x(2, 3, 4, 6)
    shared = _random(HeadNorm("rms", num_heads=4, head_dim=6))
    each = _random(HeadNorm("perhead-rms", num_heads=4, head_dim=6))
    assert shared.weight.shape == (6,) and each.weight.shape == (1, 4, 1, 6)
    unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert largest(shared(x), unit * shared.weight) <= FLOAT64
    assert largest(each(x), unit * each.weight[0, :, 0]) <= FLOAT64


def test_rope_is_a_rotation_of_half_split_pairs() -> None:
    x, positions = _x(1, 5, 2, 8), torch.tensor([[0, 1, 7, 100, 3]])
    cos, sin = rope_tables(positions, head_dim=8, base=500.0)
    assert cos.dtype == torch.float32 and cos.shape == (1, 5, 4)
    angles = positions[..., None] * 500.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    assert largest(apply_rope(x, cos, sin), torch.cat([turned.real, turned.imag], dim=-1)) <= 1e-4
    # Products depend on distances alone.
    q, k = _x(1, 1, 1, 8), _x(1, 1, 1, 8, seed=1)
    scores = []
    for shift in (0, 40):
        turned_q, turned_k = (
            apply_rope(v, *rope_tables(torch.tensor([[p + shift]]), head_dim=8, base=500.0))
            for v, p in ((q, 9), (k, 4))
        )
        scores.append((turned_q * turned_k).sum())
    assert largest(scores[0], scores[1]) <= 1e-4


def test_mlp() -> None:
    x = _x(2, 3, 6)
    gated = _random(MLP(hidden_size=6, intermediate_size=5))
    want = (F.silu(x @ gated.gate_proj.weight.T) * (x @ gated.up_proj.weight.T)) @ gated.down_proj.weight.T
    assert largest(gated(x), want) <= FLOAT64
    squared = _random(MLP(hidden_size=6, intermediate_size=5, activation="relu2"))
    assert squared.gate_proj is None
    want = F.relu(x @ squared.up_proj.weight.T).pow(2) @ squared.down_proj.weight.T
    assert largest(squared(x), want) <= FLOAT64


def test_mamba_heads_step_by_step() -> None:
    """The recurrence written out, one token at a time."""
    heads = _random(MambaHeads(d_inner=6, d_state=3, d_conv=4, dt_rank=2))
    x, z = _x(1, 9, 6), _x(1, 9, 6, seed=1)
    h = torch.zeros(6, 3, dtype=torch.float64)
    A, padded, rows = -heads.A_log.exp(), F.pad(x[0], (0, 0, 3, 0)), []
    for t in range(9):
        u = F.silu((padded[t : t + 4].T * heads.conv1d.weight[:, 0]).sum(-1) + heads.conv1d.bias)
        low, B, C = (heads.x_proj.weight @ u).split([2, 3, 3])
        step = F.softplus(heads.dt_proj.weight @ heads.dt_norm(low) + heads.dt_bias)
        h = torch.exp(step[:, None] * A) * h + (step * u)[:, None] * heads.B_norm(B)
        rows.append((h @ heads.C_norm(C) + heads.D * u) * F.silu(z[0, t]))
    assert largest(heads(x, z)[0], torch.stack(rows)) <= FLOAT64


# Attention.


def test_visibility_is_the_specification() -> None:
    q = torch.arange(12)[None]
    for window in (None, 1, 4, 50):
        seen = visible(q, q, window)[0]
        for i in range(12):
            for j in range(12):
                assert bool(seen[i, j]) == (j <= i and (window is None or i - j <= window))
    slots = torch.tensor([[8, 9, -3, 3]])
    assert visible(torch.tensor([[9]]), slots, 5)[0, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_every_path_is_the_reference(prefix: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query, many, blocks of queries, keys from a cache, packed rows, rows of their own positions."""
    b, h, kv = 2, 6, 2
    pk, pv = (_x(1, prefix, kv, 4), _x(1, prefix, kv, 8)) if prefix else (None, None)
    own = torch.arange(23)[None]
    documents = torch.tensor([0] * 9 + [1] * 3 + [2] * 11)[None]
    behind = torch.cat([torch.arange(10, 14), torch.tensor([-1, 7, 8, 9])])[None]
    ragged = torch.stack([torch.arange(20, 24), torch.arange(3, 7)])
    rows = torch.stack([torch.arange(9, 24), torch.cat([torch.arange(7), torch.full((8,), -5)])])
    cases = {
        "plain": Visibility(query=own, key=own, window=window, prefix=prefix, own_keys=0),
        "packed": Visibility(own, own, window, prefix, 0, documents, documents),
        "cache": Visibility(torch.arange(14, 16)[None], behind, window, prefix, None),
        "one": Visibility(torch.tensor([[13], [12]]), behind, window, prefix, None),
        "continued": Visibility(
            torch.arange(10, 17)[None], torch.cat([torch.arange(10), torch.arange(10, 17)])[None], window, prefix, 10
        ),
        "ragged": Visibility(ragged, rows, window, prefix, None),
    }
    for name, seen in cases.items():
        length, keys = seen.query.shape[1], seen.key.shape[1]
        q, k, v = _x(b, length, h, 4), _x(b, keys, kv, 4, seed=1), _x(b, keys, kv, 8, seed=2)
        text = visible(seen.query, seen.key, window, seen.query_document, seen.key_document)
        mask = F.pad(text, (prefix, 0), value=True)
        joined = [torch.cat([p.expand(b, -1, -1, -1), t], dim=1) for p, t in ((pk, k), (pv, v))] if prefix else [k, v]
        want, weights = attention_ref(q, *joined, mask)
        assert torch.equal(seen.dense(), mask)
        for blocks in (False, True):
            with monkeypatch.context() as patch:
                if blocks:
                    patch.setattr(attention_module, "_QUERY_BLOCK", 3)
                    patch.setattr(attention_module, "_SCORES_AT_ONCE", 1)
                for implementation in ("sdpa", "eager"):
                    for need in (False, True):
                        got, found = attention(
                            q, k, v, seen, prefix_k=pk, prefix_v=pv, implementation=implementation, need_weights=need
                        )
                        assert largest(got, want) <= FLOAT64, (name, implementation, blocks)
                        assert (found is not None) == need
                        assert found is None or largest(found, weights) <= FLOAT64


def test_long_inputs_take_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model over blocks of queries equals itself at once: forward, in chunks, packed, padded."""
    from helpers import build, some_ids, through_cache

    model = build()
    ids = some_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[0, 20:24] = 0
    positions = torch.arange(40).remainder(9)[None]

    def all_ways() -> list[Tensor]:
        with torch.no_grad():
            return [
                model.model(ids, use_cache=False).last_hidden_state,
                model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state,
                model.model(ids, position_ids=positions, use_cache=False).last_hidden_state,
                through_cache(model, ids, [17, 20, 3], hidden=True),
                through_cache(model, ids, [17, 20, 3], mask=mask, hidden=True),
            ]

    want = all_ways()
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 4)
    monkeypatch.setattr(attention_module, "_SCORES_AT_ONCE", 16)
    for got, expected in zip(all_ways(), want, strict=True):
        assert largest(got, expected) <= FLOAT64


def test_attention_heads_alone() -> None:
    heads = _random(AttentionHeads(num_heads=4, num_kv_heads=2, head_dim=4, v_head_dim=6, qk_norm="rms"))
    q, k, v = _x(2, 7, 16), _x(2, 7, 8, seed=1), _x(2, 7, 12, seed=2)
    span = Span.following(7)
    kv = heads.keys_and_values(k, v, None, span=span)
    out = heads(q, kv, span=span)
    assert isinstance(kv, SharedKV) and out.shape == (2, 7, heads.out_width)
    cos, sin = rope_tables(torch.arange(7)[None], head_dim=4, base=10000.0)
    turned = [apply_rope(norm(t.view(2, 7, -1, 4)), cos, sin) for norm, t in ((heads.q_norm, q), (heads.k_norm, k))]
    scores = torch.einsum("blhd,bshd->bhls", turned[0], turned[1].repeat_interleave(2, dim=2)) / math.sqrt(4)
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    want = torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v.view(2, 7, 2, 6).repeat_interleave(2, dim=2))
    assert largest(out, want.flatten(2)) <= FLOAT64


# Initialisation.


def test_every_parameter_has_a_rule() -> None:
    block = HymbaBlock(**MIXER, intermediate_size=12, qk_norm="perhead-rms", bias=True)
    for name, _ in block.named_parameters():
        assert rule_for(f"layers.0.{name}")
    with pytest.raises(KeyError, match="no initialisation rule for parameter 'strange'"):
        rule_for("strange")
    assert len({ending for ending, _ in RULES}) == len(RULES)


def test_blocks_are_initialised_when_made() -> None:
    torch.manual_seed(0)
    block = HymbaBlock(**MIXER, intermediate_size=12)
    assert not any(p.isnan().any() for p in block.parameters())
    assert torch.equal(block.input_norm.weight, torch.ones(16))
    assert block.mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    kept = block.mixer.mamba.D
    initialise(block, std=1.0, skip=lambda parameter: parameter is kept)
    assert block.mixer.in_proj.weight.std().item() == pytest.approx(1.0, rel=0.2)
    assert torch.equal(kept, torch.ones(32))


def test_embeddings_with_a_range_of_their_own() -> None:
    fields: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = HymbaConfig(**fields, initializer_range=0.05, embedding_initializer_range=1)
    model = HymbaForCausalLM(config).model
    assert model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert config.to_dict()["embedding_initializer_range"] == 1
    assert "embedding_initializer_range" not in HymbaConfig(**fields).to_dict()
    with pytest.raises(ConfigError, match="embedding_initializer_range=0 is not supported; allowed: numbers above 0"):
        HymbaConfig(**fields, embedding_initializer_range=0)
