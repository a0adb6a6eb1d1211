"""What every test may ask for."""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Threads that wait for each other cost more than networks of this size.
torch.set_num_threads(1)

# An example may take as long as it takes: no test is about time, and a machine may be busy with the others.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# In the background of a shell Ctrl-C is ignored, and so would every command be that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers each time, also where it names no generator."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def stand_back(request: pytest.FixtureRequest) -> None:
    """Where several processes run tests, those of units leave the cores to the ranks of launched runs beside them.

    DeepSpeed's collectives on CPUs wait in a loop: a rank whose partner has no core burns its own.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and not _launches(request.node.nodeid) and os.nice(0) == 0:
        os.nice(10)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and reference values; tests that need it skip where it is absent."""
    path = Path(os.environ.get("BD3_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no reference data at {path} (set BD3_SHARED)")
    return path


def _launches(nodeid: str) -> bool:
    return nodeid.startswith(("tests/distributed/", "tests/fault/"))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests that launch runs, one by one: two runs at once would fight for two cores.

    The others take the files of tests/unit; so a file's fixtures are made once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "launched" if _launches(nodeid) else nodeid.partition("::")[0]

    return ByRoom(config, log)
