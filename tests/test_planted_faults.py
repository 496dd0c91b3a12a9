"""The faults of scripts/plant_faults.py still fit the code; CI plants them (`make test-faults`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "plant_faults.py"


@pytest.fixture(scope="module")
def script() -> Any:
    if not (SCRIPT.parent.parent / "hymba").is_dir():
        pytest.skip("tests of a built package: its sources are not here")
    spec = importlib.util.spec_from_file_location("plant_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_be_planted(script: Any) -> None:
    """Its text stands once in its file, and the tests that have to see it exist."""
    assert len(script.FAULTS) >= 10
    assert len({fault.name for fault in script.FAULTS}) == len(script.FAULTS)
    for fault in script.FAULTS:
        text = (script.ROOT / "hymba" / fault.file).read_text()
        assert text.count(fault.old) == 1, fault.name
        assert fault.old != fault.new
        for test in fault.tests:
            assert test in script.GREEN, f"{fault.name}: {test} is not run without a fault"
            file, _, name = test.partition("::")
            assert f"def {name}(" in (script.ROOT / file).read_text() or not name, test
