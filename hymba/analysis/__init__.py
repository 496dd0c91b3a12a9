"""The paper's analyses of a model: `hymba analyze`, and the same as functions.

Each takes a model and samples of text (`hymba.analysis.texts`) and gives a `Result` with the numbers behind a figure;
`write` makes the files.
"""

from hymba.analysis.capture import AnalysisError, Reading, reading, without_meta_tokens
from hymba.analysis.importance import copying, head_importance, loss_and_accuracy, removed
from hymba.analysis.operator import ScanOperator
from hymba.analysis.report import Result, write
from hymba.analysis.studies import (
    attention_entropy,
    attention_split,
    meta_token_activation,
    output_magnitude,
    receptive_field,
)
from hymba.analysis.texts import Sample

__all__ = [
    "AnalysisError",
    "Reading",
    "Result",
    "Sample",
    "ScanOperator",
    "attention_entropy",
    "attention_split",
    "copying",
    "head_importance",
    "loss_and_accuracy",
    "meta_token_activation",
    "output_magnitude",
    "reading",
    "receptive_field",
    "removed",
    "without_meta_tokens",
    "write",
]
