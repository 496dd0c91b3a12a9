"""Folders that are either complete or absent: written under a temporary name, sealed, renamed.

A checkpoint is complete when its seal (a list of its files with their sizes, written last) agrees with what
is there. A process killed while writing leaves a folder under the temporary name, which nothing ever reads.
The seal has checksums too: what a run resumes from is read and compared first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEAL = "complete.json"
_STAGING = ".writing-"
_RETIRED = ".replaced-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class OutputError(OSError):
    """The output folder cannot take what has to be written; earlier checkpoints are untouched."""


def seal(folder: Path) -> None:
    """Write the list of all files under ``folder`` with sizes and checksums, and push everything to the disk."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    for name in files:
        _sync(folder / name)
    checksums = {name: _checksum(folder / name) for name in files}
    write_text(folder / SEAL, json.dumps({"files": files, "crc32": checksums}, indent=1))
    _sync(folder)


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` has a seal and every file in it has the size that the seal names."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, its files read whole; None when nothing is."""
    if not is_complete(folder):
        return "incomplete: a file is missing or has another size"
    try:
        # A seal of an earlier version has no checksums.
        checksums = json.loads((folder / SEAL).read_text(encoding="utf-8")).get("crc32", {})
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                return f"damaged: {name} is not what was written"
    except OSError as error:
        return f"unreadable: {error}"
    return None


def discard_damaged(output: Path) -> list[str]:
    """Delete the checkpoints newer than the newest that is whole; a line for each, which names what is wrong."""
    lines = []
    found = [(step, path) for path in _folders(output) if (step := checkpoint_step(path)) is not None]
    for _, path in sorted(found, reverse=True):
        problem = damage(path)
        if problem is None:
            break
        shutil.rmtree(path, ignore_errors=True)
        lines.append(f"{path.name} is {problem}")
    return lines


def _folders(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if path.is_dir()] if output.is_dir() else []


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def checkpoint_step(folder: Path) -> int | None:
    """The step of a folder called ``checkpoint-<step>``, or None."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def complete_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoint folders under ``output``, oldest step first."""
    found = [(checkpoint_step(path), path) for path in _folders(output)]
    return [path for step, path in sorted((s, p) for s, p in found if s is not None) if is_complete(path)]


def rotate(output: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest complete checkpoints, and broken ones older than those."""
    kept = complete_checkpoints(output)[-keep:]
    newest = checkpoint_step(kept[-1]) if kept else None
    for path in output.iterdir():
        step = checkpoint_step(path)
        if step is not None and newest is not None and path not in kept and step <= newest:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def written_folder(
    target: Path, *, sealed: bool = True, main: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Give a temporary folder beside ``target``; on leaving, put it in ``target``'s place.

    If anything fails, the temporary folder is removed and an existing ``target`` stays.

    Args:
        target: the folder to write.
        sealed: add a seal; without one, folders that only the rename protects (nothing resumes from them).
        main: whether this process makes and renames the folder; every process may write files into it.
        wait: a barrier between processes.

    Raises:
        OutputError: the write failed for want of space or permission; names the folder and the space left.
    """
    staging = target.parent / f"{_STAGING}{target.name}"
    try:
        with write_failures(target):
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            wait()
            yield staging
            wait()
            if main:
                if sealed:
                    seal(staging)
                replace_folder(staging, target)
            wait()
    except BaseException:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def write_failures(target: Path) -> Iterator[None]:
    """Turn the file system's refusal to write into an :class:`OutputError` that names ``target`` and the space."""
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise OutputError(
            f"{target}: could not be written: {error}; {free_space(target)}. Earlier checkpoints are untouched: "
            "make room or choose another folder, and run the same command again"
        ) from error


def replace_folder(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; an existing ``target`` is moved aside first and deleted after."""
    retired = None
    if target.exists():
        retired = target.parent / f"{_RETIRED}{target.name}-{uuid.uuid4().hex[:8]}"
        target.rename(retired)
    try:
        staging.rename(target)
    except OSError:
        if retired is not None:
            retired.rename(target)
        raise
    _sync(target.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Remove what a killed process left under temporary names, and put back a folder it had moved aside."""
    if not output.is_dir():
        return
    for path in list(output.iterdir()):
        if path.name.startswith(_RETIRED):
            target = path.parent / path.name[len(_RETIRED) :].rpartition("-")[0]
            if not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_STAGING):
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, push it to the disk, rename it."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_output(output: Path, needed: int) -> None:
    """Create ``output`` and make sure that it can be written to and has ``needed`` bytes left.

    Raises:
        OutputError: with the reason and what to do.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f"{_STAGING}probe-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(bytes(4096))
        _sync(probe)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"run.output = {str(output)!r}: cannot be written to: {error.strerror or error}; choose another folder"
        ) from error
    free = shutil.disk_usage(output).free
    if free < needed:
        raise OutputError(
            f"run.output = {str(output)!r}: the checkpoints of this run take {_mb(needed)} and {_mb(free)} are free; "
            "make room, lower run.keep_checkpoints or choose another folder"
        )


def free_space(path: Path) -> str:
    """``<n> MB are free there``, for a path that may not exist yet."""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    return f"{_mb(shutil.disk_usage(folder).free)} are free there"


def is_write_failure(error: BaseException) -> bool:
    """Whether an exception is the file system refusing a write.

    torch and safetensors wrap the system's error in types of their own, so their text is read too.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    if isinstance(error, OSError):
        return not isinstance(error, OutputError) and error.errno in codes
    text = f"{type(error).__name__}: {error}"
    phrases = (
        "No space left",
        "Disk quota",
        "File too large",
        "iostream error",
        "PytorchStreamWriter",
        "Io(Os",
    )
    return isinstance(error, Exception) and any(phrase in text for phrase in phrases)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; a rename is only safe after it. Folders cannot be opened on Windows."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file or no whole object in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
