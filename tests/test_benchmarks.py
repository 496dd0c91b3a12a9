"""The benchmarks' arithmetic, their refusals, and toy runs on the CPU; what only a GPU can show is not tested here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hymba import HymbaConfig, cost

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON line, which has to be the last one."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# Arithmetic.


def release() -> HymbaConfig:
    return benchmark("models").hymba_config()


def test_prefill_counts_the_last_logits_only() -> None:
    roofline, config = benchmark("roofline"), release()
    moved, operations = roofline.prefill(config, 8, 8192, "bfloat16")
    cache = cost.cache_bytes(config, 8192, batch=8).total
    assert moved == 3_045_595_648 + cache
    text = cost.flops_of_text(config, 8192)
    head = 2 * 32001 * 1600
    assert text.head == 8192 * head
    # The meta tokens cost less than their 128 share of one row's tokens.
    meta = operations - 8 * (text.total - text.head + head)
    assert 0 < meta < 128 * text.total / 8192


def test_training_counts_three_forward_passes() -> None:
    config = release()
    assert benchmark("roofline").train(config, 2, 512) == (0, 6 * cost.flops_of_text(config, 512).total)


def test_a_step_reads_what_it_needs_and_writes_its_states() -> None:
    roofline, config = benchmark("roofline"), release()
    width = 2 * 5 * (64 + 128)
    globals_, windowed, owners = 3, 29, 17
    states = 32 * 3200 * (16 * 4 + 3 * 2)
    for batch, length in ((1, 512), (4, 8192)):
        seen = globals_ * length + windowed * min(length, 1025)
        moved, operations = roofline.decode(config, batch, length, "bfloat16")
        assert moved == 3_045_595_648 + batch * (seen * width + 2 * states) + owners * 128 * width
        assert operations == batch * cost.flops_per_token(config, length).total


def test_the_floor_is_what_binds() -> None:
    ceilings = benchmark("roofline").Ceilings(bytes_per_s=4e12, flops_per_s=8e14)
    assert ceilings.floor(4e12, 8e13) == 1.0
    assert ceilings.floor(4e11, 8e14) == 1.0


def test_published_parameter_counts() -> None:
    peers = benchmark("peer_models")
    for name, expected in peers.PARAMETERS.items():
        with torch.device("meta"):
            model = peers.peer_class(name)(peers.peer_config(name))
        assert sum(p.numel() for p in model.parameters()) == expected


def test_distance() -> None:
    distance = benchmark("models").distance
    one = torch.ones(4)
    assert distance([one, 1.1 * one], [one, one]) == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    assert not distance([one * float("nan")], [one]) <= 1


def test_spread() -> None:
    values = [float(i) for i in range(100)]
    assert benchmark("common").spread(values) == {"median": 49.5, "p10": 10.0, "p90": 89.0}


# Runs.


@pytest.mark.parametrize("name", ["prefill", "train", "cache", "length", "peers", "ops", "fused"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = benchmark(name).main([])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "--device cpu" in captured.err


def test_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    status = benchmark("prefill").main("--device cpu --batch 2 --length 48 --long 96 --chunk 48 --repeats 2".split())
    found = result(capsys)
    assert status == 0 and found["benchmark"] == "prefill" and found["long_over_short_per_token"] > 0
    assert [(row["kind"], row["batch"], row["length"]) for row in found["rows"]] == [
        ("prefill", 2, 48), ("in chunks", 1, 48), ("in chunks", 1, 96)
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 for row in found["rows"])


def test_no_number_when_the_check_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prefill = benchmark("prefill")
    right = prefill.one_piece
    monkeypatch.setattr(prefill, "one_piece", lambda model, ids: 1.01 * right(model, ids))
    with pytest.raises(SystemExit, match="no number"):
        prefill.main("--device cpu --length 48 --long 0".split())
    assert "tok/s" not in capsys.readouterr().out


def test_fused(capsys: pytest.CaptureFixture[str]) -> None:
    status = benchmark("fused").main("--device cpu --tokens 4 --dtype float32 --repeats 1".split())
    found = result(capsys)
    assert status == 0 and found["benchmark"] == "fused"
    assert {row["op"] for row in found["rows"]} >= {"norm", "mean of two norms", "swiglu", "rope", "loss"}
    assert all(row["relative_error"] < 2e-5 for row in found["rows"])


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    train = benchmark("train")
    assert train.main("--device cpu --shape 1x16 --repeats 1 --policy none full".split()) == 0
    rows = [(row["way"], row["policy"]) for row in result(capsys)["rows"]]
    assert rows == [(way, policy) for way in ("backward", "step") for policy in ("none", "full")]
    with pytest.raises(SystemExit, match="2"):
        train.main("--device cpu --shape 2-32".split())
    assert "--shape 2-32" in capsys.readouterr().err


def test_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("cache").main("--device cpu --batch 1 3 --length 100".split()) == 0
    rows = result(capsys)["rows"]
    assert [(row["batch"], row["static"]) for row in rows] == [(1, False), (1, True), (3, False), (3, True)]
    assert all(row["measured_bytes"] == row["computed_bytes"] for row in rows)


def test_a_cache_that_is_not_what_was_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cost.cache_bytes

    def wrong(*args: Any, **keywords: Any) -> cost.CacheBytes:
        parts = right(*args, **keywords)
        return cost.CacheBytes(**{**parts.to_dict(), "ssm": 2 * parts.ssm})

    monkeypatch.setattr(cost, "cache_bytes", wrong)
    assert benchmark("cache").main("--device cpu --batch 1 --length 50".split()) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_release_needs_a_tenth_of_the_cache_of_llama_3b() -> None:
    """The headline in bytes: 8k tokens, bfloat16, SSM states in float32."""
    peers = benchmark("peer_models")
    config = peers.peer_config("llama-3.2-3b")
    peer = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2 * 8192
    assert peer == 896 * 2**20
    for static in (False, True):
        assert peer / cost.cache_bytes(release(), 8192, static=static).total > 10.8


def test_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("length").main("--device cpu --length 32 64 --batch 1 --repeats 1".split()) == 0
    rows = result(capsys)["rows"]
    assert [(row["kind"], row["length"]) for row in rows] == [
        ("decode", 32), ("prefill", 32), ("decode", 64), ("prefill", 64)
    ]  # fmt: skip


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--device cpu --peers llama-3.2-1b falcon-h1-1.5b --work decode prefill --repeats 1"
    assert benchmark("peers").main(command.split()) == 0
    rows = result(capsys)["rows"]
    assert [row["model"] for row in rows] == 3 * ["hymba"] + 4 * ["llama-3.2-1b"] + 4 * ["falcon-h1-1.5b"]
    assert [row["batch"] for row in rows if row["model"] == "llama-3.2-1b"] == [1, 4, 2, 2]
    assert all(row["hymba_over_this"] > 0 for row in rows if row["model"] != "hymba")


def test_compiling_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("peers").main("--device cpu --peers llama-3.2-1b --compile-only".split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama-3.2-1b: built in") and "tok/s" not in out


def test_a_peers_step_gives_its_forward_pass() -> None:
    models, peers, runs = benchmark("models"), benchmark("peer_models"), benchmark("peers")
    for name in peers.PEERS:
        config = peers.peer_config(name, toy=True)
        model = models.build(config, peers.peer_class(name), device="cpu", dtype=torch.float32)
        step = peers.PeerStep(model, 2, 40, 8)
        assert runs.check_peer(model, step) < 1e-4, name


def test_batches_are_halved_and_errors_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark("peers").Rows("cpu")

    def fits_at_8(batch: int) -> dict[str, Any]:
        if batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": {"median": 1.0, "p10": 1.0, "p90": 1.0}, "tokens_per_s": float(batch)}

    def breaks(batch: int) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    assert rows.add("a", "decode", 32, 10, fits_at_8) and rows.rows[0]["batch"] == 8
    assert rows.rows[0]["too_large"] == [32, 16]
    assert not rows.add("a", "prefill", 32, 10, fits_at_8)
    assert not rows.context_lost
    assert not rows.add("b", "decode", 1, 10, breaks) and rows.context_lost
    assert "illegal memory access" in capsys.readouterr().out


def test_a_time_limit() -> None:
    import time

    peers = benchmark("peers")
    with pytest.raises(peers.TookTooLongError), peers.time_limit(1):
        time.sleep(5)

    def nested() -> None:
        with peers.time_limit(1):
            pass
        time.sleep(5)

    with pytest.raises(peers.TookTooLongError), peers.time_limit(2):
        nested()
    time.sleep(0)


# The report.

LINES = [
    {
        "benchmark": "decode", "machine": {"python": "3.12", "torch": "2.11", "device": "H200"}, "bandwidth": 4e12,
        "rows": [
            {"batch": b, "length": 8192, "mode": "fused", "tokens_per_s": 900.0 * b, "floor_ms": 0.9,
             "cache_bytes": b << 20, "step_ms": {"median": 1.1, "p10": 1.0, "p90": 1.2}, "share_of_floor": 0.8}
            for b in (1, 4, 16)
        ],
    },
    {
        "benchmark": "length", "machine": {}, "copy_bytes_per_s": 4.2e12, "matrix_flops_per_s": 7.9e14,
        "rows": [
            {"kind": "prefill", "batch": 1, "length": n, "chunk": 1024, "tokens_per_s": 1e5, "peak_bytes": 5 << 30,
             "seconds": {"median": n / 1e5, "p10": n / 1e5, "p90": n / 1e5}}
            for n in (1024, 8192)
        ],
    },
    {
        "benchmark": "peers", "machine": {},
        "rows": [
            {"model": "hymba", "work": "decode", "length": 8192, "batch": 128, "tokens_per_s": 2e4,
             "peak_bytes": 1 << 34},
            {"model": "llama-3.2-3b", "work": "decode", "length": 8192, "batch": 64, "tokens_per_s": 600.0,
             "peak_bytes": 1 << 36, "too_large": [128], "hymba_over_this": 33.3},
            {"model": "falcon-h1-1.5b", "work": "decode", "length": 8192, "error": "not done after 170 s"},
        ],
    },
]  # fmt: skip


def written(folder: Path) -> Path:
    path = folder / "results.txt"
    path.write_text("copy bandwidth 4.2 TB/s\n" + "\n".join(json.dumps(line) for line in LINES) + "\n")
    return path


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("report").main([str(written(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "### decode\n\ntorch 2.11, H200\n" in out
    assert "| fused | 16 | 8,192 | 14,400 | 1.1 (1 to 1.2) | 0.9 | 80% | 16.0 |" in out
    assert "copy 4.20 TB/s; matrix products 790 TFLOP/s" in out
    assert "| llama-3.2-3b | decode | 64 | 8,192 | 600 | 64.0 | 33.30 | out of memory at 128 |" in out
    assert "| falcon-h1-1.5b | decode |  | 8,192 |  |  |  | not done after 170 s |" in out


def test_rows_of_ops() -> None:
    row = {"op": "selective_scan", "backend": "triton", "variant": {"T": 8}, "forward": {"median": 2e-3, "p10": 1e-3,
           "p90": 3e-3}, "worst_error": 1e-5}  # fmt: skip
    attention = {"case": "window", "backend": "triton", "variant": "", "forward_of_rate": 0.43}
    text = benchmark("report").table(
        {"benchmark": "ops", "rows": [row, attention], "copy_bytes_per_second": 4.2e12, "matrix_rate": 7.9e14}
    )
    assert "| selective_scan |  | triton | T=8 | 2 (1 to 3) |  |" in text
    assert "|  | window | triton |  |  | 43% |" in text
    assert "Measured here: copy 4.20 TB/s; matrix products 790 TFLOP/s." in text


def test_the_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    assert benchmark("report").main([str(written(tmp_path)), "--output", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.{suffix}" for name in ("against_length", "against_batch", "peers") for suffix in ("png", "svg")
    )
    assert all(path.stat().st_size > 1000 for path in folder.iterdir())


def test_plots_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert benchmark("report").main([str(written(tmp_path)), "--output", str(tmp_path / "plots")]) == 1
    assert "hymba[plots]" in capsys.readouterr().err


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = benchmark("report")
    (tmp_path / "empty.txt").write_text("no line\n")
    assert report.main([str(tmp_path / "empty.txt")]) == 2
    assert report.main([str(tmp_path / "missing.txt")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_tick_labels() -> None:
    short = benchmark("report")._short
    assert [short(v) for v in (32, 1024, 131072, 1000, 10000, 2e6, 0.5)] == [
        "32",
        "1k",
        "128k",
        "1k",
        "10k",
        "2M",
        "0.5",
    ]


def test_quantization_on_a_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="pip install 'hymba[quantization]'")
    module = benchmark("quantization")
    arguments = ["--prompt", "8", "--tokens", "2", "--check", "3", "--skip-loss"]
    assert module.main(["--only", "int8", *arguments]) == 0
    row = result(capsys)
    assert row["quantised_layers"] == 20 and row["linear_layers"] == 29 and row["tokens_per_s"] > 0
    assert row["bits_per_byte"] is None and row["step_drift"] < module.DRIFT
    assert "| int8 |  | 2.3 |" in module.table([row])
    weight = torch.randn(6, 10)
    for kind, most in (("int8", 0.01), ("int4", 0.12)):
        assert 0 < float((module.rounded(weight, kind) - weight).norm() / weight.norm()) < most
    monkeypatch.setattr(module, "drift", lambda model, length: 1.0)
    with pytest.raises(SystemExit, match="differ from the forward pass by 1; no numbers"):
        module.main(["--only", "int8", *arguments])
