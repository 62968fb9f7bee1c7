"""Searchers in long asynchronous searches: what they remember of a history is only a shorter way to the same proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nas.searchers import Proposal, Searcher, make_searcher
from nas.searchers.base import changed_positions
from nas.simulate import Faults, SyntheticTable, decisions_space, simulate
from nas.simulate.run import OBJECTIVES

SPACE = decisions_space(8, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "nsga2": {"population": 8},
    "regularized_evolution": {"population": 10, "tournament": 4},
    "tpe": {"startup": 8},
}


class Checked(Searcher):
    """A searcher that is asked a second time, as a new object that sees this history for the first time."""

    def __init__(self, name: str) -> None:
        self.make = lambda: make_searcher(name, SPACE, OBJECTIVES, 0, OPTIONS[name])
        self.inner = self.make()
        self.asked = 0

    def propose(self, history: Sequence[Any], index: int, avoid: Any = lambda digest: False) -> Proposal:
        proposal = self.inner.propose(history, index, avoid)
        if index % 5 == 0:
            self.asked += 1
            assert self.make().propose(history, index, avoid) == proposal
        if index % 31 == 30:  # a look at less of the history leaves nothing behind
            self.inner.propose(history[: index // 2], index // 2, avoid)
        return proposal


@pytest.mark.parametrize("name", OPTIONS)
def test_results_that_come_late_and_out_of_order_are_seen_as_by_a_new_searcher(name: str) -> None:
    searcher = Checked(name)
    faults = Faults(stragglers=0.3, lost=0.1, failed=0.1)
    table = SyntheticTable(SPACE, spread=0.8, epochs=1)
    found = simulate(SPACE, table, {name: searcher}, 90, 9, faults=faults)
    assert searcher.asked >= 18
    assert found.frame["state"].eq("failed").any()


def test_changed_positions_are_those_of_other_objects_and_of_new_ones() -> None:
    a, b, c = object(), object(), object()
    assert changed_positions([a, b, c], [a, b, c]) == []
    assert changed_positions([a, b, c], [a, c, c, b]) == [1, 3]
    assert changed_positions([], [a]) == [0]
    assert changed_positions([a, b], [b]) == [0]
