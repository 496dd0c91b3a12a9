"""What researchers assume of a transformers model, beyond `generate`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    VOCAB,
    alone,
    assert_same_gradients,
    build,
    gradients,
    largest,
    pad,
    randomise,
    relative,
    small_config,
    some_ids,
)  # fmt: skip
from tolerances import FLOAT32, FLOAT64, FLOAT64_GRADIENT, FLOAT64_LOGITS
from torch import Tensor
from transformers import AutoModel, DataCollatorWithFlattening, Trainer, TrainingArguments

from hymba import HymbaCache, HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.nn import Collected, LayerState, Span, run_prefix


@pytest.fixture
def model() -> Any:
    return build()


def _padded() -> tuple[Tensor, Tensor]:
    ids, mask = pad([some_ids(1, n, seed=n)[0] for n in (9, 4, 13)])
    mask[2, 5] = 0
    return ids, mask


# Inputs and outputs.


def test_logits_are_float32_whatever_the_weights_are() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = build(dtype=dtype)(some_ids(1, 4))
        assert out.logits.dtype == torch.float32
        assert out.logits.shape == (1, 4, VOCAB)


def test_inputs_embeds_equal_ids(model: Any) -> None:
    ids, mask = _padded()
    embeds = model.get_input_embeddings()(ids)
    for extra in ({}, {"attention_mask": mask}, {"use_cache": False}):
        assert torch.equal(model(inputs_embeds=embeds, **extra).logits, model(ids, **extra).logits)
    wanted = embeds.detach().requires_grad_()
    model(inputs_embeds=wanted, labels=ids).loss.backward()
    assert wanted.grad.abs().sum(dim=(1, 2)).all()


def test_logits_to_keep(model: Any) -> None:
    ids, mask = _padded()
    want = model(ids, attention_mask=mask).logits
    for kept, expected in ((0, want), (1, want[:, -1:]), (4, want[:, -4:]), (99, want)):
        assert largest(model(ids, attention_mask=mask, logits_to_keep=kept).logits, expected) <= FLOAT64_LOGITS
    index = torch.tensor([0, 12, 3])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=index).logits, want[:, index])
    with pytest.raises(ValueError, match="logits_to_keep=-1"):
        model(ids, logits_to_keep=-1)


@pytest.mark.parametrize("cached", [False, True])
def test_hidden_states(model: Any, cached: bool) -> None:
    """One row per text token: the embedding, then after each layer, the last one behind the final norm."""
    ids, mask = _padded()
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=cached)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    embedded = model.model.embed_tokens(ids) * mask[..., None]
    assert torch.equal(out.hidden_states[0], embedded)
    inner = model.model(ids, attention_mask=mask, use_cache=False)
    assert largest(out.hidden_states[-1], inner.last_hidden_state) <= FLOAT64
    assert inner.hidden_states is None
    for row in range(len(ids)):
        single = model(ids[row][mask[row] == 1][None], output_hidden_states=True, use_cache=False).hidden_states
        for a, b in zip(out.hidden_states, single, strict=True):
            assert largest(a[row, mask[row] == 1], b[0]) <= FLOAT64
    model.config.output_hidden_states = True
    assert model(ids).hidden_states is not None


def test_tuples(model: Any) -> None:
    ids = some_ids(1, 4)
    out = model(ids, labels=ids, return_dict=False)
    assert isinstance(out, tuple) and out[0].dim() == 0 and out[1].shape == (1, 4, VOCAB)
    assert isinstance(model.model(ids, return_dict=False), tuple)


# Attention weights.


def _prepended(model: Any, ids: Tensor) -> list[Tensor]:
    """Attention weights (heads, m + l, m + l) per layer of one row from the definition: meta tokens as plain tokens."""
    inner = model.model
    x = inner.embed_tokens(ids[None])
    if inner.meta_tokens is not None:
        x = torch.cat([inner.meta_tokens()[None], x], dim=1)
    meta, length = model.config.num_memory_tokens, x.shape[1]
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    weights, shared = [], {}
    for i, (spec, layer) in enumerate(zip(model.config.layers, inner.layers, strict=True)):
        allowed = k <= q
        if spec.window is not None:
            allowed = allowed & ((q - k <= spec.window) | (k < meta))
        mixer = layer.mixer
        # The layer as it is, its mask replaced by the definition's.
        span = Span.following(length, device=ids.device)
        collected = Collected()
        h = layer.input_norm(x)
        heads, *own, u, z = mixer.in_proj(h).split(mixer.splits, dim=-1)
        state = LayerState()
        if spec.kv_from is None:
            kv = mixer.attention.keys_and_values(own[0], own[1], None, span=span)
            shared[i] = kv
        kv = shared[i if spec.kv_from is None else spec.kv_from]
        kv.visibility._dense = allowed[None]
        attended = mixer.attention(heads, kv, span=span, weights=collected)
        scanned = mixer.mamba(u, z, state, span=span)
        x = x + mixer.out_proj((mixer.attention_norm(attended) + mixer.mamba_norm(scanned)) / 2)
        x = x + layer.mlp(layer.ffn_norm(x))
        weights.append(collected.tensors[0][0])
    assert largest(inner.final_norm(x)[:, meta:], inner(ids[None], use_cache=False).last_hidden_state) <= FLOAT64
    return weights


@pytest.mark.parametrize("way", ["forward", "position_ids", "one call with a cache", "chunks", "static chunks"])
def test_attention_weights(model: Any, way: str) -> None:
    """(b, heads, l, meta + columns) per layer: those of the prepended form, by input column, padding empty."""
    ids, mask = _padded()
    meta, length = model.config.num_memory_tokens, ids.shape[1]
    options: dict[str, Any] = {"attention_mask": mask, "output_attentions": True}
    if way == "forward":
        found = model(ids, use_cache=False, **options).attentions
    elif way == "position_ids":
        # As generate(use_cache=False) sends them.
        found = model(ids, use_cache=False, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options).attentions
    elif way == "one call with a cache":
        found = model(ids, use_cache=True, **options).attentions
    else:
        cache = HymbaCache(model.config, max_length=length + 2 if way == "static chunks" else None)
        parts = []
        for first, last in ((0, 6), (6, 7), (7, 12), (12, 13)):
            out = model(
                ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, output_attentions=True
            ).attentions
            parts.append([torch.nn.functional.pad(w, (0, length - last)) for w in out])
        found = [torch.cat(layer, dim=2) for layer in zip(*parts, strict=True)]
    for row in range(len(ids)):
        real = (mask[row] == 1).nonzero().flatten()
        columns = torch.cat([torch.arange(meta), real + meta])
        for layer, want in enumerate(_prepended(model, ids[row, real])):
            weights = found[layer][row]
            assert weights.shape == (model.config.num_attention_heads, length, meta + length)
            assert largest(weights[:, real][:, :, columns], want[:, meta:]) <= FLOAT64
            assert not weights[:, mask[row] == 0].any(), "a padded query sees nothing"
            assert not weights[:, :, meta:][:, :, mask[row] == 0].any(), "nobody sees padding"


def test_attention_weights_of_packed_rows(model: Any) -> None:
    documents = [some_ids(1, n, seed=n)[0] for n in (5, 8, 3)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    meta = model.config.num_memory_tokens
    for wide, mask in ((ids, None), (torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1), 4)):
        extra: dict[str, Any] = {"position_ids": positions}
        if mask:
            extra["position_ids"] = torch.cat([torch.zeros(1, mask, dtype=torch.long), positions], dim=1)
            extra["attention_mask"] = torch.cat([torch.zeros(1, mask), torch.ones_like(ids)], dim=1)
        found = model(wide, output_attentions=True, use_cache=False, **extra).attentions
        at = mask or 0
        for document in documents:
            end = at + len(document)
            for layer, want in enumerate(_prepended(model, document)):
                weights = found[layer][0][:, at:end]
                assert largest(weights[:, :, :meta], want[:, meta:, :meta]) <= FLOAT64
                assert largest(weights[:, :, meta + at : meta + end], want[:, meta:, meta:]) <= FLOAT64
                assert largest(weights.sum(-1), torch.ones(4, len(document), dtype=torch.float64)) <= 1e-6
            at = end


# Loss.


def test_labels_and_items_in_batch(model: Any) -> None:
    ids, mask = _padded()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    shifted = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), shifted, reduction="none")
    count = int((shifted != -100).sum())
    assert out.loss.item() == pytest.approx(losses.sum().item() / count, rel=1e-6)
    for items in (7, torch.tensor(7)):
        scaled = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
        assert scaled.item() == pytest.approx(losses.sum().item() / 7, rel=1e-6)
    shift = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    again = model(ids, attention_mask=mask, labels=labels, shift_labels=shift).loss
    assert float(again) == pytest.approx(float(out.loss), rel=1e-6)


# Size of the vocabulary.


def test_resize_token_embeddings(model: Any, tmp_path: Path) -> None:
    for tied in (True, False):
        model = build(tie_word_embeddings=tied, dtype=torch.float32)
        ids = some_ids(1, 6)
        want = model(ids).logits
        model.resize_token_embeddings(VOCAB + 7)
        assert model.config.vocab_size == VOCAB + 7
        # A product of another width may add in another order.
        assert largest(model(ids).logits[..., :VOCAB], want) <= FLOAT32
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model(torch.tensor([[VOCAB + 6]]), labels=torch.tensor([[VOCAB + 6]]))
        with pytest.raises(ValueError, match=f"allowed: 0 to {VOCAB + 6}"):
            model(torch.tensor([[VOCAB + 7]]))
        model.save_pretrained(tmp_path / str(tied))
        loaded = HymbaForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        model.resize_token_embeddings(VOCAB)
        assert torch.equal(model(ids).logits, want)


# Training.


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_gradient_checkpointing(kind: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of the name, which is the one that 5.17 has
    model = build(attention_dropout=0.0).train()
    ids, mask = _padded()
    extra: dict[str, Any] = {"labels": ids}
    if kind == "padded":
        extra["attention_mask"] = mask
    if kind == "packed":
        extra["position_ids"] = torch.arange(ids.shape[1]).remainder(5).expand_as(ids)
    model(ids, **extra).loss.backward()
    expected = gradients(model)
    seen = []
    hooks = [layer.mixer.register_forward_hook(lambda *_: seen.append(1)) for layer in model.model.layers]
    model.gradient_checkpointing_enable()
    model(ids, **extra).loss.backward()
    assert_same_gradients(gradients(model), expected, FLOAT64_GRADIENT)
    # The meta tokens once, the text twice.
    assert len(seen) == 3 * model.config.num_hidden_layers
    # A cache is written once, although the layers run twice.
    out = model(ids, use_cache=True, **{k: v for k, v in extra.items() if k != "position_ids"})
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == ids.shape[1]
    found = gradients(model)
    if kind != "packed":
        assert_same_gradients(found, expected, FLOAT64_GRADIENT)
    for hook in hooks:
        hook.remove()
    model.gradient_checkpointing_disable()
    seen.clear()
    model.gradient_checkpointing_enable(every_n_layers=2)
    hooks = [layer.mixer.register_forward_hook(lambda *_: seen.append(1)) for layer in model.model.layers]
    model(ids, **extra).loss.backward()
    assert_same_gradients(gradients(model), expected, FLOAT64_GRADIENT)
    assert len(seen) == 2.5 * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_dropout_is_for_training() -> None:
    model = build(attention_dropout=0.5)
    ids = some_ids(1, 20)
    want = build()(ids).logits
    assert torch.equal(model(ids).logits, want)
    model.train()
    assert largest(model(ids).logits, want) > 1e-3


def test_autocast() -> None:
    """bfloat16 products on float32 parameters; the scan, the norms and the states stay in float32."""
    model = build(dtype=torch.float32)
    ids, mask = _padded()
    want = model(ids, attention_mask=mask, labels=ids)
    want.loss.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert float(out.loss) == pytest.approx(float(want.loss), rel=0.02)
    found = gradients(model)
    assert all(g.dtype == torch.float32 for g in found.values())
    scale = torch.cat([g.flatten() for g in expected.values()])
    assert relative(torch.cat([found[n].flatten() for n in expected]), scale) < 0.1
    assert all(state.ssm.dtype == torch.float32 for state in out.past_key_values.layers)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = HymbaCache(model.config)
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
        whole = model(ids, use_cache=False).logits
        generated = model.generate(ids[:1], max_new_tokens=3)
    assert generated.shape == (1, 16)
    scale = float(whole.std())
    assert largest(torch.cat(parts, dim=1) / scale, whole / scale) < 0.12


def test_frozen_parts_train_the_rest() -> None:
    """Soft prompts: only the meta tokens learn."""
    model = build(dtype=torch.float32).train()
    model.requires_grad_(False)
    model.model.meta_tokens.requires_grad_(True)
    ids = some_ids(2, 9)
    before = float(model(ids, labels=ids).loss)
    optimizer = torch.optim.Adam([model.model.meta_tokens.weight], lr=0.05)
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < before - 0.05


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index].tolist(), "labels": self.rows[index].tolist()}


def _arguments(folder: Path, **extra: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, seed=1, **extra,
    )  # fmt: skip


def test_trainer(tmp_path: Path) -> None:
    """Trains, evaluates and saves; gradient accumulation gives the loss of the whole batch."""
    rows = _Rows([some_ids(1, 12, seed=n)[0] for n in range(8)])

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    losses = []
    for accumulate in (1, 2):
        model = build(dtype=torch.float32)
        trainer = Trainer(
            model, _arguments(tmp_path, gradient_accumulation_steps=accumulate, gradient_checkpointing=accumulate == 2),
            train_dataset=rows, eval_dataset=rows, data_collator=collate,
        )  # fmt: skip
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged[-1] < logged[0]
        losses.append(logged[0])
        assert trainer.evaluate()["eval_loss"] < logged[0]
    assert losses[0] == pytest.approx(losses[1], rel=0.5)
    trainer.save_model(str(tmp_path / "final"))
    again = HymbaForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in again.named_parameters())


def test_trainer_with_the_padding_free_collator(tmp_path: Path) -> None:
    """What transformers' own collator sends gives the loss and gradient of the documents apart."""
    rows = [some_ids(1, n, seed=n)[0] for n in (7, 12, 3, 9)]
    items = [_Rows(rows)[i] for i in range(4)]
    model = build().train()
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        batch = DataCollatorWithFlattening(**options)(items)
        assert batch["input_ids"].shape == (1, 31)
        model(**batch, num_items_in_batch=27).loss.backward()
        found = gradients(model)
        for row in rows:
            model(row[None], labels=row[None], num_items_in_batch=27).loss.backward()
        # Loss and logits are float32.
        assert_same_gradients(found, gradients(model), 1e-5)
    trainer = Trainer(
        build(dtype=torch.float32), _arguments(tmp_path), train_dataset=_Rows(rows),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    )  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]


