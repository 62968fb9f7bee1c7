"""What to measure next: the unknown before the known, the asked for before the rare, the cheap before the dear."""

import numpy as np

from hw_models.active import Wanted
from tests.hw_models.synthetic_machine import some_work, true_step_ms

WORK = some_work(8, seed=3)
MS = true_step_ms(WORK.steps)


def test_what_was_measured_is_worth_less_than_before() -> None:
    wanted = Wanted()
    before = wanted.score(WORK, MS)
    wanted.seen(WORK.steps.iloc[np.unique(WORK.of(2))])
    after = wanted.score(WORK, MS)
    assert after[2] < 0.8 * before[2]
    assert (after <= before).all()
    assert after[2] / before[2] == (after / before).min()


def test_a_step_is_less_known_the_farther_away_its_density_was_measured() -> None:
    wanted = Wanted()
    row = WORK.steps.query("nnz > 0 and density < 0.5").iloc[[0]]
    wanted.seen(row.assign(density=0.1))
    unknown = [float(wanted.unknown(row.assign(density=d))[0]) for d in (0.1, 0.13, 0.2, 0.9)]
    assert unknown == sorted(unknown)
    assert unknown[-1] > 2 * unknown[0]


def test_nothing_is_known_at_first_and_everything_is_between_0_and_1() -> None:
    wanted = Wanted()
    assert (wanted.unknown(WORK.steps) == 1.0).all()
    wanted.seen(WORK.steps)
    assert ((wanted.unknown(WORK.steps) > 0) & (wanted.unknown(WORK.steps) < 0.5)).all()


def test_what_candidates_ask_for_often_is_worth_more() -> None:
    wanted = Wanted()
    before = wanted.score(WORK, MS)
    for _ in range(5):
        wanted.ask(WORK.subset([6]), MS)
    gain = wanted.score(WORK, MS) / before
    assert gain[6] == gain.max() > 1.1


def test_a_slower_machine_makes_measuring_worth_less() -> None:
    assert (Wanted().score(WORK, 100 * MS) < Wanted().score(WORK, MS)).all()
