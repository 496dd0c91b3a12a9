"""What is written in several files agrees, and what users need is inside the installed package."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")


def name(requirement: str) -> str:
    """The package of a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def test_one_version() -> None:
    versions = {
        "pyproject.toml": PROJECT["version"],
        "installed": importlib.metadata.version("hymba"),
        "CITATION.cff": re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[1],
        "CHANGELOG.md": re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1],
    }
    assert len(set(versions.values())) == 1, versions


def test_every_dependency_is_pinned_in_the_one_file() -> None:
    pinned = {name(line) for line in CONSTRAINTS.splitlines() if re.match(r"[A-Za-z]\S*==\S+$", line)}
    extras = PROJECT["optional-dependencies"]
    wanted = {name(r) for r in [*PROJECT["dependencies"], *extras["dev"], *extras["datasets"]]} - {"hymba"}
    assert wanted <= pinned, f"without a version in constraints.txt: {sorted(wanted - pinned)}"


def test_the_oldest_transformers_tested_is_the_oldest_accepted() -> None:
    tested = re.search(r"^# overlay oldest: transformers==(\d+\.\d+)\.0$", CONSTRAINTS, re.M)[1]
    accepted = next(r for r in PROJECT["dependencies"] if name(r) == "transformers")
    assert accepted == f"transformers>={tested},<{int(tested.split('.')[0]) + 1}"


def test_the_installed_package_has_its_data() -> None:
    package = files("hymba")
    assert (package / "py.typed").is_file()
    default = package / "assets" / "default"
    assert (default / "config.json").is_file()
    assert (default / "model.safetensors").is_file()


def test_every_folder_of_modules_is_a_package() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel, and nothing in a checkout misses it.
    folders = {path.parent for path in Path(str(files("hymba"))).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_command_is_installed() -> None:
    scripts = importlib.metadata.distribution("hymba").entry_points.select(group="console_scripts")
    assert {(s.name, s.value) for s in scripts} == {("hymba", "hymba.cli:app")}