# Where parameters live.


def _with_borrowing() -> HymbaConfig:
    return small_config(num_hidden_layers=6, kv_reuse_group=[[1, 2, 4], [3, 5]], tie_word_embeddings=False)


@pytest.mark.parametrize("elsewhere", ["disk", "cpu offload hooks"])
def test_offloading_with_a_borrowing_layer_elsewhere(tmp_path: Path, elsewhere: str) -> None:
    """Layers on disk or behind accelerate's hooks, lenders and borrowers apart: same outputs, caches, weights seen."""
    model = build(_with_borrowing(), dtype=torch.float32)
    ids, mask = _padded()
    want = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    if elsewhere == "disk":
        model.save_pretrained(tmp_path / "model")
        places = {"model.embed_tokens": "cpu", "model.meta_tokens": "cpu", "model.final_norm": "cpu", "lm_head": "disk"}
        places |= {f"model.layers.{i}": "disk" if i in (2, 3) else "cpu" for i in range(6)}
        spread = HymbaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert spread.model.layers[2].mixer.in_proj.weight.is_meta
    else:
        from accelerate import cpu_offload

        spread = build(_with_borrowing(), dtype=torch.float32)
        cpu_offload(spread, execution_device=torch.device("cpu"))
    out = spread(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert largest(out.logits, want.logits) <= FLOAT32
    for a, b in zip(out.attentions, want.attentions, strict=True):
        assert largest(a, b) <= FLOAT32
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "use_cache": False}):
        again = spread.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None, **options)
        assert torch.equal(again, tokens)


