"""Argument parsing for all commands: a mistake ends with one sentence and exit code 2, without a usage dump."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.resources import ROOT


def program() -> str:
    """What the user types before the mode: run.py in a checkout, bd3-ds where the package is installed."""
    return "bd3-ds" if Path(sys.argv[0]).name == "bd3-ds" or not (ROOT / "run.py").is_file() else "run.py"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of leaving by itself; options may not be abbreviated.

    prog: such as `run.py train`; an installed package shows `bd3-ds train`.
    """

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog.replace("run.py", program()), description=description, allow_abbrev=False)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The options of `argv`; they may come before, between and after positional arguments."""
        # Looked for first: argparse would rather complain of the option that the misspelt one was meant to be.
        known = [name for action in self._actions for name in action.option_strings]
        for word in argv[: argv.index("--")] if "--" in argv else argv:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                raise UserError(f"unknown option {option}; {did_you_mean(option, known)} (see {self.prog} --help)")
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Called by argparse with its sentence."""
        raise UserError(f"{message} (see {self.prog} --help)")


def at_least_one(text: str) -> int:
    """argparse type: a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number above 0")
    return value
