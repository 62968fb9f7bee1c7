"""Every searcher obeys the laws: one class per searcher and setting."""

from __future__ import annotations

import pytest

from nas.searchers import SEARCHERS, Searcher, make_searcher
from search_spaces import get_space
from tests.conformance.searcher_laws import OBJECTIVES, SearcherLaws, digests, simulate

SMALL = {"population": 8}


class TestRandom(SearcherLaws):
    name, reads_results = "random", False


class TestDense(SearcherLaws):
    name, options, reads_results = "dense", {"draws": 32}, False


class TestEvolution(SearcherLaws):
    name, options = "regularized_evolution", SMALL | {"tournament": 3}


class TestEvolutionWithCrossoverAndOneObjective(SearcherLaws):
    name, options, objectives = "regularized_evolution", SMALL | {"crossover": 0.5}, {"val_accuracy": "max"}


class TestTPE(SearcherLaws):
    name = "tpe"


class TestTPEWithOneObjective(SearcherLaws):
    name, objectives = "tpe", {"val_accuracy": "max"}


class TestNSGA2(SearcherLaws):
    name, options = "nsga2", SMALL


class TestNSGA2WithOneObjective(SearcherLaws):
    name, options, objectives = "nsga2", SMALL, {"val_accuracy": "max"}


@pytest.mark.parametrize("space_name", ["mlp", "convnet", "nasbench201"])
@pytest.mark.parametrize("name", sorted(SEARCHERS))
def test_every_searcher_searches_the_shipped_spaces(name: str, space_name: str) -> None:
    options = {"nsga2": {"population": 5}, "regularized_evolution": {"population": 5}, "dense": {"draws": 8}}.get(name)
    space = get_space(space_name, input_shape=(64,) if space_name == "mlp" else (1, 8, 8), classes=10)

    def make() -> Searcher:
        return make_searcher(name, space, OBJECTIVES, 0, options)

    history = simulate(make, 20)
    assert len(set(digests(history))) == 20
    assert all(space.architecture(trial.architecture.as_dict()) == trial.architecture for trial in history)
    assert digests(simulate(make, 20, restart_every=9)) == digests(history)


def test_every_registered_searcher_is_under_the_laws() -> None:
    assert {laws.name for laws in SearcherLaws.__subclasses__()} == set(SEARCHERS)
