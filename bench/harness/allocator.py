"""How the process that measures gets its memory: the same for every arm, and part of its result.

By default the C library hands large arrays back to the system and takes them anew, so that an arm
pays for page faults (6,144 for an array of 24 MiB) or not, depending on what ran before it. Servers
avoid that with an allocator that keeps what is freed; so do the benchmarks.
"""

import ctypes
import os

# Parameters of glibc's mallopt, and values beyond any array here.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
SETTINGS = ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, (1 << 31) - 1), (TOP_PAD, 64 << 20))


def environment() -> dict[str, str]:
    """The same for another process that an arm starts."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    found = {name: str(value) for name, (_, value) in zip(names, SETTINGS, strict=True)}
    return found | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> dict[str, bool]:
    """Called before the first tensor exists; says what took effect."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages for large arrays
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        kept = False
    else:
        kept = all([mallopt(parameter, value) for parameter, value in SETTINGS])
    return {"freed_memory_kept": kept, "large_pages": os.environ["THP_MEM_ALLOC_ENABLE"] == "1"}
