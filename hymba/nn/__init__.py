"""Building blocks, each usable alone with keyword arguments."""

from hymba.nn.attention import AttentionHeads, Collected, SharedKV
from hymba.nn.block import HymbaBlock
from hymba.nn.hybrid import MIXERS, AttentionMixer, HybridHeads, MambaMixer
from hymba.nn.mamba import MambaHeads
from hymba.nn.mamba2 import GroupedRMSNorm, Mamba2Heads
from hymba.nn.meta import MetaTokens, PrefixRun, run_prefix
from hymba.nn.mlp import MLP
from hymba.nn.norm import HeadNorm, RMSNorm, rms_norm
from hymba.nn.rope import apply_rope, rope_tables
from hymba.nn.state import KVState, LayerState, Span

__all__ = [
    "MIXERS",
    "MLP",
    "AttentionHeads",
    "AttentionMixer",
    "Collected",
    "GroupedRMSNorm",
    "HeadNorm",
    "HybridHeads",
    "HymbaBlock",
    "KVState",
    "LayerState",
    "Mamba2Heads",
    "MambaHeads",
    "MambaMixer",
    "MetaTokens",
    "PrefixRun",
    "RMSNorm",
    "SharedKV",
    "Span",
    "apply_rope",
    "rms_norm",
    "rope_tables",
    "run_prefix",
]
