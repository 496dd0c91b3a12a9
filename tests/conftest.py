"""What every test run shares: threads, offline hubs, seeds, and how many cases the property tests take."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, (os.cpu_count() or 1) // _workers)
# Before torch is imported, and through the environment, so that subprocesses of a test keep to it as well.
if _workers > 1 or "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(_threads)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# What this machine has downloaded is nothing that a test may find.
_hub = Path(tempfile.mkdtemp(prefix="hymba-hub-"))
atexit.register(shutil.rmtree, _hub, ignore_errors=True)
os.environ["HF_HUB_CACHE"] = str(_hub)

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Cases of each property test; with the eight of tests/property, "thorough" is 10,000 in all.
# A test that sets max_examples itself is deaf to these: let it not.
# "ci" repeats the same cases, so that a red run is red again; "thorough" looks for new ones.
_common = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("brief", _common, max_examples=5, derandomize=True, database=None)
settings.register_profile("ci", _common, max_examples=40, derandomize=True, database=None)
settings.register_profile("thorough", _common, max_examples=1300)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--property-cases",
        type=int,
        default=0,
        metavar="N",
        help="fail unless the property tests ran N cases in all",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(_threads)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_CaseCounter(config), "property-case-counter")
        config.pluginmanager.register(_LeftOut(), "code-blocks-left-out")


def pytest_report_header(config: pytest.Config) -> str:
    # Says what was tested: the oldest-transformers and wheel runs differ in nothing else.
    package = importlib.util.find_spec("hymba")
    where = package.submodule_search_locations if package else "not installed"
    return f"hymba: {where}, torch {torch.__version__}, transformers {transformers.__version__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and (statistics := getattr(item, "hypothesis_statistics", None)):
        # user_properties is what pytest-xdist carries from a worker to the session that sums up.
        passing = sum(map(int, re.findall(r"(\d+) passing", statistics)))
        report.user_properties.append(("property_cases", passing))
    return report


class _CaseCounter:
    """Adds up the property cases of all workers, and fails the session when they are too few."""

    def __init__(self, config: pytest.Config) -> None:
        self.wanted: int = config.getoption("--property-cases")
        self.cases = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.cases += sum(n for name, n in report.user_properties if name == "property_cases")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.cases < self.wanted and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.cases or self.wanted:
            wanted = f", wanted at least {self.wanted}" if self.wanted else ""
            short = "ERROR: " if self.cases < self.wanted else ""
            terminalreporter.write_line(f"{short}property cases: {self.cases}{wanted}")


class _LeftOut:
    """Lists the code blocks of the manual that are marked not to run, with the reason of each."""

    def __init__(self) -> None:
        self.blocks: list[object] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.blocks += [block for name, block in report.user_properties if name == "not_run"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.blocks:
            terminalreporter.section("code blocks that are marked not to run")
            for block in self.blocks:
                terminalreporter.write_line(str(block))


@pytest.fixture(scope="session")
def hub_stand_in() -> Callable[[str, Path], None]:
    """Makes a hub id mean a folder's files, for this session: `hub_stand_in("owner/name", folder)`."""

    def stand_in(name: str, folder: Path) -> None:
        repository = _hub / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)

    return stand_in


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
