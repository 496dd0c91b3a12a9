"""Typed training settings: one YAML file, ``key=value`` overrides, and nothing accepted by accident.

Every key is a field of one of the dataclasses below; the ``model`` section alone is free-form here, because
:class:`hymba.HymbaConfig` checks it with the same rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Section = TypeVar("Section")


class SettingsError(ValueError):
    """An unknown setting, a wrong type or a value out of range; the message names key, value, remedy."""


@dataclass(frozen=True)
class TextSettings:
    """Where text comes from."""

    source: Literal["stdlib", "files", "datasets"] = "stdlib"
    paths: tuple[str, ...] = ()
    """``files``: files, or folders that are searched for ``patterns``."""
    patterns: tuple[str, ...] = ("*.py", "*.txt", "*.md")
    dataset: str | None = None
    """``datasets``: a hub id or local folder that ``datasets.load_dataset`` takes."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"


@dataclass(frozen=True)
class SourceSettings(TextSettings):
    """One of several sources that are mixed."""

    name: str = ""
    weight: float = 1.0
    """Share of the rows, relative to the other sources' weights; 0 for a source that only a later phase reads."""


@dataclass(frozen=True)
class DataSettings(TextSettings):
    """Where the text comes from and how it becomes rows of token ids."""

    held_out: float = 0.05
    """Share of the documents kept for evaluation, drawn by a hash of their names."""
    sequence_length: int = 1024
    layout: Literal["packed", "stream"] = "packed"
    """``packed``: each document starts from the meta state; ``stream``: documents form one text."""
    sources: tuple[SourceSettings, ...] = ()
    """Several sources in place of the one that ``source`` names, mixed row by row by their weights."""
    task: dict[str, Any] | None = None
    """A synthetic task in place of text: its ``name`` and parameters, as ``hymba.experiments.tasks.make_task`` takes
    them. The other keys of this section and the tokenizer are then not read."""


