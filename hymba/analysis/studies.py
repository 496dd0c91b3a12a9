"""The paper's analyses of attention and SSM heads: entropy, split, receptive field, meta tokens, magnitudes.

Each runs a model on samples one at a time and gives a `Result`. Heads of Mamba-1 are slices of its channels, as many
and in the same place as attention heads; what is said of one is the mean over its channels, each of which has a map
of its own. A head of Mamba-2 has one map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hymba.analysis import measures
from hymba.analysis.capture import AnalysisError, Reading, branch_norm, reading, without_meta_tokens
from hymba.analysis.memory import check_maps_fit
from hymba.analysis.operator import Operator
from hymba.analysis.report import Result, Table, mean
from hymba.analysis.texts import Sample
from hymba.model import HymbaForCausalLM

Measure = Callable[[Tensor, "int | None"], Mapping[str, Tensor]]
"""From maps (heads or channels, l, m + l) and the window to numbers (heads or channels) by name."""


def attention_entropy(
    model: HymbaForCausalLM, samples: Sequence[Sample], *, without: HymbaForCausalLM | None = None
) -> Result:
    """Entropy of the attention maps with and without meta tokens (figure 15 of the paper).

    Args:
        model: with meta tokens, for the comparison; one without them is measured alone.
        samples: texts.
        without: a model that was trained without meta tokens and has the same tokenizer. By default `model` itself
            runs without them, which says what they do in it, not what training without them would have given.

    Returns:
        Rows of layer, branch ("attention", "ssm"), head and meta ("with", "without"): `entropy` in nats, the mean over
        text tokens and samples, and `relative`, over the entropy of equal weights on all that is visible.

    Raises:
        AnalysisError: `without` has meta tokens.
        MemoryEstimateError: the maps do not fit.
    """
    if without is not None and without.model.meta_tokens is not None:
        raise AnalysisError("the model to compare with has meta tokens itself; give one trained without")
    table = Table("layer", "branch", "head", "meta")
    conditions: dict[str, tuple[HymbaForCausalLM, contextlib.AbstractContextManager[None]]]
    conditions = {"with" if model.model.meta_tokens is not None else "without": (model, contextlib.nullcontext())}
    if without is not None:
        conditions["without"] = (without, contextlib.nullcontext())
    elif model.model.meta_tokens is not None:
        conditions["without"] = (model, without_meta_tokens(model))
    for condition, (which, scope) in conditions.items():
        with scope:

            def measure(maps: Tensor, window: int | None) -> Mapping[str, Tensor]:
                length = maps.shape[-2]
                rows = measures.entropy(maps)
                most = measures.visible_entropy(length, maps.shape[-1] - length, window, rows)
                # The very first token without meta tokens sees itself alone and has no entropy to lose.
                told = most > 0
                return {"entropy": rows.mean(-1), "relative": (rows / most)[..., told].mean(-1)}

            _measure_maps(which, samples, table, measure, condition)
    rows = table.rows()
    summary: dict[str, Any] = {}
    for branch in _branches(rows):
        for condition in conditions:
            chosen = [row for row in rows if (row["branch"], row["meta"]) == (branch, condition)]
            summary[f"{branch}, {condition} meta tokens"] = {
                name: mean([row[name] for row in chosen]) for name in ("entropy", "relative")
            }
        if len(conditions) == 2 and without is None:
            pairs = _pairs([row for row in rows if row["branch"] == branch])
            summary[f"{branch} heads lower with meta tokens"] = {
                name: f"{sum(a[name] < b[name] for a, b in pairs)} of {len(pairs)}" for name in ("entropy", "relative")
            }
    return Result("entropy", rows, summary)


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of each head with and without meta tokens."""
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["layer"], row["head"]), {})[row["meta"]] = row
    return [(pair["with"], pair["without"]) for pair in found.values()]


def attention_split(model: HymbaForCausalLM, samples: Sequence[Sample]) -> Result:
    """How the weight of maps is split into meta tokens, BOS, self and cross (figure 7 of the paper).

    Returns:
        Rows of layer, branch and head: `meta`, `bos`, `self` and `cross` (`hymba.analysis.measures.shares`), which add
        up to 1.

    Raises:
        MemoryEstimateError: the maps do not fit.
    """
    table = Table("layer", "branch", "head")

    def measure(maps: Tensor, window: int | None) -> Mapping[str, Tensor]:
        return measures.shares(maps, maps.shape[-1] - maps.shape[-2])

    _measure_maps(model, samples, table, measure)
    rows = table.rows()
    summary = {
        branch: {name: mean([row[name] for row in rows if row["branch"] == branch]) for name in measures.SHARES}
        for branch in _branches(rows)
    }
    return Result("attention-split", rows, summary)


