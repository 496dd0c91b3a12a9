"""From task names to results: the harness's `simple_evaluate` on our model, saved in the harness's own files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba.config import nearest
from hymba.eval import TASKS, EvaluationError
from hymba.eval.presets import TaskShots

SEEDS = (0, 1234, 1234, 1234)
"""Of Python, NumPy, torch and the choice of few-shot examples, as the harness sets them."""


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        results: the harness's dictionary, without samples.
        tasks: names of the tasks and groups that were asked for, tags as their tasks.
        files: what was written.
    """

    results: dict[str, Any]
    tasks: tuple[str, ...]
    files: tuple[Path, ...] = ()


def evaluate(
    wanted: Sequence[TaskShots],
    *,
    model_args: Mapping[str, Any],
    include_path: Sequence[str | Path] = (),
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    seeds: Sequence[int | None] = SEEDS,
    output: Path | None = None,
    log_samples: bool = False,
    metadata: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    **arguments: Any,
) -> Evaluation | None:
    """Run tasks on `hymba.eval.harness.HymbaLM`.

    Tasks are found and their data loaded, and the output is tried, before the model is.

    Args:
        wanted: names as the harness knows them (tasks, groups, tags, patterns), or YAML files, with their shots.
        model_args: of `HymbaLM`: `pretrained`, `dtype`, `peft`, `max_length`, ...
        include_path: folders with tasks, which go before those of this package and the harness.
        num_fewshot: for all tasks, in place of theirs and those of `wanted`.
        batch_size: rows of a forward pass, or "auto".
        seeds: of Python, NumPy, torch and few-shot examples; `None` leaves one alone.
        output: folder for `results_*.json` (and samples), or a .json file whose name gets the date, as the harness has
            it.
        log_samples: write every request and answer too.
        metadata: for tasks that take some.
        model_name: what the results call the model, in place of where it lies.
        **arguments: further ones of `lm_eval.simple_evaluate`.

    Returns:
        The results; `None` on the processes of `accelerate launch` other than the first.

    Raises:
        EvaluationError: an unknown task, data that cannot be loaded, samples without an output, an
            output that cannot be written.
    """
    if log_samples and output is None:
        raise EvaluationError("--log-samples needs --output FOLDER to write them to")
    with _writing(output) as room:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker

        import hymba.eval.harness  # noqa: F401  (registers the model)

        manager, tasks = find_tasks(
            wanted if num_fewshot is None else [TaskShots(each.task) for each in wanted],
            include_path=include_path,
            metadata={**model_args, **(metadata or {})},
        )
        tracker = EvaluationTracker(output_path=None if room is None or output is None else str(room / output.name))
        with _no_commit():
            found: Any = lm_eval.simple_evaluate(
                model="hymba",
                model_args=dict(model_args),
                tasks=tasks,
                # It would make one for itself, of all the harness's tasks.
                task_manager=manager,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                log_samples=log_samples,
                evaluation_tracker=tracker,
                random_seed=seeds[0],
                numpy_random_seed=seeds[1],
                torch_random_seed=seeds[2],
                fewshot_random_seed=seeds[3],
                metadata=dict(metadata or {}),
                **arguments,
            )
        if found is None:
            return None
        samples = found.pop("samples", None)
        files: tuple[Path, ...] = ()
        if room is not None and output is not None:
            if model_name is not None:
                tracker.general_config_tracker.model_name = model_name
                tracker.general_config_tracker.model_name_sanitized = model_name
            tracker.save_results_aggregated(results=found, samples=samples)
            for name in samples or {}:
                tracker.save_results_samples(task_name=name, samples=samples[name])
            files = _move(room, output)
    names = tuple(getattr(task, "task_name", None) or task.name for task in tasks)
    return Evaluation(found, names, files)


