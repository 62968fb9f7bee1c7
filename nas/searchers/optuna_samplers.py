"""Searchers that let an Optuna sampler propose: `TPE` and `NSGA2`.

The samplers are made anew for every proposal, with a seed of its own, and see a study rebuilt from the history
(optuna_history.py); so a restarted search goes on as if it had not stopped. Spaces are walked by `Space.draw`, so
choices may depend on choices. Optuna is imported when a searcher is made, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from nas.searchers.base import (
    Avoid,
    Outcome,
    Proposal,
    Searcher,
    TrialLike,
    changed_positions,
    check_option,
    mutants,
    rng,
    stable_seed,
)
from search_spaces.architecture import Architecture
from search_spaces.space import Space

if TYPE_CHECKING:
    from optuna.study import Study

    from nas.searchers.optuna_history import Encoded

MUTATION_TRIES = 50
Pick = Callable[[str, Any], int]
"""(parameter, distribution) -> code of the option."""


class _OptunaSearcher(Searcher):
    """What both share: the study, walking a space with a sampler's choices, and what happens when only old ones are proposed."""

    def __init__(self, space: Space, objectives: Mapping[str, str], seed: int) -> None:
        super().__init__(space, objectives, seed)
        from nas.searchers.optuna_history import OptunaHistory

        self._optuna = OptunaHistory(space, self.objectives)

    def _walk(self, pick: Pick) -> tuple[Architecture, Encoded]:
        """Take every decision by `pick`."""
        params: dict[str, int] = {}
        distributions: dict[str, Any] = {}

        def decide(name: str, options: tuple[Any, ...]) -> Any:
            parameter, distribution = self._optuna.parameter(name, options)
            params[parameter] = pick(parameter, distribution)
            distributions[parameter] = distribution
            return options[params[parameter]]

        return self.space.draw(decide), (params, distributions)

    def _near(self, refused: Architecture, index: int, avoid: Avoid) -> Architecture:
        """The sampler insists on what is to be avoided: take what is next to it, and if nothing new is, draw at random."""
        generator = rng(self.seed, self.name, index, "near")
        for child in mutants(self.space, refused, generator, avoid, MUTATION_TRIES):
            return child
        return self.draw_random(index, avoid)


class TPE(_OptunaSearcher):
    """Tree-structured Parzen estimator: Optuna's, multivariate, with constant liar, for one or several objectives.

    Random (the proposals of random search) until `startup` trials have a result. Then decisions that always occur
    together are drawn together from the density of the good trials, and each such group is drawn only when it is
    needed. This is Optuna's `group=True`, done here so that groups no decision asks for cost nothing.

    Infeasible trials count as bad, the more the larger their violation. Pending trials count as bad too (constant
    liar), and so does, for one proposal, what it came up with that is to be avoided: that drives it away from there.
    After `asks` such it mutates the last of them, once or, where everything near is known too, several times; in the
    end it draws at random. (Asking 8 times cost more and found no better fronts: convnet space, additive objectives,
    400 trials, hypervolume 174.5 +- 1.4 with 2 and 172.0 +- 1.2 with 8, 4 seeds.)

    The cost of a proposal grows with trials x groups x asks.

    Args:
        startup: trials with a result before the model is used.
        candidates: how many draws the acquisition chooses from.
        asks: how often the model may propose what is to be avoided.

    Source: Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"; Watanabe 2023 (arXiv:2304.11127).
    """

    name = "tpe"

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        seed: int = 0,
        *,
        startup: int = 10,
        candidates: int = 24,
        asks: int = 2,
    ) -> None:
        super().__init__(space, objectives, seed)
        check_option(self.name, "startup", startup, 1)
        check_option(self.name, "candidates", candidates, 1)
        check_option(self.name, "asks", asks, 1)
        self.startup, self.candidates, self.asks = startup, candidates, asks
        self._kinds: dict[tuple[str, ...], dict[str, Any]] = {}
        self._groups: dict[str, dict[str, Any]] = {}

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        from optuna.samplers import TPESampler

        outcomes = self.outcomes(history)
        if sum(1 for _ in islice((o for o in outcomes if o.known), self.startup)) < self.startup:
            return Proposal(self.draw_random(index, avoid))
        self._optuna.update(history, outcomes)
        self._regroup()
        sampler = TPESampler(
            n_startup_trials=0,
            n_ei_candidates=self.candidates,
            seed=stable_seed(self.seed, self.name, index, bits=32),
            multivariate=True,
            constant_liar=True,
        )
        generator = rng(self.seed, self.name, index, "new")
        for _ in range(self.asks):
            architecture, encoded = self._walk(self._pick(self._optuna.study(sampler), generator.randrange))
            if not avoid(architecture.digest):
                self._optuna.remember(architecture, encoded)
                return Proposal(architecture)
            self._optuna.pretend_running(encoded)
        return Proposal(self._near(architecture, index, avoid))

    def _pick(self, study: Study, uniform: Callable[[int], int]) -> Pick:
        newcomer = self._optuna.newcomer()
        drawn: dict[str, int] = {}

        def pick(parameter: str, distribution: Any) -> int:
            if parameter not in drawn:
                group = self._groups.get(parameter)
                if group is None:  # in no finished trial yet
                    return uniform(len(distribution.choices))
                drawn.update(study.sampler.sample_relative(study, newcomer, group))
            return drawn[parameter]

        return pick

    def _regroup(self) -> None:
        """Put parameters that occur in exactly the same finished trials into one group, ordered by name."""
        kinds: dict[tuple[str, ...], dict[str, Any]] = {}
        for trial in self._optuna.storage.trials:
            if trial.state.name == "COMPLETE":
                kinds.setdefault(tuple(trial.distributions), trial.distributions)
        if kinds.keys() == self._kinds.keys():
            return
        self._kinds = kinds
        occurs: dict[str, int] = {}
        distributions: dict[str, Any] = {}
        for bit, kind in enumerate(kinds.values()):
            distributions.update(kind)
            for parameter in kind:
                occurs[parameter] = occurs.get(parameter, 0) | 1 << bit
        groups: dict[int, dict[str, Any]] = {}
        for parameter in sorted(occurs):
            groups.setdefault(occurs[parameter], {})[parameter] = distributions[parameter]
        self._groups = {parameter: groups[where] for parameter, where in occurs.items()}