def receptive_field(models: Mapping[str, HymbaForCausalLM], samples: Mapping[str, Sequence[Sample]]) -> Result:
    """Effective receptive field (equation 5, figure 11 of the paper).

    Only the last token's row is read, so memory grows with the length of the text, not with its square.

    Args:
        models: by name. samples: texts for each of them, by its tokenizer.

    Returns:
        Rows of model, layer, branch and head: `distance`, the mean distance at which the last token looks, meta tokens
        counted at the places in front of the text, and `text_distance`, the text's part of it. The summary has the
        equation's mean over layers of each model: of all heads (`erf`), of each branch, and of the text's part.
    """
    table = Table("model", "layer", "branch", "head")
    summary: dict[str, Any] = {}
    for name, model in models.items():
        for sample in samples[name]:
            ids = sample.ids.to(model.device)
            with reading(model, scan=True) as readings:
                cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
                with reading(model, attention=True) as last:
                    model(ids[:, -1:], past_key_values=cache, use_cache=True)
                maps = {"attention": [one.attention for one in last], "ssm": [_last_rows(one) for one in readings]}
            for branch, layers in maps.items():
                for layer, last_rows in enumerate(layers):
                    if last_rows is None:
                        continue
                    far, near = measures.mean_distance(last_rows[:, 0].double(), last_rows.shape[-1] - ids.shape[1])
                    heads = _heads(readings[layer], branch)
                    for head, (distance, text) in enumerate(
                        zip(_by_head(far, heads), _by_head(near, heads), strict=True)
                    ):
                        table.add(name, layer, branch, head, distance=distance, text_distance=text)
    rows = table.rows()
    for name in models:
        own = [row for row in rows if row["model"] == name]
        summary[name] = {
            "erf": _erf(own, "distance", ("attention", "ssm")),
            "erf, text only": _erf(own, "text_distance", ("attention", "ssm")),
            **{f"erf, {branch} heads": _erf(own, "distance", (branch,)) for branch in _branches(own)},
        }
    return Result("erf", rows, summary)


def _last_rows(one: Reading) -> Tensor | None:
    """(channels, 1, s) the last token's row of every channel's map."""
    operator = one.operator()
    if operator is None:
        return None
    return torch.cat([operator.maps(operator.steps - 1, channels=part) for part in _blocks(operator, 1)])


def _erf(rows: list[dict[str, Any]], value: str, branches: tuple[str, ...]) -> float:
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row["branch"] in branches:
            layers.setdefault(row["layer"], []).append(row[value])
    return measures.effective_receptive_field([mean(layers[layer]) for layer in sorted(layers)])


def meta_token_activation(model: HymbaForCausalLM, samples: Sequence[Sample], *, layer: int = -1) -> Result:
    """Attention that each meta token receives, by kind of text (figure 5 of the paper).

    Args:
        model: with meta tokens. samples: texts of one or more domains.
        layer: whose attention; the paper's is the last layer's.

    Returns:
        Rows of domain and meta token: `attention`, the mean weight over heads, text tokens and samples.

    Raises:
        AnalysisError: no meta tokens, no such layer, or one without attention heads.
        MemoryEstimateError: the maps do not fit.
    """
    if model.model.meta_tokens is None:
        raise AnalysisError("the model has no meta tokens (num_memory_tokens=0)")
    layers = len(model.model.layers)
    if not -layers <= layer < layers:
        raise AnalysisError(f"layer={layer}: allowed: 0 to {layers - 1}, or -1 for the last")
    wanted, meta = layer % layers, model.config.num_memory_tokens
    table = Table("domain", "meta_token")
    for sample in samples:
        check_maps_fit(model.config, sample.tokens, model.device)
        found: list[Tensor] = []

        def take(one: Reading) -> None:
            if one.layer == wanted and one.attention is not None:
                found.append(one.attention[..., :meta].double().mean((0, 1)))  # noqa: B023

        with reading(model, attention=True, visit=take):
            model(sample.ids.to(model.device), use_cache=False, logits_to_keep=1)
        if not found:
            raise AnalysisError(f"layer {wanted} has no attention heads")
        for token, weight in enumerate(found[0].tolist()):
            table.add(sample.domain, token, attention=weight)
    rows = table.rows()
    summary = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        received = [row["attention"] for row in rows if row["domain"] == domain]
        order = sorted(range(meta), key=lambda token: -received[token])
        summary[domain] = {"share of attention on meta tokens": sum(received), "most active": order[:5]}
    return Result("meta-tokens", rows, summary, {"layer": wanted})