def test_device_map_auto(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = HymbaForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(some_ids(1, 9)).logits, model(some_ids(1, 9)).logits)


def test_layers_on_two_devices() -> None:
    """Shapes only, on devices without arithmetic: what a layer hands to another one follows it."""
    from accelerate import dispatch_model

    model = build(_with_borrowing(), dtype=torch.float32).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = [f"model.layers.{i}" for i in range(6)]
        places += ["model.embed_tokens", "model.meta_tokens", "model.final_norm", "lm_head"]
        dispatch_model(model, dict.fromkeys(places, "meta"), main_device="meta", force_hooks=True)
    assert model(torch.zeros(2, 7, dtype=torch.long, device="meta")).logits.shape == (2, 7, VOCAB)


# Compilation.


@pytest.mark.parametrize("training", [False, True])
def test_compile_whole(training: bool) -> None:
    """One graph, without a cache: the forward has no host sync and no control flow on values."""
    layers = {"num_hidden_layers": 2, "global_attn_idx": None, "kv_reuse_group": [[0, 1]]}
    model = build(**layers, dtype=torch.float32).train(training)
    ids, mask = _padded()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.set_grad_enabled(training):
        found = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
        want = model(ids, attention_mask=mask, labels=ids, use_cache=False)
        assert largest(found.logits, want.logits) <= FLOAT32
        if training:
            found.loss.backward()
            grads = gradients(model)
            want.loss.backward()
            assert_same_gradients(grads, gradients(model), 1e-4)