class NSGA2(_OptunaSearcher):
    """NSGA-II: Optuna's elitist selection over generations, with constraints, for one or several objectives.

    Generation 0 is random (the proposals of random search). A generation ends when `population` of its trials have a
    result; the parents of the next are then chosen once, from that generation and its own parents, and written into the
    proposal so that a restart breeds from the same parents whatever came in late. Failed trials are in no generation.

    A child inherits every decision either parent took; where both took it, from either with equal probability; a
    decision mutates to a random option with probability 1 / decisions, and what no parent decided is drawn uniformly.
    Optuna's own crossover knows only the decisions that occur in *all* trials, and draws conditional ones, such as a
    pattern, at random for ever: on the six-layer space of tests/conformance/searcher_laws.py its hypervolume after 400
    trials, population 50, was 1882 +- 20 against 1952 +- 22 here and 1856 +- 24 for random search (10 seeds, mean +-
    standard deviation).

    A child that is to be avoided is bred anew up to `asks` times; then the last is mutated, and in the end one is drawn
    at random.

    Args:
        population: size of a generation.
        crossover: probability of two parents rather than one.
        asks: how often a child may be one to be avoided.

    Source: Deb, Pratap, Agarwal, Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II".
    """

    name = "nsga2"

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        seed: int = 0,
        *,
        population: int = 50,
        crossover: float = 0.9,
        asks: int = 20,
    ) -> None:
        super().__init__(space, objectives, seed)
        check_option(self.name, "population", population, 2)
        check_option(self.name, "crossover", crossover, 0, 1, whole=False)
        check_option(self.name, "asks", asks, 1)
        self.population, self.crossover, self.asks = population, crossover, asks
        self._counted: list[Outcome] = []
        self._member_of: list[int | None] = []  # generation of each of those, if it has a result
        self._members: dict[int, int] = {0: 0}  # generation -> results
        self._parents: dict[int, tuple[int, TrialLike, list[tuple[int, int]]]] = {}

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        outcomes = self.outcomes(history)
        generation = self._generation(outcomes, history)
        if generation == 0:
            return Proposal(self.draw_random(index, avoid), {"generation": 0})
        note: dict[str, Any] = {"generation": generation}
        parents = self._recorded(history, generation)
        if parents is None:
            parents = self._select(history, outcomes, generation)
            note["parents"] = [history[position].index for position in parents]
        encoded = [self._optuna.encode(history[position].architecture) for position in parents]
        beats = _constrained_dominance([outcomes[position] for position in parents])
        generator = rng(self.seed, self.name, index)
        for _ in range(self.asks):
            child = self._breed(encoded, beats, generator)

            def pick(parameter: str, distribution: Any, child: dict[str, int] = child) -> int:
                code = child.get(parameter)
                return generator.randrange(len(distribution.choices)) if code is None else code

            architecture, made = self._walk(pick)
            if not avoid(architecture.digest):
                self._optuna.remember(architecture, made)
                return Proposal(architecture, note)
        return Proposal(self._near(architecture, index, avoid), note)

    def _generation(self, outcomes: Sequence[Outcome], history: Sequence[TrialLike]) -> int:
        """The latest generation with a result, or the next if that is full. Counted anew only where something changed."""
        if len(outcomes) < len(self._counted):
            self._counted, self._member_of, self._members = [], [], {0: 0}
        for position in changed_positions(self._counted, outcomes):
            outcome = outcomes[position]
            generation = int(history[position].sampler.get("generation", 0)) if outcome.known else None
            if position == len(self._counted):
                self._counted.append(outcome)
                self._member_of.append(None)
            before = self._member_of[position]
            if before is not None:
                self._members[before] -= 1
            if generation is not None:
                self._members[generation] = self._members.get(generation, 0) + 1
            self._counted[position], self._member_of[position] = outcome, generation
        latest = max(generation for generation, count in self._members.items() if count or not generation)
        return latest + (self._members[latest] >= self.population)

    def _recorded(self, history: Sequence[TrialLike], generation: int) -> list[int] | None:
        """`_recorded_parents`, remembered as long as the trials it was read from are there."""
        known = self._parents.get(generation)
        if known is not None and all(p < len(history) and history[p].index == index for p, index in known[2]):
            where, trial, found = known
            if where < len(history) and history[where] is trial:
                return [position for position, _ in found]
        recorded = _recorded_parents(history, generation)
        if recorded is not None:
            where, positions = recorded
            self._parents[generation] = (where, history[where], [(p, history[p].index) for p in positions])
            return positions
        return None

    def _select(self, history: Sequence[TrialLike], outcomes: Sequence[Outcome], generation: int) -> list[int]:
        """Positions of the best `population` of the last generation and its parents, by Optuna's elitist selection."""
        from optuna.samplers import NSGAIISampler

        self._optuna.update(history, outcomes)
        last = {
            position
            for position, (trial, outcome) in enumerate(zip(history, outcomes))
            if outcome.known and int(trial.sampler.get("generation", 0)) == generation - 1
        }
        candidates = sorted(last | set(self._recorded(history, generation - 1) or ()))
        trials = self._optuna.storage.trials

        class Elite(NSGAIISampler):
            def get_population(self, study: Study, generation: int) -> list[Any]:
                return [trials[position] for position in candidates]

            def get_parent_population(self, study: Study, generation: int) -> list[Any]:
                return []

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental parts of Optuna say so
            sampler = Elite(population_size=self.population, seed=0)
            return sorted(trial.number for trial in sampler.select_parent(self._optuna.study(sampler), generation))

    def _breed(self, parents: Sequence[Encoded], beats: Callable[[int, int], bool], generator: Any) -> dict[str, int]:
        """Parameters of a child; those that mutate are left out."""

        def tournament() -> dict[str, int]:
            one, two = generator.randrange(len(parents)), generator.randrange(len(parents))
            return parents[one if beats(one, two) else two][0]

        mother = tournament()
        child = dict(mother)
        if generator.random() < self.crossover:
            for parameter, code in tournament().items():
                if parameter not in mother or generator.random() < 0.5:
                    child[parameter] = code
        rate = 1.0 / max(1, len(mother))
        return {parameter: code for parameter, code in child.items() if generator.random() >= rate}


def _recorded_parents(history: Sequence[TrialLike], generation: int) -> tuple[int, list[int]] | None:
    """Where the first proposal of a generation is, which recorded its parents, and the positions of those; None if none did."""
    for where, trial in enumerate(history):
        if trial.sampler.get("generation") == generation and "parents" in trial.sampler:
            wanted = set(trial.sampler["parents"])
            return where, [position for position, candidate in enumerate(history) if candidate.index in wanted]
    return None


def _constrained_dominance(outcomes: Sequence[Outcome]) -> Callable[[int, int], bool]:
    """Does one beat two: less violation, or both feasible and it dominates (Deb et al. 2002, definition 1)."""

    def beats(one: int, two: int) -> bool:
        a, b = outcomes[one], outcomes[two]
        if a.violation or b.violation:
            return a.violation < b.violation
        if a.costs is None or b.costs is None:
            return b.costs is None
        return a.costs != b.costs and all(x <= y for x, y in zip(a.costs, b.costs))

    return beats
