"""Small random models in which every tensor matters, and the ways a test runs text through one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.utils import logging

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM

logging.disable_progress_bar()

VOCAB = 41


def small_config(**fields: Any) -> HymbaConfig:
    """The release in miniature (global, windowed, lending and borrowing layers), with fields replaced."""
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_memory_tokens": 3,
        "sliding_window": 5,
        "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]],
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "max_position_embeddings": 64,
        "orig_max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
    }
    return HymbaConfig(**(base | fields))


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model of any size with its layers kept and every width as small as they allow."""

    def layer(entry: dict[str, Any]) -> dict[str, Any]:
        if "layers" in entry:
            return {**entry, "layers": [layer(each) for each in entry["layers"]]}
        small = dict(entry)
        if entry.get("window"):
            small["window"] = 4
        if entry.get("ssm") == "mamba2":
            small["ssm_head_dim"] = 4
        if entry.get("v_head_dim"):
            small["v_head_dim"] = 2
        return small

    heads = fields["num_attention_heads"]
    tiny = {"hidden_size": 4 * heads if heads > 1 else 8, "intermediate_size": 8, "vocab_size": 17, "mamba_d_state": 4}
    if fields.get("num_memory_tokens"):
        tiny["num_memory_tokens"] = 3
    if fields.get("sliding_window"):
        tiny["sliding_window"] = 4
    if fields.get("layer_pattern"):
        tiny["layer_pattern"] = [layer(entry) for entry in fields["layer_pattern"]]
    return {**fields, **tiny, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every tensor values on which the output depends strongly, norms and biases included.

    A freshly initialised model hides faults: unit norms commute, zero biases vanish, small projections make attention
    uniform, and slow states forget nothing. Values are drawn where the model is.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device=device) * std

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device=device) * (high - low) + low

    for name, tensor in model.named_parameters():
        if "norm" in name:
            new = uniform(tensor, 0.4, 1.6)
        elif name.endswith(("A_log", "dt_bias")):
            new = uniform(tensor, -2.0, 1.0)
        elif name.endswith((".D", ".bias")):
            new = normal(tensor, 0.5)
        elif "conv1d" in name:
            new = normal(tensor, 0.6)
        elif "embed_tokens" in name or "meta_tokens" in name or "lm_head" in name:
            new = normal(tensor, 1.0)
        elif "in_proj" in name:
            # Queries and keys of more than unit scale: attention that picks.
            new = normal(tensor, 1.5 * tensor.shape[-1] ** -0.5)
        else:
            new = normal(tensor, tensor.shape[-1] ** -0.5)
        tensor.copy_(new)


def build(
    config: HymbaConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> Any:
    """A `HymbaForCausalLM` in eval mode with `randomise`d weights; `fields` go to `small_config`."""
    model = HymbaForCausalLM(small_config(**fields) if config is None else config)
    randomise(model, seed)
    return model.to(dtype).eval()


def some_ids(rows: int, length: int, *, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """(rows, length) token ids, id 0 (the release's pad id) among them."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def cut(length: int, rng: random.Random, *, most: int | None = None) -> list[int]:
    """Sizes of random chunks that make up `length`."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(rng.randint(1, min(most or length, length - sum(sizes))))
    return sizes


@torch.no_grad()
def through_cache(
    model: Any,
    ids: Tensor,
    sizes: Iterable[int],
    *,
    mask: Tensor | None = None,
    cache: HymbaCache | None = None,
    hidden: bool = False,
) -> Tensor:
    """Logits (b, l, vocab), or last hidden states, of ids fed to a cache in chunks.

    mask: (b, past + l) of the whole sequence, the cache's columns included.
    """
    cache = HymbaCache(model.config) if cache is None else cache
    past = cache.columns
    at, parts = 0, []
    for size in sizes:
        chunk = ids[:, at : at + size]
        seen = None if mask is None else mask[:, : past + at + size]
        run = model.model if hidden else model
        out = run(chunk, attention_mask=seen, past_key_values=cache, use_cache=True)
        parts.append(out.last_hidden_state if hidden else out.logits)
        at += size
    return torch.cat(parts, dim=1)


@torch.no_grad()
def alone(model: Any, ids: Tensor, mask: Tensor | None = None, *, hidden: bool = False) -> list[Tensor]:
    """Logits (or last hidden states) of each row's real tokens, each row run on its own, at once, without a cache."""
    out = []
    for row in range(ids.shape[0]):
        real = ids[row] if mask is None else ids[row][mask[row] != 0]
        if not len(real):
            out.append(torch.zeros(0, model.config.hidden_size if hidden else model.config.vocab_size))
            continue
        run = model.model if hidden else model
        result = run(real[None], use_cache=False)
        out.append((result.last_hidden_state if hidden else result.logits)[0])
    return out


def pad(rows: Sequence[Tensor], *, side: str = "left", value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, and its mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def padded_ids() -> tuple[Tensor, Tensor]:
    """(3, 13) token ids and their mask: rows of three lengths, padded on the left, the longest with a hole."""
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (9, 4, 13)])
    mask[2, 5] = 0
    return ids, mask


class Script(LogitsProcessor):
    """Makes a model say given ids, whatever it thinks; an exception in place of an id is raised."""

    def __init__(self, said: Iterable[int | Exception | type[Exception]]) -> None:
        self.said = iter(said)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = next(self.said)
        if not isinstance(token, int):
            raise token
        return torch.full_like(scores, -torch.inf).index_fill_(-1, torch.tensor([token]), 0.0)


def largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a.detach() - b.detach()).abs().max()) if a.numel() else 0.0


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that a backward pass has left, copied, and cleared from the model."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same parameters, and every gradient within `tolerance` of the expected one, relative to its norm."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    wrong = {name: relative(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in wrong.items() if not error <= tolerance}
    assert not wrong, wrong


def losses_of(output: str | Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of each entry in a training's log."""
    entries = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e]
