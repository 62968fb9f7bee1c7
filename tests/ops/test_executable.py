"""Memory for machine code: it runs, is never writable and executable at once, and goes away with its object."""

import ctypes
import gc
import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from ops.kernels import executable
from ops.kernels.executable import Executable, ExecutableError, executable_available

needs_memory = pytest.mark.skipif(not executable_available(), reason="this system gives no executable memory")
needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
RETURN_42 = np.frombuffer(bytes.fromhex("b82a000000c3"), np.uint8)  # mov eax, 42; ret


def _rights(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        if low <= address < high:
            return line.split(" ")[1]
    return ""


@needs_memory
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the code is x86-64")
def test_code_runs():
    memory = Executable(RETURN_42)
    assert ctypes.CFUNCTYPE(ctypes.c_int)(memory.address)() == 42


@needs_memory
@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 1 << 20])
def test_memory_holds_the_code_in_whole_pages(size):
    code = np.arange(size, dtype=np.uint32).astype(np.uint8)
    memory = Executable(code)
    assert memory.address % mmap.PAGESIZE == 0
    assert memory.nbytes == max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    assert ctypes.string_at(memory.address, size) == code.tobytes()


@needs_memory
@needs_maps
def test_memory_is_never_writable_and_executable(monkeypatch):
    seen = []
    libc = executable._libc()

    class Spy:
        def __getattr__(self, name):
            def call(*arguments):
                result = getattr(libc, name)(*arguments)
                address = result if name == "mmap" else arguments[0]
                seen.append((name, _rights(address)))
                return result

            return call

    monkeypatch.setattr(executable, "_libc", Spy)
    memory = Executable(RETURN_42)
    assert [name for name, _ in seen] == ["mmap", "mprotect"]
    assert [rights[:3] for _, rights in seen] == ["rw-", "r-x"]
    assert _rights(memory.address).startswith("r-x")


@needs_memory
@needs_maps
def test_memory_goes_with_the_object():
    # 40 pages on their own: a freed mapping is either absent or somebody else's, so look at many
    memories = [Executable(RETURN_42) for _ in range(40)]
    addresses = [memory.address for memory in memories]
    assert all(_rights(address).startswith("r-x") for address in addresses)
    del memories
    gc.collect()
    assert not any(_rights(address).startswith("r-x") for address in addresses)


class _Refusing:
    """A C library on which one call fails."""

    def __init__(self, refused):
        self.refused, self.released, self.page = refused, [], ctypes.create_string_buffer(1 << 16)

    def mmap(self, *arguments):
        return ctypes.c_void_p(-1).value if self.refused == "mmap" else ctypes.addressof(self.page)

    def mprotect(self, *arguments):
        return -1 if self.refused == "mprotect" else 0

    def munmap(self, *arguments):
        self.released.append(arguments)


@pytest.mark.parametrize("refused", ["mmap", "mprotect"])
def test_refusals_are_told_and_leave_nothing_behind(monkeypatch, refused):
    libc = _Refusing(refused)
    monkeypatch.setattr(executable, "_libc", lambda: libc)
    with pytest.raises(ExecutableError, match=refused):
        Executable(RETURN_42)
    assert len(libc.released) == (refused == "mprotect")
    executable_available.cache_clear()
    try:
        assert not executable_available()
    finally:
        executable_available.cache_clear()


def test_systems_without_posix_are_refused(monkeypatch):
    executable._libc.cache_clear()
    monkeypatch.setattr(executable.os, "name", "nt")
    try:
        with pytest.raises(ExecutableError, match="'nt'"):
            executable._libc()
    finally:
        executable._libc.cache_clear()
