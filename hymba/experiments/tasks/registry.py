"""From a task's name and parameters to the task."""

from __future__ import annotations

from typing import Any

from hymba.config import nearest
from hymba.experiments.settings import SettingsError, settings_from
from hymba.experiments.tasks.base import Task
from hymba.experiments.tasks.copying import SelectiveCopying
from hymba.experiments.tasks.mqar import MQAR
from hymba.experiments.tasks.needle import Needle

TASKS: dict[str, type[Task]] = {task.name: task for task in (MQAR, Needle, SelectiveCopying)}


def make_task(name: str | None, **parameters: Any) -> Task:
    """The task called ``name``; ``parameters`` are the fields of its class in :data:`TASKS`.

    Raises:
        SettingsError: an unknown name or parameter (with the nearest one), a wrong type, or values that no row can
            have; the message names them as ``data.task.<parameter>``.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise SettingsError(
            f"data.task.name = {name!r}: no such task; there are {', '.join(TASKS)}.{nearest(str(name), TASKS)}"
        )
    return settings_from(TASKS[name], parameters, where=f"task {name}", prefix="data.task.")
