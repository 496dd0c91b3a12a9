"""Attention of many queries, forward and backward: a window behind meta keys, and global causal, against their floor.

    python -m benchmarks.attention                  # the released heads, 8 x 8192, bf16
    python -m benchmarks.attention --sweep          # the same with other tiles
    python -m benchmarks.attention --peers          # and cuDNN SDPA and FlexAttention (which takes a minute to compile)

Checks values and every gradient first, against the reference in float64 on small cases: plain, packed, behind a ring
and behind a buffer; prints no number when one fails. The floor: 2 (d + e) operations per visible pair forward and
2 (3 d + 2 e) backward, over a measured matrix rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import matrix_rate, report, spread, times
from hymba.nn.state import KVState, Span
from hymba.ops.attention import attention
from hymba.ops.masks import Visibility

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""||got - want|| / ||want|| of outputs and gradients against float64."""
Tensors = dict[str, Tensor]


def inputs(args: argparse.Namespace, b: int, l: int, keys: int | None = None) -> Tensors:
    """Random leaves as the model has them: q, k and v are slices of one projection's output."""
    h, k, d, e = args.heads, args.kv_heads, args.head_dim, args.v_head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=getattr(torch, args.dtype))

    q, own_k, own_v = normal(b, l, h * d + k * (d + e)).split([h * d, k * d, k * e], dim=-1)
    out = {"q": q.unflatten(2, (h, d)), "k": own_k.unflatten(2, (k, d)), "v": own_v.unflatten(2, (k, e))}
    if keys is not None:
        out |= {"k": normal(b, keys, k, d), "v": normal(b, keys, k, e)}
    if args.meta:
        out |= {"prefix_k": normal(1, args.meta, k, d), "prefix_v": normal(1, args.meta, k, e)}
    return out


def gradients(case: Tensors, seen: Visibility, **options: Any) -> Tensors:
    """The output and the gradient of every input, under weights that depend on nothing but the shape."""
    leaves = {k: v.detach().requires_grad_() for k, v in case.items()}
    out, _ = attention(**leaves, visibility=seen, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return {"out": out} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), weight), strict=True))


def check_cases(args: argparse.Namespace, window: int | None) -> Iterator[tuple[Tensors, Visibility]]:
    """Two rows of 300 tokens: plain, packed, and the same behind a cache that holds 500."""
    span = Span.following(300, device="cuda")
    yield inputs(args, 2, 300), span.visibility(window, prefix=args.meta)
    span = Span.following(300, device="cuda")
    span.seq_idx = (torch.arange(300, device="cuda") // 41).int()[None]
    span.positions = torch.arange(300, device="cuda")[None] % 41
    yield inputs(args, 2, 300), span.visibility(window, prefix=args.meta)
    kv = KVState(window=window, capacity=900, in_place=True)
    past = inputs(args, 2, 500)
    kv.extend(past["k"], past["v"], Span.following(500, device="cuda"), prefix=args.meta)
    span = Span.following(300, start=torch.tensor([500], device="cuda"), columns=500)
    case = inputs(args, 2, 300)
    k, v, seen = kv.extend(case["k"], case["v"], span, prefix=args.meta)
    yield case | {"k": k.clone(), "v": v.clone()}, seen


def check(args: argparse.Namespace, window: int | None) -> float:
    """The worst relative error over outputs and gradients."""
    worst = 0.0
    for case, seen in check_cases(args, None if window is None else min(window, 128)):
        got = gradients(case, seen, backend="triton")
        want = gradients({k: v.double() for k, v in case.items()}, seen, backend="reference")
        for name, value in want.items():
            error = ((got[name].double() - value).norm() / value.norm()).item()
            worst = error if error != error else max(worst, error)
    return worst


def time_op(run: Callable[..., Tensor], case: Tensors) -> dict[str, Any]:
    """Forward without gradients, and backward alone from a graph that is kept."""
    with torch.no_grad():
        forward = spread(times(lambda: run(**case)))
    leaves = {k: v.detach().requires_grad_() for k, v in case.items()}
    out = run(**leaves)
    dout = torch.randn_like(out)
    backward = spread(times(lambda: torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)))
    return {"forward": forward, "backward": backward}


