"""Attention's kernels in Triton's interpreter against the reference. Needs the interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run in the interpreter here: set TRITON_INTERPRET=1", allow_module_level=True)

from helpers import build, small_config, some_ids, through_cache

from hymba.nn.state import KVState, Span
from hymba.ops import BackendError, use_backend
from hymba.ops import attention_op as op
from hymba.ops.attention import attention, attention_ref
from hymba.ops.masks import Visibility
from hymba.ops.triton import attention as kernels
from hymba.ops.triton import attention_backward

FLOAT32 = 2e-6
"""||got - want|| / ||want|| of outputs and gradients against float64."""
BFLOAT16 = 1e-2
D, E = 16, 32

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = kernels.Tile(16, 16, 4, 2)
    for table in (kernels.TILES, kernels.GLOBAL_TILES, attention_backward.QUERY_TILES, attention_backward.KEY_TILES):
        for key in table:
            monkeypatch.setitem(table, key, tile)
    monkeypatch.setattr(attention_backward, "PREFIX_ROWS", 48)


def inputs(b: int, l: int, s: int, prefix: int = 0, rows: int = 1, heads: tuple[int, int] = (6, 2)) -> Inputs:
    """Random float64 q, k, v and, for a prefix, its keys and values of `rows` rows."""
    h, k = heads
    shapes = {"q": (b, l, h, D), "k": (b, s, k, D), "v": (b, s, k, E)}
    if prefix:
        shapes |= {"prefix_k": (rows, prefix, k, D), "prefix_v": (rows, prefix, k, E)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def with_gradients(case: Inputs, seen: Visibility, weight: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in case.items()}
    out, _ = attention(**leaves, visibility=seen, **options)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weight.to(out.dtype))]


def check(case: Inputs, seen: Visibility, dtype: torch.dtype = torch.float32, real: Tensor | None = None) -> None:
    """Kernel against reference, values and every gradient; `real` marks the queries that count."""
    b, l, h, _ = case["q"].shape
    weight = torch.randn(b, l, h * E, dtype=torch.float64)
    if real is not None:
        weight = weight * real[..., None]
    want = with_gradients({k: v.to(dtype).double() for k, v in case.items()}, seen, weight, implementation="eager")
    low = {k: v.to(dtype) for k, v in case.items()}
    # As the model has them: queries, keys and values are slices of one projection's output.
    if case["q"].shape[1] == case["k"].shape[1]:
        joined = torch.cat([low[name].flatten(2) for name in "qkv"], dim=-1)
        parts = joined.split([low[name].flatten(2).shape[2] for name in "qkv"], dim=-1)
        low |= {name: part.unflatten(2, (-1, low[name].shape[3])) for name, part in zip("qkv", parts)}
    got = with_gradients(low, seen, weight, backend="triton")
    if real is not None:
        want[0], got[0] = want[0][real], got[0][real]
    limit = FLOAT32 if dtype == torch.float32 else BFLOAT16
    for name, a, x in zip(["out", *case], got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - x).norm() <= limit * x.norm(), name


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(("prefix", "rows"), [(0, 1), (20, 1), (5, 2)])
def test_own_keys(prefix: int, rows: int, window: int | None) -> None:
    check(inputs(2, 27, 27, prefix, rows), Span.following(27).visibility(window, prefix=prefix))


@pytest.mark.parametrize("window", [None, 7])
def test_own_keys_in_bfloat16(window: int | None) -> None:
    check(inputs(2, 27, 27, 20), Span.following(27).visibility(window, prefix=20), torch.bfloat16)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (4, 4)])
@pytest.mark.parametrize("length", [1, 15, 33])
def test_lengths_and_groups(length: int, heads: tuple[int, int]) -> None:
    check(inputs(1, length, length, 3, heads=heads), Span.following(length).visibility(9, prefix=3))


@pytest.mark.parametrize("window", [None, 6])
def test_packed_rows(window: int | None) -> None:
    span = Span.following(40)
    documents = torch.stack([torch.arange(40) // 17, (torch.arange(40) + 5) // 11])
    span.seq_idx = documents.int() + 1
    first = torch.stack([torch.searchsorted(row, row) for row in documents])
    span.positions = torch.arange(40) - first
    check(inputs(2, 40, 40, 4), span.visibility(window, prefix=4))


def test_packed_rows_with_positions_that_skip_masked_tokens() -> None:
    # Positions count columns: the window reaches fewer tokens. Padding behind the row has any.
    span = Span.following(20, lengths=torch.tensor([17]))
    span.seq_idx = torch.tensor([[1] * 9 + [2] * 8 + [3, 4, 5]])
    span.positions = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 13, 14, 0, 1, 4, 5, 6, 7, 8, 9, 3, -7, 0]])
    check(inputs(1, 20, 20, 4), span.visibility(4, prefix=4), real=torch.arange(20)[None] < 17)


@pytest.mark.parametrize("window", [None, 6, 21])
@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("past", [3, 40])
def test_keys_behind_a_cache(past: int, capacity: int | None, window: int | None) -> None:
    """A ring before and after its turn and a buffer; slots that are empty; rows of different lengths."""
    kv = KVState(window=window, capacity=capacity, in_place=True)
    heads = 2
    lengths = torch.tensor([past, past - 2])
    first = Span.following(past, lengths=lengths)
    kv.extend(torch.randn(2, past, heads, D, dtype=torch.float64), torch.randn(2, past, heads, E, dtype=torch.float64),
              first, prefix=5)  # fmt: skip
    span = Span.following(19, start=first.end, columns=past, lengths=torch.tensor([19, 12]), uniform=False)
    own = inputs(2, 19, 19, 5)
    k, v, seen = kv.extend(own["k"], own["v"], span, prefix=5)
    assert seen.start is not None
    assert (seen.own_keys is None) == (window is None)
    real = torch.arange(19) < torch.tensor([[19], [12]])
    check(own | {"k": k.clone(), "v": v.clone()}, seen, real=real)


def test_one_query_in_a_ring_that_holds_its_key() -> None:
    kv = KVState(window=6, capacity=60, in_place=True)
    keys, values = torch.randn(1, 11, 2, D, dtype=torch.float64), torch.randn(1, 11, 2, E, dtype=torch.float64)
    kv.extend(keys[:, :10], values[:, :10], Span.following(10), prefix=3)
    span = Span.following(1, start=torch.tensor([10]), columns=10)
    k, v, seen = kv.extend(keys[:, 10:], values[:, 10:], span, prefix=3)
    assert seen.own_keys is None
    check(inputs(1, 1, 1, 3) | {"k": k.clone(), "v": v.clone()}, seen)


@pytest.mark.parametrize("window", [None, 9])
@torch.no_grad()
def test_one_query_over_slots_without_gradients(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    b, past, slots = 2, 21, 40 if window is None else 10
    case = inputs(b, 1, slots, prefix=5)
    start = torch.tensor([past, past - 3])
    positions = start[:, None]
    from hymba.nn.state import slot_positions

    seen = Visibility(positions, slot_positions(start + 1, slots), window, 5, own_keys=None, start=start)
    want, _ = attention(**case, visibility=seen, implementation="eager")
    calls = []
    kernel = op._one_query
    monkeypatch.setattr(op, "_one_query", lambda *args: calls.append(1) or kernel(*args))
    low = {name: x.float() for name, x in case.items()}
    got, _ = attention(**low, visibility=seen, backend="triton")
    assert calls and (got.double() - want).norm() <= FLOAT32 * want.norm()
    monkeypatch.setattr("hymba.ops.backend.wants_kernel", lambda *_: False)
    got, _ = attention(**low, visibility=seen, backend="triton")
    assert (got.double() - want).norm() <= FLOAT32 * want.norm()


def test_the_layout_of_the_keys_is_what_the_positions_say() -> None:
    for window, capacity, past, length in product((None, 6), (None, 60), (2, 30), (1, 4)):
        kv = KVState(window=window, capacity=capacity, in_place=True)
        x = torch.zeros(1, past, 1, D)
        kv.extend(x, x, Span.following(past), prefix=0)
        span = Span.following(length, start=torch.tensor([past]), columns=past)
        k, v, seen = kv.extend(x[:, :1].expand(-1, length, -1, -1), x[:, :1].expand(-1, length, -1, -1), span, prefix=0)
        s = op.Sources(torch.zeros(1, length, 1, D), k, v, None, None, seen.start, None, None, window, seen.own_keys)
        assert torch.equal(op._block(s, 0, length)[3], seen.dense()), (window, capacity, past, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_hands_over_inside(packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # As compiled code does that chose the kernel before it failed: the op gets its name and falls back.
    monkeypatch.setattr(op, "_QUERY_BLOCK", 8)
    span = Span.following(21)
    if packed:
        span.seq_idx = torch.arange(21)[None] // 8
        span.positions = torch.arange(21)[None] % 8
    seen = span.visibility(5, prefix=3)
    case = {k: v.to(dtype) for k, v in inputs(2, 21, 21, 3).items()}
    weight = torch.randn(2, 21, 6 * E)
    with use_backend(attention="triton"):
        want = with_gradients(case, seen, weight)
    monkeypatch.setattr("hymba.ops.backend.wants_kernel", lambda *_: False)
    with use_backend(attention="triton"):
        got = with_gradients(case, seen, weight)
    for a, x in zip(got, want, strict=True):
        assert (a.double() - x.double()).norm() <= (FLOAT32 if dtype == torch.float32 else BFLOAT16) * x.norm()


def test_what_it_refuses() -> None:
    case = {k: v.float() for k, v in inputs(1, 5, 5).items()}
    seen = Span.following(5).visibility(None, prefix=0)
    unordered = Visibility(seen.query, seen.key, None, own_keys=0)
    wide = {"q": torch.zeros(1, 5, 2, 48), "k": torch.zeros(1, 5, 2, 48), "v": torch.zeros(1, 5, 2, 48)}
    for arguments, options, reason in (
        (case, {"visibility": unordered}, "the order of the keys is unknown"),
        (case, {"visibility": seen, "dropout": 0.1}, "dropout=0.1; it has none"),
        (case | {"v": case["v"].double()}, {"visibility": seen}, "it takes one dtype"),
        (wide, {"visibility": seen}, "a head is 48 wide; it takes powers of two from 16 to 256"),
        ({k: v.double() for k, v in case.items()}, {"visibility": seen}, "x is torch.float64"),
    ):
        with pytest.raises(BackendError, match=reason):
            attention(**arguments, **options, backend="triton")
    with pytest.raises(ValueError, match="backend='flash' for attention; allowed: 'auto', 'triton'"):
        attention(**case, visibility=seen, backend="flash")


def test_a_model_runs_on_it() -> None:
    """Whole, through a cache in pieces, compiled: hidden states and gradients."""
    model = build(small_config(hidden_size=64, num_attention_heads=4, num_hidden_layers=3), dtype=torch.float32)
    ids = some_ids(2, 21)
    loss = model(ids, labels=ids).loss
    want = torch.autograd.grad(loss, list(model.parameters()))
    with use_backend(attention="triton"):
        got = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
        pieces = through_cache(model, ids, [8, 13])
    for a, x in zip(got, want, strict=True):
        assert (a - x).norm() <= 1e-4 * x.norm() + 1e-7
    assert (pieces - model(ids).logits).abs().max() < 1e-4


def test_compiles_into_one_op() -> None:
    seen = Span.following(18).visibility(5, prefix=3)
    case = {k: v.float() for k, v in inputs(1, 18, 18, 3).items()}
    weight = torch.randn(1, 18, 6 * E)

    def run(**arguments: Tensor) -> Tensor:
        return attention(**arguments, visibility=seen, backend="triton")[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for function in (run, compiled):
        leaves = {k: v.clone().requires_grad_() for k, v in case.items()}
        out = function(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), weight)
        if function is run:
            want = [out, *grads]
    assert all(torch.equal(a, x) for a, x in zip([out, *grads], want, strict=True))


def test_tiles_fit_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 128), torch.zeros(1, 1, 1, 128)
    s = op.Sources(*(t.to(torch.bfloat16) for t in x), *[None] * 6, 0)  # type: ignore[arg-type]
    table = {(2, 128): kernels.Tile(64, 128, 8, 3)}
    for room, rows, keys, stages in ((232448, 64, 128, 3), (101376, 64, 128, 2), (65536, 64, 32, 2), (9999, 16, 16, 2)):
        monkeypatch.setattr(kernels, "_shared_memory", lambda _, room=room: room)
        tile = kernels.tile_for(table, s, rows_stay=False)
        assert (tile.rows, tile.keys, tile.stages) == (rows, keys, stages)


def test_masks_and_bounds_agree() -> None:
    span = Span.following(12)
    span.seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 6])
    span.positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    for window in (None, 0, 2):
        seen = span.visibility(window, prefix=0)
        low, high = seen.bounds()
        i = torch.arange(12)
        key, query = i[None], i[:, None]
        assert torch.equal((key <= query) & (key >= low[0, :, None]), seen.dense()[0])
        assert torch.equal((query >= key) & (query < high), seen.dense()[0])
        mask = F.pad(seen.dense(), (2, 0), value=True)
        assert (
            attention_ref(torch.zeros(1, 12, 1, D), torch.zeros(1, 14, 1, D), torch.zeros(1, 14, 1, E), mask)[1].sum()
            > 0
        )
