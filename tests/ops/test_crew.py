"""Programs on several threads: every share of every step runs once, after all of the step before, also after the threads slept."""

from __future__ import annotations

import threading
import time
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from ops.kernels.crew import Crew, crew
from ops.kernels.vector import kernel, read_i64, write_i64

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="compiled code only")  # type: ignore[attr-defined]

MANY = 16  # places per step, one for each thread


@kernel
def _follow_up(d, thread, threads):
    """own place := run number, read from the places of all threads in the step before (the first step counts up)."""
    own = d[0] + 8 * thread
    if d[1] == 0:
        write_i64(own, read_i64(own) + 1)
    else:
        expected = read_i64(d[1])
        for other in range(threads):
            if read_i64(d[1] + 8 * other) != expected:
                expected = -(10**9)
        write_i64(own, expected)


def _program(steps: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Any]:
    places = np.zeros((steps, MANY), np.int64)
    descriptors = np.zeros((steps, 2), np.int64)
    for k in range(steps):
        descriptors[k] = places[k].ctypes.data, places[k - 1].ctypes.data if k else 0
    pairs = [(_follow_up.address, descriptors[k].ctypes.data) for k in range(steps)]
    return np.array(pairs, np.int64).reshape(-1), places, descriptors


@pytest.mark.parametrize("threads", [2, 3])
def test_every_share_runs_once_and_after_all_of_the_step_before(threads: int) -> None:
    program, places, _keep = _program(6)
    made = crew(threads)
    for run in range(1, 201):
        if run % 50 == 0:
            time.sleep(0.02)  # long enough for the others to fall asleep
        made.run(program)
        assert places[:, :threads].tolist() == [[run] * threads] * 6
    assert (places[:, threads:] == 0).all()


def test_callers_take_turns() -> None:
    program, places, _keep = _program(3)
    made = Crew(2)
    callers = [threading.Thread(target=lambda: [made.run(program) for _ in range(100)]) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert places[:, :2].tolist() == [[300, 300]] * 3
