"""`hymba inspect` and `hymba env`: a configuration's numbers, and what this machine can run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from commands.running import hymba
from safetensors.torch import load_file

from hymba import HymbaConfig, HymbaForCausalLM, cost
from hymba.commands.inspect import layer_map
from hymba.layout import LayerSpec, released_layers


def test_inspect_needs_nothing_but_the_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    config = HymbaConfig.from_pretrained(folder)
    args = ["inspect", "-m", tmp_path, "--length", 100, "--batch-size", 3]
    facts = json.loads(hymba(*args, "--json", "--cache-implementation", "static", "--dtype", "float16").stdout)
    model = HymbaForCausalLM.from_pretrained(folder)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["weight_bytes"] == 2 * facts["parameters"]["total"]
    held = cost.cache_bytes(config, 100, batch=3, dtype="float16", static=True)
    assert facts["cache_bytes"] == {"total": held.total, **held.to_dict()}
    peak = facts["peak_bytes"]
    assert peak["generation"] > facts["weight_bytes"] + held.total
    assert peak["training_step_none"] > peak["training_step_selective"] > peak["training_step_full"]
    assert facts["flops_per_token"]["total"] == cost.flops_per_token(config, 100).total
    assert facts["layers"][2] == {"layer": 2, "mixer": "hybrid", "window": 16, "kv_from": 1, "ffn": True}
    assert facts["config"]["hidden_size"] == 32
    page = hymba(*args).stdout
    for part in (
        f"{facts['parameters']['total']:,} parameters",
        "float32",
        "1-2     hybrid  the last 16     1 has them, 2 borrows",
        f"{cost.flops_per_token(config, 100).total:,}",
        f"{cost.cache_bytes(config, 100, batch=3, dtype='float32').total:,}",
        "100 text tokens, 3 rows, float32, dynamic",
    ):
        assert part in page, part


def test_inspect_of_quantised_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    held = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    args = ["inspect", "-m", tmp_path, "--dtype", "bfloat16"]
    facts = json.loads(hymba(*args, "--json").stdout)
    assert (facts["weight_bytes"], facts["quantization"]) == (held, "torchao")
    assert list(facts["peak_bytes"]) == ["generation"] and facts["peak_bytes"]["generation"] > held
    assert f"quantised (torchao): {held:,} bytes, bfloat16 around them" in hymba(*args).stdout
    (tmp_path / "model.safetensors").unlink()
    assert json.loads(hymba(*args, "--json").stdout)["weight_bytes"] is None
    assert "a size that only its files say" in " ".join(hymba(*args).stdout.split())


def test_layer_maps() -> None:
    def lists(**options: Any) -> list[str]:
        given = {"window": 8, "global_layers": None, "kv_groups": None, "kv_every": None, **options}
        return [f"{row[0]}: {row[2]}, {row[3]}" for row in layer_map(released_layers(6, **given))]

    assert lists() == ["0-5: the last 8, own"]
    assert lists(window=None, kv_every=4) == [
        "0-3: all tokens, 0 has them, 1, 2 and 3 borrow",
        "4-5: all tokens, 4 has them, 5 borrows",
    ]
    assert lists(global_layers=[0, 2], kv_groups=[[1, 3]]) == [
        "0: all tokens, own",
        "1: the last 8, own, lent to 3",
        "2: all tokens, own",
        "3: the last 8, borrowed from 1",
        "4-5: the last 8, own",
    ]
    assert layer_map((LayerSpec(mixer="other"),)) == [("0", "other", "all tokens", "own")]


def test_env_names_versions_and_backends() -> None:
    facts = json.loads(hymba("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert any(row["op"] == "selective_scan" and row["usable"] for row in facts["backends"])
    page = hymba("env").stdout
    assert "selective_scan" in page
    assert torch.__version__ in page