def cudnn(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None) -> Tensor:
    """Global causal attention of cuDNN over [prefix | text], with as many idle queries in front."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if prefix_k is not None and prefix_v is not None:
        m, shape = prefix_k.shape[1], (q.shape[0], -1, -1, -1)
        q = F.pad(q, (0, 0, 0, 0, m, 0))
        k, v = torch.cat([prefix_k.expand(shape), k], 1), torch.cat([prefix_v.expand(shape), v], 1)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)[:, -(q.shape[1] - (0 if prefix_k is None else prefix_k.shape[1])) :].flatten(2)


def flex(args: argparse.Namespace, window: int | None) -> Callable[..., Tensor]:
    """Compiled FlexAttention with the block mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    m, l = args.meta, args.length

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query + m >= key) & (query + m - key <= (l if window is None else window))
        return (key < m) | near

    mask = create_block_mask(seen, None, None, l, m + l, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None) -> Tensor:
        if prefix_k is not None and prefix_v is not None:
            shape = (q.shape[0], -1, -1, -1)
            k, v = torch.cat([prefix_k.expand(shape), k], 1), torch.cat([prefix_v.expand(shape), v], 1)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)

    return run


@contextmanager
def tiles(table: str, tile: tuple[int | None, ...]) -> Iterator[None]:
    """Another tile in one of the three tables, for all shapes."""
    from hymba.ops.triton import attention as kernels
    from hymba.ops.triton import attention_backward

    tables = {
        "forward": [kernels.TILES, kernels.GLOBAL_TILES],
        "queries": [attention_backward.QUERY_TILES],
        "keys": [attention_backward.KEY_TILES],
    }[table]
    before = [dict(t) for t in tables]
    for t in tables:
        t.update(dict.fromkeys(t, kernels.Tile(*tile)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for t, old in zip(tables, before, strict=True):
            t.update(old)


SWEEP: list[tuple[str, tuple[int | None, ...]]] = [
    ("forward", (128, 64, 4, 3)),
    ("forward", (128, 64, 8, 3)),
    ("forward", (128, 64, 8, 3, 128)),
    ("forward", (128, 128, 8, 2)),
    ("forward", (64, 64, 4, 3)),
    ("queries", (128, 64, 8, 3)),
    ("queries", (128, 64, 8, 2, 128)),
    ("queries", (64, 64, 4, 2)),
    ("queries", (128, 128, 8, 2)),
    ("keys", (64, 128, 8, 3)),
    ("keys", (64, 64, 4, 2)),
    ("keys", (128, 64, 8, 2)),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    sizes = {"batch": 8, "length": 8192, "window": 1024, "meta": 128, "heads": 25, "kv-heads": 5, "head-dim": 64}
    for name, value in (sizes | {"v-head-dim": 128}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peers", action="store_true", help="also time cuDNN's SDPA and FlexAttention")
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rate = matrix_rate()
    rows: list[dict[str, Any]] = []
    failed = False
    case = inputs(args, args.batch, args.length)

    def add(name: str, backend: str, window: int | None, run: Callable[..., Tensor], variant: str = "") -> None:
        reach = args.length if window is None else window
        pairs = sum(min(i, reach) + 1 + args.meta for i in range(args.length)) * args.batch * args.heads
        row: dict[str, Any] = {"case": name, "backend": backend, "variant": variant} | time_op(run, case)
        line = f"{name:7} {backend:7} "
        d, e = args.head_dim, args.v_head_dim
        for way, work in (("forward", 2 * (d + e)), ("backward", 2 * (3 * d + 2 * e))):
            speed = pairs * work / row[way]["median"]
            row[f"{way}_of_rate"] = speed / rate
            line += f"{way} {1e3 * row[way]['median']:7.3f} ms {speed / 1e12:4.0f} TFLOP/s ({speed / rate:4.0%})  "
        print(f"{line} {variant}", flush=True)
        rows.append(row)

    for name, window in (("window", args.window), ("global", None)):
        seen = Span.following(args.length, device="cuda").visibility(window, prefix=args.meta)

        def ours(seen: Visibility = seen, **tensors: Tensor) -> Tensor:
            return attention(**tensors, visibility=seen, backend="triton")[0]

        error = check(args, window)
        if not error < TOLERANCE[getattr(torch, args.dtype)]:
            failed = True
            print(f"{name} triton: WRONG, relative error {error:.1e}", flush=True)
            continue
        print(f"{name} triton: worst relative error {error:.1e}", flush=True)
        add(name, "triton", window, ours)
        for table, tile in SWEEP if args.sweep else []:
            with tiles(table, tile):
                try:
                    add(name, "triton", window, ours, f"{table} {tile}")
                except Exception as problem:
                    print(f"{name} {table} {tile}: {type(problem).__name__}", flush=True)
        peers: dict[str, Callable[[], Callable[..., Tensor]]] = {"cudnn": lambda: cudnn} if window is None else {}
        if window is not None:
            peers["flex"] = lambda window=window: flex(args, window)
        for peer, make in peers.items() if args.peers else ():
            try:
                add(name, peer, window, make())
            except Exception as problem:
                print(f"{name} {peer}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
    facts = {k: v for k, v in vars(args).items() if k not in ("sweep", "peers")}
    facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    report("attention", rows, matrix_rate=rate, **facts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
