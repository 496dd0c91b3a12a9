"""Tokenizer, rows of token ids, optimizer groups, schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hymba import HymbaConfig, HymbaForCausalLM
from hymba.experiments.optimization import build_optimizer, build_scheduler, decays, parameter_groups, wsd
from hymba.experiments.packing import IGNORED, TokenRows, collate
from hymba.experiments.settings import OptimizerSettings, ScheduleSettings, SettingsError, TokenizerSettings
from hymba.experiments.tokenizer import build_tokenizer, encode_documents, train_tokenizer

TEXTS = [
    "def first(self, value):\n    return value + 1\n\n\n",
    "class Second:\n    def __init__(self):\n        self.x_y = {'a': 1}\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_every_text_comes_back(tokenizer):
    for text in [*TEXTS[:2], "tabs\t\r\n  é 漢字 \x00 \U0001f600", " ", "a  b   c\n\n\n"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_space_belongs_to_what_stands_before_it(tokenizer):
    prompt, whole = tokenizer("def ").input_ids, tokenizer("def first(").input_ids
    assert whole[: len(prompt)] == prompt


def test_training_a_tokenizer_repeats(tokenizer):
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 300


def test_a_tokenizer_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    loaded = build_tokenizer(TokenizerSettings(path=str(tmp_path / "tok")), [])
    assert loaded(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "tok").padding_side == "left"
    with pytest.raises(SettingsError, match=r"tokenizer.path = .*absent': no such folder"):
        build_tokenizer(TokenizerSettings(path=str(tmp_path / "absent")), [])
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingsError, match="no tokenizer can be read there"):
        build_tokenizer(TokenizerSettings(path=str(tmp_path / "none")), [])
    tokenizer.eos_token, before = None, tokenizer.eos_token
    tokenizer.save_pretrained(str(tmp_path / "endless"))
    tokenizer.eos_token = before
    with pytest.raises(SettingsError, match="eos_token_id is not set"):
        build_tokenizer(TokenizerSettings(path=str(tmp_path / "endless")), [])


def test_documents_have_both_ends(tokenizer):
    ids = encode_documents(tokenizer, ["def f", ""])
    assert ids[1] == [1, 2]
    assert (ids[0][0], ids[0][-1]) == (1, 2)


DOCUMENTS = [[1, *range(10 * i, 10 * i + n), 2] for i, n in ((1, 3), (2, 9), (3, 1), (4, 6), (5, 14))]


def rows(layout="packed", **changes):
    options = {"length": 8, "rows": 12, "seed": 3, "layout": layout, **changes}
    return TokenRows(DOCUMENTS, **options)


def test_a_pass_holds_each_token_once():
    one = rows("stream", rows=5)
    assert one.rows_per_pass == 5
    seen = torch.cat([one[i]["input_ids"] for i in range(5)]).tolist()
    stream = [token for document in DOCUMENTS for token in document]
    assert len(seen) == 40
    assert all(seen.count(token) <= stream.count(token) for token in set(seen))


def test_rows_depend_on_seed_and_place_alone():
    first, again = rows(), rows()
    # Read in another order, over a pass's border and back: what a resumed run does.
    order = [11, 4, 0, 7, 4]
    for i in order:
        assert torch.equal(first[i]["input_ids"], again[i]["input_ids"])
    assert not all(torch.equal(rows()[i]["input_ids"], rows(seed=4)[i]["input_ids"]) for i in range(5))
    assert not torch.equal(
        torch.cat([first[i]["input_ids"] for i in range(5)]), torch.cat([first[i]["input_ids"] for i in range(5, 10)])
    )
    assert len(first) == 12
    assert first.passes == 12 / 5
    with pytest.raises(IndexError):
        first[12]


def test_packed_rows_mark_their_documents():
    batch = collate([rows()[i] for i in range(5)])
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(batch, (5, 8))
    for row in range(5):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        positions, documents = batch["position_ids"][row], batch["seq_idx"][row]
        starts = positions == 0
        assert starts[0]
        assert torch.equal(starts[1:], ids[1:] == 1)
        assert torch.equal(documents.long(), starts.long().cumsum(0) - 1)
        assert torch.equal(labels == IGNORED, starts)
        assert torch.equal(labels[~starts], ids[~starts])
        for i in range(1, 8):
            assert positions[i] == (0 if starts[i] else positions[i - 1] + 1)
    assert set(rows("stream")[0]) == {"input_ids", "labels"}


def test_wide_vocabularies_and_short_corpora():
    wide = TokenRows([[1, 70000, 2] * 4], length=4, rows=1, seed=0, layout="stream")
    assert int(wide[0]["input_ids"].max()) == 70000
    with pytest.raises(ValueError, match=r"data.sequence_length = 99: .* only 43 tokens"):
        rows(length=99)


CONFIG = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_memory_tokens": 3, "sliding_window": 8, "global_attn_idx": [0],
    "mamba_d_state": 4, "kq_norm": "rms", "mamba_proj_bias": True, "rope_type": "default",
}  # fmt: skip


def test_what_weight_decay_leaves_alone():
    model = HymbaForCausalLM(HymbaConfig(**CONFIG))
    decayed = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    kept = {name for name, _ in model.named_parameters()} - decayed
    for part in ("A_log", "D", "dt_bias", "bias", "meta_tokens", "norm"):
        assert any(part in name for name in kept), part
        assert not any(part in name.split(".") for name in decayed), part
    assert not any("norm" in name for name in decayed)
    assert all(name.endswith("weight") for name in decayed)
    for part in ("embed_tokens", "in_proj", "out_proj", "x_proj", "dt_proj", "conv1d", "gate_proj", "down_proj"):
        assert any(part in name for name in decayed), part
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    model.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 0


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_the_schedule(shape):
    factor = wsd(ScheduleSettings(warmup=0.1, decay=0.3, floor=0.05, shape=shape), 100)
    values = [factor(step) for step in range(100)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10:70] == [1.0] * 60
    assert all(np.diff(values[69:]) < 0)
    assert values[-1] == pytest.approx(0.05)
    assert factor(150) == pytest.approx(0.05)


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_schedules_at_the_limits(warmup, decay):
    for steps in (1, 2, 7):
        factor = wsd(ScheduleSettings(warmup=warmup, decay=decay, floor=0.1), steps)
        assert all(0 < factor(step) <= 1 for step in range(steps))


def test_optimizer_and_scheduler_follow_the_settings():
    model = HymbaForCausalLM(HymbaConfig(**CONFIG))
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=0.5, betas=(0.8, 0.7), eps=1e-6))
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    scheduler = build_scheduler(optimizer, ScheduleSettings(warmup=0.5, decay=0.0), 4)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.5, 0.5]
