"""The versions of packages, for the records of a run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import hymba


def versions_of(*packages: str) -> dict[str, str]:
    """Version by name. This package's own is its code's: run from its sources it need not be installed."""
    return {name: hymba.__version__ if name == "hymba" else _installed(name) for name in packages}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
