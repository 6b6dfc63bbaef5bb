"""Memory: what the machine has, and what was freed but not given back.

spare_memory()                   # once, at the start of a process
give_back()                      # after a large thing was freed
fits(model_bytes)                # small enough to be checked in one piece
"""

import ctypes
import os
from pathlib import Path

WHOLE_SHARE = 1 / 16
"""Models whose bf16 weights take less of the machine's memory are held whole where one layer would do."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
CACHED = "16"
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 1 << 20
M_TRIM_THRESHOLD, SPARE_BYTES = -1, 1 << 26


def spare_memory() -> None:
    """Have this process keep little that it does not use; it must not have multiplied matrices yet.

    oneDNN keeps 16 compiled products of bf16 matrices, in torch's cache and in its own, instead of 1024 each. One holds
    about 0.7 MB, and experts meet another number of tokens in every batch, so that almost none is used again: a
    calibrated method grew by up to 0.7 GB (seen). And glibc gives tensors of 1 MB and more back as soon as they are
    freed. By itself it learns to keep ever larger ones: unpacking a layer took twice the layer (seen). Smaller ones it
    may keep, up to 64 MB of them; else it gives back the end of its heap and asks for it again with every operation: a
    third of the time of rounding to nearest (seen).
    """
    for name in CACHES:
        os.environ.setdefault(name, CACHED)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, SPARE_BYTES)


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc keeps what lies between live blocks).

    Without it a process that frees a decoder layer after another still grows with the number of layers (seen).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def fits(needed: int) -> bool:
    """Whether so many bytes are less than WHOLE_SHARE of the memory that this machine, or container, has."""
    return needed <= WHOLE_SHARE * total_bytes()


def total_bytes() -> int:
    """Memory of the machine, or the container's limit where that is less; the same at any time."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, LIMITS):
        if path.is_file() and (content := path.read_text().strip()).isdigit():
            limits.append(int(content))
    return min(limits)
