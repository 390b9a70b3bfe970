"""Memory that a network frees is kept for its next call.

By default glibc hands every large block back to the operating system as soon as it is freed, and asks for it, zeroed page by page, for the next tensor. That
can take as long as computing with it: see the rows "memory kept" of `benchmarks.evaluation`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""As `malloc.h` numbers them."""

KEPT = 2**30
"""Bytes: larger blocks are handed back, and so is what is free at the end of the heap beyond as many."""

LARGEST = 2**25
"""The largest threshold of a block that older versions of glibc take."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """For this process, from now on; whether its C library can be told so."""
    return set_thresholds(KEPT, KEPT)


def set_thresholds(block: int, heap: int) -> bool:
    """Bytes from which on a freed block, and free memory at the end of the heap, are handed back."""
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    blocks = tell(MMAP_THRESHOLD, block) or tell(MMAP_THRESHOLD, min(block, LARGEST))
    return bool(blocks and tell(TRIM_THRESHOLD, heap))
