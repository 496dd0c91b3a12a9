"""Keeps two notices of torchao's off the terminal; the first thing that the package imports.

transformers imports torchao wherever it is installed, for models that are not quantised too. torchao then warns of its
extensions for other GPUs than the one at hand, and torch of how torchao registers its enums: four lines on every start
that nobody can do anything about.
"""

from __future__ import annotations

import logging
from functools import partial

_HIDDEN = {"torchao": "Failed to load ", "torch.utils._pytree": "Calling register_constant() on Enum subclasses"}


def _lacks(phrase: str, record: logging.LogRecord) -> bool:
    return phrase not in record.getMessage()


for _logger, _phrase in _HIDDEN.items():
    logging.getLogger(_logger).addFilter(partial(_lacks, _phrase))
