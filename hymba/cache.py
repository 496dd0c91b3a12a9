"""`HymbaCache`: one typed state per layer behind transformers' `Cache` interface.

Everything that decoding needs is in `hymba.nn.state`; this file allocates those states, reorders their rows, copies
them aside and writes them to disk. Lengths count text: meta tokens are part of every layer's state and never of
`get_seq_length()`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from hymba.config import HymbaConfig, architecture, differences
from hymba.nn.state import KVState, LayerState, Span, map_tensors


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made here carry no gradients, and may be written outside inference mode although made inside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class CacheError(ValueError):
    """A cache that cannot do what it was asked to; the message says what to do instead."""


@dataclass
class CacheSnapshot:
    """A copy of a cache's contents, made by `HymbaCache.snapshot()`."""

    config: HymbaConfig
    max_length: int | None
    layers: list[LayerState]
    columns: int
    uniform: bool
    seen: Tensor | None
    valid: list[Tensor | int]
    started: bool


class HymbaCache(Cache):
    """State of a batch between calls of the model.

    Args:
        config: the model's configuration.
        max_length: text tokens to make room for. Given, buffers have a fixed size and address ("static"); without,
            they grow ("dynamic").

    A windowed layer keeps at most `window` text slots (a static cache one more, for the token being written); a layer
    that borrows keys and values keeps none. Meta keys and values are held once for the whole batch.

    Tensors in a cache carry no gradients.
    """

    def __init__(self, config: HymbaConfig, *, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: allowed: text tokens from 1, or None to grow")
        super().__init__(layers=[])
        self.config = config
        self.max_length = max_length
        self.meta_state_from_scope = False
        self._clear()

    def _clear(self) -> None:
        specs = self.config.layers
        self.layers: list[LayerState] = [
            LayerState(
                kv=KVState(window=spec.window, capacity=self.max_length, in_place=True)
                if spec.attends and spec.kv_from is None
                else None,
                in_place=True,
            )
            for spec in specs
        ]
        self.columns = 0
        self.uniform = True
        self.seen: Tensor | None = None
        self.valid: list[Tensor | int] = []
        self.started = False
        self.interrupted = False

    # What the model does with a cache.

    def begin(self, index: int, start: LayerState, rows: int) -> None:
        """Start all rows of a layer from its state after the meta tokens.

        Args:
            start: batch 1 (`hymba.nn.PrefixRun`), or an empty state without meta tokens.
            rows: batch size.
        """

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(rows, *tensor.shape[1:]).clone()

        def shared(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else (tensor.clone() if tensor.is_inference() else tensor.detach())

        with _lasting():
            self.layers[index] = replace(
                self.layers[index],
                prefix_k=shared(start.prefix_k),
                prefix_v=shared(start.prefix_v),
                conv=own(start.conv),
                ssm=own(start.ssm),
            )

    def functional(self, index: int, start: LayerState | None = None) -> LayerState:
        """A layer's state for a call that autograd records: nothing that the cache holds is written by it.

        Args:
            start: the state after the meta tokens, with gradients, when the call is the first one.
        """
        state = self.layers[index]
        kv = None if state.kv is None else replace(state.kv, in_place=False)
        state = replace(state, kv=kv, in_place=False)
        if start is not None:
            return replace(state, prefix_k=start.prefix_k, prefix_v=start.prefix_v, conv=start.conv, ssm=start.ssm)
        # The graph keeps what the scan starts from, and `put` overwrites the cache's own tensors.
        return map_tensors(state, lambda name, tensor: tensor.clone() if name in ("conv", "ssm") else tensor)

    def put(self, index: int, state: LayerState) -> None:
        """Take over a layer's state after a call: as it is, or from `functional` states as a copy without gradients."""
        if not state.in_place:
            held = self.layers[index]
            state = replace(state, prefix_k=held.prefix_k, prefix_v=held.prefix_v, in_place=True)
            state = _overwrite(held, state)
            if state.kv is not None:
                state.kv.in_place = True
        self.layers[index] = state

    def span(self, length: int, lengths: Tensor | None, *, rows: int, device: torch.device) -> Span:
        """Where `length` new tokens per row stand. Checks that they fit before anything is written."""
        if self.interrupted:
            raise CacheError(
                "this cache was being written when a call was interrupted; restore() a snapshot or start a new cache"
            )
        held = self.batch_size
        if held is not None and held != rows:
            raise CacheError(f"the cache holds {held} rows, the input has {rows}; use expand() or select() first")
        if self.max_length is not None and self.columns + length > self.max_length:
            raise CacheError(
                f"the cache has room for max_length={self.max_length} text tokens, holds {self.columns} and was "
                f"given {length} more; make it with max_length={self.columns + length} or more"
            )
        return Span.following(
            length,
            start=self.seen,
            columns=self.columns,
            lengths=lengths,
            offset=self.config.num_memory_tokens,
            uniform=self.uniform,
            device=device,
        )

    def advance(self, span: Span, valid: Tensor | None) -> None:
        """Take note of the tokens that all layers have taken in. `valid`: (b, length) bool, `None` for all real."""
        self.columns += span.length
        self.uniform = span.uniform
        self.seen = span.end.detach()
        self.valid.append(span.length if valid is None else valid.detach())

    def note_steps(self, steps: int, valid: Tensor | None) -> None:
        """Take note of single-token steps that a `DecodeStep` has already written.

        Args:
            steps: how many. valid: (b, steps) bool, `None` when all tokens were real.
        """
        self.columns += steps
        self.uniform = self.uniform and valid is None
        if steps:
            self.valid.append(steps if valid is None else valid)

    def valid_columns(self) -> Tensor | None:
        """(b, columns) bool: which columns held real tokens; `None` when all did."""
        if self.uniform:
            return None
        masks = [part for part in self.valid if isinstance(part, Tensor)]
        rows, device = masks[0].shape[0], masks[0].device
        parts = [
            p if isinstance(p, Tensor) else torch.ones(rows, p, dtype=torch.bool, device=device) for p in self.valid
        ]
        joined = torch.cat(parts, dim=1)
        self.valid = [joined]
        return joined

    @property
    def batch_size(self) -> int | None:
        """Rows held, or `None` before the first call."""
        if not self.columns:
            return None
        for state in self.layers:
            for tensor in (state.ssm, None if state.kv is None else state.kv.keys):
                if tensor is not None:
                    return tensor.shape[0]
        return None

    def check_mask(self, mask: Tensor | None) -> None:
        """Refuse a mask under which a column that was taken in is padding where it was real, or the other way round.

        mask: (b, from columns on); `None` is all real. Its values are read.
        """
        held = self.valid_columns()
        given = None if mask is None else mask[:, : self.columns] != 0
        if not self.columns or (given is None and held is None):
            return
        if held is None:
            assert given is not None
            wrong = ~given
        else:
            given = torch.ones_like(held) if given is None else given
            wrong = given != held.to(given.device)
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            says = " is missing and" if mask is None else f"[{row}, {column}]={int(given[row, column])}"
            kind = "padding" if given[row, column] else "a real token"
            raise CacheError(
                f"attention_mask{says} disagrees with the cache, which took column "
                f"{column} of row {row} in as {kind}; pass the mask that the cache was filled with "
                "(cache.valid_columns(); rows that ended early count their padding as 0), or start a new cache"
            )

    def _check_architecture(self, other: HymbaConfig, names: tuple[str, str]) -> None:
        if other is not self.config and (differ := differences(architecture(self.config), architecture(other), names)):
            raise CacheError(f"the {names[0]} and the {names[1]} are of different architectures ({differ})")

    # Rows.

    def _map_rows(self, function: Any) -> None:
        def rows(name: str, tensor: Tensor) -> Tensor:
            if name.startswith("prefix") or (name == "seen" and tensor.shape[0] == 1):
                return tensor
            new = function(tensor)
            return tensor.copy_(new) if self.max_length is not None and _fits(tensor, new) else new

        if not self.columns:
            return
        with _lasting():
            self.layers = [map_tensors(state, rows) for state in self.layers]
            if self.seen is not None and self.seen.shape[0] > 1:
                self.seen = function(self.seen)
            self.valid = [function(part) if isinstance(part, Tensor) else part for part in self.valid]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order. rows: (n,) integers."""
        self._map_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def expand(self, repeats: int) -> HymbaCache:
        """Repeat every row `repeats` times in place; returns the cache. A prefix serves a batch this way."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.expand(repeats)

    # Going back.

    def snapshot(self) -> CacheSnapshot:
        """A copy of everything that this cache holds; the cache may go on."""
        with _lasting():
            return CacheSnapshot(
                config=self.config,
                max_length=self.max_length,
                layers=[map_tensors(state, lambda _, tensor: tensor.clone()) for state in self.layers],
                columns=self.columns,
                uniform=self.uniform,
                seen=None if self.seen is None else self.seen.clone(),
                valid=list(self.valid),
                started=self.started,
            )

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Back to a snapshot of this cache, as often as wanted. A static cache keeps its addresses."""
        if snapshot.max_length != self.max_length:
            raise CacheError(
                f"the snapshot is of a cache with max_length={snapshot.max_length}, this one has {self.max_length}"
            )
        self._check_architecture(snapshot.config, ("cache", "snapshot"))
        self.layers = [
            _overwrite(mine, saved, fixed=self.max_length is not None)
            for mine, saved in zip(self.layers, snapshot.layers, strict=True)
        ]
        self.columns, self.uniform, self.started = snapshot.columns, snapshot.uniform, snapshot.started
        self.seen = None if snapshot.seen is None else snapshot.seen.clone()
        self.valid = list(snapshot.valid)
        self.interrupted = False

    def crop(self, *_: Any, **__: Any) -> None:
        """Not possible: an SSM state does not remember how it came about."""
        raise NotImplementedError(
            "HymbaCache cannot be cropped: an SSM state cannot be rolled back. Take cache.snapshot() before the tokens "
            "that may have to go, and cache.restore(snapshot) to go back"
        )

    def reset(self) -> None:
        """Empty the cache; the next call starts new rows and computes the meta state again."""
        self._clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> HymbaCache:
        twin = HymbaCache(self.config, max_length=self.max_length)
        twin.restore(self.snapshot())
        return twin

    # Disk.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the contents to one safetensors file (a temporary name first, then renamed)."""
        if not self.columns:
            raise CacheError("an empty cache has nothing to save; run a prefix through the model first")
        tensors: dict[str, Tensor] = {}
        for i, state in enumerate(self.layers):

            def keep(name: str, tensor: Tensor, i: int = i) -> Tensor:
                tensors[f"layers.{i}.{name}"] = tensor.contiguous()
                return tensor

            map_tensors(replace(state, seen=None), keep)
        assert self.seen is not None
        tensors["seen"] = self.seen.contiguous()
        valid = self.valid_columns()
        if valid is not None:
            tensors["valid"] = valid.contiguous()
        meta = {
            "format": "hymba-cache-1",
            "columns": str(self.columns),
            "max_length": json.dumps(self.max_length),
            "architecture": json.dumps(architecture(self.config)),
        }
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=meta)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: HymbaConfig, *, device: torch.device | str = "cpu"
    ) -> HymbaCache:
        """Read a cache that `save` wrote; it has to come from a model of the same architecture.

        Raises:
            CacheError: not such a file, or another architecture (the fields that differ are named).
        """
        try:
            with _lasting(), safe_open(path, framework="pt", device=str(device)) as file:
                meta = file.metadata() or {}
                if meta.get("format") != "hymba-cache-1":
                    raise CacheError(f"{path} is not a saved HymbaCache (no format hymba-cache-1 in its header)")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CacheError(f"{path} is not a readable safetensors file: {error}") from error
        differ = differences(json.loads(meta["architecture"]), architecture(config), ("file", "model"))
        if differ:
            raise CacheError(f"{path} was saved by another architecture ({differ})")
        cache = cls(config, max_length=json.loads(meta["max_length"]))
        for i, state in enumerate(cache.layers):
            mine = {name.split(".")[-1]: t for name, t in tensors.items() if name.startswith(f"layers.{i}.")}
            kv = state.kv
            if kv is not None:
                kv = replace(kv, keys=mine.pop("keys", None), values=mine.pop("values", None))
            cache.layers[i] = replace(state, kv=kv, **mine)
        cache.columns = int(meta["columns"])
        cache.seen = tensors["seen"]
        cache.uniform = "valid" not in tensors
        cache.valid = [tensors.get("valid", cache.columns)]
        cache.started = True
        return cache

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Text tokens taken in per row, padding included, meta tokens not."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Text tokens that fit; -1 without a limit."""
        return -1 if self.max_length is None else self.max_length

    def get_max_length(self) -> int | None:
        return self.max_length

    @property
    def max_cache_len(self) -> int | None:
        return self.max_length

    @property
    def max_batch_size(self) -> int | None:
        return self.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        """Never (see `crop`); transformers asks before it plans to take tokens back."""
        return False

    @property
    def is_compileable(self) -> bool:
        # generate() would build four-dimensional masks for it; ours come from positions.
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [spec.attends and spec.window is not None for spec in self.config.layers]

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        return self.columns > 0

    def update(self, *_: Any, **__: Any) -> Any:
        raise CacheError("HymbaCache is written by HymbaModel; foreign attention layers cannot update it")

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        size = "dynamic" if self.max_length is None else f"static, max_length={self.max_length}"
        return f"HymbaCache({size}, rows={self.batch_size}, tokens={self.columns}, {self.nbytes():,} bytes)"

    def nbytes(self) -> int:
        """Bytes of all tensors held: keys, values, meta keys and values (once), convolution windows, SSM states."""
        total = 0
        counted: set[int] = set()

        def add(name: str, tensor: Tensor) -> Tensor:
            nonlocal total
            if name != "seen" and id(tensor) not in counted:
                counted.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
            return tensor

        for state in self.layers:
            map_tensors(state, add)
        return total