@dataclass(frozen=True)
class TokenizerSettings:
    """``path`` names a tokenizer folder; without it a byte-level BPE is trained on the training documents."""

    path: str | None = None
    vocab_size: int = 2048


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; decay applies to the matrices that multiply activations, to nothing else."""

    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ScheduleSettings:
    """Warm-up, stable, decay: fractions of all steps; ``floor``: of the peak learning rate, reached last."""

    warmup: float = 0.01
    decay: float = 0.2
    floor: float = 0.01
    shape: Literal["linear", "cosine", "sqrt"] = "linear"


@dataclass(frozen=True)
class RunSettings:
    """What runs, for how long, and where it is written."""

    output: str = "runs/train"
    steps: int = 1000
    batch_size: int = 8
    """Rows per device and forward pass."""
    gradient_accumulation: int = 1
    tokens_per_step: int | None = None
    """Tokens of one optimizer step over all devices. With it the accumulation follows from ``batch_size`` and the
    number of processes, so that a run may go on with another number of them."""
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    """What several processes do: each holds the model (``ddp``), or a share of every parameter (``fsdp2``)."""
    reshard: bool = True
    """``fsdp2``: let go of the other processes' shares of a layer after each use, and gather them again in backward."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: autocast over fp32 parameters."""
    device: Literal["auto", "cpu"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    compile: bool = False
    """Compile each layer with ``torch.compile``; selective activation checkpointing is then the compiler's choice."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph, for one process with a GPU: for models so small that the host's
    launches of kernels take longer than the kernels. Without a GPU it changes nothing."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Of ``HymbaModel.set_activation_checkpointing``: less memory for more work, the same numbers."""
    gradient_checkpointing: bool = False
    """transformers' name for ``activation_checkpointing: full``."""
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    """Steps between held-out measurements on a sample; 0 measures only at the end."""
    evaluate_bytes: int = 100_000
    tensorboard: bool = True
    resume: Literal["auto", "never"] = "auto"
    init_from: str | None = None
    """A checkpoint folder or hub id that the run starts from; ``model`` then overrides its config."""

    @property
    def checkpointing(self) -> str:
        """The policy of activation checkpointing."""
        return "full" if self.gradient_checkpointing else self.activation_checkpointing


@dataclass(frozen=True)
class ExportSettings:
    """The checkpoint folder written at the end, in the released layout."""

    folder: str = "final"
    """Relative to ``run.output``, or absolute."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    evaluate: bool = True
    generation: dict[str, Any] = field(default_factory=dict)
    """What ``generate`` does with the checkpoint by default: fields of transformers' GenerationConfig."""


@dataclass(frozen=True)
class PhaseSettings:
    """A later part of a run and what changes there; what it leaves out stays as in the sections."""

    name: str
    start: float
    """Share of ``run.steps`` after which the phase begins; it ends where the next one does."""
    weights: dict[str, float] | None = None
    """Of ``data.sources`` by name; sources left out are not read."""
    sequence_length: int | None = None
    batch_size: int | None = None
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    task: dict[str, Any] = field(default_factory=dict)
    """Parameters in place of those of ``data.task``, such as its length; the vocabulary stays."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields that change no tensor's shape, such as those of the rotary embedding."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything ``hymba train`` reads; the fields are the sections of the YAML file."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    phases: tuple[PhaseSettings, ...] = ()
    export: ExportSettings = field(default_factory=ExportSettings)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as YAML or JSON write them."""
        return _plain(dataclasses.asdict(self))


def load_settings(path: str | Path, overrides: Iterable[str] = ()) -> TrainSettings:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, values in YAML), check everything.

    ``model`` may be a mapping of :class:`HymbaConfig` fields, the path of a YAML file with one, or a mapping with the
    path as ``file`` and fields that replace the file's; a relative path is looked up beside the file that names it,
    then in the working directory.

    Raises:
        FileNotFoundError: the file does not exist.
        SettingsError: invalid YAML, an unknown key (with the nearest name), a wrong type or value.
    """
    path = Path(path)
    raw = read_raw(path)
    for override in overrides:
        apply_override(raw, override)
    return train_settings(raw, where=str(path))


def read_raw(path: Path) -> dict[str, Any]:
    """The sections of a training file, unchecked, with a ``model`` that is a path read from its file."""
    raw = read_yaml(path)
    model = raw.get("model")
    if isinstance(model, str):
        raw["model"] = read_yaml(beside(path, model))
    elif isinstance(model, dict) and isinstance(model.get("file"), str):
        fields = {key: value for key, value in model.items() if key != "file"}
        raw["model"] = {**read_yaml(beside(path, model["file"])), **fields}
    return raw


def train_settings(raw: Mapping[str, Any], *, where: str) -> TrainSettings:
    """Settings from the sections of a training file, with the checks of :func:`load_settings`."""
    settings = _build(TrainSettings, raw, prefix="", where=where)
    # The checks know the settings, so an import at the top would go in a circle.
    from hymba.experiments.ranges import check_ranges

    check_ranges(settings)
    return settings


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, of which PyYAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a key that stands twice is refused.

    Raises:
        FileNotFoundError: the file does not exist.
        SettingsError: not YAML, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file; give the path of a YAML file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: expected sections with keys, got {type(raw).__name__}")
    return raw


def beside(path: Path, name: str) -> Path:
    """``name`` as a path relative to the folder of the file ``path``, or else to the working directory."""
    near = path.parent / name
    return near if near.is_file() else Path(name)


def apply_override(raw: dict[str, Any], override: str, kind: type | None = None) -> None:
    """Put the value of ``key=value`` into the sections of a file whose settings are ``kind`` (a training's by default).

    Raises:
        SettingsError: not of that form, or a key that :func:`set_key` refuses.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SettingsError(f"override {override!r}: expected key=value, for example run.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: the value is not readable as YAML: {error}") from error
    set_key(raw, key, value, where=f"override {override!r}", kind=kind)


def set_key(raw: dict[str, Any], key: str, value: Any, *, where: str, kind: type | None = None) -> None:
    """Put ``value`` at the dotted ``key`` of a file's sections; ``where`` names the source in errors.

    ``kind``: the settings that the file describes, a training's by default.

    Raises:
        SettingsError: an unknown key (with the nearest name), or a section instead of a key.
    """
    kind = TrainSettings if kind is None else kind
    known, free = known_keys(kind), ("model.", _TASK) if kind is TrainSettings else ()
    # A list, as `phases` is, has no keys of its own and is given whole.
    lists = {name for name, hint in typing.get_type_hints(kind).items() if typing.get_origin(hint) is tuple}
    if key not in known and key not in lists and not key.startswith(free):
        if key in {item.name for item in dataclasses.fields(kind)}:
            raise SettingsError(f"{where}: {key!r} is a section; set one of its keys, {key}.<name>=value")
        raise SettingsError(f"{where}: unknown key {key!r}{_nearest(key, known)}")
    path = ["data", "task", key.removeprefix(_TASK)] if free and key.startswith(_TASK) else key.split(".", 1)
    target: Any = raw
    for section in path[:-1]:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise SettingsError(f"{where}: section {section!r} is {target!r}, not a mapping")
    target[path[-1]] = value


def settings_from(kind: type[Section], raw: Mapping[str, Any], *, where: str, prefix: str = "") -> Section:
    """One section from a mapping, with the checks of :func:`load_settings`.

    ``where`` names its source in errors, ``prefix`` (``"data.task."``) stands before its keys there.
    """
    section = _build(kind, raw, prefix=prefix, where=where)
    assert isinstance(section, kind)
    return section


def known_keys(kind: type | None = None) -> list[str]:
    """Dotted names of every setting of ``kind`` (a training's by default) that stands in a section of typed keys."""
    hints = typing.get_type_hints(TrainSettings if kind is None else kind)
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [f"{section}.{item.name}" for section, hint in sections.items() for item in dataclasses.fields(hint)]


def _nearest(key: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for the closest known key, also when only the section was left out."""
    known = list(known)
    by_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    match = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not match:
        leaves = {name.rpartition(".")[2]: name for name in known}
        match = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.5)]
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(known)}"


def _build(cls: type, raw: Any, *, prefix: str, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise SettingsError(f"{where}: {prefix.rstrip('.') or 'file'} = {raw!r}: expected a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    names = {item.name for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in names:
            candidates = [prefix + name for name in sorted(names)] if prefix else sorted(names) + known_keys(cls)
            raise SettingsError(f"{where}: unknown key {prefix + str(key)!r}{_nearest(prefix + str(key), candidates)}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(type, hints[key]), value, prefix=f"{prefix}{key}.", where=where)
        else:
            values[key] = _convert(value, hints[key], f"{where}: {prefix}{key}")
    for item in dataclasses.fields(cls):
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise SettingsError(f"{where}: {prefix}{item.name} is missing")
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        where, _, key = name.rpartition(": ")
        return _build(typing.cast(type, hint), value, prefix=f"{key}.", where=where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise SettingsError(f"{name} = {value!r}: allowed are {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{name} = {value!r}: expected a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise SettingsError(f"{name} = {value!r}: expected a list of {len(arguments)} values")
        return tuple(_convert(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(zip(value, arguments)))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise SettingsError(f"{name} = {value!r}: expected a mapping of names to values")
        if arguments[1] is Any:
            return dict(value)
        return {key: _convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as text; a person who writes it means the number.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise SettingsError(f"{name} = {value!r}: expected a number")
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise SettingsError(f"{name} = {value!r}: expected a whole number")
    if hint is bool and not isinstance(value, bool):
        raise SettingsError(f"{name} = {value!r}: expected true or false")
    if hint is str and not isinstance(value, str):
        raise SettingsError(f"{name} = {value!r}: expected text")
    return value


def check_optimisation(
    optimizer: OptimizerSettings, schedule: ScheduleSettings, need: Callable[[bool, str, Any, str], None]
) -> None:
    """Value limits of two sections; ``need`` raises with key, value and what is allowed unless its first is true."""
    for name in ("warmup", "decay", "floor"):
        value = getattr(schedule, name)
        need(0.0 <= value <= 1.0, f"schedule.{name}", value, "expected a fraction between 0 and 1")
    need(
        schedule.warmup + schedule.decay <= 1.0,
        "schedule.warmup + schedule.decay",
        schedule.warmup + schedule.decay,
        "the two fractions must not exceed 1 together",
    )
    need(
        optimizer.learning_rate > 0,
        "optimizer.learning_rate",
        optimizer.learning_rate,
        "expected more than 0",
    )
    need(optimizer.weight_decay >= 0, "optimizer.weight_decay", optimizer.weight_decay, "expected 0 or more")
    need(
        optimizer.clip_norm >= 0,
        "optimizer.clip_norm",
        optimizer.clip_norm,
        "expected 0 (no clipping) or more",
    )
    need(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "expected more than 0")
    for beta in optimizer.betas:
        need(0.0 <= beta < 1.0, "optimizer.betas", list(optimizer.betas), "expected 0 <= value < 1")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_TASK = "data.task."
