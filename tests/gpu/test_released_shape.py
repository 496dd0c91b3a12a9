"""The released shape on a GPU: ways through the model against each other, graphs, and no look at the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu.on_gpu import decoded, ids_on_gpu, model_on_gpu, needs_gpu
from helpers import relative
from tolerances import AS_GOOD_AS_PLAIN, GPU_RELATIVE
from torch import Tensor

from hymba import HymbaCache
from hymba.decoding import DecodeStep, capture, why_not_fused
from hymba.ops import use_backend

pytestmark = needs_gpu

LAYERS = 4


@pytest.fixture(scope="module")
def four_layers() -> Iterator[Any]:
    """A global layer, a lender with its borrower, and a layer alone, in float32."""
    yield model_on_gpu(LAYERS)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def whole() -> Iterator[Any]:
    yield model_on_gpu(dtype=torch.bfloat16)
    torch.cuda.empty_cache()


@torch.no_grad()
def plain(model: Any, ids: Tensor) -> Tensor:
    """Logits by plain PyTorch operations and materialised attention scores."""
    model.set_attn_implementation("eager")
    try:
        with use_backend("torch"):
            return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation("sdpa")


# Around the window of 1,024: the ring's first wrap happens in the prompt, and among the decoded tokens.
@pytest.mark.parametrize("prompt", [1016, 1130])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
@torch.no_grad()
def test_decode_equals_forward_past_the_window(four_layers: Any, prompt: int, fused: bool) -> None:
    ids = ids_on_gpu(2, prompt + 16)
    if fused and (reason := why_not_fused(four_layers)):
        pytest.skip(f"no fused step: {reason}")
    want = four_layers(ids, use_cache=False).logits[:, prompt:]
    assert relative(plain(four_layers, ids)[:, prompt:], want) <= GPU_RELATIVE
    assert relative(decoded(four_layers, ids, prompt, fused=fused), want) <= GPU_RELATIVE


@torch.no_grad()
def test_the_whole_model_in_bfloat16(whole: Any) -> None:
    """Forward and decoding past the window are as near to float32 as plain PyTorch in bfloat16 is."""
    ids, prompt = ids_on_gpu(2, 1048), 1032
    base = plain(whole, ids)[:, prompt:]
    got = {"forward": whole(ids, use_cache=False).logits[:, prompt:]}
    for fused in (True, False):
        if not fused or why_not_fused(whole) is None:
            got["fused" if fused else "modules"] = decoded(whole, ids, prompt, fused=fused)
    exact = whole.float()
    want = plain(exact, ids)[:, prompt:]
    whole.bfloat16()
    allowed = AS_GOOD_AS_PLAIN * relative(base, want)
    errors = {name: relative(logits, want) for name, logits in got.items()}
    print({"plain": allowed / AS_GOOD_AS_PLAIN} | errors)
    assert all(error <= allowed for error in errors.values()), f"{errors}, allowed {allowed}"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_equals_alone(four_layers: Any, side: str) -> None:
    lengths = (1100, 37, 613)
    rows = [ids_on_gpu(1, n, seed=n)[0] for n in lengths]
    ids = torch.full((3, max(lengths)), 5, device="cuda")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(max(lengths) - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    logits = four_layers(ids, attention_mask=mask, use_cache=False).logits
    for i, row in enumerate(rows):
        want = four_layers(row[None], use_cache=False).logits[0]
        assert relative(logits[i][mask[i] == 1], want) <= GPU_RELATIVE, lengths[i]


@torch.no_grad()
def test_packed_equals_apart(four_layers: Any) -> None:
    lengths = (300, 1, 1150, 77)
    rows = [ids_on_gpu(1, n, seed=n) for n in lengths]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int().to("cuda")
    logits = four_layers(torch.cat(rows, dim=1), seq_idx=seq_idx, use_cache=False).logits
    for row, got in zip(rows, logits.split(list(lengths), dim=1), strict=True):
        assert relative(got, four_layers(row, use_cache=False).logits) <= GPU_RELATIVE, row.shape


def test_gradients_of_kernels_and_plain_pytorch(four_layers: Any) -> None:
    ids = ids_on_gpu(2, 1100)
    found = []
    for backend in ("auto", "torch"):
        four_layers.train()
        four_layers.set_attn_implementation("sdpa" if backend == "auto" else "eager")
        with use_backend(None if backend == "auto" else backend):
            four_layers(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in four_layers.named_parameters() if p.grad is not None})
        four_layers.zero_grad()
    four_layers.set_attn_implementation("sdpa")
    four_layers.eval()
    assert found[0].keys() == found[1].keys()
    wrong = {name: e for name in found[0] if not (e := relative(found[0][name], found[1][name])) <= 1e-3}
    assert not wrong, wrong


def test_generation_is_the_same_with_either_cache(four_layers: Any) -> None:
    ids = ids_on_gpu(3, 1010)
    mask = torch.ones_like(ids)
    mask[1, :200] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    dynamic = four_layers.generate(ids, **options)
    static = four_layers.generate(ids, cache_implementation="static", **options)
    assert dynamic.tolist() == static.tolist()


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "prefill"])
@torch.no_grad()
def test_the_forward_pass_never_waits_for_the_device(whole: Any, kind: str) -> None:
    ids = ids_on_gpu(2, 1100)
    options: dict[str, Any] = {"use_cache": kind == "prefill"}
    if kind in ("padded", "prefill"):
        options["attention_mask"] = torch.ones_like(ids).tril(600)
    if kind == "packed":
        options["seq_idx"] = (torch.arange(1100, device="cuda") // 400).int().expand(2, -1).contiguous()
    whole(ids, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    whole(ids, **options)


@pytest.mark.parametrize("rows", [1, 4, 20])
@torch.no_grad()
def test_a_captured_step_gives_what_the_step_gives(whole: Any, rows: int) -> None:
    ids = ids_on_gpu(rows, 40)
    fused = why_not_fused(whole) is None
    want = decoded(whole, ids, 30, fused=fused)
    cache = HymbaCache(whole.config, max_length=40)
    whole(ids[:, :30], past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(whole, cache, fused=fused)
    replay = capture(step.run, step=step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = []
        for t in range(30, 40):
            step.tokens.copy_(ids[:, t])
            replay()
            got.append(step.logits.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Sums may fall in another order from run to run only where a kernel adds atomically.
    assert relative(torch.stack(got, dim=1), want) <= 1e-2
