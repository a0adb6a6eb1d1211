"""`run.py harness --model bd3 …`: lm_eval's own command line, in which the model `bd3` is known."""

from __future__ import annotations

import sys

from bd3_ds.evaluation.harness.lm_eval import harness_model, with_device


def main(argv: list[str]) -> int:
    """Hand over to lm_eval; raises UserError where it is not installed."""
    harness_model()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *with_device(argv)]  # lm_eval reads no other
    cli_evaluate()
    return 0
