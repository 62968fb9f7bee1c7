"""Random search: the baseline every other searcher is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from nas.searchers.base import Avoid, Proposal, Searcher, TrialLike


class RandomSearch(Searcher):
    """Draws every decision uniformly; looks at no result. Proposal k depends on (seed, k), and on `avoid` where that redraws."""

    name = "random"

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        return Proposal(self.draw_random(index, avoid))
