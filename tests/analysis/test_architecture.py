"""The figures of an architecture show what the model runs on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, small_config, some_ids
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch
from typer.testing import CliRunner

from hymba import HymbaCache, cost
from hymba.analysis import drawings
from hymba.analysis.architecture import HIDDEN, META, TEXT, layer_memory, mask_cells, masks
from hymba.cli import app


def by_hand(window: int | None, tokens: int, meta: int, documents: list[int]) -> list[list[int]]:
    number = [i for i, length in enumerate(documents) for _ in range(length)]
    return [
        [META] * meta
        + [
            TEXT if k <= q and (window is None or q - k <= window) and number[q] == number[k] else HIDDEN
            for k in range(tokens)
        ]
        for q in range(tokens)
    ]


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("documents", [[13], [5, 8], [1, 11, 1]])
def test_masks_by_hand(window: int | None, documents: list[int]) -> None:
    given = None if len(documents) == 1 else documents
    found = mask_cells(window, tokens=13, meta=3, documents=given)
    assert found.tolist() == by_hand(window, 13, 3, documents)


def test_masks_are_where_a_model_attends() -> None:
    config = small_config()
    model = build(config)
    with torch.no_grad():
        attentions = model(some_ids(1, 17), output_attentions=True, use_cache=False).attentions
    for mask in masks(config, tokens=17):
        for layer in mask.layers:
            attended = attentions[layer][0].amax(0) > 0
            assert torch.equal(attended, mask.cells != HIDDEN), f"layer {layer}"


def test_masks_of_the_kinds_of_a_configuration() -> None:
    config = small_config(num_hidden_layers=4, global_attn_idx=[0, 3])
    assert [(mask.window, mask.layers, mask.meta) for mask in masks(config)] == [(None, (0, 3), 3), (5, (1, 2), 3)]
    assert masks(config)[0].cells.shape == (24, 27)


def test_large_masks_are_thinned_out() -> None:
    config = small_config(num_memory_tokens=128, sliding_window=1024, max_position_embeddings=4096)
    everywhere, windowed = masks(config)
    assert windowed.stride == 14 and windowed.cells.shape == (220, 230) and windowed.meta_columns == 10
    whole = mask_cells(1024, tokens=3072)
    assert torch.equal(windowed.cells[:, 10:], whole[::14, ::14])
    assert (everywhere.cells[-1] != HIDDEN).all()


def test_documents_have_to_add_up() -> None:
    with pytest.raises(ValueError, match=r"documents=\[3, 4\]: allowed: lengths from 1 that add up to tokens=8"):
        mask_cells(None, tokens=8, documents=[3, 4])


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_map_adds_up_to_the_cache(length: int, dtype: str) -> None:
    pattern = [
        {"mixer": "hybrid", "window": 5},
        {"mixer": "hybrid", "window": 5, "kv_from": "previous"},
        {"mixer": "mamba", "ssm": "mamba2", "ssm_head_dim": 8},
        {"mixer": "attention", "kv_heads": 1},
    ]
    for config in (small_config(), _patterned(pattern)):
        layers = layer_memory(config, length, dtype=dtype)
        held = cost.cache_bytes(config, length, dtype=dtype)
        assert sum(layer.text_bytes for layer in layers) == held.global_kv + held.windowed_kv
        assert sum(layer.meta_bytes for layer in layers) == held.meta_kv
        assert sum(layer.state_bytes for layer in layers) == held.conv + held.ssm
        assert [layer.kv_from for layer in layers] == [spec.kv_from for spec in config.layers]
        own = [state.kv is not None for state in HymbaCache(config).layers]
        assert [layer.text_bytes > 0 for layer in layers] == own


def _patterned(pattern: list[dict[str, Any]]) -> Any:
    return small_config(
        layer_pattern=pattern, num_hidden_layers=len(pattern), sliding_window=None, global_attn_idx=None,
        kv_reuse_group=None,
    )  # fmt: skip


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='int7': allowed: float32, bfloat16, float16"):
        layer_memory(small_config(), 8, dtype="int7")


# What is drawn.


def test_every_cell_is_drawn() -> None:
    shown = masks(small_config(), tokens=10)
    figure = drawings.draw_masks(shown, documents=[4, 6])
    expected = [mask.cells for mask in shown] + [mask_cells(5, tokens=10, meta=3, documents=[4, 6])]
    kinds = {drawings.ATTENTION: TEXT, drawings.META: META}
    for panel, cells in zip(figure.axes, expected, strict=True):
        (runs,) = (item for item in panel.collections if isinstance(item, PolyCollection))
        drawn = torch.full_like(cells, -1)
        for path, color in zip(runs.get_paths(), runs.get_facecolors(), strict=True):
            (left, top), (right, bottom) = path.vertices.min(0), path.vertices.max(0)
            drawn[int(top) : int(bottom), int(left) : int(right)] = kinds.get(to_hex(color), HIDDEN)
        assert torch.equal(drawn, cells)


def test_every_loan_is_an_arrow() -> None:
    config = small_config(num_hidden_layers=6, global_attn_idx=[0], kv_reuse_group=[[1, 2, 3], [4, 5]])
    figure = drawings.draw_layers(layer_memory(config, 100), length=100)
    top, bars = figure.axes
    arrows = [patch for patch in top.patches if isinstance(patch, FancyArrowPatch)]
    ends = sorted((arrow._posA_posB[0][0], arrow._posA_posB[1][0]) for arrow in arrows)
    assert ends == [(1, 2), (1, 3), (4, 5)]
    # Nothing is cut off, and the legends squeeze no panel.
    figure.draw_without_rendering()
    for arrow in arrows:
        assert arrow.get_path().vertices[:, 1].max() <= top.get_ylim()[1]
    assert bars.get_position().width > 0.8
    drawn = sum(bar.get_height() for bar in bars.patches) * 2**20
    assert drawn == pytest.approx(cost.cache_bytes(config, 100).total)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_memory_tokens": 0, "sliding_window": None, "global_attn_idx": None, "kv_reuse_group": None},
        {"kv_reuse_group": [[0], [1, 2]][1:], "num_key_value_heads": 4},
    ],
)
def test_the_hybrid_head_names_its_widths(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    texts = [text.get_text() for text in drawings.draw_hybrid_head(config).axes[0].texts]
    kv = config.num_key_value_heads
    assert {"q\n16", f"k\n{4 * kv}", f"v\n{8 * kv}", "SSM input\n32", "gate\n32", "out_proj from 32"} <= set(texts)
    state = [text.get_text() for text in drawings.draw_state(config).axes[0].texts]
    assert f"{config.num_memory_tokens} meta tokens" in state


def test_figures_are_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        drawings.write_figures(small_config(), tmp_path / name, length=64)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{figure}.{kind}" for figure in ("hybrid-head", "layers", "masks") for kind in ("png", "svg")]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_inspect_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _patterned([{"mixer": "mamba"}, {"mixer": "mamba", "ffn": False}]).save_pretrained(tmp_path / "model")
    options = ["inspect", "--model", str(tmp_path / "model"), "--json", "--figures", str(tmp_path / "figures")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"][1]["mixer"] == "mamba"
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"layers.png", "layers.svg"}
    assert f"written: {tmp_path / 'figures' / 'layers.svg'}" in done.stderr

    for module in ("matplotlib", "hymba.analysis.drawings"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    assert done.stderr == "error: --figures needs matplotlib: pip install 'hymba[plots]'\n"
