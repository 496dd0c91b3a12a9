"""`hymba analyze`: the paper's analyses of a checkpoint, as numbers and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError
from hymba.commands.models import load, locate
from hymba.commands.terminal import note, progress, status

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba.analysis import Result, Sample
    from hymba.model import HymbaForCausalLM

analyze = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look inside a checkpoint: the paper's analyses, as numbers (JSON, CSV) and figures (PNG, SVG).",
)

_TEXT = "Text"
Texts = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FILE|FOLDER",
        help="Texts to read. Without any: the default corpus's held-out files.",
        show_default=False,
    ),
]
Length = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a sample.", rich_help_panel=_TEXT)]
Samples = Annotated[
    int, typer.Option(min=1, metavar="N", help="Samples of each file or folder.", rich_help_panel=_TEXT)
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the files go.", rich_help_panel=opt.OUTPUT)
]
Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER|HUB-ID", help="A further checkpoint for the same figure; may be given several times."),
]
_OUTPUT = Path("analysis")
# Maps in a narrower dtype are noise at the size of what is to be seen.
_DTYPE = opt.DType.float32


@analyze.command()
def entropy(
    texts: Texts = None,
    without: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB-ID",
            help="Checkpoint trained without meta tokens. [default: the same model, its meta tokens left out]",
        ),
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 256,
    samples: Samples = 4,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """Entropy of the attention maps of every head, with and without meta tokens."""
    from hymba.analysis import attention_entropy

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = _samples(tokenizer, texts, length, samples)
    other = None
    if without is not None:
        other_name, other, other_tokenizer = _load(without, dtype, device, None)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"--without {without}: its tokenizer differs, so the rows would not compare")
    with status("reading attention maps"):
        result = attention_entropy(loaded, chosen, without=other)
    result.about["without"] = "the same weights" if other is None else other_name
    _finish(result, name, loaded, chosen, output, as_json)


@analyze.command("attention-split")
def attention_split(
    texts: Texts = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 256,
    samples: Samples = 4,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """Split of attention and SSM maps into meta tokens, BOS, self and cross."""
    from hymba.analysis import attention_split as analysis

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = _samples(tokenizer, texts, length, samples)
    with status("reading attention maps"):
        result = analysis(loaded, chosen)
    _finish(result, name, loaded, chosen, output, as_json)


@analyze.command()
def erf(
    texts: Texts = None,
    compare: Compare = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 512,
    samples: Samples = 8,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """Effective receptive field (equation 5): how far back the last token looks."""
    from hymba.analysis import receptive_field

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = _samples(tokenizer, texts, length, samples)
    models, by_model = {name: loaded}, {name: chosen}
    for other in compare or ():
        other_name, other_model, other_tokenizer = _load(other, dtype, device, None)
        if other_name in models:
            raise UsageError(f"--compare {other}: it is there already; give each checkpoint once")
        models[other_name] = other_model
        by_model[other_name] = _samples(other_tokenizer, texts, length, samples)
    with status("reading attention maps"):
        result = receptive_field(models, by_model)
    _finish(result, name, loaded, chosen, output, as_json)


@analyze.command()
def importance(
    texts: Texts = None,
    heads: Annotated[bool, typer.Option("--heads", help="Remove single heads as well.")] = False,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 256,
    samples: Samples = 4,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """What each branch, and each head, is worth: the change when it is removed.

    Measured are the loss and the next-token accuracy on the text, and the accuracy at copying: predicting the second
    of two copies of a piece of it.
    """
    from hymba.analysis import copying, head_importance

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = _samples(tokenizer, texts, length, samples)
    runs = 2 * len(loaded.model.layers) * (1 + heads * loaded.config.num_attention_heads)
    with progress(runs, shown=True, what="removals") as advance:
        result = head_importance(
            loaded, chosen, heads=heads, tasks={"copying": copying(chosen)}, progress=lambda: advance(1)
        )
    _finish(result, name, loaded, chosen, output, as_json)


@analyze.command("meta-tokens")
def meta_tokens(
    texts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="Kinds of text, one of each. Without any: prose and code of the default corpus's held-out files, "
            "and sums.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[int, typer.Option(metavar="N", help="Whose attention; -1 is the last layer.")] = -1,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 256,
    samples: Samples = 4,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """Attention that each meta token receives, by kind of text."""
    from hymba.analysis import meta_token_activation
    from hymba.analysis.texts import default_domains, documents
    from hymba.analysis.texts import samples as pieces

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = pieces(tokenizer, documents(texts) if texts else default_domains(), length=length, count=samples)
    with status("reading attention maps"):
        result = meta_token_activation(loaded, chosen, layer=layer)
    _finish(result, name, loaded, chosen, output, as_json)


@analyze.command()
def magnitude(
    texts: Texts = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = _DTYPE,
    device: opt.Device = "auto",
    length: Length = 256,
    samples: Samples = 4,
    output: Output = _OUTPUT,
    as_json: opt.AsJson = False,
) -> None:
    """Size of each branch's output before and behind its norm, and of the gate."""
    from hymba.analysis import output_magnitude

    name, loaded, tokenizer = _load(model, dtype, device, revision)
    chosen = _samples(tokenizer, texts, length, samples)
    with status("reading outputs"):
        result = output_magnitude(loaded, chosen)
    _finish(result, name, loaded, chosen, output, as_json)


def _load(
    model: str | None, dtype: opt.DType, device: str, revision: str | None
) -> tuple[str, HymbaForCausalLM, PreTrainedTokenizerBase]:
    """The model's name in the output, the model and its tokenizer."""
    loaded, tokenizer = load(locate(model), dtype=dtype.value, device=device, revision=revision)
    return "default" if model is None else model, loaded, tokenizer


def _samples(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Path] | None, length: int, count: int) -> list[Sample]:
    from hymba.analysis.texts import documents, samples

    return samples(tokenizer, documents(texts or ()), length=length, count=count)


def _finish(
    result: Result, name: str, model: HymbaForCausalLM, samples: Sequence[Sample], output: Path, as_json: bool
) -> None:
    """Write the files and say what came out."""
    from hymba import __version__
    from hymba.analysis import write

    lengths = [sample.tokens for sample in samples]
    shortest, longest = min(lengths), max(lengths)
    result.about = {
        "model": name,
        "domains": list(dict.fromkeys(sample.domain for sample in samples)),
        "samples": [{"domain": s.domain, "document": s.name, "tokens": s.tokens} for s in samples],
        "tokens_per_sample": longest if shortest == longest else f"{shortest} to {longest}",
        "meta_tokens": model.config.num_memory_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
        **result.about,
    }
    files, why = write(result, output)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        for line in _lines(result.summary):
            typer.echo(line)
        typer.echo(f"written: {', '.join(map(str, files))}")
    if why is not None:
        note(why)


def _lines(summary: dict[str, Any]) -> list[str]:
    """A summary as text, one line per entry."""
    found = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_number(item)}" for name, item in value.items())
        found.append(f"{key}: {_number(value)}")
    return found


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
