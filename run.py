"""The entry of the project: `deepspeed run.py train RECIPE …`, `python run.py MODE …`.

Every mode explains itself with --help. Its module is imported only when it is asked for, and imports torch only after
the arguments have been checked.
"""

from __future__ import annotations

import importlib
import sys

from bd3_ds.runtime.errors import UserError, did_you_mean, leave, run_command

MODES = {
    "train": "bd3_ds.commands.train",
    "check": "bd3_ds.commands.check",
    "evaluate": "bd3_ds.commands.evaluate",
    "eval-worker": "bd3_ds.commands.eval_worker",
    "variance": "bd3_ds.commands.variance",
    "sample": "bd3_ds.commands.sample",
    "quality": "bd3_ds.commands.quality",
    "denoising": "bd3_ds.commands.denoising",
    "report": "bd3_ds.commands.report",
    "convert": "bd3_ds.commands.convert",
    "summary": "bd3_ds.commands.summary",
    "harness": "bd3_ds.evaluation.harness.lm_eval",
}


def main(argv: list[str]) -> int | None:
    """Hand over to the mode's own main function."""
    # DeepSpeed's launcher adds --local_rank=N; the number is in the environment as well.
    argv = [word for word in argv if not word.startswith("--local_rank")]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: run.py MODE …\nmodes: {', '.join(MODES)}\n`run.py MODE --help` explains each")
        return 0 if argv else 2
    mode, *rest = argv
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}'; {did_you_mean(mode, MODES)}")
    command: int | None = importlib.import_module(MODES[mode]).main(rest)
    return command


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
