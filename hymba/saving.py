"""A checkpoint folder that goes from one complete state to the next, whatever happens in between.

New files are written into a hidden folder inside the target. When they are complete, that folder gets its final name,
which is the moment of the change, and its files are moved over the old ones. A process that dies before leaves the
old checkpoint alone; one that dies during the moves leaves them for `finish`, which loading and saving call first.
A file is replaced, never written over: parameters may be mapped from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_WRITING = ".saving-"
_COMPLETE = ".saved"
_LIST = "files.json"
_WEIGHTS = re.compile(r"(model|adapter_model)(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"(model|adapter_model)\.safetensors\.index(?:\.([^.]+))?\.json")


def _weights_of(name: str) -> tuple[str, str | None] | None:
    """Which weights a file belongs to (model or adapter, variant); `None` for other files."""
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return None if match is None else (match[1], match[2])


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files into; they take their place in `folder` together, when the block ends without an error.

    Weight files of the same kind and variant that are not among them (shards of an earlier save, a single file that
    shards replace) are removed; other files stay.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the folder cannot be written, or the disk is full; what it held is as it was.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save_directory={str(folder)!r} is a file; allowed: a folder, or a free name")
    missing = [path for path in (target, *target.parents) if not path.exists()]
    writing = target / f"{_WRITING}{os.getpid()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        finish(target)
        _remove_abandoned(target)
        writing.mkdir()
        yield writing
        names = sorted(path.name for path in writing.iterdir())
        if names:
            (writing / _LIST).write_text(json.dumps(names))
            writing.rename(target / _COMPLETE)
            finish(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        for path in missing:
            # Only those that this call made, and only when nothing came of it.
            with contextlib.suppress(OSError):
                path.rmdir()


def finish(folder: str | os.PathLike[str]) -> None:
    """Move the files of a complete save to their places, if there is one. Does nothing otherwise."""
    target, complete = Path(folder), Path(folder) / _COMPLETE
    try:
        names: list[str] = json.loads((complete / _LIST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        # Already moved by a process that died, or by another one that finishes the same save.
        with contextlib.suppress(FileNotFoundError):
            os.replace(complete / name, target / name)
    saved = {_weights_of(name) for name in names} - {None}
    for path in target.iterdir():
        if path.name not in names and _weights_of(path.name) in saved:
            path.unlink(missing_ok=True)
    shutil.rmtree(complete, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what processes that no longer run have left half-written."""
    for path in target.glob(f"{_WRITING}*"):
        pid = path.name.removeprefix(_WRITING)
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
