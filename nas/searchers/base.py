"""What a searcher is, and what they all share: seeds, outcomes of trials, and drawing something new.

A searcher is a function of the history. It keeps nothing that it could not find again in the trials it is shown: a new
object with the same seed and the same history proposes the same. All randomness of proposal `index` comes from (seed,
searcher, index), so nothing depends on how many numbers were drawn before. Start with `Searcher` and `Proposal`.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from nas.errors import ConfigError, NasError
from nas.objectives import objective_values, parse_objectives, total_violation
from nas.pareto import normalise_directions
from search_spaces.architecture import Architecture, SpaceError
from search_spaces.space import Space

Avoid = Callable[[str], bool]
"""digest -> True if this architecture must not be proposed (again)."""

RANDOM_TRIES = 50
LAST_TRIES = 2000
ENUMERABLE_SIZE = 5_000


class SpaceExhausted(NasError, RuntimeError):
    """There is nothing left to propose: every architecture that can be found was proposed already. The search is complete."""


class TrialLike(Protocol):
    """What searchers read of a trial (`nas.store.Trial`)."""

    @property
    def index(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def digest(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    @property
    def violations(self) -> Mapping[str, float]: ...
    @property
    def sampler(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Proposal:
    """What to evaluate next.

    Attributes:
        architecture: the network.
        sampler: JSON the searcher wants to find again in `Trial.sampler`; opaque to everybody else.
        seed: of the trial's weights, masks and batches; None: the run's.
        initial: safetensors file, relative to the run's folder, of weights and masks that training must start from; None: from
            scratch.
    """

    architecture: Architecture
    sampler: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    initial: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a trial taught.

    Attributes:
        kind: "pending" (no result yet), "failed" (none will come), or "known".
        costs: the objectives, all minimised; None if they were not measured (an infeasible trial stopped early).
        violation: sum of the violated constraints, 0.0 if feasible.
    """

    kind: str
    costs: tuple[float, ...] | None = None
    violation: float = 0.0

    @property
    def known(self) -> bool:
        return self.kind == "known"


PENDING = Outcome("pending")
FAILED = Outcome("failed")


def read_outcome(trial: TrialLike, objectives: Mapping[str, str], signs: Sequence[float]) -> Outcome:
    """Sort a trial into pending, failed and known.

    A finished trial counts as failed if it says so, if a violation is NaN, or if it is feasible but an objective is
    missing or not finite. A trial that is infeasible without violations that say by how much counts as violating by 1.
    One that was stopped early is known by the values of its last epoch: too low, but that it was stopped says that it is not good.
    """
    if trial.state in ("proposed", "running"):
        return PENDING
    if trial.state == "failed":
        return FAILED
    violation = total_violation(trial.violations)
    if any(value != value for value in trial.violations.values()):
        return FAILED
    if trial.state == "infeasible" and violation == 0.0:
        violation = 1.0
    values = objective_values(trial.metrics, objectives)
    if values is None:
        return Outcome("known", None, violation) if violation > 0 else FAILED
    return Outcome("known", tuple(value * sign for value, sign in zip(values, signs)), violation)


