"""The architecture as data: one `LayerSpec` per layer.

Nothing here depends on torch or transformers. The released checkpoints describe their layers with three lists
(global layers, KV groups, a window); `released_layers` turns them into specs, and everything else in the library
(blocks, masks, caches, costs) reads the specs only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MIXERS = ("hybrid", "attention", "mamba")
FUSIONS = ("mean", "concat")
SSMS = ("mamba", "mamba2")


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the network.

    Attributes:
        mixer: which heads mix tokens: `"hybrid"` (attention and Mamba heads in parallel), `"attention"` or `"mamba"`.
        window: how many past positions an attention head sees besides itself and the meta tokens;
            `None` is a global layer.
        kv_from: index of the layer whose keys and values this one borrows; `None` when it computes its own.
        ffn: whether an MLP follows the mixer.
        fusion: how a hybrid layer joins its branches: `"mean"` of their norms, or `"concat"`, one projection over both.
        heads, kv_heads: attention heads and key/value heads of this layer; `None` is the configuration's. Fewer heads
            make a narrower branch, so a hybrid layer with fewer needs `"concat"`.
        v_head_dim: width of a value head; `None` is the configuration's on a hybrid layer, and that of a query head on
            an attention layer.
        ssm: the heads of the Mamba branch: `"mamba"` (Mamba-1, as released) or `"mamba2"`.
        ssm_head_dim, ssm_groups: channels per Mamba-2 head, by default 64, and groups of heads that share B and C, by
            default 1. The states per channel are the configuration's `mamba_d_state` for both kinds.
    """

    mixer: str = "hybrid"
    window: int | None = None
    kv_from: int | None = None
    ffn: bool = True
    fusion: str = "mean"
    heads: int | None = None
    kv_heads: int | None = None
    v_head_dim: int | None = None
    ssm: str = "mamba"
    ssm_head_dim: int | None = None
    ssm_groups: int | None = None

    @property
    def attends(self) -> bool:
        """Whether the layer has attention heads."""
        return self.mixer != "mamba"

    @property
    def scans(self) -> bool:
        """Whether the layer has Mamba heads."""
        return self.mixer != "attention"

    @property
    def is_global(self) -> bool:
        return self.attends and self.window is None


class LayoutError(ValueError):
    """A list of layers that contradicts itself; the message names field, value, layers and what is allowed."""


def _kind(is_global: bool) -> str:
    return "global" if is_global else "windowed"


def _check_indices(field: str, indices: Sequence[int], num_layers: int) -> None:
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise LayoutError(f"{field}={list(indices)!r}: {index!r} is not a layer index; allowed: integers")
        if not 0 <= index < num_layers:
            raise LayoutError(f"{field}={list(indices)!r}: there is no layer {index}; allowed: 0 to {num_layers - 1}")
    if list(indices) != sorted(set(indices)):
        raise LayoutError(f"{field}={list(indices)!r}: entries must increase and stand once each")


def released_layers(
    num_layers: int,
    *,
    window: int | None,
    global_layers: Sequence[int] | None,
    kv_groups: Sequence[Sequence[int]] | None,
    kv_every: int | None,
) -> tuple[LayerSpec, ...]:
    """Layer specs from the lists of a released `config.json`.

    Args:
        num_layers: number of layers.
        window: past positions visible on a windowed layer; `None` makes every layer global.
        global_layers: layers without a window (`global_attn_idx`); `None` equals `[]`.
        kv_groups: groups of layers that share the keys and values of their first member (`kv_reuse_group`).
        kv_every: the other form (`kv_reuse_every_i_layer`): layer i computes its own when `i % n == 0`;
            -1 and `None` switch it off.

    Raises:
        LayoutError: an index out of range, a group with one member or in decreasing order, a layer in two groups,
            a group that mixes global and windowed layers, or both forms of sharing at once.
    """
    global_set = set(global_layers or ())
    _check_indices("global_attn_idx", list(global_layers or ()), num_layers)
    is_global = [window is None or i in global_set for i in range(num_layers)]
    borrows: dict[int, int] = {}

    every = None if kv_every in (None, -1) else kv_every
    if every is not None:
        if kv_groups:
            raise LayoutError(
                f"kv_reuse_every_i_layer={every} and kv_reuse_group={[list(g) for g in kv_groups]} are two forms of "
                "the same thing; set one of them (-1 or null switches the other off)"
            )
        if every < 1:
            raise LayoutError(f"kv_reuse_every_i_layer={every}: allowed: -1 (off) or a number of layers from 1")
        kv_groups = [list(range(start, min(start + every, num_layers))) for start in range(0, num_layers, every)]
        field = f"kv_reuse_every_i_layer={every}"
    else:
        field = f"kv_reuse_group={[list(g) for g in kv_groups or ()]}"
        for group in kv_groups or ():
            _check_indices("kv_reuse_group entry", list(group), num_layers)
            if len(group) < 2:
                raise LayoutError(f"{field}: group {list(group)} has fewer than two layers; leave it out")

    owner: dict[int, list[int]] = {}
    for group in kv_groups or ():
        members = list(group)
        for layer in members:
            if layer in owner:
                raise LayoutError(
                    f"{field}: layer {layer} is in two groups, {owner[layer]} and {members}; allowed: one group a layer"
                )
            owner[layer] = members
        kinds = {is_global[layer] for layer in members}
        if len(kinds) > 1:
            named = ", ".join(f"{layer} {_kind(is_global[layer])}" for layer in members)
            raise LayoutError(
                f"{field}: group {members} mixes kinds ({named}); allowed: all global or all windowed. "
                "Change global_attn_idx or the group so that they agree"
            )
        borrows.update(dict.fromkeys(members[1:], members[0]))

    return tuple(LayerSpec(window=None if is_global[i] else window, kv_from=borrows.get(i)) for i in range(num_layers))


