#!/usr/bin/env python
"""Does the test suite see faults? Plants them one at a time into a copy of the package and runs tests against it.

    python scripts/plant_faults.py            # all faults
    python scripts/plant_faults.py --list
    python scripts/plant_faults.py --only "a stale meta state"

Each fault must turn a test red, and the copy without a fault must be green; otherwise the exit status is 1. A fault is
a piece of text that stands exactly once in its file: when the code moves on, this script says so instead of planting
nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where each kind of fault has to show: few tests, so that a fault costs little more than starting Python.
GOLDEN = "tests/parity/test_golden.py"
FORWARD = (f"{GOLDEN}::test_forward",)
CACHE = (f"{GOLDEN}::test_through_the_cache",)
PADDED = (f"{GOLDEN}::test_in_a_padded_batch",)
GRADIENTS = (f"{GOLDEN}::test_gradients_in_evaluation_with_a_cache",)
PACKED = ("tests/test_packed.py::test_documents_equal_apart", "tests/test_packed.py::test_a_neighbour_changes_nothing")
META = ("tests/test_meta_state.py::test_never_stale",)
STATE = ("tests/test_state.py",)
GENERATE = (
    "tests/test_generate.py::test_beams_of_a_padded_batch",
    "tests/test_generate.py::test_without_a_mask_nothing_is_padding",
)
GREEN = (*FORWARD, *CACHE, *PADDED, *GRADIENTS, *PACKED, *META, *STATE, *GENERATE)


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: what is wrong. file: below `hymba/`. old, new: the text replaced, and by what.
        tests: where it has to show.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = FORWARD


FAULTS = (
    Fault("a window one too narrow", "ops/masks.py", "seen & (q - k <= window)", "seen & (q - k < window)"),
    Fault("a window one too wide", "ops/masks.py", "seen & (q - k <= window)", "seen & (q - k <= window + 1)"),
    Fault(
        "a conv window that is not shifted",
        "nn/mamba.py",
        "state.store_mamba(conv=conv, ssm=ssm)",
        "state.store_mamba(conv=conv if state.conv is None else state.conv, ssm=ssm)",
        CACHE,
    ),
    Fault("the meta tokens' SSM state dropped", "nn/state.py", "            ssm=self.ssm,\n        )", "        )"),
    Fault(
        "the meta tokens' keys dropped",
        "nn/state.py",
        "prefix_k=None if kv is None or kv.keys is None else kv.keys.contiguous(),\n"
        "            prefix_v=None if kv is None or kv.values is None else kv.values.contiguous(),",
        "prefix_k=None,\n            prefix_v=None,",
    ),
    Fault(
        "padding that enters the scan",
        "nn/mamba.py",
        "initial_state=state.ssm, lengths=lengths, seq_idx=seq_idx",
        "initial_state=state.ssm, seq_idx=seq_idx",
        PADDED,
    ),
    Fault(
        "padding that enters the conv window",
        "nn/mamba.py",
        "return causal_conv1d(x, weight, bias, initial_state=state, lengths=lengths, seq_idx=seq_idx)",
        "return causal_conv1d(x, weight, bias, initial_state=state, seq_idx=seq_idx)",
        PADDED,
    ),
    Fault(
        "a fixed ring one slot short",
        "nn/state.py",
        "min(self.capacity, self.window + 1)",
        "min(self.capacity, self.window)",
        STATE,
    ),
    Fault(
        "a cache that cuts the meta tokens' gradient",
        "model.py",
        "cache.functional(i, own)",
        "cache.functional(i)",
        GRADIENTS,
    ),
    Fault(
        "a wrong borrower",
        "model.py",
        "shared[i] = kv.apart() if lean and not span.columns else kv",
        "shared[i] = shared[-1] = shared.get(-1, kv)  # what the first lender lends",
    ),
    Fault(
        "rotary positions one off behind the meta tokens",
        "nn/attention.py",
        "rope_tables(span.positions + span.offset,",
        "rope_tables(span.positions + (span.offset and span.offset - 1),",
    ),
    Fault(
        "branch norms swapped",
        "nn/hybrid.py",
        "first, second = self.attention_norm, self.mamba_norm",
        "second, first = self.attention_norm, self.mamba_norm",
    ),
    Fault(
        "a stale meta state",
        "model.py",
        "        if self._frozen is None or torch.is_grad_enabled():",
        "        self._frozen = {} if self._frozen is None else self._frozen\n        if torch.is_grad_enabled():",
        META,
    ),
    Fault(
        "a packed document whose attention sees its neighbour",
        "ops/masks.py",
        "query_document[:, :, None] == key_document[:, None, :]",
        "query_document[:, :, None] >= key_document[:, None, :]",
        PACKED,
    ),
    Fault(
        "a packed document whose convolution sees its neighbour",
        "nn/mamba.py",
        "u, conv = self.conv1d(x, state.conv, lengths=lengths, seq_idx=seq_idx)",
        "u, conv = self.conv1d(x, state.conv, lengths=lengths)",
        PACKED,
    ),
    Fault(
        "a key written to its neighbour's slot",
        "nn/state.py",
        "at = first % slots",
        "at = (first + 1) % slots",
        CACHE,
    ),
    Fault(
        "beams that keep another beam's state",
        "cache.py",
        "        self.select(beam_idx)",
        "        pass",
        GENERATE,
    ),
    Fault(
        "ended rows that take in padding",
        "generation.py",
        "torch.where(finished.done.to(mask.device), 0, mask[:, -1])",
        "mask[:, -1]",
        STATE,
    ),
    Fault(
        "padding guessed from token ids",
        "generation.py",
        "return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)",
        "return (inputs_tensor != 0).long()",
        GENERATE,
    ),
)


def copy_package(folder: Path) -> None:
    """What a test run needs, without the version control's and the tools' folders."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("hymba", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status of pytest in the copy, and the first red test (or the end of what it printed)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "brief"]
    done = subprocess.run(
        [*command, *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        # The copy comes first; an installed package would otherwise be what is tested.
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    red = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, red.group(1) if red else done.stdout.strip().splitlines()[-1:][0] if done.stdout else ""


def plant(fault: Fault | None) -> tuple[str, bool, str, float]:
    """Run the tests against a copy with this fault (`None`: without one): name, as it should be, first red test."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hymba-fault-") as temporary:
        folder = Path(temporary)
        copy_package(folder)
        if fault is not None:
            path = folder / "hymba" / fault.file
            text = path.read_text()
            if text.count(fault.old) != 1:
                found = text.count(fault.old)
                return fault.name, False, f"its text stands {found} times in hymba/{fault.file}, expected once", 0.0
            path.write_text(text.replace(fault.old, fault.new))
        status, red = run_tests(folder, GREEN if fault is None else fault.tests)
    # 1 is "tests failed"; anything else (collection, usage) would not be the fault's doing.
    good = status == 0 if fault is None else status == 1
    return "no fault" if fault is None else fault.name, good, red, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="plant this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    names = [fault.name for fault in FAULTS]
    if arguments.list:
        print("\n".join(names))
        return
    unknown = set(arguments.only) - set(names)
    if unknown:
        parser.error(f"no fault named {', '.join(sorted(unknown))}; --list names them")
    chosen: list[Fault | None] = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    chosen.append(None)
    failed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for name, good, red, seconds in pool.map(plant, chosen):
            print(f"{'ok ' if good else 'BAD'} {seconds:5.0f} s  {name:56s} {red}", flush=True)
            if not good:
                failed.append(name)
    if failed:
        sys.exit(f"not as they should be: {', '.join(failed)}")
    print(f"{len(chosen) - 1} faults planted, each turned a test red; without a fault all are green")


if __name__ == "__main__":
    main()
