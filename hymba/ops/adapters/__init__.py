"""Optional packages with compiled kernels, each behind the contract of our own op.

One module per package. `hymba.ops.backend` asks it two things, whether this machine can use it (`probe`) and whether
it serves a call (`serves`); both answer None or the reason why not. Nothing of a package is imported before that.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

# Where the packages' kernels run. Tests put modules with the same signatures in their place, on the CPU.
DEVICE = "cuda"


@functools.cache
def refusal(package: str, *modules: str) -> str | None:
    """Why a package cannot be used here: it is missing, or one of these modules of it does not import."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install 'hymba[cuda]')"
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module and "." not in module:
                return f"{package} is installed without its compiled extension {module}"
            return f"{module} does not import: {error}"
        except Exception as error:  # an extension built for another torch ends in ImportError, OSError, RuntimeError
            return f"{module} does not import: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None
