"""Every searcher obeys the laws: one class per searcher and setting."""

from __future__ import annotations

from tests.conformance.searcher_laws import SearcherLaws

SMALL = {"population": 8}


class TestRandom(SearcherLaws):
    name, reads_results = "random", False


class TestDense(SearcherLaws):
    name, reads_results = "dense", False


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


def test_every_registered_searcher_is_under_the_laws() -> None:
    from nas.searchers import SEARCHERS

    assert {laws.name for laws in SearcherLaws.__subclasses__()} == set(SEARCHERS)
