"""What every test may ask for."""

import os
import random
import signal
import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and reference values; tests that need it skip where it is absent."""
    path = Path(os.environ.get("BD3_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no reference data at {path} (set BD3_SHARED)")
    return path