def pattern_layers(pattern: Sequence[Mapping[str, Any]]) -> tuple[LayerSpec, ...]:
    """Layer specs from a list of plain mappings, the `layer_pattern` of a configuration.

    Each entry has the fields of `LayerSpec` by name and, optionally, `repeat`: how many such layers follow one another.
    An entry with `layers`, a list of entries, and `repeat` stands for that list so many times. `kv_from` counts layers,
    repeated ones included; `"previous"` is the layer before, or the one it borrows from.

    Raises:
        LayoutError: an unknown key (with the nearest), a value of the wrong kind, a lender that is no earlier layer
            with keys and values of its own and the same window and heads.
    """
    if not pattern:
        raise LayoutError("layer_pattern=[]: allowed: at least one layer")
    layers: list[LayerSpec] = []
    _extend(layers, pattern, "layer_pattern")
    return tuple(layers)


def _extend(layers: list[LayerSpec], pattern: Sequence[Mapping[str, Any]], where: str) -> None:
    """Append what the entries stand for."""
    known = [field.name for field in fields(LayerSpec)]
    for number, entry in enumerate(pattern):
        at = f"{where}[{number}]"
        if not isinstance(entry, Mapping):
            raise LayoutError(f"{at}={entry!r}: allowed: a mapping with keys {', '.join([*known, 'repeat'])}")
        allowed = ["layers", "repeat"] if "layers" in entry else [*known, "repeat", "layers"]
        for key in entry:
            if key not in allowed:
                close = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0)
                raise LayoutError(f"{at} has no key {key!r}; nearest: {close[0]!r}; keys: {', '.join(allowed)}")
        repeat = entry.get("repeat", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise LayoutError(f"{at}.repeat={repeat!r}: allowed: integers from 1")
        if "layers" in entry:
            inner = entry["layers"]
            if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
                raise LayoutError(f"{at}.layers={inner!r}: allowed: a list of at least one layer")
            for _ in range(repeat):
                _extend(layers, inner, f"{at}.layers")
            continue
        _check_entry(at, entry)
        for _ in range(repeat):
            values = {key: value for key, value in entry.items() if key != "repeat"}
            if values.get("kv_from") == "previous":
                values["kv_from"] = _owner(at, layers, len(layers) - 1)
            spec = LayerSpec(**values)
            if spec.kv_from is not None:
                _check_lender(at, spec, layers)
            layers.append(spec)


def _owner(where: str, layers: Sequence[LayerSpec], index: int) -> int:
    if index < 0:
        raise LayoutError(f"{where}.kv_from='previous': there is no layer before the first")
    lender = layers[index].kv_from
    return index if lender is None else lender


def _check_entry(where: str, entry: Mapping[str, Any]) -> None:
    def refuse(key: str, allowed: str) -> None:
        raise LayoutError(f"{where}.{key}={entry.get(key)!r}: allowed: {allowed}")

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if entry.get("mixer", "hybrid") not in MIXERS:
        refuse("mixer", ", ".join(MIXERS))
    if entry.get("fusion", "mean") not in FUSIONS:
        refuse("fusion", ", ".join(FUSIONS))
    if not isinstance(entry.get("ffn", True), bool):
        refuse("ffn", "true or false")
    if entry.get("ssm", "mamba") not in SSMS:
        refuse("ssm", ", ".join(SSMS))
    for key in ("window", "heads", "kv_heads", "v_head_dim", "ssm_head_dim", "ssm_groups"):
        if entry.get(key) is not None and not whole(entry[key], 1):
            refuse(key, "integers from 1, or null")
    if entry.get("kv_from") not in (None, "previous") and not whole(entry["kv_from"], 0):
        refuse("kv_from", 'a layer index, "previous", or null')
    mixer = entry.get("mixer", "hybrid")
    if mixer == "mamba":
        for key in ("window", "kv_from", "heads", "kv_heads", "v_head_dim"):
            if entry.get(key) is not None:
                refuse(key, "null on a layer without attention heads")
    if mixer == "attention" and "ssm" in entry:
        refuse("ssm", "only on a layer with Mamba heads")
    for key in ("ssm_head_dim", "ssm_groups"):
        if entry.get(key) is not None and entry.get("ssm", "mamba") != "mamba2":
            refuse(key, 'null, or a layer with ssm="mamba2"')
    if mixer != "hybrid" and "fusion" in entry:
        refuse("fusion", "only on a hybrid layer, which has two branches to join")


def _check_lender(where: str, spec: LayerSpec, layers: Sequence[LayerSpec]) -> None:
    lender = spec.kv_from
    assert lender is not None
    if lender >= len(layers) or not layers[lender].attends or layers[lender].kv_from is not None:
        raise LayoutError(
            f"{where}.kv_from={lender}: allowed: an earlier layer with attention heads and keys and values of its own"
        )
    for key in ("window", "kv_heads"):
        mine, theirs = getattr(spec, key), getattr(layers[lender], key)
        if mine != theirs:
            raise LayoutError(
                f"{where}.{key}={mine}: allowed: {theirs}, that of layer {lender}, whose keys and values it borrows"
            )


def lenders(layers: Sequence[LayerSpec]) -> frozenset[int]:
    """Layers whose keys and values another layer borrows."""
    return frozenset(spec.kv_from for spec in layers if spec.kv_from is not None)
