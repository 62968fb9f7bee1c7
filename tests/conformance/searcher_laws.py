"""What every searcher must obey: `SearcherLaws`, and the spaces, trials and simulated runs the laws are checked with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from torch import nn

from nas.schema import Trial
from nas.searchers import Searcher, SpaceExhausted, make_searcher
from search_spaces.architecture import Architecture
from search_spaces.chooser import Chooser
from search_spaces.space import Space

OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}
Result = tuple[str, dict[str, Any], dict[str, float]]
"""state, metrics, violations."""


def layered(c: Chooser, *, layers: int = 3) -> nn.Module:
    """Choices that depend on choices: how many layers there are, whether there is a pattern, which patterns there are."""
    network = nn.Sequential()
    features = 4
    for i in range(c.choice("depth", tuple(range(1, layers + 1)))):
        width = c.choice(f"l{i}.width", (8, 16, 32))
        c.choice(f"l{i}.op", ("plain", "gated", "residual"))
        if c.choice(f"l{i}.density", (1.0, 0.5, 0.1)) < 1:
            c.choice(f"l{i}.pattern", ("unstructured", "4x1") if width < 32 else ("unstructured", "4x1", "8x1"))
        network.append(c.build(lambda features=features, width=width: nn.Linear(features, width)))
        features = width
    return network


def pair(c: Chooser) -> nn.Module:
    """Nine decision sequences, six different computations (see `pair_space`)."""
    c.choice("a", (0, 1, 2))
    c.choice("b", (0, 1, 2))
    return nn.Identity()


def fixed(c: Chooser) -> nn.Module:
    """No choice at all."""
    return nn.Identity()


def flat(c: Chooser, *, decisions: int = 10, options: int = 4) -> nn.Module:
    """Independent decisions 0 ... options - 1."""
    for i in range(decisions):
        c.choice(f"d{i}", tuple(range(options)))
    return nn.Identity()


def layered_space() -> Space:
    return Space(layered, "layered")


def pair_space() -> Space:
    """Where (a, b) computes the same as (b, a)."""
    return Space(pair, "pair", canonical=lambda decisions, options: sorted(decisions.values()))


def score(architecture: Architecture) -> dict[str, float]:
    """Easy objectives that pull in opposite directions: capacity against cost."""
    capacity, cost = 0.0, 1.0
    for name, value in architecture.decisions:
        if name.endswith("density"):
            capacity, cost = capacity + math.sqrt(float(value)), cost + 4 * float(value)
        elif name.endswith("op"):
            capacity += {"plain": 0.0, "gated": 0.5, "residual": 1.0}[str(value)]
        elif isinstance(value, int):
            capacity, cost = capacity + math.log2(1 + value), cost + value / 8
    return {"val_accuracy": 1 - math.exp(-capacity / 10), "latency_ms": cost}


def good(trial: Trial) -> Result:
    return "complete", score(trial.architecture), {}


def mixed(trial: Trial) -> Result:
    """Every kind of result there is, by index."""
    metrics: dict[str, Any] = score(trial.architecture)
    kind = trial.index % 9
    if kind == 2:
        return "failed", {}, {}
    if kind == 3:
        return "complete", metrics | {"val_accuracy": float("nan")}, {}
    if kind == 4:
        return "infeasible", {"latency_ms": metrics["latency_ms"]}, {"latency_ms": 0.3 * trial.index, "params": -0.5}
    if kind == 5:
        return "infeasible", metrics, {"latency_ms": 0.1}
    if kind == 6:
        return "complete", {"val_accuracy": metrics["val_accuracy"], "latency_ms": None}, {}
    if kind == 7:
        return "infeasible", {}, {"latency_ms": float("inf")}
    return "complete", metrics, {"latency_ms": -0.2}


def propose(searcher: Searcher, history: Sequence[Trial], seen: Callable[[str], bool]) -> Trial:
    """The next trial, in state "proposed"."""
    index = len(history)
    proposal = searcher.propose(history, index, seen)
    return Trial(
        trial=index,
        searcher=searcher.name,
        index=index,
        state="proposed",
        architecture=proposal.architecture,
        digest=proposal.architecture.digest,
        seed=0,
        epochs=1,
        sampler=proposal.sampler,
    )


def finish(trial: Trial, result: Callable[[Trial], Result]) -> Trial:
    state, metrics, violations = result(trial)
    return replace(trial, state=state, metrics=metrics, violations=violations, attempts=1)  # type: ignore[arg-type]


def simulate(
    make: Callable[[], Searcher],
    trials: int,
    *,
    result: Callable[[Trial], Result] = good,
    pending: int = 0,
    restart_every: int | None = None,
    avoid: bool = True,
    shuffle: int | None = None,
) -> list[Trial]:
    """A whole search.

    Args:
        make: makes the searcher.
        trials: how many to propose.
        result: what comes of a trial.
        pending: how many run at once; more than 0 means that the searcher proposes while that many have no result.
        restart_every: make the searcher anew after so many proposals.
        avoid: tell the searcher what was proposed.
        shuffle: seed of the order in which results come in; None for the order of the proposals.
    """
    order = random.Random(shuffle)
    searcher = make()
    history: list[Trial] = []
    running: list[int] = []
    for index in range(trials):
        if restart_every and index % restart_every == 0:
            searcher = make()
        digests = {trial.digest for trial in history}
        history.append(propose(searcher, history, digests.__contains__ if avoid else lambda digest: False))
        running.append(index)
        while len(running) > pending:
            done = running.pop(0 if shuffle is None else order.randrange(len(running)))
            history[done] = finish(history[done], result)
    return history


def digests(history: Sequence[Trial]) -> list[str]:
    return [trial.digest for trial in history]


class SearcherLaws:
    """Laws for a searcher; subclass, and say which one."""

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    objectives: ClassVar[Mapping[str, str]] = OBJECTIVES
    reads_results: ClassVar[bool] = True

    def maker(self, space: Space, seed: int = 0) -> Callable[[], Searcher]:
        return lambda: make_searcher(self.name, space, self.objectives, seed, self.options)

    def test_proposes_only_valid_architectures(self) -> None:
        space = layered_space()
        for trial in simulate(self.maker(space), 40):
            assert space.architecture(trial.architecture.as_dict()) == trial.architecture

    def test_a_seed_decides_everything(self) -> None:
        space = layered_space()
        assert digests(simulate(self.maker(space), 40)) == digests(simulate(self.maker(space), 40))

    def test_another_seed_searches_elsewhere(self) -> None:
        space = layered_space()
        assert digests(simulate(self.maker(space, 0), 20)) != digests(simulate(self.maker(space, 1), 20))

    @pytest.mark.parametrize("result", [good, mixed])
    @pytest.mark.parametrize("restart_every", [1, 7])
    def test_a_restarted_search_goes_on_where_it_stopped(
        self, result: Callable[[Trial], Result], restart_every: int
    ) -> None:
        space = layered_space()
        options: dict[str, Any] = {"result": result, "pending": 3, "shuffle": 1}
        expected = simulate(self.maker(space), 40, **options)
        restarted = simulate(self.maker(space), 40, restart_every=restart_every, **options)
        assert digests(restarted) == digests(expected)
        assert [trial.sampler for trial in restarted] == [trial.sampler for trial in expected]

    def test_a_proposal_that_was_lost_is_made_again(self) -> None:
        """The process died before the proposal was written down; the same object, or a new one, is asked again."""
        space = layered_space()
        searcher = self.maker(space)()
        history = simulate(self.maker(space), 30)
        seen = set(digests(history)).__contains__
        first = searcher.propose(history, 30, seen)
        assert searcher.propose(history, 30, seen) == first
        assert self.maker(space)().propose(list(history), 30, seen) == first

    def test_an_equal_copy_of_the_history_is_the_same_history(self) -> None:
        space = layered_space()
        searcher = self.maker(space)()
        history = simulate(self.maker(space), 30, result=mixed)
        copies = [replace(trial, metrics=dict(trial.metrics), sampler=dict(trial.sampler)) for trial in history]
        assert searcher.propose(history, 30) == searcher.propose(copies, 30) == self.maker(space)().propose(copies, 30)

    def test_failed_infeasible_and_nan_results_survive(self) -> None:
        space = layered_space()
        history = simulate(self.maker(space), 45, result=mixed)
        assert len(set(digests(history))) == 45

    def test_a_history_of_failures_only_survives(self) -> None:
        history = simulate(self.maker(layered_space()), 30, result=lambda trial: ("failed", {}, {}))
        assert len(set(digests(history))) == 30

    def test_a_history_of_infeasible_trials_only_survives(self) -> None:
        def infeasible(trial: Trial) -> Result:
            return "infeasible", {}, {"latency_ms": score(trial.architecture)["latency_ms"]}

        history = simulate(self.maker(layered_space()), 40, result=infeasible)
        assert len(set(digests(history))) == 40

    def test_equal_results_everywhere_survive(self) -> None:
        same = {"val_accuracy": 0.5, "latency_ms": 1.0}
        history = simulate(self.maker(layered_space()), 40, result=lambda trial: ("complete", same, {}))
        assert len(set(digests(history))) == 40

    def test_duplicates_in_the_history_survive(self) -> None:
        space = layered_space()
        history = simulate(self.maker(space), 30, avoid=False)
        doubled = [replace(trial, trial=i, index=i) for i, trial in enumerate([*history, *history])]
        assert self.maker(space)().propose(doubled, 60) == self.maker(space)().propose(doubled, 60)

    def test_results_may_come_late_and_in_any_order(self) -> None:
        history = simulate(self.maker(layered_space()), 45, result=mixed, pending=6, shuffle=3)
        assert len(set(digests(history))) == 45

    def test_nothing_needs_to_be_finished(self) -> None:
        history = simulate(self.maker(layered_space()), 30, pending=100)
        assert len(set(digests(history))) == 30

    def test_what_is_to_be_avoided_is_never_proposed(self) -> None:
        space = layered_space()
        refused = {space.sample(i).digest for i in range(60)}
        searcher = self.maker(space)()
        history: list[Trial] = []
        for _ in range(30):
            taken = refused | set(digests(history))
            history.append(finish(propose(searcher, history, taken.__contains__), good))
            assert history[-1].digest not in taken

    def test_a_small_space_is_proposed_completely_and_then_said_to_be_exhausted(self) -> None:
        space = pair_space()
        history = simulate(self.maker(space), 6)
        assert set(digests(history)) == {architecture.digest for architecture in space.enumerate()}
        with pytest.raises(SpaceExhausted, match="pair"):
            propose(self.maker(space)(), history, set(digests(history)).__contains__)

    def test_a_space_without_choices_holds_one_proposal(self) -> None:
        space = Space(fixed, "fixed")
        history = simulate(self.maker(space), 1)
        with pytest.raises(SpaceExhausted):
            propose(self.maker(space)(), history, set(digests(history)).__contains__)

    def test_the_history_is_left_alone(self) -> None:
        space = layered_space()
        history = simulate(self.maker(space), 30, result=mixed)
        copies = [replace(trial, metrics=dict(trial.metrics), sampler=dict(trial.sampler)) for trial in history]
        self.maker(space)().propose(history, 30)
        assert repr(history) == repr(copies)  # repr, since NaN is not equal to itself

    def test_results_matter_unless_the_searcher_looks_at_none(self) -> None:
        space = layered_space()
        up = simulate(self.maker(space), 40)
        down = simulate(
            self.maker(space), 40, result=lambda t: ("complete", {k: -v for k, v in score(t.architecture).items()}, {})
        )
        assert (digests(up) != digests(down)) == self.reads_results
