"""run.py that prints how often it opened each file of a pack's facts; for one test.

    python tests/helpers/counted_opens.py train RECIPE [key=value …]

Loader processes and whatever else is forked do not count.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import run

NAMES = ("manifest.json", "token_counts.npy")
OPENED: Counter[str] = Counter()
PID = os.getpid()


def count(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: PACK/NAME of each file that is opened."""
    if event == "open" and isinstance(arguments[0], str | os.PathLike) and os.getpid() == PID:
        path = Path(arguments[0])
        if path.name in NAMES:
            OPENED[f"{path.parent.name}/{path.name}"] += 1


sys.addaudithook(count)
code = run.main(sys.argv[1:])
print("OPENED", json.dumps(OPENED), flush=True)
sys.exit(code)
