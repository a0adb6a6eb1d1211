"""What every test may ask for."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and reference values; tests that need it skip where it is absent."""
    path = Path(os.environ.get("BD3_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no reference data at {path} (set BD3_SHARED)")
    return path
