"""Memory that was freed but not given back.

give_back()
"""

import ctypes


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc keeps what lies between live blocks).

    Without it a process that frees a decoder layer after another still grows with the number of layers (seen).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
