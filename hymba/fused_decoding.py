"""A decode step in few kernels over plain weights: what `DecodeStep` runs when nothing is in the way.

A batch of one runs seven kernels per layer, every product with what surrounds it. More rows run cuBLAS products with
seven kernels around them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.cache import HymbaCache
from hymba.nn import HymbaBlock, rope_tables
from hymba.ops.triton.decode import conv_update
from hymba.ops.triton.decode_attention import decode_attention
from hymba.ops.triton.decode_mamba import mamba_step
from hymba.ops.triton.decode_rows import gate_rows, norm_rows
from hymba.ops.triton.gemv import gemv

if TYPE_CHECKING:
    from hymba.model import HymbaForCausalLM


class FusedStep:
    """One decode step over fixed addresses.

    Args:
        model: a model that `why_not_fused` has nothing against.
        cache: a static cache that holds a prompt; `seen` has one entry per row.
        tokens: (b,) int64, read. active: (b,) bool, read: rows at rest keep their state.
        logits: (b, vocab) float32, written.
    """

    def __init__(
        self, model: HymbaForCausalLM, cache: HymbaCache, *, tokens: Tensor, active: Tensor, logits: Tensor
    ) -> None:
        config, dtype, device, rows = model.config, model.dtype, tokens.device, tokens.shape[0]
        self.model, self.cache, self.rows = model, cache, rows
        self.tokens, self.active, self.logits = tokens, active, logits
        assert cache.max_length is not None
        positions = torch.arange(cache.max_length, device=device)[None] + config.num_memory_tokens
        cos, sin = rope_tables(positions, head_dim=config.head_dim, base=config.rope_base)
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        self.scanned = torch.empty(rows, config.d_inner, dtype=dtype, device=device)
        # Rows of whole vectors, which an odd vocabulary is not.
        wide = -(-config.vocab_size // 64) * 64
        self.scores = torch.empty(rows, wide, dtype=dtype, device=device)[:, : config.vocab_size]
        self.count = torch.zeros(rows * config.num_key_value_heads, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Take in `tokens`, leave `logits`; the caller moves `cache.seen` on."""
        body = self.model.model
        x = F.embedding(self.tokens, body.embed_tokens.weight)
        single = self.rows == 1
        for i in range(len(body.layers)):
            x = self._single_row_layer(i, x) if single else self._rows_layer(i, x)
        head, norm = self.model.lm_head, body.final_norm
        if single:
            gemv(x, head.weight, norm=norm.weight, eps=norm.eps, out=self.logits)
        else:
            torch.mm(norm_rows(x, norm.weight, eps=norm.eps), head.weight.T, out=self.scores)
            self.logits.copy_(self.scores)

    def _attend(self, i: int, parts: tuple[Tensor, ...]) -> Tensor:
        """Attention of layer i on its split projection, (b, d_inner)."""
        lender = self.model.model.lenders[i]
        lending = self.cache.layers[i if lender is None else lender]
        assert lending.kv is not None and lending.kv.keys is not None and lending.kv.values is not None
        assert self.cache.seen is not None
        block = self.model.model.layers[i]
        assert isinstance(block, HymbaBlock)
        k, v = (parts[1], parts[2]) if lender is None else (None, None)
        return decode_attention(
            parts[0], k, v, keys=lending.kv.keys, values=lending.kv.values, position=self.cache.seen,
            cos=self.cos, sin=self.sin, window=block.mixer.attention.window, count=self.count,
            prefix_k=lending.prefix_k, prefix_v=lending.prefix_v, valid=self.active,
        )  # fmt: skip

    def _scan(self, i: int, u: Tensor, z: Tensor, low: Tensor, conv: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """State update of layer i, (b, d_inner)."""
        block, state = self.model.model.layers[i], self.cache.layers[i]
        assert isinstance(block, HymbaBlock) and state.ssm is not None
        mamba = block.mixer.mamba
        return mamba_step(
            u, z, low, conv=conv, dt_weight=mamba.dt_proj.weight, dt_bias=mamba.dt_bias, A_log=mamba.A_log, D=mamba.D,
            dt_norm=mamba.dt_norm.weight, b_norm=mamba.B_norm.weight, c_norm=mamba.C_norm.weight,
            ssm_state=state.ssm, eps=mamba.dt_norm.eps, out=self.scanned, valid=self.active,
        )  # fmt: skip

    def _single_row_layer(self, i: int, x: Tensor) -> Tensor:
        """Seven launches, whose order `early` and the state update's loads rely on; x is overwritten."""
        block, state = self.model.model.layers[i], self.cache.layers[i]
        assert isinstance(block, HymbaBlock) and state.conv is not None
        mixer, mamba, mlp = block.mixer, block.mixer.mamba, block.mlp
        parts = gemv(
            x, mixer.in_proj.weight, norm=block.input_norm.weight, eps=block.input_norm.eps, bias=mixer.in_proj.bias
        ).split(mixer.splits, dim=-1)
        attended = self._attend(i, parts)
        conv = (mamba.conv1d.weight[:, 0], mamba.conv1d.bias, state.conv)
        low = gemv(parts[-2], mamba.x_proj.weight, conv=conv, early=True)
        scanned = self._scan(i, parts[-2], parts[-1], low, conv)
        gemv(
            attended, mixer.out_proj.weight, norm=mixer.attention_norm.weight, eps=mixer.attention_norm.eps,
            merge=(scanned, mixer.mamba_norm.weight), bias=mixer.out_proj.bias, add_to=x, early=True,
        )  # fmt: skip
        if mlp is not None and block.ffn_norm is not None:
            gate = None if mlp.gate_proj is None else mlp.gate_proj.weight
            inner = gemv(
                x, mlp.up_proj.weight, norm=block.ffn_norm.weight, eps=block.ffn_norm.eps, gate=gate, relu2=gate is None
            )
            gemv(inner, mlp.down_proj.weight, add_to=x)
        return x

    def _rows_layer(self, i: int, x: Tensor) -> Tensor:
        """cuBLAS for the products, seven launches around them; x is overwritten."""
        block, state = self.model.model.layers[i], self.cache.layers[i]
        assert isinstance(block, HymbaBlock) and state.conv is not None
        mixer, mamba, mlp = block.mixer, block.mixer.mamba, block.mlp
        normed = norm_rows(x, block.input_norm.weight, eps=block.input_norm.eps)
        parts = F.linear(normed, mixer.in_proj.weight, mixer.in_proj.bias).split(mixer.splits, dim=-1)
        u = conv_update(state.conv, parts[-2], mamba.conv1d.weight[:, 0], mamba.conv1d.bias, self.active, silu=True)
        scanned = self._scan(i, u, parts[-1], F.linear(u, mamba.x_proj.weight), None)
        attended = self._attend(i, parts)
        merged = norm_rows(
            attended, mixer.attention_norm.weight, eps=mixer.attention_norm.eps,
            merge=(scanned, mixer.mamba_norm.weight),
        )  # fmt: skip
        x.addmm_(merged, mixer.out_proj.weight.T)
        if mixer.out_proj.bias is not None:
            x += mixer.out_proj.bias
        if mlp is not None and block.ffn_norm is not None:
            normed = norm_rows(x, block.ffn_norm.weight, eps=block.ffn_norm.eps)
            gate = None if mlp.gate_proj is None else F.linear(normed, mlp.gate_proj.weight)
            inner = gate_rows(F.linear(normed, mlp.up_proj.weight), gate)
            x.addmm_(inner, mlp.down_proj.weight.T)
        return x
