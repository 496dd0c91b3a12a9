"""Small checkpoints with tokenizers of the two kinds that matter: the release's, and byte-level BPE."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from helpers import randomise
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hymba import HymbaConfig, HymbaForCausalLM

# Pairs that merge, in order; ".<" lets an answer's last character share a token with the marker of the next turn.
_MERGES = "e|x ex|t ext|r extr|a U|s Us|e Use|r .|< ▁|< ▁|H l|l ▁H|e ▁He|ll ▁Hell|o H|e He|ll Hell|o"


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As the release's: BPE with byte fallback, a space put before the first word, bos added, no newline piece."""
    merges = [tuple(pair.split("|")) for pair in _MERGES.split()]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [c for c in string.printable if not c.isspace()]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which two newlines make one token, with `<|end|>` as bos and eos and no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<|end|>", *alphabet, "ĊĊ", "de", "def", "Ġ:"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("d", "e"), ("de", "f"), ("Ġ", ":")]))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| ?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", eos_token="<|end|>")


def tiny_model(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> HymbaForCausalLM:
    """Four layers, two of them global, a window shorter than a turn, and weights in which every tensor matters."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_memory_tokens": 4,
        "sliding_window": 16,
        "global_attn_idx": [0, 3],
        "kv_reuse_group": [[1, 2]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    model = HymbaForCausalLM(HymbaConfig(**{**shape, **fields})).eval()
    randomise(model)
    return model


def tiny_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **fields: Any) -> Path:
    """A folder with model and tokenizer."""
    tokenizer = llama_tokenizer() if tokenizer is None else tokenizer
    tiny_model(tokenizer, **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
