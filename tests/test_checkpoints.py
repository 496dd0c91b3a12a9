"""Checkpoints: the released layout in both directions, and nothing lost when saving is interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, largest, small_config, some_ids, through_cache
from safetensors.torch import load_file
from tolerances import BFLOAT16
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

import hymba.saving
from hymba import HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.hub import CheckpointError, our_name, released_name

PARITY = Path(__file__).parent / "parity"
GOLDEN = sorted(path for path in (PARITY / "golden").iterdir() if path.is_dir())


@pytest.fixture
def model() -> Any:
    return build(dtype=torch.float32)


def _same(a: Any, b: Any) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name


def _edit(folder: Path, **fields: Any) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | fields))


# The released layout.


def _release() -> HymbaConfig:
    pairs = [[i, i + 1] for i in [*range(1, 15, 2), *range(19, 31, 2)]]
    return HymbaConfig(global_attn_idx=[0, 15, 31], kv_reuse_group=[*pairs[:7], [16, 17, 18], *pairs[7:]])


def test_the_release_has_exactly_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes that `save_pretrained` writes for the 1.5B configuration, without its numbers."""
    with torch.device("meta"):
        model = HymbaForCausalLM(_release())
    written: dict[str, list[int]] = {}

    def note(tensors: dict[str, torch.Tensor], path: Any, metadata: Any = None) -> None:
        written.update({name: list(tensor.shape) for name, tensor in tensors.items()})
        Path(path).touch()

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", note)
    model.save_pretrained(tmp_path)
    stored = json.loads((PARITY / "hymba-1.5b-tensors.json").read_text())
    assert len(stored) == 611 and written == stored
    assert sum(p.numel() for p in model.parameters()) == 1_522_797_824


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_what_the_reference_wrote_comes_back(folder: Path, tmp_path: Path) -> None:
    """Names, bits and configuration of the reference's own files, through our model and back."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    # The file names code beside it, which is not saved, and says bfloat16 of float32 tensors.
    changed = {"auto_map", "torch_dtype", "transformers_version"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: after[k] for k in before.keys() - changed}
    assert after["torch_dtype"] == "float32"
    assert "auto_map" not in after


def test_the_name_table_is_exact_in_both_directions() -> None:
    for fields in (
        {},
        {"kq_norm": "rms"},
        {"mlp_hidden_act": "relu2", "mamba_proj_bias": True, "num_memory_tokens": 0},
    ):
        names = list(build(**fields).state_dict())
        released = [released_name(name) for name in names]
        assert len(set(released)) == len(names)
        assert [our_name(name) for name in released] == names
        assert not any("mixer" in name or name.endswith(("dt_bias", "A_log")) for name in released)


def test_shards(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(map(our_name, index["weight_map"])) == set(model.state_dict()) - {"lm_head.weight"}
    _same(HymbaForCausalLM.from_pretrained(tmp_path), model)
    _same(HymbaModel.from_pretrained(tmp_path), model.model)


def test_the_bare_model(model: Any, tmp_path: Path) -> None:
    """Saved without its head it loads as either class; an untied head is missed by name."""
    model.model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    _same(HymbaModel.from_pretrained(tmp_path), model.model)
    _same(HymbaForCausalLM.from_pretrained(tmp_path), model)
    _edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing"):
        HymbaForCausalLM.from_pretrained(tmp_path)
    untied = build(tie_word_embeddings=False, dtype=torch.float32)
    untied.save_pretrained(tmp_path)
    _same(HymbaModel.from_pretrained(tmp_path), untied.model)
    _same(HymbaForCausalLM.from_pretrained(tmp_path), untied)


def test_dtypes(model: Any, tmp_path: Path) -> None:
    """The file's dtypes hold in memory and on save, whatever config.json says; `dtype=` converts."""
    mixed = build(dtype=torch.bfloat16)
    for name, parameter in mixed.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "conv1d.weight", "meta_tokens.weight")):
            parameter.data = parameter.data.float()
    mixed.save_pretrained(tmp_path)
    for claimed in ("bfloat16", "float16", "float32"):
        _edit(tmp_path, torch_dtype=claimed)
        loaded = HymbaForCausalLM.from_pretrained(tmp_path)
        _same(loaded, mixed)
        _same(HymbaForCausalLM.from_pretrained(tmp_path, dtype="auto"), mixed)
    loaded.save_pretrained(tmp_path / "again")
    again, first = load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(again[name].dtype == first[name].dtype for name in first)
    ids = some_ids(1, 8)
    assert torch.equal(loaded(ids).logits, mixed(ids).logits)
    parts = through_cache(loaded, ids, [5, 1, 2])
    scale = float(parts.std())
    assert largest(parts / scale, loaded(ids).logits / scale) <= BFLOAT16
    for keyword in ("dtype", "torch_dtype"):
        for dtype in (torch.float32, "float32"):
            converted = HymbaForCausalLM.from_pretrained(tmp_path, **{keyword: dtype})
            assert {p.dtype for p in converted.parameters()} == {torch.float32}
            assert converted.dtype == torch.float32


