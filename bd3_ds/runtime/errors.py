"""Whose fault it is: the user's mistakes end with exit code 2 and one sentence, ours with a traceback and 1."""

from __future__ import annotations

import atexit
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells say it
EXIT_STOPPED = 75  # asked to stop, and everything is saved: start it again (EX_TEMPFAIL of sysexits.h)
_SHOWN, _ALL = 4, 16  # names in a sentence: that may be meant, that there are


class UserError(Exception):
    """Something that the user can mend; the message names the option, the value and what would do.

    Several problems found together are given as several messages and printed one a line.
    """

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = messages

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        """Pickled for other ranks it keeps its messages apart."""
        return type(self), self.messages


def did_you_mean(value: str, known: Iterable[str], first: Sequence[str] = (), otherwise: str = "") -> str:
    """A half-sentence that helps after an unknown name: the names that may be meant, never a wall of them.

    `first` are names to offer before all others. Else one whose beginning, or a part, `value` is, else the most alike;
    where none is, `otherwise`, or the known ones.
    """
    options = sorted(set(known))
    found = list(first) or alike(value, options)
    if found:
        shown = [f"'{name}'" for name in found[:_SHOWN]]
        rest = f" (or {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        return f"did you mean {' or '.join(filter(None, [', '.join(shown[:-1]), shown[-1]]))}{rest}?"
    if otherwise:
        return otherwise
    if len(options) <= _ALL:
        return "known: " + ", ".join(options)
    return f"known: {', '.join(options[:_ALL])} and {len(options) - _ALL} more"


def alike(value: str, known: Iterable[str]) -> list[str]:
    """The known names that begin with `value`; else the one most alike; else those that `value` is a part of."""
    options = sorted(set(known))
    folded = value.casefold()
    begun = [name for name in options if len(folded) > 2 and name.casefold().startswith(folded)]
    if begun:
        return begun
    by_folded = {name.casefold(): name for name in options}
    close = difflib.get_close_matches(folded, list(by_folded), n=1, cutoff=0.6)
    if close:
        return [by_folded[close[0]]]
    return [name for name in options if len(folded) > 2 and folded in name.casefold()]


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command's main function and turn a UserError, or a full disk, into its sentence and exit code 2.

    Under a launcher every rank meets the same mistake; only global rank 0 prints it.
    """
    try:
        return main(argv) or 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; nothing complete is lost: free some and start again", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:  # its text, if any, says what is kept and what goes on
        print(str(error) or "stopped", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            for message in error.messages:
                print(f"error: {message}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def leave(code: int) -> NoReturn:
    """End the process now, after what is registered for the end of Python.

    The interpreter's teardown is left out: in it, threads of torch and DeepSpeed have been seen to abort finished runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
