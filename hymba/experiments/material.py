"""What a run trains on: the rows of each phase, from text with its tokenizer or from a synthetic task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hymba import HymbaForCausalLM
from hymba.experiments import checkpoints
from hymba.experiments.bits import bits_per_byte
from hymba.experiments.corpus import Corpus, Document, byte_length, join, load_corpora
from hymba.experiments.packing import Rows, Tokens
from hymba.experiments.phases import Phase, task_rows, text_rows
from hymba.experiments.processes import first_decides, is_first, wait, world_size
from hymba.experiments.resuming import check_corpus
from hymba.experiments.settings import TokenizerSettings, TrainSettings
from hymba.experiments.tasks import Task
from hymba.experiments.tokenizer import build_tokenizer, encode_documents

TOKENS = "tokens"


@dataclass(frozen=True)
class Material:
    """What a run trains on.

    Attributes:
        rows: of each phase.
        described: for the user. passes: over the corpus; over the source that is read most, if there are several.
        corpus: text and split; in the first process only, and not for a task.
        task: of the last phase, which the run is measured on.
        sample: held-out documents to follow the training with.
    """

    rows: list[Rows]
    described: str
    passes: float = 0.0
    corpus: Corpus | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    task: Task | None = None
    sample: tuple[Document, ...] = ()


def gather(
    settings: TrainSettings,
    phases: list[Phase],
    *,
    checkpoint: Path | None,
    output: Path,
    say: Callable[[str], None],
) -> Material:
    """Rows for all phases. Several processes take part: the first one reads and encodes, the others map its files.

    Args:
        checkpoint: that the run goes on from; tokenizer and text must then be those in its folder.

    Raises:
        CorpusError: the corpus is missing, empty or not text.
        SettingsError: it is not what the run was started with.
        ValueError: a source has fewer tokens than one row.
    """
    if (task := phases[-1].task) is not None:
        return Material(task_rows(phases), f"all of task {task.name}", task=task)
    corpora: dict[str, Corpus] = {}
    tokens: dict[str, Tokens] = {}

    def read() -> tuple[PreTrainedTokenizerBase, tuple[Document, ...], list[str]]:
        corpora.update(load_corpora(settings.data))
        corpus = join(corpora)
        sizes = [sum(byte_length(d.text) for d in side) for side in (corpus.train, corpus.held_out)]
        say(
            f"corpus: {corpus.description}: {len(corpus.train)} documents, {sizes[0]:,} bytes to train on; "
            f"{len(corpus.held_out)} documents, {sizes[1]:,} bytes held out"
        )
        chosen = settings.tokenizer
        if checkpoint is not None:
            check_corpus(corpus, checkpoint.parent)
            chosen = TokenizerSettings(path=str(checkpoint.parent / "tokenizer"))
        tokenizer = build_tokenizer(chosen, (d.text for d in corpus.train))
        for name, one in corpora.items():
            tokens[name] = Tokens.of(encode_documents(tokenizer, [document.text for document in one.train]))
        if world_size() > 1:
            with checkpoints.written_folder(output / TOKENS, sealed=False) as folder:
                for name, own in tokens.items():
                    (folder / (name or "text")).mkdir()
                    own.save(folder / (name or "text"))
        sample = sample_documents(corpus.held_out, settings.run.evaluate_bytes) if settings.run.evaluate_every else []
        return tokenizer, tuple(sample), list(tokens)

    tokenizer, sample, names = first_decides(read)
    if world_size() > 1:
        # The first one too: the text of a large corpus is then in memory once, as pages of the file.
        tokens = {name: Tokens.open(output / TOKENS / (name or "text")) for name in names}
        wait()
    rows, passes = text_rows(phases, tokens)
    over = ", ".join(f"{count:.2f} {f'of {name}' if name else ''}".strip() for name, count in passes.items())
    described = f"{over} passes over the corpus; tokenizer: {len(tokenizer):,} tokens"
    corpus = join(corpora) if is_first() else None
    return Material(rows, described, max(passes.values()), corpus=corpus, tokenizer=tokenizer, sample=sample)


def held_out_measure(
    settings: TrainSettings, material: Material, model: HymbaForCausalLM
) -> tuple[str, Callable[[], float]] | None:
    """Name and measurement of the figure that a run follows while it trains; None without held-out text."""
    task, tokenizer = material.task, material.tokenizer
    if task is not None:

        def accuracy() -> float:
            found = task.evaluate(model)["accuracy"]
            assert isinstance(found, float)
            return found

        return "accuracy", accuracy
    if not material.sample:
        return None
    assert tokenizer is not None
    context = settings.data.sequence_length
    return "bits_per_byte", lambda: bits_per_byte(model, tokenizer, material.sample, context=context).per_byte


def sample_documents(documents: Iterable[Document], limit: int) -> list[Document]:
    """Documents in order until ``limit`` bytes are full; the last one may be cut at a line's end."""
    taken: list[Document] = []
    room = limit
    for document in documents:
        size = byte_length(document.text)
        if size > room:
            cut = document.text.encode("utf-8")[:room].decode("utf-8", "ignore")
            cut = cut[: cut.rfind("\n") + 1] or cut
            if cut:
                taken.append(Document(document.name, cut))
            break
        taken.append(document)
        room -= size
    return taken
