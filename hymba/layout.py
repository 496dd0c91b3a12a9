"""The architecture as data: one `LayerSpec` per layer.

Nothing here depends on torch or transformers. The released checkpoints describe their layers with three lists
(global layers, KV groups, a window); `released_layers` turns them into specs, and everything else in the library
(blocks, masks, caches, costs) reads the specs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the network.

    Attributes:
        mixer: which heads mix tokens: `"hybrid"` (attention and Mamba heads in parallel).
        window: how many past positions an attention head sees besides itself and the meta tokens;
            `None` is a global layer.
        kv_from: index of the layer whose keys and values this one borrows; `None` when it computes its own.
        ffn: whether an MLP follows the mixer.
    """

    mixer: str = "hybrid"
    window: int | None = None
    kv_from: int | None = None
    ffn: bool = True

    @property
    def is_global(self) -> bool:
        return self.window is None


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


def lenders(layers: Sequence[LayerSpec]) -> frozenset[int]:
    """Layers whose keys and values another layer borrows."""
    return frozenset(spec.kv_from for spec in layers if spec.kv_from is not None)