def _fits(old: Tensor, new: Tensor) -> bool:
    """Whether `new` can be written into the memory of `old`."""
    alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return alike and not old.is_inference()


def _overwrite(held: LayerState, new: LayerState, *, fixed: bool = True) -> LayerState:
    """`new` in the memory of `held` where shapes agree (and addresses are `fixed`), else as copies. No gradients."""
    memory: dict[str, Tensor] = {}
    map_tensors(held, lambda name, tensor: memory.setdefault(name, tensor))

    def own(name: str, tensor: Tensor) -> Tensor:
        old = memory.get(name)
        if old is tensor:
            return tensor
        return old.copy_(tensor) if fixed and old is not None and _fits(old, tensor) else tensor.clone()

    with _lasting():
        return map_tensors(new, own)


def as_hymba_cache(past: Any, config: HymbaConfig) -> HymbaCache:
    """The cache to use for what a caller passed as `past_key_values`.

    An empty `DynamicCache` or `StaticCache` is turned into a `HymbaCache` in place, so that the caller's variable is
    the cache that the next call continues.

    Raises:
        CacheError: a foreign cache that holds something, or a type that has no counterpart.
    """
    if isinstance(past, HymbaCache):
        past._check_architecture(config, ("cache", "model"))
        return past
    if not isinstance(past, Cache):
        raise CacheError(
            f"past_key_values is a {type(past).__name__}; allowed: HymbaCache, or an empty DynamicCache or StaticCache"
        )
    if past.get_seq_length() > 0:
        raise CacheError(
            f"past_key_values is a {type(past).__name__} that holds {past.get_seq_length()} tokens of another model; "
            "allowed: a HymbaCache, or an empty DynamicCache or StaticCache"
        )
    if type(past) not in (DynamicCache, StaticCache):
        raise CacheError(
            f"past_key_values is a {type(past).__name__}, which has no counterpart here; allowed: HymbaCache, or an "
            "empty DynamicCache or StaticCache"
        )
    max_length = None
    if isinstance(past, StaticCache):
        # Layers with a window are shorter than the cache and do not know its length.
        lengths = [int(layer.max_cache_len) for layer in past.layers if not getattr(layer, "is_sliding", False)]
        if not lengths:
            raise CacheError(
                "past_key_values is a StaticCache without a global layer, which does not know its own length; use "
                "HymbaCache(model.config, max_length=...) or cache_implementation='static'"
            )
        max_length = max(lengths)
    user_defined = getattr(past, "_is_user_defined", False)
    past.__class__ = HymbaCache
    past.__dict__.clear()
    past.__init__(config, max_length=max_length)
    if user_defined:
        past._is_user_defined = True
    return past
