"""Loss and gradients of ranks that share sequences, beside those of one rank, at two lengths.

    python -m benchmarks.long_context [--lengths 2048 16384] [--ranks 2] [--json FILE]

A tiny network (two layers, heads of width 16) with random weights, one micro-batch, fp32. Differences are the largest,
relative to the largest number of their kind; gradients' are those of the parameter that fares worst. See
tests/helpers/sequence_probe.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import finish, parser
from tests.helpers.launch import ROOT, environment, free_port

OBJECTIVES = ("bd3", "ar", "mdlm", "sedd")


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384])
    options.add_argument("--ranks", type=int, default=2, help="that share the sequence")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["bd3"])
    asked = options.parse_args(argv)
    cases = [
        {"objective": objective, "length": length, "block_size": asked.block_size, "rows": 1, "heads": asked.ranks}
        for objective in asked.objectives
        for length in asked.lengths
    ]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", str(asked.ranks)]
    words = ["--master_port", str(free_port()), "tests/helpers/sequence_probe.py", json.dumps(cases)]
    done = subprocess.run([*launcher, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    found = [json.loads(line) for line in re.findall(r"RESULT (.*)", done.stdout)]
    if len(found) != len(cases):
        print(done.stdout + done.stderr, file=sys.stderr)
        return 1
    settings = {"lengths": asked.lengths, "ranks": asked.ranks, "block_size": asked.block_size}
    rows = [case | differences for case, differences in zip(cases, found, strict=True)]
    finish("long_context", settings, rows, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
