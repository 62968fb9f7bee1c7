"""Regularized (ageing) evolution, for one or several objectives, with constraints."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from nas.pareto import crowding_distance, nondomination_rank
from nas.searchers.base import Avoid, Outcome, Proposal, Searcher, TrialLike, check_option, mutants, rng
from search_spaces.space import Space

MUTATION_TRIES = 50


class RegularizedEvolution(Searcher):
    """Mutates the winner of a tournament among the youngest architectures; old ones die however good they are.

    The first `population` proposals are those of random search. Afterwards the population is the `population` youngest
    trials that have a result, by index. A tournament draws `tournament` of them without replacement; the fittest is
    mutated, or, with probability `crossover`, crossed over with the winner of a second tournament and then mutated.

    Fitter is: less violation of the constraints; then a lower front number within the population, then more room around
    it (crowding distance in its front), then younger. With one objective this is the better value, then the younger.
    Failed trials are no members; infeasible ones are, but lose to every feasible one.

    A child that is to be avoided is mutated anew up to MUTATION_TRIES times, ever further from its parent; then a
    random one is taken.

    Args:
        population: how many live (P in the paper).
        tournament: how many meet (S in the paper).
        crossover: probability of two parents; the paper has 0.

    Source: Real, Aggarwal, Huang, Le 2019, "Regularized evolution for image classifier architecture search" (arXiv:1802.01548),
    Algorithm 1. Fronts and crowding instead of the one fitness: Deb et al. 2002 (NSGA-II).
    """

    name = "regularized_evolution"

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        seed: int = 0,
        *,
        population: int = 50,
        tournament: int = 10,
        crossover: float = 0.0,
    ) -> None:
        super().__init__(space, objectives, seed)
        check_option(self.name, "population", population, 1)
        check_option(self.name, "tournament", tournament, 1)
        check_option(self.name, "crossover", crossover, 0, 1, whole=False)
        self.population, self.tournament, self.crossover = population, tournament, crossover

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        if index < self.population:
            return Proposal(self.draw_random(index, avoid))
        outcomes = self.outcomes(history)
        living = self._living(outcomes)
        if not living:
            return Proposal(self.draw_random(index, avoid))
        fitness = self._fitness([outcomes[i] for i in living])
        generator = rng(self.seed, self.name, index)
        winner = history[living[self._meet(fitness, generator)]]
        parents = [winner.index]
        start = winner.architecture
        if generator.random() < self.crossover:
            other = history[living[self._meet(fitness, generator)]]
            parents.append(other.index)
            start = self.space.crossover(start, other.architecture, generator)
        for child in mutants(self.space, start, generator, avoid, MUTATION_TRIES):
            return Proposal(child, {"parents": parents})
        return Proposal(self.draw_random(index, avoid))

    def _living(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Positions of the youngest trials with a result, oldest first."""
        living: list[int] = []
        for position in range(len(outcomes) - 1, -1, -1):
            if outcomes[position].known:
                living.append(position)
                if len(living) == self.population:
                    break
        return living[::-1]

    def _meet(self, fitness: Sequence[tuple[float, ...]], generator: random.Random) -> int:
        """Position in the population of the fittest of a drawn few."""
        meeting = generator.sample(range(len(fitness)), min(self.tournament, len(fitness)))
        return min(meeting, key=lambda i: (*fitness[i], -i))

    def _fitness(self, outcomes: Sequence[Outcome]) -> list[tuple[float, ...]]:
        """Sort keys, lower is fitter: (violation, front number, minus crowding distance); with one objective the cost itself."""
        keys: list[tuple[float, ...]] = [(outcome.violation, np.inf, 0.0) for outcome in outcomes]
        measured = [i for i, outcome in enumerate(outcomes) if outcome.costs is not None]
        if len(self.objectives) == 1:
            for i in measured:
                keys[i] = (outcomes[i].violation, (outcomes[i].costs or (np.inf,))[0], 0.0)
            return keys
        feasible = [i for i in measured if outcomes[i].violation == 0.0]
        costs = np.array([outcomes[i].costs for i in feasible], dtype=np.float64).reshape(
            len(feasible), len(self.objectives)
        )
        ranks = nondomination_rank(costs)
        for rank in range(int(ranks.max(initial=-1)) + 1):
            front = np.flatnonzero(ranks == rank)
            for i, distance in zip(front.tolist(), crowding_distance(costs[front])):
                keys[feasible[i]] = (0.0, float(rank), -float(distance))
        return keys
