"""Make the C allocator keep what tensors free, so that a CPU step does not fault pages in again."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# mallopt's parameters (glibc's malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Serve large tensors from the heap and never give it back; True where the library obeys.

    glibc maps every block over 128 KiB anew and returns it to the kernel when freed, so each
    activation is faulted in page by page at every step. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    largest_mmap_threshold = 32 * 2**20  # glibc refuses more
    settings = [
        (_MMAP_THRESHOLD, largest_mmap_threshold),
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_TOP_PAD, 256 * 2**20),
    ]
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)
