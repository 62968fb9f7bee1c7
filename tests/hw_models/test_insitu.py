"""Networks measured in place: whole and steps agree, rounds are all there, failures name the network."""

import random

import numpy as np
import pytest
import torch

from hw_models.insitu import measure_in_place
from hw_models.measure import MeasurementError, Measurer
from hw_models.observe import digest_of, observe
from hw_models.probes import probe
from hw_models.workload import NETWORK_COLUMNS, STEP_COLUMNS
from ops.plan import lower
from ops.runtime import Runtime

QUICK = Measurer(rounds=3, cap_rounds=3, spacing_s=0.0, blocks=2, min_block_ms=0.2)


def prepared(module: torch.nn.Module, example: torch.Tensor, threads: int = 1) -> tuple[Runtime, torch.Tensor]:
    """A network ready to be measured."""
    return Runtime(lower(module, example), threads), example


def _networks(count: int = 3) -> dict:
    rng = random.Random(5)
    return {f"network {k}": prepared(*probe(rng)[1:]) for k in range(count)}


def test_steps_sum_up_to_the_whole_less_what_is_between() -> None:
    networks = _networks()
    for name, found in measure_in_place(networks, QUICK).items():
        steps = networks[name][0].schedule.steps
        assert found.step_ms.shape == (len(steps),)
        assert found.step_rounds.shape == (len(found.whole.rounds), len(steps))
        assert (found.step_ms > 0).all()
        assert found.sum_ms == pytest.approx(found.step_ms.sum())
        assert found.sum_ms <= found.whole.floor_ms


def test_rows_for_the_store_are_complete() -> None:
    networks = _networks()
    found = observe(networks, QUICK, groups=["a", "b", "a"])
    assert set(STEP_COLUMNS) < set(found.steps.columns)
    assert set(NETWORK_COLUMNS) < set(found.networks.columns)
    assert found.networks["group"].tolist() == ["a", "b", "a"]
    sums = (found.steps["ms"] * found.steps["count"]).groupby(found.steps["network"]).sum()
    np.testing.assert_allclose(sums, found.networks["sum_ms"], rtol=1e-3)
    assert (found.steps["hi_ms"] >= found.steps["lo_ms"]).all()
    assert not found.steps.duplicated(["network", "key"]).any()


def test_the_digest_is_of_what_is_executed() -> None:
    (_, a, x), (_, b, y) = probe(random.Random(1)), probe(random.Random(1))
    _, c, z = probe(random.Random(2))
    first, same, other = (prepared(m, e)[0].schedule for m, e in ((a, x), (b, y), (c, z)))
    assert digest_of(first) == digest_of(same) != digest_of(other)


def test_a_network_that_fails_while_it_is_timed_is_named() -> None:
    class Fails(torch.nn.Module):
        left = 3

        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Fails.left -= 1
            if Fails.left < 0:
                raise RuntimeError("no more")
            return x * 2 if float(x.sum()) < 1e9 else x

    with pytest.raises(MeasurementError, match=r'"0: bad".*no more'):
        measure_in_place({"bad": prepared(Fails().eval(), torch.zeros(1, 4))}, QUICK)


def test_one_group_per_network_and_one_number_of_threads() -> None:
    networks = _networks(2)
    with pytest.raises(ValueError, match="2 networks need as many groups, got 1"):
        observe(networks, QUICK, groups=["a"])
    one, two = _networks(1)["network 0"], prepared(*probe(random.Random(3))[1:], threads=2)
    with pytest.raises(ValueError, match="same number of threads"):
        observe({"one": one, "two": two}, QUICK)
