"""Parameters, FLOPs and cache bytes computed from a configuration are those of the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba.cost import cache_bytes, flops_of_text, flops_per_token, parameters
from hymba.nn.state import map_tensors
from hymba.ops import ssd_state_update

RELEASE = HymbaConfig(
    global_attn_idx=[0, 15, 31],
    kv_reuse_group=[[i, i + 1] for i in range(1, 15, 2)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 31, 2)],
)
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, num_memory_tokens=6, sliding_window=8, global_attn_idx=[0, 4], mamba_d_state=4,
)  # fmt: skip
CONFIGS = {
    "groups": {**SMALL, "kv_reuse_group": [[1, 2, 3]]},
    "every-2-no-window": {**SMALL, "sliding_window": None, "global_attn_idx": None, "kv_reuse_every_i_layer": 2},
    "all-windowed": {**SMALL, "global_attn_idx": [], "mamba_d_conv": 2},
    "no-meta-untied-relu2-bias": {
        **SMALL,
        "num_memory_tokens": 0,
        "tie_word_embeddings": False,
        "mlp_hidden_act": "relu2",
        "mamba_proj_bias": True,
        "kq_norm": "perhead-rms",
        "mamba_dt_rank": 3,
    },
    "qk-rms-mha-expand-3": {**SMALL, "kq_norm": "rms", "num_key_value_heads": None, "mamba_expand": 3},
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> HymbaConfig:
    return HymbaConfig(**CONFIGS[request.param])


def test_parameters_are_those_of_the_model(config: HymbaConfig) -> None:
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    count = parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == model.model.embed_tokens.weight.numel()
    assert count.mlp == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)


def test_parameters_of_the_release() -> None:
    count = parameters(RELEASE)
    assert count.total == 1_522_797_824
    assert count.total * 2 == 3_045_595_648


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(1, 3), (3, 8), (2, 21)])
def test_cache_bytes_are_those_of_a_cache(config: HymbaConfig, rows: int, length: int, dtype: torch.dtype) -> None:
    model = HymbaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(0, config.vocab_size, (rows, length))
    for cache, static in ((HymbaCache(config), False), (HymbaCache(config, max_length=length), True)):
        with torch.no_grad():
            model(ids, past_key_values=cache)
        expected = cache_bytes(config, length, batch=rows, dtype=dtype, static=static)
        assert cache.nbytes() == expected.total
        # None of them is a view that keeps a larger tensor, such as a whole projection, in memory.
        assert storage_bytes(cache) == expected.total


def storage_bytes(cache: HymbaCache) -> int:
    """Bytes of the memory that a cache keeps alive, each piece once."""
    found: dict[int, int] = {}

    def add(name: str, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if name != "seen":
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    for state in cache.layers:
        map_tensors(state, add)
    return sum(found.values())


def test_a_static_cache_never_changes_its_size() -> None:
    config = HymbaConfig(**CONFIGS["groups"])
    model, cache = HymbaForCausalLM(config).eval(), HymbaCache(config, max_length=40)
    expected = cache_bytes(config, 40, batch=2, dtype="float32", static=True).total
    with torch.no_grad():
        for chunk in torch.randint(0, 97, (2, 40)).split([1, 1, 20, 1, 17], dim=1):
            model(chunk, past_key_values=cache)
            assert cache.nbytes() == expected


def test_cache_bytes_of_the_release() -> None:
    # SPEC section 5 has 82.3 MiB with a convolution window of 4; this one keeps the 3 inputs that are needed.
    held = cache_bytes(RELEASE, 8192)
    assert held.global_kv + held.windowed_kv + held.meta_kv == 2 * 960 * (3 * 8320 + 14 * 1152)
    assert held.conv == 2 * 32 * 3200 * 3
    assert held.ssm == 4 * 32 * 3200 * 16
    assert held.total + 2 * 32 * 3200 == pytest.approx(82.3 * 2**20, rel=1e-3)
    assert cache_bytes(RELEASE, 8192, batch=4).meta_kv == held.meta_kv


def test_projections_cost_what_torch_counts(config: HymbaConfig) -> None:
    """One decoding step: every matrix product outside of attention, counted by torch."""
    model = HymbaForCausalLM(config).eval()
    cache = HymbaCache(config)
    with torch.no_grad():
        model(torch.randint(0, config.vocab_size, (1, 20)), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[1]]), past_key_values=cache)
    counted = counter.get_flop_counts()["Global"]
    flops = flops_per_token(config, 20)
    inner, rank, state = config.d_inner, int(config.mamba_dt_rank), config.mamba_d_state
    products = 2 * config.num_hidden_layers * inner * (2 * rank + 2 * state)
    linear = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert linear == flops.projections + flops.mlp + flops.head + products
    # The rest of the Mamba heads is the convolution and the scan: 7 per channel and state, 4 per channel.
    assert flops.mamba - products == config.num_hidden_layers * inner * (2 * config.mamba_d_conv + 7 * state + 4)


@pytest.mark.parametrize("length", [0, 5, 8, 9, 20])
def test_attention_costs_two_products_for_each_visible_key(config: HymbaConfig, length: int) -> None:
    model = HymbaForCausalLM(config).eval()
    with torch.no_grad():
        ids = torch.randint(0, config.vocab_size, (1, length + 1))
        weights = model(ids, use_cache=False, output_attentions=True).attentions
    seen = sum(int((layer[0, :, -1] > 0).sum()) for layer in weights)
    widths = config.head_dim + config.v_head_dim
    assert flops_per_token(config, length).attention == 2 * seen * widths


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 10, 40])
def test_a_text_costs_what_its_tokens_cost(config: HymbaConfig, length: int) -> None:
    tokens = [flops_per_token(config, position).to_dict() for position in range(length)]
    assert flops_of_text(config, length).to_dict() == {
        part: sum(token[part] for token in tokens) for part in flops_of_text(config, length).to_dict()
    }


def test_only_attention_depends_on_the_length_and_only_until_the_window_is_full() -> None:
    config = HymbaConfig(**CONFIGS["all-windowed"])
    near, full, far = (flops_per_token(config, n) for n in (3, 8, 8000))
    assert near.attention < full.attention
    assert full == far


def test_a_length_batch_or_dtype_that_cannot_be_is_refused() -> None:
    for call, message in (
        (lambda: cache_bytes(RELEASE, -1), "length=-1: allowed: integers from 0"),
        (lambda: cache_bytes(RELEASE, 10, batch=0), "batch=0: allowed: integers from 1"),
        (lambda: cache_bytes(RELEASE, 10, dtype="int8"), "dtype='int8': allowed: float32, bfloat16, float16"),
        (lambda: flops_per_token(RELEASE, 1.5), "length=1.5: allowed: integers from 0"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            call()


class _Counted(TorchDispatchMode):
    """Adds up the operations of a step's elementwise ops and products."""

    each = {"mul": 1, "mul_": 1, "add": 1, "exp": 1, "addcmul_": 2}

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "bmm":
            self.total += 2 * out.numel() * args[0].shape[-1]
        self.total += self.each.get(name, 0) * (out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_the_scan_of_mamba_2_costs_what_its_step_does() -> None:
    width, states, groups = 4, 8, 2
    fields = SMALL | {"mamba_d_state": states, "global_attn_idx": None, "layer_pattern": [
        {"mixer": "mamba", "ssm": "mamba2", "ssm_head_dim": width, "ssm_groups": groups, "ffn": False}
    ]}  # fmt: skip
    config = HymbaConfig(**fields | {"num_hidden_layers": 1, "kv_reuse_group": None})
    inner = config.d_inner
    heads = inner // width
    vector, B = torch.rand(heads), torch.rand(1, groups, states)
    with _Counted() as counted:
        state, x = torch.rand(1, heads, width, states), torch.rand(1, heads, width)
        ssd_state_update(state, x, torch.rand(1, heads), -vector, B, B, vector, backend="torch")
    convolved = inner + 2 * groups * states
    # The step, the gate, and the convolution.
    assert flops_per_token(config, 5).mamba == counted.total + inner + 2 * config.mamba_d_conv * convolved

    model, cache = HymbaForCausalLM(config).eval(), HymbaCache(config)
    with torch.no_grad():
        model(torch.randint(0, config.vocab_size, (1, 20)), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[1]]), past_key_values=cache)
    counts = counter.get_flop_counts()["Global"]
    flops = flops_per_token(config, 20)
    linear = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert linear == flops.projections + flops.mlp + flops.head
