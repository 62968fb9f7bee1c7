"""Threads that run the steps of a program together: `crew(threads).run(program)`.

Between two steps all threads meet at a barrier. They wait by spinning, because a step takes microseconds and waking a thread
takes tens of them; after a run they spin on for a moment in case the next one follows, then sleep. One program at a time per
crew; a second caller waits. With one thread there is no crew: `run_alone`.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ops.kernels.atomics import (
    atomic_add,
    atomic_read,
    atomic_write,
    flush_subnormals,
    pause,
    restore_mode,
    yield_core,
)
from ops.kernels.vector import call_kernel, jit

__all__ = ["Crew", "crew", "run_alone"]

# Places of the shared array, each in a cache line of its own: number of the current run, threads that passed barriers since the
# beginning, that count when the run began, address and length of the program.
_RUN, _PASSED, _BEGAN, _PROGRAM, _LENGTH = 0, 8, 16, 24, 25
SPINS = 20_000  # some 0.5 ms of waiting for the next run before a thread sleeps
PATIENCE = 2_000  # spins at a barrier before the core is offered to somebody else


@jit
def run_alone(program, thread, threads):
    """Run (function, descriptor) pairs one after another on this thread, as share `thread` of `threads`."""
    mode = flush_subnormals()
    for i in range(program.shape[0] // 2):
        call_kernel(program[2 * i], program[2 * i + 1], thread, threads)
    restore_mode(mode)


@jit
def _read(address, i):
    return atomic_read(address + 8 * i)


@jit
def _run(shared, thread, threads):
    """This thread's share of the current run, with a barrier after every step."""
    program, began = _read(shared, _PROGRAM), _read(shared, _BEGAN)
    for i in range(_read(shared, _LENGTH)):
        call_kernel(atomic_read(program + 16 * i), atomic_read(program + 16 * i + 8), thread, threads)
        atomic_add(shared + 8 * _PASSED, 1)
        wanted, spins = began + (i + 1) * threads, 0
        while _read(shared, _PASSED) < wanted:
            spins += 1
            if spins % PATIENCE == 0:
                yield_core()
            pause()


@jit
def _lead(shared, run, program, length, threads):
    """Publish a run and take part as thread 0; returns when all steps are done by all. One call, which no signal interrupts."""
    mode = flush_subnormals()
    atomic_write(shared + 8 * _BEGAN, _read(shared, _PASSED))
    atomic_write(shared + 8 * _PROGRAM, program)
    atomic_write(shared + 8 * _LENGTH, length)
    atomic_write(shared + 8 * _RUN, run)
    _run(shared, 0, threads)
    restore_mode(mode)


@jit
def _follow(shared, seen, thread, threads):
    """Take part in runs after number `seen` until none came for a while; returns the last run seen."""
    mode = flush_subnormals()
    spins = 0
    while spins < SPINS:
        current = _read(shared, _RUN)
        if current != seen:
            _run(shared, thread, threads)
            seen = current
            spins = 0
        spins += 1
        pause()
    restore_mode(mode)
    return seen


class Crew:
    """`threads` - 1 waiting threads and whoever calls `run`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._shared = np.zeros(64, np.int64)
        self._address = self._shared.ctypes.data
        self._turn = threading.Lock()
        self._number = 0
        # Closed while their thread sleeps. Plain locks, not events: a signal's exception in the middle of `Event.set` would
        # leave the event locked for ever.
        self._gates = [threading.Lock() for _ in range(1, threads)]
        for gate in self._gates:
            gate.acquire()
        # compile here, so that the threads never do
        _follow.compile("(int64, int64, int64, int64)")
        _lead.compile("(int64, int64, int64, int64, int64)")
        for thread, gate in enumerate(self._gates, 1):
            threading.Thread(target=self._work, args=(thread, gate), daemon=True, name=f"ops-{thread}").start()

    def run(self, program: npt.NDArray[np.int64]) -> None:
        """Run (function, descriptor) pairs, int64[2 * steps]; returns when all is done."""
        with self._turn:
            self._number += 1
            for gate in self._gates:
                if gate.locked():
                    gate.release()
            _lead(self._address, self._number, program.ctypes.data, program.size // 2, self.threads)

    def _work(self, thread: int, gate: threading.Lock) -> None:
        seen = 0
        while True:
            gate.acquire()
            while seen < self._number:  # woken for a run that may not be published yet
                seen = _follow(self._address, seen, thread, self.threads)


@lru_cache
def _crew(threads: int, process: int) -> Crew:
    return Crew(threads)


def crew(threads: int) -> Crew:
    """The crew of this process with that many threads; made at the first call."""
    return _crew(threads, os.getpid())
