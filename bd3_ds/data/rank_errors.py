"""Reading errors that several ranks meet are reported once."""

from __future__ import annotations

import sys

import torch

from bd3_ds.data.share import Share
from bd3_ds.runtime.errors import EXIT_USER_ERROR, UserError


def of_all_ranks(error: UserError, share: Share) -> BaseException:
    """What this rank raises for `error`: `run_command` prints what global rank 0 raises, and no other rank's.

    A broken shard is met by some ranks or by all, so the first to meet it reports it.
    """
    if not torch.distributed.is_initialized():
        return error
    try:
        first = torch.distributed.distributed_c10d._get_default_store().add("bd3_ds/data-failure", 1) == 1
    except RuntimeError:  # the store has gone with the rank that held it, and that has its own reason
        first = False
    if first and share.rank == 0:
        return error
    if first:
        print(file=sys.stderr)  # rank 0 has its progress bar on the console's line
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr, flush=True)
    return SystemExit(EXIT_USER_ERROR)