# Blocks and hooks.


def test_each_branch_is_a_modules_output(model: Any) -> None:
    """Forward hooks see both branches before fusion, and changing them changes the model."""
    ids = some_ids(2, 8)
    want = model(ids, use_cache=False).logits
    seen: dict[str, Tensor] = {}
    mixer = model.model.layers[1].mixer
    hooks = [
        branch.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name, branch in (("attention", mixer.attention), ("mamba", mixer.mamba))
    ]
    model(ids, use_cache=False)
    assert seen["attention"].shape == seen["mamba"].shape == (2, 8, model.config.d_inner)
    for hook in hooks:
        hook.remove()
    for branch in (mixer.attention, mixer.mamba):
        with branch.register_forward_hook(lambda m, a, out: torch.zeros_like(out)):
            assert largest(model(ids, use_cache=False).logits, want) > 1e-3


def test_prepended_form(model: Any) -> None:
    """Meta tokens as an initial state are the prepended form exactly; `_prepended` asserts it."""
    for fields in (
        {},
        {"num_memory_tokens": 0},
        {"sliding_window": None},
        {"kq_norm": "rms", "mlp_hidden_act": "relu2"},
    ):
        _prepended(build(**fields), some_ids(1, 19)[0])
    states, hidden = run_prefix(model.model.layers, model.model.meta_tokens(), lenders=model.model.lenders)
    assert len(states) == 4 and len(hidden) == 5
    assert states[0].prefix == model.config.num_memory_tokens and states[2].prefix_k is None


