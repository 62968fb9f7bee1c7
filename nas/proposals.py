"""What the searchers of a run propose, each in its turn: written to the store, and a copy where the same was proposed before.

Keeps every trial of the run by its number and every searcher's history; what a proposal costs here does not grow with them. Knows
nothing of evaluation. Start with `Proposals.next`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nas.searchers import Proposal, Searcher, SpaceExhausted
from nas.store import Store, Trial
from search_spaces import SpaceError

INITIAL = "initial"
"""Key of a trial's sampler dict and of its job: the file of weights and masks that its training starts from, if there is one."""

Work = tuple[str, int, str | None]
"""What makes two trials of a run the same work: digest, seed, and what they start from."""


class Proposals:
    """The trials of a run and the next ones.

    Args:
        store: the run's.
        searchers: name -> searcher.
        totals: name -> number of trials.
        seed: seed of every trial whose proposal names none.
        epochs: training budget of every trial, for the record.
        message: is told of searchers that end early or fail.

    Attributes:
        trials: number -> trial, as last remembered.
        history: searcher -> its trials in the order of their index.
    """

    def __init__(
        self,
        store: Store,
        searchers: Mapping[str, Searcher],
        totals: Mapping[str, int],
        *,
        seed: int,
        epochs: int,
        message: Callable[[str], None],
    ) -> None:
        self.store = store
        self.searchers = dict(searchers)
        self.totals = dict(totals)
        self.seed = seed
        self.epochs = epochs
        self.message = message
        self.trials: dict[int, Trial] = {}
        self.history: dict[str, list[Trial]] = {name: [] for name in self.searchers}
        self._proposed: dict[str, set[str]] = {name: set() for name in self.searchers}
        self._original: dict[Work, int] = {}  # -> the trial that is or was really evaluated
        self._exhausted: set[str] = set()

    def remember(self, trial: Trial) -> None:
        """Take the state of a trial as it is in the store now."""
        fresh = trial.trial not in self.trials
        self.trials[trial.trial] = trial
        if trial.searcher in self.history:
            if fresh:
                self.history[trial.searcher].append(trial)
                self._proposed[trial.searcher].add(trial.digest)
            else:
                self.history[trial.searcher][trial.index] = trial
        work = (trial.digest, trial.seed, trial.sampler.get(INITIAL))
        if trial.copy_of is None and trial.state != "failed":
            self._original.setdefault(work, trial.trial)
        elif trial.state == "failed" and self._original.get(work) == trial.trial:
            del self._original[work]

    def open_searchers(self) -> list[str]:
        """Those that have not had all their trials yet."""
        return [
            name
            for name, total in self.totals.items()
            if len(self.history[name]) < total and name not in self._exhausted
        ]

    def next(self) -> Trial | None:
        """A new trial, of the searcher that has had the smallest share of its own so far; None if all have been proposed.

        Equal work is done once: with `copy_of` it is to share the answer of that trial.
        """
        while open_searchers := self.open_searchers():
            name = min(open_searchers, key=lambda n: len(self.history[n]) / self.totals[n])
            index = len(self.history[name])
            try:
                proposal = self._ask(name, index)
            except SpaceExhausted as reason:
                self._exhausted.add(name)
                self.message(f"{name} stops after {index} of {self.totals[name]} trials: {reason}")
                continue
            seed = self.seed if proposal.seed is None else proposal.seed
            trial = self.store.propose(
                searcher=name,
                index=index,
                architecture=proposal.architecture,
                seed=seed,
                epochs=self.epochs,
                sampler=proposal.sampler | ({INITIAL: proposal.initial} if proposal.initial else {}),
                copy_of=self._original.get((proposal.architecture.digest, seed, proposal.initial)),
            )
            self.remember(trial)
            return trial
        return None

    def _ask(self, name: str, index: int) -> Proposal:
        searcher, avoid = self.searchers[name], self._proposed[name].__contains__
        try:
            return searcher.propose(self.history[name], index, avoid)
        except SpaceError as error:
            # The space function raised for what the searcher wanted; anything new will do instead.
            self.message(f"{name}, proposal {index}: {error}; drawn at random instead")
            return Proposal(searcher.draw_random(index, avoid))
