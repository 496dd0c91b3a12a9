"""The analyses on models whose maps are known, and against what the model itself says."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from analysis.known_maps import uniform
from helpers import build, largest, some_ids
from tolerances import OPERATOR
from torch import Tensor, nn

from hymba import analysis
from hymba.analysis import AnalysisError, Reading, Sample, importance, memory
from hymba.analysis.measures import effective_receptive_field, mean_distance, shares
from hymba.memory import MemoryEstimateError
from hymba.nn import Mamba2Heads, MambaHeads

LENGTH, META, WINDOW = 23, 3, 5


def texts(count: int = 2, length: int = LENGTH) -> list[Sample]:
    return [Sample("random", f"text {i}", some_ids(1, length, seed=i)) for i in range(count)]


@torch.no_grad()
def with_uniform_attention(model: Any) -> Any:
    """Queries of zero: every head sees all that is visible alike."""
    for layer in model.model.layers:
        layer.mixer.in_proj.weight[: layer.mixer.attention.q_width] = 0
    return model


@torch.no_grad()
def with_scan(model: Any, *, decay: float) -> Any:
    """One state per channel whose input and readout have the size 1, and a decay of exp(-decay) per step."""
    for mamba in (module for module in model.modules() if isinstance(module, MambaHeads)):
        mamba.dt_proj.weight.zero_()
        mamba.dt_bias.fill_(math.log(math.expm1(1.0)))
        mamba.A_log.fill_(math.log(decay))
        mamba.B_norm.weight.fill_(1)
        mamba.C_norm.weight.fill_(1)
        mamba.B_norm.eps = mamba.C_norm.eps = 1e-30
    return model


# Reading.


@pytest.mark.parametrize("fields", [{}, {"num_memory_tokens": 0}, {"kq_norm": "rms", "kv_reuse_group": [[2, 3]]}])
def test_maps_are_the_models_own(fields: dict[str, Any]) -> None:
    model, ids = build(**fields), some_ids(1, LENGTH)
    seen: list[Tensor] = []

    def visit(one: Reading) -> None:
        assert one.attention is not None
        seen.append(one.attention)

    with analysis.reading(model, attention=True, visit=visit):
        logits = model(ids, use_cache=False).logits
    with torch.no_grad():
        plain = model(ids, use_cache=False, output_attentions=True)
    assert len(seen) == 4 and largest(logits, plain.logits) < 1e-5
    for found, expected in zip(seen, plain.attentions, strict=True):
        assert largest(found, expected[0]) < 1e-12
        assert float((found.sum(-1) - 1).abs().max()) < 1e-12
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("meta", [0, META])
def test_operator_over_meta_tokens_and_text_gives_the_scans_output(meta: int) -> None:
    """(alpha x + D x) gated is what the branch puts out, its initial state included."""
    model, ids = build(num_memory_tokens=meta, dtype=torch.float32), some_ids(1, 70)
    with analysis.reading(model, scan=True, scan_input=True, outputs=True) as readings:
        model(ids, use_cache=False)
    for one in readings:
        operator, x, mamba = one.operator(), one.scan_input(), one.mamba
        assert operator is not None and mamba is not None and operator.steps == meta + 70
        mixed = torch.einsum("dij,jd->id", operator.rows(meta), x)
        expected = (mixed + mamba.D.detach() * x[meta:]) * one.outputs["gate"]
        scale = max(1.0, float(expected.abs().max()))
        assert largest(one.outputs["ssm"], expected) < OPERATOR * scale


MAMBA_2: list[dict[str, Any]] = [
    {"mixer": "hybrid", "window": None, "ssm": "mamba2", "ssm_head_dim": 4, "ssm_groups": 2},
    {"mixer": "mamba", "ssm": "mamba2", "ssm_head_dim": 8},
]


def with_mamba_2(**fields: Any) -> Any:
    return build(layer_pattern=MAMBA_2, num_hidden_layers=2, global_attn_idx=None, kv_reuse_group=None, **fields)


def test_operator_of_mamba_2_heads_gives_the_scans_output() -> None:
    model, ids = with_mamba_2(dtype=torch.float32), some_ids(1, 40)
    with analysis.reading(model, attention=True, scan=True, scan_input=True, outputs=True) as readings:
        model(ids, use_cache=False)
    assert [one.attention is None for one in readings] == [False, True]
    for one in readings:
        operator, x, mamba = one.operator(), one.scan_input(), one.mamba
        assert operator is not None and mamba is not None and operator.steps == META + 40
        assert operator.channels == one.slices == mamba.num_heads
        x = x.unflatten(-1, (mamba.num_heads, -1))
        mixed = torch.einsum("hij,jhp->ihp", operator.rows(META), x) + mamba.D.detach()[:, None] * x[META:]
        expected = mixed.flatten(1) * one.outputs["gate"]
        if mamba.norm is not None:
            expected = mamba.norm(expected).detach()
        assert largest(one.outputs["ssm"], expected) < OPERATOR * max(1.0, float(expected.abs().max()))


def test_studies_know_mamba_2_heads() -> None:
    """Scans that forget at once: all of a map is the token itself, or BOS for the first one."""
    model = with_mamba_2()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mamba2Heads):
                module.A_log.fill_(math.log(1e4))
                module.dt_bias.fill_(2.0)
    found = analysis.attention_split(model, texts(1))
    scans = [row for row in found.rows if row["branch"] == "ssm"]
    heads = [sum(row["layer"] == layer for row in scans) for layer in (0, 1)]
    assert heads == [analysis.capture.heads_of(layer, "ssm", model.config) for layer in model.model.layers]
    for row in scans:
        assert (row["meta"], row["cross"]) == pytest.approx((0, 0), abs=1e-9)
        assert (row["bos"], row["self"]) == pytest.approx((1 / LENGTH, 1 - 1 / LENGTH))
    spread = analysis.attention_entropy(model, texts(1)).rows
    assert all(row["entropy"] == pytest.approx(0, abs=1e-9) for row in spread if row["branch"] == "ssm")
    # Removing a head takes its channels out of the fusion; a norm of Mamba-2 alone is no branch's weight.
    with importance.removed(model, 0, "ssm", head=1):
        weight = model.model.layers[0].mixer.mamba_norm.weight
        assert weight[4:8].eq(0).all() and weight[:4].ne(0).all()
    with pytest.raises(AnalysisError, match="does not fuse"), importance.removed(model, 1, "ssm"):
        pass
    assert {row["layer"] for row in analysis.output_magnitude(model, texts(1)).rows} <= {0, 1}


def test_the_last_row_from_a_cache_is_that_of_the_whole_map() -> None:
    model, ids = build(), some_ids(1, LENGTH)
    with analysis.reading(model, attention=True, scan=True) as whole:
        model(ids, use_cache=False)
    with analysis.reading(model, scan=True) as parts:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with analysis.reading(model, attention=True) as last:
            model(ids[:, -1:], past_key_values=cache)
    for full, operator, row in zip(whole, parts, last, strict=True):
        assert full.attention is not None and row.attention is not None
        assert largest(row.attention, full.attention[:, -1:]) < 1e-12
        a, b = full.operator(), operator.operator()
        assert a is not None and b is not None
        assert largest(a.maps(a.steps - 1), b.maps(b.steps - 1)) < 1e-9


PATTERN = [
    {"mixer": "attention", "window": 4},
    {"mixer": "mamba", "ffn": False},
    {"mixer": "hybrid", "fusion": "concat", "heads": 3, "kv_heads": 1},
    {"mixer": "attention", "kv_from": 0, "window": 4},
]


def test_layers_of_other_kinds() -> None:
    """Layers with one branch, and branches of different widths: each is read for what it has."""
    fields = {"layer_pattern": PATTERN, "global_attn_idx": None, "kv_reuse_group": None}
    model, samples = build(**fields), texts(1)
    heads = {(0, "attention"): 4, (1, "ssm"): 4, (2, "attention"): 3, (2, "ssm"): 4, (3, "attention"): 4}
    results = [
        analysis.attention_entropy(model, samples),
        analysis.attention_split(model, samples),
        analysis.receptive_field({"a": model}, {"a": samples}),
        analysis.output_magnitude(model, samples),
        analysis.head_importance(model, samples, heads=True),
    ]
    for result in results[:3]:
        found: dict[tuple[int, str], set[int]] = {}
        for row in result.rows:
            found.setdefault((row["layer"], row["branch"]), set()).add(row["head"])
        assert {place: len(each) for place, each in found.items()} == heads
    assert {(row["layer"], row["branch"]) for row in results[3].rows} == heads.keys()
    assert len(results[4].rows) == (1 + 3) + (1 + 4) and {row["layer"] for row in results[4].rows} == {2}
    assert len(analysis.meta_token_activation(model, samples).rows) == META
    with pytest.raises(AnalysisError, match="layer 1 has no attention heads"):
        analysis.meta_token_activation(model, samples, layer=1)


# Known maps.


def test_entropy_of_uniform_attention() -> None:
    model = with_scan(with_uniform_attention(build(mamba_d_state=1)), decay=1e-12)
    result = analysis.attention_entropy(model, texts())
    assert len(result.rows) == 2 * 2 * 4 * 4
    for row in result.rows:
        meta = META if row["meta"] == "with" else 0
        window = None if row["branch"] == "ssm" or row["layer"] == 0 else WINDOW
        sizes = [meta + 1 + (i if window is None else min(i, window)) for i in range(LENGTH)]
        expected = sum(map(math.log, sizes)) / LENGTH
        assert row["entropy"] == pytest.approx(expected, abs=1e-6), row
        assert row["relative"] == pytest.approx(1, abs=1e-6)
        assert row["entropy_std"] == pytest.approx(0, abs=1e-6) and row["samples"] == 2
    # More to see alike is more entropy.
    assert result.summary["ssm heads lower with meta tokens"]["entropy"] == "0 of 16"


def test_entropy_against_a_model_without_meta_tokens() -> None:
    model, other = build(), build(num_memory_tokens=0)
    result = analysis.attention_entropy(model, texts(), without=other)
    alone = analysis.attention_entropy(other, texts())
    assert {row["meta"] for row in alone.rows} == {"without"}
    assert [row for row in result.rows if row["meta"] == "without"] == alone.rows
    assert model.model.meta_tokens is not None
    with pytest.raises(AnalysisError, match="has meta tokens itself"):
        analysis.attention_entropy(model, texts(), without=build())


def test_split_of_known_maps() -> None:
    """Uniform attention; scans that keep everything or forget at once."""
    for decay, remembers in ((1e-12, True), (200.0, False)):
        model = with_scan(with_uniform_attention(build(mamba_d_state=1)), decay=decay)
        for row in analysis.attention_split(model, texts()).rows:
            if row["branch"] == "ssm":
                maps = (
                    uniform(LENGTH, META) if remembers else torch.cat([torch.zeros(LENGTH, META), torch.eye(LENGTH)], 1)
                )
            else:
                maps = uniform(LENGTH, META, None if row["layer"] == 0 else WINDOW)
            expected = {name: float(part) for name, part in shares(maps.double(), META).items()}
            assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6), row


def test_receptive_field_of_known_maps() -> None:
    model = with_scan(with_uniform_attention(build(mamba_d_state=1)), decay=200.0)
    result = analysis.receptive_field({"a": model}, {"a": texts()})
    distances = []
    for layer in range(4):
        far, near = mean_distance(uniform(LENGTH, META, None if layer == 0 else WINDOW)[-1], META)
        distances.append(float(far))
        for row in (row for row in result.rows if row["layer"] == layer):
            found = (row["distance"], row["text_distance"])
            expected = (float(far), float(near)) if row["branch"] == "attention" else (0, 0)
            assert found == pytest.approx(expected, abs=1e-6)
    assert result.summary["a"]["erf, ssm heads"] == pytest.approx(0, abs=1e-6)
    assert result.summary["a"]["erf, attention heads"] == pytest.approx(effective_receptive_field(distances))
    assert result.summary["a"]["erf"] == pytest.approx(effective_receptive_field(distances) / 2)


def test_meta_tokens_of_uniform_attention() -> None:
    model = with_uniform_attention(build())
    for layer, window in ((-1, WINDOW), (0, None)):
        result = analysis.meta_token_activation(model, texts(), layer=layer)
        assert len(result.rows) == META
        expected = float(uniform(LENGTH, META, window)[:, 0].mean())
        for row in result.rows:
            assert row["attention"] == pytest.approx(expected)
    assert result.summary["random"]["share of attention on meta tokens"] == pytest.approx(META * expected)
    with pytest.raises(AnalysisError, match="layer=4: allowed: 0 to 3"):
        analysis.meta_token_activation(model, texts(), layer=4)
    for call in (analysis.meta_token_activation, lambda m, _: analysis.without_meta_tokens(m).__enter__()):
        with pytest.raises(AnalysisError, match="no meta tokens"):
            call(build(num_memory_tokens=0), texts())


def test_magnitudes() -> None:
    model = build()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mixer.attention_norm.weight.fill_(2.0 + i)
            layer.mixer.mamba_norm.weight.fill_(-0.5)
        # A gate of zero closes the SSM.
        width = model.model.layers[1].mixer.splits[-1]
        model.model.layers[1].mixer.in_proj.weight[-width:] = 0
    result = analysis.output_magnitude(model, texts())
    for row in result.rows:
        closed = (row["layer"], row["branch"]) == (1, "ssm")
        beta = 2.0 + row["layer"] if row["branch"] == "attention" else 0.5
        assert row["beta"] == pytest.approx(beta)
        # Behind an RMS norm with equal weights the root mean square is the weight, whatever the output.
        assert row["normed"] == pytest.approx(0 if closed else beta, rel=1e-3)
        assert (row["output"] == 0) == closed
        assert math.isnan(row["gate"]) if row["branch"] == "attention" else (row["gate"] == 0) == closed


# Importance.


def test_removing_a_branch_without_weight_changes_nothing() -> None:
    model = build()
    with torch.no_grad():
        model.model.layers[2].mixer.mamba_norm.weight.zero_()
        model.model.layers[0].mixer.attention_norm.weight[8:16] = 0
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = analysis.head_importance(model, texts(1), heads=True)
    assert len(result.rows) == 4 * 2 * (1 + 4)
    for row in result.rows:
        nothing = (row["layer"], row["branch"]) == (2, "ssm") or (
            (row["layer"], row["branch"], row["head"]) == (0, "attention", 1)
        )
        assert (row["loss_change"] == 0) == nothing, row
        assert row["loss_change"] == pytest.approx(row["loss"] - result.summary["whole model"]["loss"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_removal_is_a_norm_weight_of_zero() -> None:
    model, other, ids = build(), build(), some_ids(1, LENGTH)
    with torch.no_grad():
        # d_inner is 32: four heads of eight channels.
        other.model.layers[1].mixer.mamba_norm.weight[16:24] = 0
        with analysis.removed(model, 1, "ssm", 2):
            assert largest(model(ids).logits, other(ids).logits) == 0
        assert largest(model(ids).logits, build()(ids).logits) == 0


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ((4, "ssm", None), "layer=4: allowed: 0 to 3"),
        ((0, "mlp", None), "branch='mlp': allowed: 'attention', 'ssm'"),
        ((0, "ssm", 4), "head=4: allowed: 0 to 3"),
    ],
)
def test_what_is_not_there_cannot_be_removed(place: Any, match: str) -> None:
    with pytest.raises(AnalysisError, match=match), analysis.removed(build(), *place):
        pass


def test_a_model_without_fusion_has_no_branches_to_remove() -> None:
    model = build()
    for layer in model.model.layers:
        del layer.mixer.mamba_norm, layer.mixer.attention_norm
    with pytest.raises(AnalysisError, match="no layer of this model fuses"):
        analysis.head_importance(model, texts())
    with pytest.raises(AnalysisError, match="does not fuse two branches"), analysis.removed(model, 0, "ssm"):
        pass


def test_accuracy_of_copying() -> None:
    """A model that says what came a piece's length ago is always right; one that says token 0, hardly ever."""
    samples = texts(3, 20)

    class Copies(SimpleNamespace):
        device = torch.device("cpu")

        def __call__(self, ids: Tensor, use_cache: bool) -> Any:
            guesses = ids.roll(self.lag - 1, dims=1) if self.lag else torch.zeros_like(ids)
            return SimpleNamespace(logits=nn.functional.one_hot(guesses, 41).float())

    assert analysis.copying(samples, length=7)(Copies(lag=7)) == 1  # type: ignore[arg-type]
    pieces = torch.cat([sample.ids[0, 2:8] for sample in samples])
    assert analysis.copying(samples, length=7)(Copies(lag=0)) == pytest.approx(  # type: ignore[arg-type]
        float((pieces == 0).double().mean())
    )
    with pytest.raises(AnalysisError, match="at least three tokens"):
        analysis.copying(texts(1, 2))(Copies(lag=1))  # type: ignore[arg-type]