def output_magnitude(model: HymbaForCausalLM, samples: Sequence[Sample]) -> Result:
    """Size of the branches' outputs before and behind their norms, and of the gate (figure 12 of the paper).

    Returns:
        Rows of layer and branch: `output`, the root mean square of the branch's output over channels, averaged over
        text tokens and samples; `normed`, the same behind its norm; `beta`, the mean absolute weight of the norm; and
        for the SSM `gate`, the mean absolute value of the gate that its output is multiplied with.
    """
    table = Table("layer", "branch")

    def visit(one: Reading) -> None:
        for branch in ("attention", "ssm"):
            if branch not in one.outputs:
                continue
            nan = float("nan")
            values = {"output": _rms(one.outputs[branch]), "normed": nan, "beta": nan, "gate": nan}
            norm = branch_norm(model.model.layers[one.layer], branch)
            if norm is not None:
                values["normed"] = _rms(one.outputs[f"{branch} normed"])
                values["beta"] = float(norm.get_parameter("weight").detach().float().abs().mean())
            if branch == "ssm":
                values["gate"] = float(one.outputs["gate"].abs().mean())
            table.add(one.layer, branch, **values)

    for sample in samples:
        with reading(model, outputs=True, visit=visit):
            model(sample.ids.to(model.device), use_cache=False, logits_to_keep=1)
    rows = table.rows()
    summary: dict[str, Any] = {}
    for branch in _branches(rows):
        summary[f"{branch} output, mean over layers"] = mean([row["output"] for row in rows if row["branch"] == branch])
    sizes: dict[int, dict[str, float]] = {}
    for row in rows:
        sizes.setdefault(row["layer"], {})[row["branch"]] = row["output"]
    both = [size for size in sizes.values() if len(size) == 2]
    if both:
        larger = sum(size["ssm"] > size["attention"] for size in both)
        summary["layers where the SSM's output is larger"] = f"{larger} of {len(both)}"
    return Result("magnitude", rows, summary)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean(-1).sqrt().mean())


def _measure_maps(
    model: HymbaForCausalLM, samples: Sequence[Sample], table: Table, measure: Measure, *key: Any
) -> None:
    """Add a measure of every head's map to the table under (layer, branch, head, *key)."""

    def visit(one: Reading) -> None:
        found: dict[str, Mapping[str, Tensor]] = {}
        if one.attention is not None:
            found["attention"] = measure(one.attention, one.window)
        operator = one.operator()
        if operator is not None:
            found["ssm"] = _measure_scan(operator, operator.steps - tokens, measure)
        for branch, values in found.items():
            heads = _heads(one, branch)
            by_head = {name: _by_head(value, heads) for name, value in values.items()}
            for head in range(heads):
                table.add(one.layer, branch, head, *key, **{name: value[head] for name, value in by_head.items()})

    for sample in samples:
        check_maps_fit(model.config, sample.tokens, model.device)
        tokens = sample.tokens
        with reading(model, attention=True, scan=True, visit=visit):
            model(sample.ids.to(model.device), use_cache=False, logits_to_keep=1)


def _measure_scan(operator: Operator, meta: int, measure: Measure) -> Mapping[str, Tensor]:
    parts = [measure(operator.maps(meta, channels=part), None) for part in _blocks(operator, operator.steps - meta)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _blocks(operator: Operator, rows: int) -> list[slice]:
    size = operator.channels_at_once(rows)
    return [slice(first, first + size) for first in range(0, operator.channels, size)]


def _heads(one: Reading, branch: str) -> int:
    return one.heads if branch == "attention" else one.slices


def _by_head(values: Tensor, heads: int) -> list[float]:
    """Means over equal slices: of heads themselves, or of channels."""
    return values.double().reshape(heads, -1).mean(1).tolist()


def _branches(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["branch"] for row in rows))