@contextmanager
def _no_commit() -> Iterator[None]:
    """Outside a git repository the harness's question for the commit would only make git complain."""
    from lm_eval import evaluator

    here = Path.cwd()
    if any((folder / ".git").exists() for folder in (here, *here.parents)):
        yield
        return
    asked, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def find_tasks(
    wanted: Sequence[TaskShots], *, include_path: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> tuple[Any, list[Any]]:
    """The harness's `TaskManager`, and its `Task` and `Group` objects, their data loaded, each with its shots.

    Raises:
        EvaluationError: no tasks, an unknown one (with the nearest name), or one whose data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    if not wanted:
        raise EvaluationError("--tasks: none; name some, or a --preset")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise EvaluationError(f"--include-path {folder}: no such folder; needed: one with the YAML files of tasks")
    folders = [TASKS, *map(Path, include_path)]
    # The harness reads 14,000 files to know its own tasks: only when one of them is wanted.
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=dict(metadata or {}))
    if not all(each.task in manager.task_index or Path(each.task).is_file() for each in wanted):
        manager = TaskManager(include_path=folders, metadata=dict(metadata or {}))
    tasks: dict[int, Any] = {}
    for each in wanted:
        names = [each.task] if Path(each.task).is_file() else manager.match_tasks([each.task])
        if not names:
            raise EvaluationError(_unknown(each.task, manager, folders))
        for name in names:
            for task in _built(manager, name):
                for leaf in task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]:
                    if each.num_fewshot is not None:
                        leaf.set_config(key="num_fewshot", value=each.num_fewshot)
                tasks[id(task)] = task
    return manager, list(tasks.values())


def _built(manager: Any, name: str) -> list[Any]:
    """A task or group, or the tasks of a tag."""
    try:
        loaded = manager.load(name)
    except EvaluationError:
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise EvaluationError(f"task {name} cannot be loaded: {type(error).__name__}: {why}") from error
    groups = loaded.get("groups") or {}
    # A group's members are listed beside it.
    inside = {member for group in groups.values() for member in group.child_names}
    tops = [group for key, group in groups.items() if key not in inside]
    covered = {id(task) for group in tops for task in group.get_all_tasks()}
    return [*tops, *(task for task in loaded["tasks"].values() if id(task) not in covered)]


def _unknown(name: str, manager: Any, folders: Sequence[Path]) -> str:
    """What to say about a name that no task has."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for folder in folders[1:]:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:
                # The harness passes over such files in silence.
                why = " ".join(str(error).split())
                return f"--tasks {name}: no such task; {path} cannot be read, so a task in it is missing: {why}"
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return f"--tasks {name}: no such file; allowed: names of tasks, groups and tags, or YAML files"
    ours = sorted(key for key in manager.task_index if key.startswith("hymba_"))
    return (
        f"--tasks {name}: no such task, group or tag of lm-evaluation-harness, of --include-path or of this package "
        f"({', '.join(ours)}).{nearest(name, manager.all_tasks)}"
    )


@contextmanager
def _writing(output: Path | None) -> Iterator[Path | None]:
    """A hidden folder beside the output, which shows at once whether it can be written; removed at the end."""
    if output is None:
        yield None
        return
    target = output.parent if output.suffix == ".json" else output
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=".eval-", dir=target))
    except OSError as error:
        why = error.strerror or str(error)
        raise EvaluationError(
            f"--output {output}: {target} cannot be written to: {why}; give a folder that can"
        ) from error
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)
        for path in missing:
            # Those that nothing came into.
            if not any(path.iterdir()):
                path.rmdir()


def _move(room: Path, output: Path) -> tuple[Path, ...]:
    """Give the files in `room` their names, each in one step.

    Raises:
        EvaluationError: the harness could not write its results, about which it only writes to its log.
    """
    base = room if output.suffix == ".json" else room / output.name
    target = output.parent if output.suffix == ".json" else output
    moved = []
    for path in sorted(base.rglob("*")):
        if path.is_file():
            final = target / path.relative_to(base)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
            moved.append(final)
    if not any(path.suffix == ".json" for path in moved):
        raise EvaluationError(f"--output {output}: the results could not be written; is the disk full?")
    return tuple(moved)
