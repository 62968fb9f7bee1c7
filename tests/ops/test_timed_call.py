"""Networks timed step by step: the same result, a time for every step, and the sum within the whole."""

import random
import time

import numpy as np
import pytest
import torch

from hw_models.probes import probe
from ops.plan import lower
from ops.runtime import InputError, Runtime


@pytest.mark.parametrize("threads", [1, 2])
def test_every_step_has_a_time_and_their_sum_is_within_the_call(threads: int) -> None:
    rng = random.Random(1)
    for _ in range(4):
        _, module, example = probe(rng)
        runtime = Runtime(lower(module, example), threads)
        call = runtime.timed_call(example)
        call()
        start = time.perf_counter_ns()
        times = call()
        whole = time.perf_counter_ns() - start
        assert times.shape == (len(runtime.schedule.steps),)
        assert (times >= 0).all()
        assert 0 < times.sum() <= whole


def test_a_slow_step_is_where_the_time_is() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2000), torch.nn.Linear(2000, 2000))
    runtime = Runtime(lower(net.eval(), torch.zeros(16, 8)))
    call = runtime.timed_call(torch.zeros(16, 8))
    call()
    times = np.min([call().copy() for _ in range(5)], axis=0)
    assert int(times.argmax()) == len(times) - 1


def test_timing_does_not_change_results() -> None:
    _, module, example = probe(random.Random(2))
    runtime = Runtime(lower(module, example))
    before = runtime(example)
    runtime.timed_call(example)()
    assert torch.equal(before, runtime(example))


def test_the_input_is_checked() -> None:
    runtime = Runtime(lower(torch.nn.Linear(4, 2), torch.zeros(1, 4)))
    with pytest.raises(InputError, match="made for an input"):
        runtime.timed_call(torch.zeros(2, 4))