class Searcher(abc.ABC):
    """Proposes architectures from the history of its own trials.

    Args:
        space: where to search.
        objectives: metric -> "max" or "min".
        seed: of all its randomness.
    """

    name: ClassVar[str]

    def __init__(self, space: Space, objectives: Mapping[str, str], seed: int = 0) -> None:
        self.space = space
        self.objectives = parse_objectives(objectives)
        self.seed = int(seed)
        self.signs = tuple(normalise_directions(self.objectives).tolist())
        self._seen: list[TrialLike] = []
        self._outcomes: list[Outcome] = []  # of those
        self._everything: list[Architecture] | None = None

    @abc.abstractmethod
    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        """Propose the next architecture.

        Args:
            history: all trials of this searcher so far, whatever their state, in the order of their index. Results may be missing
                and may have come in any order.
            index: which proposal this is, 0 for the first.
            avoid: says which digests were proposed already.

        Raises:
            SpaceExhausted: everything was proposed already.
        """

    def outcomes(self, history: Sequence[TrialLike]) -> list[Outcome]:
        """Outcome per trial, not to be changed. Only trials that are new or other objects than last time are read again."""
        known, seen = self._outcomes, self._seen
        del known[len(history) :], seen[len(history) :]
        for position in changed_positions(seen, history):
            trial = history[position]
            if position == len(seen):
                seen.append(trial)
                known.append(read_outcome(trial, self.objectives, self.signs))
                continue
            if not _same(seen[position], trial):
                known[position] = read_outcome(trial, self.objectives, self.signs)
            seen[position] = trial
        return known

    def draw_random(self, index: int, avoid: Avoid) -> Architecture:
        """The random proposal of this index: the same for every searcher with this seed, so that all start alike.

        Redraws up to RANDOM_TRIES times what is to be avoided. Then, in a space of at most ENUMERABLE_SIZE decision
        sequences, picks from everything that is left; in a larger one tries LAST_TRIES times more.

        Raises:
            SpaceExhausted: nothing new was found.
        """
        generator = rng(self.seed, "random", index)
        broken: SpaceError | None = None  # a space function may raise for some decisions: those are drawn again
        drawn = 0
        for _ in range(RANDOM_TRIES):
            try:
                architecture = self.space.sample(generator)
            except SpaceError as error:
                broken = error
                continue
            drawn += 1
            if not avoid(architecture.digest):
                return architecture
        if broken is not None:
            if not drawn:
                raise broken
            raise SpaceExhausted(
                f"space {self.space.name!r}: nothing new in {RANDOM_TRIES} draws, some of which raised: {broken}"
            )
        if self._everything is None:
            self._everything = _enumerate_small(self.space)
        if self._everything:
            left = [architecture for architecture in self._everything if not avoid(architecture.digest)]
            if left:
                return generator.choice(left)
            raise SpaceExhausted(
                f"space {self.space.name!r} is exhausted: all {len(self._everything)} different architectures were proposed; "
                "lower the number of trials, or offer more choices"
            )
        for _ in range(LAST_TRIES):
            architecture = self.space.sample(generator)
            if not avoid(architecture.digest):
                return architecture
        raise SpaceExhausted(
            f"space {self.space.name!r} is exhausted as far as one can tell: {RANDOM_TRIES + LAST_TRIES} draws in a row were "
            "proposed already; lower the number of trials, or offer more choices"
        )


def changed_positions(old: Sequence[object], new: Sequence[object]) -> list[int]:
    """Where `new` holds another object than `old`, ascending, and where it goes on; some 20 ns per element, as it is asked for at
    every proposal."""
    both = itertools.compress(itertools.count(), map(operator.is_not, old, new))
    return [*both, *range(len(old), len(new))]


def _same(one: TrialLike, two: TrialLike) -> bool:
    return (
        one.state == two.state
        and one.digest == two.digest
        and one.metrics == two.metrics
        and one.violations == two.violations
        and one.architecture == two.architecture
        and one.sampler == two.sampler
    )


def _enumerate_small(space: Space) -> list[Architecture]:
    """One architecture per digest, or nothing if the space has more than ENUMERABLE_SIZE decision sequences."""
    found: dict[str, Architecture] = {}
    for count, architecture in enumerate(space.enumerate()):
        if count == ENUMERABLE_SIZE:
            return []
        found.setdefault(architecture.digest, architecture)
    return list(found.values())


def stable_seed(*parts: object, bits: int = 63) -> int:
    """A number from some values, the same in every process and Python (unlike `hash`).

    >>> stable_seed(0, "random", 1) == stable_seed(0, "random", 1)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - bits)


def rng(*parts: object) -> random.Random:
    """A generator seeded with `stable_seed(*parts)`."""
    return random.Random(stable_seed(*parts))


def mutants(
    space: Space, parent: Architecture, generator: random.Random, avoid: Avoid, tries: int
) -> Iterator[Architecture]:
    """Mutants of `parent` that need not be avoided; mutates once, and one step further after every tenth of `tries` failures.

    Empty after `tries` failures, or if the space has nothing to mutate.
    """
    for attempt in range(tries):
        child = parent
        for _ in range(1 + attempt * 10 // tries):
            try:
                child = space.mutate(child, generator)
            except ValueError:
                return
        if not avoid(child.digest):
            yield child


def check_option(
    searcher: str, option: str, value: Any, low: float, high: float | None = None, *, whole: bool = True
) -> None:
    """Raise a ConfigError unless `low <= value <= high` (and a whole number, if asked)."""
    kind = int if whole else int | float
    fits = isinstance(value, kind) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        limits = f">= {low:g}" + (f" and <= {high:g}" if high is not None else "")
        number = "a whole number" if whole else "a number"
        raise ConfigError(f"searcher {searcher!r}: {option} must be {number} {limits}, got {value!r}")