def test_loss_is_the_models_own() -> None:
    model, (sample,) = build(), texts(1)
    loss, accuracy = importance.loss_and_accuracy(model, [sample])
    assert loss == pytest.approx(float(model(sample.ids, labels=sample.ids).loss.detach()), rel=1e-5)
    assert 0 <= accuracy <= 1


# Memory.


def test_maps_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(memory, "_free_on_host", lambda: memory.map_bytes(model.config, LENGTH) - 1)
    for study in (analysis.attention_entropy, analysis.attention_split, analysis.meta_token_activation):
        with pytest.raises(MemoryEstimateError, match=r"attention maps of 23 tokens need .* would fit"):
            study(model, texts())
    analysis.receptive_field({"a": model}, {"a": texts()})
    monkeypatch.setenv("HYMBA_MEMORY_CHECK", "off")
    analysis.attention_split(model, texts())


def test_the_advice_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build().config
    free = 3 << 30
    monkeypatch.setattr(memory, "_free_on_host", lambda: free)
    with pytest.raises(MemoryEstimateError) as caught:
        memory.check_maps_fit(config, 1 << 20, "cpu")
    length = int(str(caught.value).split("about ")[2].split()[0].replace(",", ""))
    assert memory.map_bytes(config, length) <= free < memory.map_bytes(config, length + 1)
    memory.check_maps_fit(config, length, "cpu")
