"""Whether the C library's allocator gives memory back to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_pages() -> bool:
    """From now on, and until this process ends, freed memory stays with it; False where the C library (other than
    glibc) has no such setting.

    As it comes, glibc maps a large tensor anew whenever it is made, and the kernel clears every page of it: a fifth to
    a third of the time of networks on large maps, and more where several processes wait for the kernel at once. The
    price is that the process never shrinks below the most that it held.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is None:
        return False
    return bool(setting(_MMAP_MAX, 0)) and bool(setting(_TRIM_THRESHOLD, -1))
