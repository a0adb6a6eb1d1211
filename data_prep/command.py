"""Command-line parsing whose mistakes are one sentence like all others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from bd3_ds.runtime.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError and takes no abbreviated options."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """`parse_args` that names the nearest option to an unknown one."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            hint = did_you_mean(unknown[0], known) if unknown[0].startswith("-") else "--help lists the options"
            raise UserError(f"unknown argument '{unknown[0]}'; {hint}")
        return options


def whole_number(option: str, text: str, least: int, unit: str = "") -> int:
    """`text` as an integer of at least `least`, or UserError naming `option`."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"{option} {text}: must be a whole number of at least {least}{' ' + unit if unit else ''}")
    return value


def local_directory(option: str, text: str) -> Path:
    """`text` as a path on this machine, or UserError for a remote address or a file in the way."""
    if "://" in text:
        raise UserError(
            f"{option} {text}: packs are written to local directories; give one and copy it there when it is done "
            "(`aws s3 sync DIR s3://...`, `gsutil rsync`)"
        )
    path = Path(text).expanduser()
    if not text or path.is_file():
        raise UserError(f"{option} '{text}': must name a directory" + (", but is a file" if text else ""))
    return path
