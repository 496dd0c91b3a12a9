"""Evaluation on lm-evaluation-harness: the model for it, tasks, and the paper's task lists.

`python -m hymba.eval` is the harness's own command line, in which `--model hymba` is `hymba.eval.harness.HymbaLM`. The
harness is an optional package; only `harness`, `run` and `__main__` import it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

TASKS = Path(str(files("hymba"))) / "assets" / "eval" / "tasks"
"""Folder of this package's tasks, for `--include_path`."""
DEFAULT_MODEL = Path(str(files("hymba"))) / "assets" / "default"
"""The checkpoint inside the package."""


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked; the message names the value and what is allowed."""
