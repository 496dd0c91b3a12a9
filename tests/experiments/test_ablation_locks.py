"""Locks of an ablation's runs: one invocation at each, and nothing left behind by the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from experiments.ablation_runs import Here, ablate, table_of

from hymba.experiments.ablation import lock
from hymba.experiments.ablation.plan import AblationError, make_plan
from hymba.experiments.ablation.runner import run_plan
from hymba.experiments.ablation.settings import load_ablation


def test_locks_are_all_or_none_and_let_go(tmp_path):
    one, other = tmp_path / "one.lock", tmp_path / "other.lock"
    with lock.Locks([other]):
        with pytest.raises(AblationError, match=rf"other\.lock: process {os.getpid()} on .* is at work"):
            lock.Locks([one, other]).__enter__()
        assert not one.exists() and other.exists()
    assert not other.exists()


@pytest.mark.parametrize("left", ["dead process", "later process", "other host, old", "half a file, old"])
def test_a_stale_lock_is_taken_over(tmp_path, left):
    path = tmp_path / "run.lock"
    holder = {"pid": os.getpid(), "host": lock.this_process().host, "started": 0, "since": "then"}
    if left == "dead process":
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        holder["pid"] = gone.pid
    elif left == "later process":
        if not lock.this_process().started:
            pytest.skip("this system does not say when a process started")
        holder["started"] = lock.this_process().started - 1
    elif left == "other host, old":
        holder["host"] = "elsewhere.example"
    path.write_text('{"pid": 3,' if "half" in left else json.dumps(holder))
    if "old" in left:
        before = time.time() - 2 * lock.STALE_SECONDS
        os.utime(path, (before, before))
    locks = lock.Locks([path])
    with locks:
        assert lock.read_holder(path) == lock.this_process() or lock.read_holder(path).pid == os.getpid()
        assert "taken over" in locks.stale[0]


@pytest.mark.parametrize("left", ["other host", "half a file"])
def test_a_lock_that_may_be_alive_is_kept(tmp_path, left):
    path = tmp_path / "run.lock"
    text = json.dumps({"pid": 1, "host": "elsewhere.example", "started": 5, "since": "then"})
    path.write_text(text if left == "other host" else text[:9])
    with pytest.raises(AblationError, match="elsewhere" if left == "other host" else "another process"):
        lock.Locks([path]).__enter__()
    assert path.exists()


def test_shards_of_one_folder_go_on_side_by_side(file, tmp_path):
    path = file()
    settings = load_ablation(path)
    plan = make_plan(settings)
    (mine,) = plan.select(["wide"])
    start = Here()
    with lock.Locks([mine.folder.with_name(f"{mine.folder.name}.lock")]):
        with pytest.raises(AblationError, match="take other runs with --only"):
            run_plan(plan, plan.units, start=start)
        assert start.started == []
        assert ablate(path, start=start, only=["hymba", "no-meta"])[0] == 0
    assert [row["status"] for row in table_of(tmp_path)["rows"]] == ["done", "done", "1 missing"]
