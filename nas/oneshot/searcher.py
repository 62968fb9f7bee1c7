"""One-shot searches as searchers: their options, and handing out what was found before the trials begin.

`OneShot` proposes a list that is known already; the supernets behind it were trained by `nas.oneshot.stage`.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from nas.errors import ConfigError
from nas.oneshot.algorithm import Options
from nas.oneshot.algorithms import ALGORITHMS
from nas.searchers.base import Avoid, Proposal, Searcher, SpaceExhausted, TrialLike
from nas.typed import typed
from search_spaces.space import Space


class OneShot(Searcher):
    """Proposes a given list, in its order, whatever comes of it.

    Args:
        proposals: what a search, or a control of one, is to have trained.
    """

    name = "oneshot"

    def __init__(
        self, space: Space, objectives: Mapping[str, str], seed: int = 0, *, proposals: Sequence[Proposal] = ()
    ) -> None:
        super().__init__(space, objectives, seed)
        self.proposals = tuple(proposals)

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        if index >= len(self.proposals):
            raise SpaceExhausted(f"all {len(self.proposals)} architectures that were found were proposed")
        return self.proposals[index]


def options_of(name: str) -> dict[str, Any]:
    """The options of a one-shot searcher and their defaults."""
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(ALGORITHMS[name].Options)
    }


def make_options(name: str, options: Mapping[str, Any]) -> Options:
    """The checked options of a one-shot searcher.

    Args:
        name: a key of `ALGORITHMS`.
        options: as in a run file.

    Raises:
        ConfigError: an option it does not have, of the wrong type or out of range.
    """
    cls = ALGORITHMS[name].Options
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise ConfigError(f'searcher "{name}" has no option "{option}"{hint} it has: {", ".join(sorted(known))}')
    try:
        return cls(**{option: typed(value, hints[option], option) for option, value in options.items()})
    except ConfigError as error:
        raise ConfigError(f'searcher "{name}": {error}') from error
