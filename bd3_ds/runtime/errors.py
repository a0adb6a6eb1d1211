"""Errors and exit codes: 2 and one sentence for a user's mistake, 1 and a traceback for a bug of ours."""

from __future__ import annotations

import atexit
import difflib
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # by Ctrl-C: what shells report
EXIT_STOPPED = 75  # asked to stop, and everything is saved: start it again (EX_TEMPFAIL of sysexits.h)
EXIT_NO_READER = 141  # the reader of the output has exited (`| head`): what shells report of SIGPIPE
# Seconds until the first rank of another host, and then any rank, reports an error that rank 0 may have met too: by
# then the launcher, which ends all ranks when one has failed, has ended this one.
_FIRST_OF_HOST_WAITS, _OTHERS_WAIT = 3.0, 6.0
_silent: dict[str, float] = {}  # "wait": seconds, where another rank reports errors first
_SHOWN, _ALL = 4, 16  # names listed at most: similar ones, all known ones


class UserError(Exception):
    """A mistake that the user can correct; the message names the option, the value and what would do.

    Several problems found together are given as several messages and printed one a line.
    """

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = messages

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        """Pickled for other ranks it keeps its messages apart."""
        return type(self), self.messages


def did_you_mean(value: str, known: Iterable[str], first: Sequence[str] = (), otherwise: str = "") -> str:
    """The second half of an error about an unknown name: the names that may be meant, a few at most.

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

    Ctrl-C ends with one line and EXIT_INTERRUPTED; output whose reader has exited ends quietly, EXIT_NO_READER.
    Errors are reported whatever the environment says, unless `report_errors_once` was called.
    """
    _silent.clear()
    try:
        try:
            code = main(argv) or 0
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_has_exited():
            raise
        return EXIT_NO_READER
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _say(error, f"error: {error.strerror}{where}; nothing complete is lost: free some and start again")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:  # its text, if any, says what is kept and what goes on
        if not _silent:
            print(str(error) or "stopped", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except UserError as error:
        _say(error, *(f"error: {message}" for message in error.messages))
        return EXIT_USER_ERROR


def report_errors_once(env: Mapping[str, str]) -> None:
    """Called by a command whose processes are ranks of one job: an error that all meet is then reported once.

    A rank that fails alone reports too, after rank 0 has had time to. A single process always reports.
    """
    rank, size = env.get("RANK", "0"), env.get("WORLD_SIZE", "1")
    if rank != "0" and size != "1":
        _silent["wait"] = _FIRST_OF_HOST_WAITS if env.get("LOCAL_RANK", "0") == "0" else _OTHERS_WAIT


def raised_on_all_ranks(error: Exception) -> Exception:
    """Mark an error that every rank raises, so that only rank 0 reports it."""
    error.raised_on_all_ranks = True  # type: ignore[attr-defined]
    return error


def _say(error: Exception, *lines: str) -> None:
    """Print the lines to stderr; a rank other than the first waits for its launcher to end it."""
    if _silent:
        if getattr(error, "raised_on_all_ranks", False):
            return
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler would only note it
        time.sleep(_silent["wait"])
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _reader_has_exited() -> bool:
    """Whether stdout or stderr is a pipe without a reader; what is still to be written there is then discarded."""
    left = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is no file, as under a test
            number = stream.fileno()
            poll = select.poll()
            poll.register(number, select.POLLOUT)
            if any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
                left = True
    return left


def leave(code: int) -> NoReturn:
    """End the process now, after what is registered for the end of Python.

    The interpreter's teardown is skipped: in it, threads of torch and DeepSpeed have been seen to abort finished runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
