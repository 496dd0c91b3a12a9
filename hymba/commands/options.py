"""Options that several subcommands share, under the names that transformers gives them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

_MODEL, _DECODING, _SAMPLING, _BEAMS, OUTPUT = "Model", "Decoding", "Sampling", "Beam search", "Output"


class DType(StrEnum):
    """Dtypes of weights; `auto` is the checkpoint's."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class QuantizationKind(StrEnum):
    """Weights rounded while they are read."""

    int8 = "int8"
    int4 = "int4"


class CacheImplementation(StrEnum):
    """A cache that grows, or one with buffers of a fixed size."""

    dynamic = "dynamic"
    static = "static"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|HUB-ID",
        help="Checkpoint in the released layout. [default: the small one inside the package]",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a hub repository.", rich_help_panel=_MODEL),
]
ModelDType = Annotated[
    DType,
    typer.Option(
        "--dtype", metavar="NAME", help="auto (the file's), float32, bfloat16, float16.", rich_help_panel=_MODEL
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto (CUDA when there is one), cpu, cuda, cuda:1, ...", rich_help_panel=_MODEL),
]
Quantization = Annotated[
    QuantizationKind | None,
    typer.Option(
        "--quantization",
        metavar="KIND",
        help="Round the large weights while reading them: int8 or int4 (torchao).",
        rich_help_panel=_MODEL,
    ),
]
Prepack = Annotated[
    bool,
    typer.Option(
        "--prepack",
        help="Read packed copies of the weights: 16-bit decoding on a CPU is faster and takes twice the memory.",
        rich_help_panel=_MODEL,
    ),
]
CacheKind = Annotated[
    CacheImplementation | None,
    typer.Option(
        "--cache-implementation",
        metavar="KIND",
        help="dynamic (it grows) or static (fixed buffers).",
        show_default="static on CUDA without beams, else dynamic",
        rich_help_panel=_DECODING,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most tokens to generate.", rich_help_panel=_DECODING),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Fewest tokens before an end.", rich_help_panel=_DECODING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(min=0.01, metavar="X", help="Above 1: say less again.", rich_help_panel=_DECODING),
]
NoRepeatNgramSize = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="No N tokens in a row twice.", rich_help_panel=_DECODING),
]
StopStrings = Annotated[
    list[str] | None,
    typer.Option(
        "--stop-strings",
        metavar="TEXT",
        help="End with the token that completes this text; may be given several times.",
        rich_help_panel=_DECODING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Seed of sampling.", rich_help_panel=_SAMPLING),
]
DoSample = Annotated[
    bool | None,
    typer.Option(
        "--do-sample/--no-do-sample",
        help="Sample instead of taking the likeliest token; the options below switch it on.",
        rich_help_panel=_SAMPLING,
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.01, metavar="X", help="Below 1: likelier tokens more often.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Among the N likeliest; 0 for all.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="X", help="Among the likeliest that sum up to X.", rich_help_panel=_SAMPLING
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="X", help="Among those at least X times as likely as the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]  # fmt: skip
NumBeams = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Continuations followed at once.", rich_help_panel=_BEAMS),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Above 0: longer ones; below: shorter ones.", rich_help_panel=_BEAMS),
]
NumReturnSequences = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Continuations of each prompt.", rich_help_panel=_DECODING),
]
Stats = Annotated[bool, typer.Option("--stats", help="Tokens and tokens/s, to stderr.", rich_help_panel=OUTPUT)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
