"""A lock file for each run, with the process and host that hold it: two invocations never write one folder.

Shards of one ablation (`--only`, `--seed`) hold locks on different runs and go on side by side. A lock is stale when
its process is gone from its host, or, held from another host, when its holder has not touched it for a while.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from hymba.experiments import checkpoints
from hymba.experiments.ablation.settings import AblationError
from hymba.experiments.checkpoints import read_json

_TOUCH_SECONDS = 30.0
STALE_SECONDS = 600.0
"""Without a touch for so long, the holder on another host is taken to be gone."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; ``started`` tells a process from a later one with its number (0 where it cannot be known)."""

    pid: int
    host: str
    started: int
    since: str


def this_process() -> Holder:
    """The holder that this process is."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(os.getpid(), socket.gethostname(), _started(os.getpid()), now)


class Locks:
    """Locks on several files, all or none; a context manager that lets go of them.

    Args:
        paths: the files.
        advice: what the user may do besides waiting, with what joins it to "wait for it".

    Raises:
        AblationError: a file is locked by a live process; names it and the file.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        *,
        advice: str = ", choose another run.output, or take other runs with --only, --task and --seed",
    ) -> None:
        self.paths, self._advice = list(paths), advice
        self.stale: list[str] = []
        """A line for each lock that a process left behind and this one took over."""
        self._held: list[Path] = []
        self._done = threading.Event()
        self._holder = this_process()

    def __enter__(self) -> Locks:
        try:
            for path in self.paths:
                self._take(path)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the files that are still this process' own."""
        self._done.set()
        for path in self._held:
            if read_holder(path) == self._holder:
                path.unlink(missing_ok=True)
        self._held.clear()

    def _take(self, path: Path) -> None:
        with checkpoints.write_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(path):
                holder = read_holder(path)
                if not is_stale(path, holder):
                    named = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
                    since = "" if holder is None else f" since {holder.since}"
                    raise AblationError(f"{path}: {named} is at work on this run{since}; wait for it{self._advice}")
                if _remove_stale(path, holder):
                    named = "an unreadable lock" if holder is None else f"process {holder.pid} on {holder.host}"
                    self.stale.append(f"{path}: left behind by {named}, which is gone; taken over")
        self._held.append(path)

    def _create(self, path: Path) -> bool:
        """Create the file; False where there is one."""
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self._holder)))
        except FileExistsError:
            return False
        return True

    def _touch(self) -> None:
        while not self._done.wait(_TOUCH_SECONDS):
            for path in list(self._held):
                try:
                    os.utime(path)
                except OSError:
                    continue


def read_holder(path: Path) -> Holder | None:
    """Who holds a lock, or None where the file is gone or not a lock's."""
    try:
        return Holder(**(read_json(path) or {}))
    except TypeError:
        return None


def is_stale(path: Path, holder: Holder | None) -> bool:
    """Whether the process that made a lock file is gone."""
    if holder is not None and holder.host == socket.gethostname() and os.name == "posix":
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        # The number may be another process' by now.
        return bool(holder.started) and holder.started != _started(holder.pid)
    # Another host's processes cannot be asked; the age is taken on the clock of the disk that both write to.
    probe = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return True
    finally:
        probe.unlink(missing_ok=True)


def _remove_stale(path: Path, holder: Holder | None) -> bool:
    """Remove a stale lock, unless another process did and has made its own since."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if read_holder(aside) == holder:
        aside.unlink(missing_ok=True)
        return True
    aside.rename(path)
    return False


def _started(pid: int) -> int:
    """When a process started, in ticks since the machine did; 0 where the system does not say."""
    try:
        # The command's name, in parentheses, may itself have spaces and parentheses.
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
