"""PEFT's adapters: default targets that cover every projection, each of which takes effect, under either name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from architectures import configs
from helpers import build, largest, some_ids
from hypothesis import given
from peft import LoraConfig, get_peft_model
from tolerances import FLOAT64_LOGITS
from torch import nn

from hymba import HymbaCache
from hymba.adapters import LMFLOW_PROJECTIONS, PROJECTIONS, target_names
from hymba.finetuning import default_target_modules
from hymba.hub import released_name


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@given(configs(layers=3))
def test_every_linear_layer_but_the_head_is_a_default_target(config: Any) -> None:
    model = build(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[2] for name in linear - {"lm_head"}} <= set(PROJECTIONS)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1))
    reached = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert reached == linear - {"lm_head"}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_each_adapter_alone_moves_the_output(dora: bool) -> None:
    """Weights of one adapted layer at a time: none is computed around, in a forward pass or in decoding."""
    model = build(num_hidden_layers=2, kv_reuse_group=[[0, 1]], global_attn_idx=[])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=dora)).eval()
    ids = some_ids(1, 6)

    def outputs() -> list[torch.Tensor]:
        cache = HymbaCache(model.config)
        prefill = adapted(input_ids=ids[:, :5], past_key_values=cache, use_cache=True).logits
        return [prefill, adapted(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits]

    want = outputs()
    kind = "magnitude" if dora else "lora_B"
    names = [name for name, _ in adapted.named_parameters() if kind in name]
    assert {part for name in names for part in PROJECTIONS if f".{part}." in name} == set(PROJECTIONS)
    for name in names:
        parameter = adapted.get_parameter(name)
        kept = parameter.clone()
        parameter.add_(0.3)
        assert all(largest(new, old) > 1e-6 for new, old in zip(outputs(), want)), name
        parameter.copy_(kept)
    assert all(largest(new, old) <= FLOAT64_LOGITS for new, old in zip(outputs(), want))


def test_defaults_without_importing_peft() -> None:
    """The table gets its entry when PEFT asks, also of a model that was there before PEFT was."""
    code = """
import sys
from hymba import HymbaConfig, HymbaForCausalLM
model = HymbaForCausalLM(HymbaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    num_memory_tokens=0, mamba_d_state=1, tie_word_embeddings=False))
assert not {"peft", "trl"} & set(sys.modules)
from peft import LoraConfig, get_peft_model
print(sorted(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).peft_config["default"].target_modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(sorted(PROJECTIONS)), done.stderr


def test_an_entry_of_the_users_stays(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from peft.utils import constants

    monkeypatch.setitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "hymba", ["in_proj"])
    model.config.to_dict()
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["hymba"] == ["in_proj"]


def test_names_of_the_release(model: Any) -> None:
    """LMFlow's targets mean the same layers by our names; whatever is no projection is left for PEFT to refuse."""
    assert target_names(["x_proj.0", "in_proj", "out_proj", "dt_proj.0"]) == list(LMFLOW_PROJECTIONS)
    assert target_names() == default_target_modules() == list(PROJECTIONS)
    assert target_names(["lm_head", "x.0"]) == ["lm_head", "x.0"]
    released = {released_name(name) for name, _ in model.named_parameters()}
    assert all(any(f".{name}.weight" in full for full in released) for name in ("x_proj.0", "dt_proj.0"))
