"""Folders are complete or absent, whatever interrupts the writing."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from hymba.experiments import checkpoints
from hymba.experiments.checkpoints import OutputError


def checkpoint(output, step, text="weights"):
    target = output / f"checkpoint-{step}"
    with checkpoints.written_folder(target) as folder:
        (folder / "model").write_text(text)
    return target


def test_complete_checkpoints_in_order_of_steps(tmp_path):
    assert checkpoints.complete_checkpoints(tmp_path / "absent") == []
    made = [checkpoint(tmp_path, step) for step in (9, 100, 20)]
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-500").mkdir()
    assert checkpoints.complete_checkpoints(tmp_path) == [made[0], made[2], made[1]]
    assert checkpoints.checkpoint_step(tmp_path / "final") is None


@pytest.mark.parametrize("damage", ["unsealed", "truncated", "missing", "half a seal"])
def test_a_damaged_checkpoint_is_never_picked(tmp_path, damage):
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    if damage == "unsealed":
        (bad / checkpoints.SEAL).unlink()
    elif damage == "truncated":
        (bad / "model").write_text("weig")
    elif damage == "missing":
        (bad / "model").unlink()
    else:
        (bad / checkpoints.SEAL).write_text('{"files": {"mod')
    assert checkpoints.complete_checkpoints(tmp_path) == [good]


def test_an_exception_leaves_the_folder_that_was_there(tmp_path):
    target = checkpoint(tmp_path, 1, "old")

    def write_half():
        with checkpoints.written_folder(target) as folder:
            (folder / "model").write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert (target / "model").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint(tmp_path, 1, "new") == target
    assert (target / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, error):
    good = checkpoint(tmp_path, 1)

    def write():
        with checkpoints.written_folder(tmp_path / "checkpoint-2"):
            raise error

    with pytest.raises(OutputError, match=r"checkpoint-2: could not be written: .* MB are free there.*untouched"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = checkpoint(tmp_path, 1, "old")
    real = type(target).rename

    def rename(self, to):
        if self.name.startswith(".writing-"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(self, to)

    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(OutputError, match="Permission denied"):
        checkpoint(tmp_path, 1, "new")
    assert (target / "model").read_text() == "old"


def test_leftovers_of_a_killed_process(tmp_path):
    checkpoints.clear_leftovers(tmp_path / "absent")
    kept = checkpoint(tmp_path, 1)
    (tmp_path / ".writing-checkpoint-2").mkdir()
    moved = tmp_path / ".replaced-final-0a1b2c3d"
    shutil.copytree(kept, moved)
    superseded = tmp_path / ".replaced-checkpoint-1-0a1b2c3d"
    shutil.copytree(kept, superseded)
    checkpoints.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "final"]


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "final").mkdir()
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "final"]


def test_the_output_is_checked_before_anything_is_computed(tmp_path, monkeypatch):
    checkpoints.check_output(tmp_path / "new" / "folder", needed=0)
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(OutputError, match=r"run.output = .* take .* MB and .* MB are free; make room"):
        checkpoints.check_output(tmp_path, needed=1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"run.output = .*file/x': cannot be written to: Not a directory"):
        checkpoints.check_output(tmp_path / "file" / "x", needed=0)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(OutputError, match="Permission denied; choose another folder"):
        checkpoints.check_output(tmp_path, needed=0)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permissions hold nobody back here: root, or a system without them; the test above refuses in their place",
)
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            checkpoints.check_output(tmp_path / "x", needed=0)
    finally:
        tmp_path.chmod(0o700)


def test_write_text_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoints.write_text(path, "one")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write_text(path, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "one"


def test_a_changed_byte_is_found_and_the_checkpoint_before_taken(tmp_path):
    good, bad, broken = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    (bad / "model").write_text("weighty")
    (broken / checkpoints.SEAL).unlink()
    assert checkpoints.complete_checkpoints(tmp_path) == [good, bad]
    assert checkpoints.damage(good) is None
    assert checkpoints.discard_damaged(tmp_path) == [
        "checkpoint-3 is incomplete: a file is missing or has another size",
        "checkpoint-2 is damaged: model is not what was written",
    ]
    assert checkpoints.complete_checkpoints(tmp_path) == [good]
    assert not bad.exists() and not broken.exists()
    assert checkpoints.discard_damaged(tmp_path / "absent") == []


def test_a_seal_without_checksums_is_trusted(tmp_path):
    old = checkpoint(tmp_path, 1)
    written = json.loads((old / checkpoints.SEAL).read_text())
    (old / checkpoints.SEAL).write_text(json.dumps({"files": written["files"]}))
    assert checkpoints.damage(old) is None
