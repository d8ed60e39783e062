"""Keep freed memory in the process: on a CPU, every step's scratch arrays come from `malloc`."""

from __future__ import annotations

import ctypes
import platform

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
TOP_PAD = 64 << 20
NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let glibc reuse what a step frees instead of giving it back to the kernel.

    Given back, every page of the next step's scratch memory is a page fault, some 3 microseconds
    in a virtual machine: a seventh of a training step's time (docs/performance.md). The price is
    that the process keeps its peak size. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    libc.mallopt(M_TOP_PAD, TOP_PAD)
