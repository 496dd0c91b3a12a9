"""How much a model needs a branch or a head: what it loses when the branch's weight in the fusion is 0.

The weight of a branch (the paper's beta) is the weight of its norm. Setting it to 0 in one layer removes the branch,
setting one head's slice of it to 0 removes the head (section 2.1 and appendix C of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from hymba.analysis.capture import BRANCH_NORMS, AnalysisError, branch_norm, heads_of
from hymba.analysis.report import Result, mean
from hymba.analysis.texts import Sample
from hymba.model import HymbaForCausalLM

Task = Callable[[HymbaForCausalLM], float]
"""From a model to its accuracy between 0 and 1."""


@contextmanager
def removed(model: HymbaForCausalLM, layer: int, branch: str, head: int | None = None) -> Iterator[None]:
    """Inside the block a layer runs without one of its branches, or without one head of it.

    Args:
        layer: its index. branch: "attention" or "ssm".
        head: which of the branch's heads, equal slices of its channels; `None` for all.

    Raises:
        AnalysisError: there is no such layer, branch or head.
    """
    layers = model.model.layers
    if not 0 <= layer < len(layers):
        raise AnalysisError(f"layer={layer}: allowed: 0 to {len(layers) - 1}")
    if branch not in BRANCH_NORMS:
        raise AnalysisError(f"branch={branch!r}: allowed: {', '.join(map(repr, BRANCH_NORMS))}")
    norm = branch_norm(layers[layer], branch)
    if norm is None:
        raise AnalysisError(f"layer {layer} does not fuse two branches; there is no {branch} branch to remove")
    weight, heads = norm.get_parameter("weight"), heads_of(layers[layer], branch, model.config)
    if head is not None and not 0 <= head < heads:
        raise AnalysisError(f"head={head}: allowed: 0 to {heads - 1}")
    width = weight.shape[0] // heads
    part = slice(None) if head is None else slice(head * width, (head + 1) * width)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[part] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@torch.no_grad()
def loss_and_accuracy(model: HymbaForCausalLM, samples: Sequence[Sample]) -> tuple[float, float]:
    """Mean loss in nats per token, and the share of tokens that are the likeliest one, over all samples' tokens."""
    losses, hits, tokens = 0.0, 0, 0
    for sample in samples:
        ids = sample.ids.to(model.device)
        logits, targets = model(ids, use_cache=False).logits[0, :-1], ids[0, 1:]
        losses += float(F.cross_entropy(logits, targets, reduction="none").double().sum())
        hits += int((logits.argmax(-1) == targets).sum())
        tokens += targets.numel()
    return losses / tokens, hits / tokens


def copying(samples: Sequence[Sample], *, length: int = 64) -> Task:
    """A task that every checkpoint can be asked: predict the second of two copies of a piece of text.

    The accuracy is the share of the second copy's tokens, its first one apart, that are the likeliest ones: recall
    from the context, which no window shorter than the piece and no text before it can answer.

    Args:
        samples: texts to take pieces of. length: tokens of a piece.

    Raises:
        AnalysisError: from the task, when every sample is too short to have a piece.
    """

    @torch.no_grad()
    def accuracy(model: HymbaForCausalLM) -> float:
        hits, tokens = 0, 0
        for sample in samples:
            start, piece = sample.ids[:, :1], sample.ids[:, 1 : 1 + length]
            size = piece.shape[1]
            if size < 2:
                continue
            ids = torch.cat([start, piece, piece], dim=1).to(model.device)
            guesses = model(ids, use_cache=False).logits[0, size + 1 : -1].argmax(-1)
            hits += int((guesses == ids[0, size + 2 :]).sum())
            tokens += guesses.numel()
        if not tokens:
            raise AnalysisError("copying needs texts of at least three tokens")
        return hits / tokens

    return accuracy


def head_importance(
    model: HymbaForCausalLM,
    samples: Sequence[Sample],
    *,
    heads: bool = False,
    tasks: Mapping[str, Task] | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> Result:
    """What each branch of each layer, and each head, is worth: the change when it alone is removed.

    Args:
        model: is as it was afterwards; its mode is evaluation meanwhile.
        samples: texts whose loss is measured.
        heads: remove single heads too, which takes as many runs more as there are heads.
        tasks: accuracies to measure as well, by name.
        progress: called behind each removal.

    Returns:
        Rows of layer, branch and head (`None` for the whole branch): `loss` in nats per token, `accuracy` of the next
        token, each task's accuracy under its name, and the change of each against the whole model (`..._change`).

    Raises:
        AnalysisError: no layer fuses two branches.
    """
    layers = range(len(model.model.layers))
    places = [(i, branch) for i in layers for branch in BRANCH_NORMS if branch_norm(model.model.layers[i], branch)]
    if not places:
        raise AnalysisError("no layer of this model fuses attention and SSM heads; there is no branch to remove")

    def parts(layer: int, branch: str) -> list[int | None]:
        count = heads_of(model.model.layers[layer], branch, model.config) if heads else 0
        return [None, *range(count)]

    def scores() -> dict[str, float]:
        loss, accuracy = loss_and_accuracy(model, samples)
        return {"loss": loss, "accuracy": accuracy} | {name: task(model) for name, task in (tasks or {}).items()}

    training = model.training
    model.eval()
    try:
        whole = scores()
        rows: list[dict[str, Any]] = []
        for layer, branch in places:
            for head in parts(layer, branch):
                with removed(model, layer, branch, head):
                    found = scores()
                changes = {f"{name}_change": found[name] - whole[name] for name in whole}
                rows.append({"layer": layer, "branch": branch, "head": head, **found, **changes})
                progress()
    finally:
        model.train(training)
    summary: dict[str, Any] = {"whole model": whole}
    for branch in BRANCH_NORMS:
        chosen = [row for row in rows if row["branch"] == branch and row["head"] is None]
        summary[f"mean change without {branch} of one layer"] = {
            name: mean([row[f"{name}_change"] for row in chosen]) for name in whole
        }
        single = [row for row in rows if row["branch"] == branch and row["head"] is not None]
        if single:
            summary[f"mean change without one {branch} head"] = {
                name: mean([row[f"{name}_change"] for row in single]) for name in whole
            }
    worst = max((row for row in rows if row["head"] is None), key=lambda row: row["loss_change"])
    summary["most needed"] = f"{worst['branch']} of layer {worst['layer']}"
    return Result("importance", rows, summary)