def test_every_tensor_matters() -> None:
    """The test models notice a change in any parameter: otherwise a fault could hide in one."""
    for fields in (
        {"mamba_proj_bias": True, "kq_norm": "rms", "tie_word_embeddings": False},
        {"kq_norm": "perhead-rms", "mlp_hidden_act": "relu2"},
    ):
        model = build(**fields)
        ids = some_ids(2, 15)
        want = model(ids).logits
        for name, parameter in model.named_parameters():
            if name.endswith("layers.2.mixer.attention.k_norm.weight"):
                continue  # a borrowing layer's, as in the release's layout
            with torch.no_grad():
                # One element, a small step.
                index = tuple(size // 2 for size in parameter.shape)
                parameter[index] += 0.1
                if name.endswith("embed_tokens.weight"):
                    parameter[ids[0, 3]] += 0.1
                assert largest(model(ids).logits, want) > 1e-5, name
                if name.endswith("embed_tokens.weight"):
                    parameter[ids[0, 3]] -= 0.1
                parameter[index] -= 0.1


def test_auto_model(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    inner = AutoModel.from_pretrained(tmp_path)
    assert type(inner) is HymbaModel
    ids = some_ids(1, 5)
    assert torch.equal(inner(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hymba"
    randomise(inner, seed=3)
    assert largest(alone(build(dtype=torch.float32), ids)[0], model(ids).logits[0]) == 0
