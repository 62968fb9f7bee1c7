"""Memory that machine code may be run from, never writable and executable at once.

Code is copied into fresh pages while they are writable; then the pages become executable and read-only, and stay so until the
object is gone. Where the system forbids it (hardened kernels, Windows), `Executable` raises `ExecutableError` and the
caller takes a kernel that needs no code of its own.

Start with `Executable`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["Executable", "ExecutableError", "executable_available"]

_READ, _WRITE, _EXECUTE = 1, 2, 4  # PROT_*, equal on all POSIX systems


class ExecutableError(OSError):
    """The system gives no executable memory; says which call failed and why."""


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    if os.name != "posix":
        raise ExecutableError(f"executable memory is taken with mmap and mprotect, which {os.name!r} systems lack")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class Executable:
    """Machine code, ready to be called.

    Args:
        code: uint8[n], position-independent.

    Attributes:
        address: of the first byte, a multiple of the page size.
        nbytes: of the pages held.

    Raises:
        ExecutableError: the system refuses.
    """

    def __init__(self, code: npt.NDArray[np.uint8]) -> None:
        libc = _libc()
        self.nbytes = -(-max(1, code.size) // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = libc.mmap(None, self.nbytes, _READ | _WRITE, flags, -1, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise ExecutableError(f"no memory for {self.nbytes} bytes of machine code: {_reason('mmap')}")
        self._release = weakref.finalize(self, libc.munmap, address, self.nbytes)
        ctypes.memmove(address, np.ascontiguousarray(code).ctypes.data, code.size)
        if libc.mprotect(address, self.nbytes, _READ | _EXECUTE) != 0:
            reason = _reason("mprotect")
            self._release()
            raise ExecutableError(f"this system forbids running generated machine code: {reason}")
        self.address = int(address)


def _reason(call: str) -> str:
    number = ctypes.get_errno()
    return f"{call} failed with {os.strerror(number)} ({number})"


@lru_cache(maxsize=1)
def executable_available() -> bool:
    """Whether this system lets a process run code it wrote itself; tried once."""
    try:
        Executable(np.zeros(1, np.uint8))
    except (ExecutableError, OSError, AttributeError):
        return False
    return True
