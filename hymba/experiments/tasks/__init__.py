"""Synthetic tasks that need no download: a name and parameters give batches to train on and a held-out measurement."""

from hymba.experiments.tasks.base import IGNORED, Task, TaskRows
from hymba.experiments.tasks.registry import TASKS, make_task

__all__ = ["IGNORED", "TASKS", "Task", "TaskRows", "make_task"]
