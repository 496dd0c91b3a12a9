from __future__ import annotations

import importlib.metadata

import pytest
import torch

import hymba
from hymba.experiments import versions


def test_run_from_its_sources_the_package_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "hymba":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(versions, "version", version)
    found = versions.versions_of("hymba", "torch", "no-such-package")
    assert found == {"hymba": hymba.__version__, "torch": installed("torch"), "no-such-package": "unknown"}
    assert torch.__version__.startswith(found["torch"].split("+")[0])


def test_the_package_is_installed_in_its_own_version() -> None:
    assert importlib.metadata.version("hymba") == hymba.__version__
