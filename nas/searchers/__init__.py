"""Searchers: what proposes the next architecture, from the history of its own trials.

`SEARCHERS` maps the names used in run files to classes; `make_searcher` makes one with its options checked. One-shot searchers have
a table of their own, `nas.oneshot.algorithms.ALGORITHMS`. To add one:
subclass `nas.searchers.base.Searcher`, add a line here and a line to `tests/conformance/test_searchers_conformance.py`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from nas.errors import ConfigError, unknown_name
from nas.searchers.base import Proposal, Searcher, SpaceExhausted
from nas.searchers.dense import DenseBaseline
from nas.searchers.optuna_samplers import NSGA2, TPE
from nas.searchers.random import RandomSearch
from nas.searchers.regularized_evolution import RegularizedEvolution
from search_spaces.chooser import Chooser
from search_spaces.space import Space

__all__ = [
    "SEARCHERS",
    "Proposal",
    "Searcher",
    "SpaceExhausted",
    "check_options",
    "is_oneshot",
    "make_searcher",
    "searcher_options",
]

SEARCHERS: dict[str, type[Searcher]] = {
    "dense": DenseBaseline,
    "nsga2": NSGA2,
    "random": RandomSearch,
    "regularized_evolution": RegularizedEvolution,
    "tpe": TPE,
}


def make_searcher(
    name: str, space: Space, objectives: Mapping[str, str], seed: int = 0, options: Mapping[str, Any] | None = None
) -> Searcher:
    """Make the searcher called `name`.

    Args:
        name: a key of `SEARCHERS`.
        space: where to search.
        objectives: metric -> "max" or "min".
        seed: of all its randomness.
        options: keyword arguments of the class, e.g. {"population": 20}.

    Raises:
        UnknownName: no such searcher.
        ConfigError: an option it does not have, or a value out of range.
    """
    _check_option_names(name, options or {})
    return SEARCHERS[name](space, objectives, seed, **dict(options or {}))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check options, names and values, without a space to search: before there are data, or of a searcher that is not used.

    Those of one-shot searchers (`nas.oneshot.algorithms`) too.

    Raises:
        UnknownName: no such searcher.
        ConfigError: an option it does not have, or a value out of range.
    """
    if is_oneshot(name):
        from nas.oneshot.searcher import make_options

        make_options(name, options)
        return
    _check_option_names(name, options)
    if options:  # searchers check their options when they are made; none looks at the space yet
        SEARCHERS[name](Space(_no_network, "no space"), {"val_accuracy": "max"}, 0, **options)


def _no_network(c: Chooser) -> nn.Module:
    raise NotImplementedError("a space without networks, to check options with")


def _check_option_names(name: str, options: Mapping[str, Any]) -> None:
    if name not in SEARCHERS:
        raise unknown_name("searcher", name, [*SEARCHERS, *_oneshot_names()])
    known = searcher_options(name)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise ConfigError(
                f'searcher "{name}" has no option "{option}"{hint} it has: {", ".join(sorted(known)) or "none"}'
            )


def is_oneshot(name: str) -> bool:
    """Whether this is a searcher that trains supernets before the trials, and then hands out what they found."""
    return name not in SEARCHERS and name in _oneshot_names()


def _oneshot_names() -> list[str]:
    from nas.oneshot.algorithms import ALGORITHMS  # late: they build on the searchers' base

    return list(ALGORITHMS)


def fitted_options(name: str, trials: int) -> dict[str, Any]:
    """Options that suit a budget: all searchers begin with random search's proposals, and that must not be the whole budget.

    A quarter of the trials (4 to 50) is the first population, or TPE's start-up (4 to 10).
    """
    quarter = max(4, trials // 4)
    if name == "nsga2":
        return {"population": min(50, quarter)}
    if name == "regularized_evolution":
        return {"population": min(50, quarter), "tournament": max(2, min(10, quarter // 3))}
    if name == "tpe":
        return {"startup": min(10, quarter)}
    return {}


def searcher_options(name: str) -> dict[str, Any]:
    """The options of a searcher and their defaults; of a one-shot searcher too."""
    if is_oneshot(name):
        from nas.oneshot.searcher import options_of

        return options_of(name)
    parameters = inspect.signature(SEARCHERS[name].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
