"""The peers' published shapes with random weights, their static caches, and their decode step without Python.

Configurations are those of the published config.json files (meta-llama/Llama-3.2-1B and -3B,
tiiuae/Falcon-H1-1.5B-Base); multipliers of Falcon-H1 that scale activations are left at 1, which changes no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import FalconH1Config, FalconH1ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
FALCON: dict[str, Any] = {
    "vocab_size": 65537, "hidden_size": 2048, "intermediate_size": 4608, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 48,
    "mamba_d_head": 64, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 256, "mamba_rms_norm": False, "mamba_norm_before_gate": False, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
}  # fmt: skip
PEERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-3.2-1b": (
        LlamaConfig,
        LlamaForCausalLM,
        LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    ),
    "llama-3.2-3b": (
        LlamaConfig,
        LlamaForCausalLM,
        LLAMA | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    ),
    "falcon-h1-1.5b": (FalconH1Config, FalconH1ForCausalLM, FALCON),
}
"""In the order in which they run: a kernel that breaks the device's context comes last."""
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "falcon-h1-1.5b": 1_554_789_760}
TOY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "head_dim": 16}
TOY_FALCON = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}


def peer_config(name: str, *, toy: bool = False) -> Any:
    """The configuration of a peer, or a small one of the same kind."""
    config, _, fields = PEERS[name]
    if toy:
        fields = fields | TOY | {"num_attention_heads": 4, "num_key_value_heads": 2}
        fields |= TOY_FALCON if config is FalconH1Config else {}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    return config(**fields)


def peer_class(name: str) -> Callable[[Any], Any]:
    return PEERS[name][1]


def cache_tensors(cache: Any) -> list[Tensor]:
    """Every tensor of states that a transformers cache holds: keys, values, convolution and recurrent states."""
    found: list[Tensor] = []
    for layer in cache.layers:
        for name in ("keys", "values"):
            if isinstance(tensor := getattr(layer, name, None), Tensor):
                found.append(tensor)
        for name in ("conv_states", "recurrent_states"):
            found += [t for t in getattr(layer, name, {}).values() if isinstance(t, Tensor)]
    return found


def cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for t in cache_tensors(cache))


class PeerStep:
    """Greedy decoding of one token on a static cache, with everything on the device.

    Args:
        model: in inference. rows: batch. length: tokens that the cache holds. room: steps that it has room for.

    Attributes:
        tokens: (rows, 1) the token that each row takes in next. logits: (rows, vocab) of the last step.
    """

    def __init__(self, model: Any, rows: int, length: int, room: int) -> None:
        self.model, self.length = model, length
        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=length + room)
        self.tokens = torch.full((rows, 1), 5, device=device)
        self.logits: Tensor | None = None
        self.call = model.__call__

    def compile(self) -> None:
        """Run the compiled forward pass from now on."""
        self.call = torch.compile(self.model.__call__, dynamic=False)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        """Take in a prompt, as the model stands."""
        self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def fill(self) -> None:
        """Random states of `length` tokens in the place of what a prompt would leave."""
        self.prefill(self.tokens.expand(-1, 4).contiguous())
        for tensor in cache_tensors(self.cache):
            tensor.normal_(std=0.1)
        self.rewind()

    def rewind(self) -> None:
        """Back to `length` tokens, so that there is room for steps again."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    @torch.no_grad()
    def run(self) -> None:
        out = self.call(input_ids=self.tokens, past_key_values=self.cache, use_cache=True)
        self.logits = out.logits[:, -1]
        self.tokens.copy_(self.logits.argmax(dim=-1, keepdim=True))
