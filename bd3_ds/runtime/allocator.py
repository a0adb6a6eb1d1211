"""Tuning of the C library's allocator for tensors on the host."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Reuse the pages of freed tensors instead of giving them back.

    glibc maps every allocation of 32 MiB and more anew, and the first touch of its pages costs as much as a product
    over them: on CPUs an activation's elementwise work took twice as long. Another C library is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
