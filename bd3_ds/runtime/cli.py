"""Command lines whose mistakes are the user's: one sentence, exit code 2, no usage dump."""

from __future__ import annotations

import argparse
from typing import NoReturn

from bd3_ds.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of leaving by itself; options may not be abbreviated."""

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Called by argparse with its sentence."""
        raise UserError(f"{message} (see {self.prog} --help)")