def test_ablations_over_trained_weights(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for load in (HymbaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        changed = load(tmp_path, sliding_window=2, global_attn_idx=[0, 3])
        assert [spec.window for spec in changed.config.layers] == [None, 2, 2, None]
        want = build(sliding_window=2, global_attn_idx=[0, 3], dtype=torch.float32)
        assert torch.equal(changed(some_ids(1, 20)).logits, want(some_ids(1, 20)).logits)
        assert load(tmp_path, sliding_window=None).config.sliding_window is None
    changed.save_pretrained(tmp_path / "ablated")
    assert HymbaConfig.from_pretrained(tmp_path / "ablated").sliding_window == 2
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mamba\.x_proj\.0\.weight in model\.safetensors: expected shape"
    ):
        HymbaForCausalLM.from_pretrained(tmp_path, mamba_d_state=5)


def test_fields_that_nobody_knows_are_kept(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.save_pretrained(tmp_path)
    _edit(tmp_path, lab_notes={"run": 7}, swish=True)
    with caplog.at_level("WARNING"), _propagating():
        loaded = HymbaForCausalLM.from_pretrained(tmp_path)
    warned = [record.message for record in caplog.records if "does not know" in record.message]
    assert len(warned) == 1 and "lab_notes, swish" in warned[0]
    loaded.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert stored["lab_notes"] == {"run": 7} and stored["swish"] is True


def _propagating() -> Any:
    """transformers' loggers do not reach the root logger, where pytest listens."""
    import contextlib
    import logging

    @contextlib.contextmanager
    def manager() -> Any:
        found = [logging.getLogger(name) for name in ("transformers", "hymba")]
        before = [logger.propagate for logger in found]
        for logger in found:
            logger.propagate = True
        yield
        for logger, value in zip(found, before, strict=True):
            logger.propagate = value

    return manager()


def test_the_published_configuration_loads_untouched(tmp_path: Path) -> None:
    """Its attention names, string keys, `use_cache: false` and remote code fight transformers, and lose."""
    published = json.loads((GOLDEN[-1] / "config.json").read_text()) | {
        "conv_dim": {str(i): 64 for i in range(8)},
        "layer_type": ["h"] * 8,
        "use_cache": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    for config in (HymbaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert config.use_cache
        assert config._attn_implementation in (None, "sdpa", "eager")
        config.save_pretrained(tmp_path / "again")
        stored = json.loads((tmp_path / "again" / "config.json").read_text())
        assert stored["attn_implementation"] == stored["attn_implementation_new"] == "flex"
        assert stored["conv_dim"] == published["conv_dim"]
        assert "rope_parameters" not in stored and "dtype" not in stored


def test_linked_remote_code_stays_linked(tmp_path: Path) -> None:
    config = small_config(auto_map={"AutoConfig": "nvidia/some--configuration_hymba.HymbaConfig"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == config.auto_map


def test_variants(model: Any, tmp_path: Path) -> None:
    """Files of a variant stand beside the others, in one file or in shards."""
    other = build(seed=5, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for size in ("5GB", "20KB"):
        other.save_pretrained(tmp_path, variant="half", max_shard_size=size)
        _same(HymbaForCausalLM.from_pretrained(tmp_path, variant="half"), other)
        _same(HymbaForCausalLM.from_pretrained(tmp_path), model)
    assert not (tmp_path / "model.half.safetensors").exists(), "the shards replace the single file"


def test_fresh_weights_follow_the_table() -> None:
    torch.manual_seed(0)
    model = HymbaForCausalLM(small_config(hidden_size=64, initializer_range=0.05))
    mamba = model.model.layers[0].mixer.mamba
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 5.0).expand_as(mamba.A_log))
    assert torch.equal(mamba.D, torch.ones_like(mamba.D))
    steps = torch.nn.functional.softplus(mamba.dt_bias)
    assert steps.min().item() > 9e-4 and steps.max().item() < 0.11
    assert model.model.layers[0].mixer.in_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert model.model.meta_tokens.weight.std().item() == pytest.approx(1.0, rel=0.2)
    assert not any(p.isnan().any() for p in model.parameters())


def test_other_ways_to_load(model: Any, tmp_path: Path) -> None:
    """A state dict in hand, loading information, a configuration object, a subfolder, attention by name."""
    model.save_pretrained(tmp_path / "sub")
    loaded = HymbaForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    _same(loaded, model)
    loaded, info = HymbaForCausalLM.from_pretrained(tmp_path / "sub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    _same(loaded, model)
    eager = HymbaForCausalLM.from_pretrained(tmp_path / "sub", attn_implementation="eager")
    assert eager.model.layers[0].mixer.attention.implementation == "eager"
    assert largest(eager(some_ids(1, 9)).logits, model(some_ids(1, 9)).logits) <= 1e-4
    config = HymbaConfig.from_pretrained(tmp_path / "sub", sliding_window=3)
    assert HymbaForCausalLM.from_pretrained(tmp_path / "sub", config=config).config.sliding_window == 3
    state = load_file(tmp_path / "sub" / "model.safetensors")
    _same(HymbaForCausalLM.from_pretrained(None, config=model.config, state_dict=state), model)


# Saving, interrupted.


def test_saving_over_the_files_that_parameters_are_mapped_from(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = HymbaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.model.layers[1].mixer.mamba.D.add_(1.0)
    want = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path)
    _same(HymbaForCausalLM.from_pretrained(tmp_path), loaded)
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())


def test_other_files_stay_and_stale_weights_go(model: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "model.bf16.safetensors").write_bytes(b"of another variant")
    (tmp_path / "model_card.safetensors").write_bytes(b"of nobody")
    kept = set(os.listdir(tmp_path))
    for size in ("20KB", "5GB", "9KB", "20KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        _same(HymbaForCausalLM.from_pretrained(tmp_path), model)
        single = (tmp_path / "model.safetensors").exists()
        assert single == (size == "5GB")
        assert (tmp_path / "model.safetensors.index.json").exists() != single
        names = set(os.listdir(tmp_path))
        assert kept <= names
        assert not [name for name in names if name.startswith(".")]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("model-*")}


def test_a_full_disk_leaves_the_previous_checkpoint(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "model"
    other = build(seed=4, dtype=torch.float32)

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(folder)
    assert not (tmp_path / "new").exists(), "a folder that never came to be"
    model.save_pretrained(folder, max_shard_size="20KB")
    before = sorted(os.listdir(folder))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == before
    _same(HymbaForCausalLM.from_pretrained(folder), model)


def test_a_file_in_the_way(model: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"save_directory='.*taken' is a file; allowed: a folder"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_unwritable_folder(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def _save_and_die(model: Any, folder: Path, size: str, step: int) -> bool:
    """Save in a process that kills itself before its n-th write, move or removal; whether it got that far."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def before(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return before

    try:
        modeling_utils.safe_save_file = counted(modeling_utils.safe_save_file)
        for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "write_text"), (Path, "mkdir")):
            setattr(owner, name, counted(getattr(owner, name)))
        model.save_pretrained(folder, max_shard_size=size)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("before", "after"), [("20KB", "9KB"), ("20KB", "5GB"), ("5GB", "20KB"), ("5GB", "5GB")])
def test_kill_9_at_every_step_of_saving(before: str, after: str, tmp_path: Path) -> None:
    """Before the moment of change the old checkpoint loads, after it the new one; never a mixture."""
    old = build(dtype=torch.float32)
    new = build(seed=4, num_hidden_layers=3, dtype=torch.float32)
    seen = ""
    for step in range(1, 99):
        folder = tmp_path / str(step)
        old.save_pretrained(folder, max_shard_size=before)
        killed = _save_and_die(new, folder, after, step)
        loaded = HymbaForCausalLM.from_pretrained(folder)
        which = "o" if loaded.config.num_hidden_layers == 4 else "n"
        _same(loaded, old if which == "o" else new)
        # The next save cleans up, whatever was left.
        new.save_pretrained(folder, max_shard_size=after)
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        _same(HymbaForCausalLM.from_pretrained(folder), new)
        if not killed:
            break
        seen += which
    assert which == "n" and "no" not in seen and seen.count("o") >= 3 and seen.count("n") >= 3, seen


def test_moves_that_cannot_be_finished_are_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hymba.saving, "finish", lambda folder: None)
        model.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match=r"interrupted .* make the folder writable"):
            HymbaForCausalLM.from_pretrained(tmp_path)
    _same(HymbaForCausalLM.from_pretrained(tmp_path), model)


def test_control_c_while_saving(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))

    def interrupted(tensors: Any, path: Any, metadata: Any = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(seed=4, dtype=torch.float32).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    _same(HymbaForCausalLM.from_pretrained(tmp_path), model)


def test_the_golden_folder_is_only_read() -> None:
    """Loading writes nothing beside the checkpoint."""
    before = {path: path.stat().st_mtime_ns for path in GOLDEN[0].iterdir()}
    HymbaForCausalLM.from_pretrained(GOLDEN[0])
    assert {path: path.stat().st_mtime_ns for path in GOLDEN[0].iterdir()} == before


# The hub's cache.


def _in_hub_cache(model: Any, cache: Path, **options: Any) -> Path:
    """A repository as the hub's client keeps it: a snapshot that the branch points to."""
    repository = cache / "models--lab--tiny-hymba"
    snapshot = repository / "snapshots" / ("c" * 40)
    model.save_pretrained(snapshot, **options)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    return snapshot


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_hub_id(model: Any, tmp_path: Path, size: str) -> None:
    """Checked like a folder, without the network once it is in the cache."""
    snapshot = _in_hub_cache(model, tmp_path, max_shard_size=size)
    for load in (HymbaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load("lab/tiny-hymba", cache_dir=tmp_path, sliding_window=2)
        _same(loaded, model)
        assert loaded.config.sliding_window == 2
    for file in sorted(snapshot.glob("*.safetensors"))[:1]:
        data = file.read_bytes()
        file.write_bytes(data[:-4])
        with pytest.raises(CheckpointError, match=rf"{file.name}: truncated: expected {len(data)} bytes"):
            AutoModelForCausalLM.from_pretrained("lab/tiny-hymba", cache_dir=tmp_path)
        file.unlink()
        with pytest.raises((CheckpointError, OSError), match=r"tiny-hymba"):
            HymbaForCausalLM.from_pretrained("lab/tiny-hymba", cache_dir=tmp_path)


def test_an_unknown_hub_id(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="lab/nothing-here"):
        HymbaForCausalLM.from_pretrained("lab/nothing-here", cache_dir=tmp_path)


def test_pushing_names_the_folder_that_the_user_gave(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def recorded(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        calls.append({"folder": Path(folder), **kwargs})
        Path(folder, "model.safetensors").write_text("x")

    monkeypatch.setattr(modeling_utils.PreTrainedModel, "save_pretrained", recorded)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    model.save_pretrained(str(tmp_path / "mine"), push_to_hub=True, repo_id="lab/theirs")
    assert [call["repo_id"] for call in calls] == ["mine", "lab/theirs"]
    assert sorted(os.listdir(tmp_path / "mine")) == ["model.safetensors"]
    # Every process writes its part of a distributed checkpoint straight into the folder.
    model.save_pretrained(tmp_path / "mine", distributed_checkpoint=True)
    assert calls[-1]["folder"] == tmp_path / "mine"
