"""The sentinels: always the same work, and a limit beyond which they have moved."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hw_models.measure import Measurement, Measurer
from hw_models.sentinels import moved, sentinel_calls

M = Measurement(1.0, 0.9, 1.1, 1.2, 1.3, "ok", (1.0, 1.1))


def at(**floors: float) -> dict[str, Measurement]:
    return {name: replace(M, floor_ms=floor) for name, floor in floors.items()}


def test_a_sentinel_has_moved_beyond_the_limit_either_way() -> None:
    old = at(a=1.0, b=2.0)
    assert moved(old, old) == {}
    assert moved(old, at(a=1.029, b=1.942)) == {}
    changes = moved(old, at(a=1.04, b=1.9))
    assert {name: round(change, 6) for name, change in changes.items()} == {"a": 0.04, "b": -0.05}
    assert list(moved(old, at(a=1.04, b=1.9), limit=0.045)) == ["b"]


def test_sentinels_that_cannot_be_compared_have_moved() -> None:
    for old, new in ((at(a=1.0), at(b=1.0)), (at(a=0.0), at(a=1.0)), (at(a=math.nan), at(a=1.0))):
        changes = moved(old, new)
        assert set(changes) == {*old, *new}
        assert all(math.isnan(change) for change in changes.values())


def results() -> dict[str, float]:
    """A number made of each sentinel's result."""
    found = {name: call() for name, call in sentinel_calls().items()}
    return {name: float((value * value).sum()) for name, value in found.items() if isinstance(value, torch.Tensor)}


def test_sentinels_do_the_same_work_in_every_process_and_leave_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    here = results()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(here) == 2
    code = "import torch; torch.manual_seed(5); torch.set_num_threads(1)\n"
    code += "from tests.hw_models.test_sentinels import results; print(results())"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(here)


def test_one_sentinel_is_dense_and_one_has_a_tenth_of_its_weights() -> None:
    from ops.plan import Plan
    from ops.runtime import Runtime

    dense, sparse = sentinel_calls(threads=1).values()
    runtime = next(cell.cell_contents for cell in sparse.__closure__ or () if isinstance(cell.cell_contents, Runtime))
    plan = runtime.plan
    assert isinstance(plan, Plan)
    (op,) = plan.ops
    assert op.nnz == 64 * 64 * 9 - int(0.9 * 64 * 64 * 9)
    assert runtime.threads == 1
    assert isinstance(dense(), torch.Tensor)


def test_sentinels_can_be_measured_with_everything_else() -> None:
    measured = Measurer(rounds=2, cap_rounds=2, spacing_s=0, blocks=2, min_block_ms=0.1).measure(sentinel_calls())
    assert all(0.01 < m.floor_ms < 100 for m in measured.values())
