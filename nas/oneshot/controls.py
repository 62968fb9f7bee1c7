"""What a found architecture has to be compared with: random architectures and that of a dense search, at equal kept weights.

A search for sparse networks has to beat both before anything can be said for it: cells full of skips and pools do well at very
low density whoever finds them. Start with `control_proposals`.

Source: controls asked for by Li and Talwalkar 2019 (arXiv:1902.07638) section 3 and Yang et al. 2020 (arXiv:1912.12522) section 3:
random architectures of the same space, trained alike, over several seeds.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nas.oneshot.matching import TOLERANCE, MatchError, match
from nas.searchers.base import Proposal, rng
from ops.counting import total_kept_weights
from search_spaces import Architecture, Space

RANDOM, DENSE = "random", "dense"
TRIES = 50
"""Random architectures drawn before a control is given up: in some spaces most cannot have so few or so many weights."""


@dataclass(frozen=True)
class FoundTrial:
    """An architecture that a search found and the run trains.

    Attributes:
        replicate: which search of this searcher it is from, 0 for the first.
        seed: of its training; its controls are trained with the same.
        architecture: what was found.
        note: what the search says of it (JSON). "density" (the target) makes groups that are compared within; "kept_weights" is
            believed where the weights really kept are not those of the architecture's densities.
    """

    replicate: int
    seed: int
    architecture: Architecture
    note: Mapping[str, Any] = field(default_factory=dict)


def control_name(searcher: str, kind: str) -> str:
    """Name under which controls are trials: "<searcher>/random", "<searcher>/dense", "<searcher>/<other searcher>"."""
    return f"{searcher}/{kind}"


def control_proposals(
    space: Space,
    found: Mapping[str, Sequence[FoundTrial]],
    dense: Mapping[str, Sequence[FoundTrial]],
    *,
    seed: int,
    count: int = 1,
    tolerance: float = TOLERANCE,
    message: Callable[[str], None] | None = None,
) -> dict[str, list[Proposal]]:
    """The controls of found architectures: for each, `count` random ones, that of the dense search of its replicate, and those
    that the run's other searches for sparse networks found in that replicate (of several, the one nearest in density).

    Every control keeps as many convolution and linear weights as the found one, within `tolerance`, and has its patterns and
    allocation rules where the same decisions are asked. A random architecture that cannot keep so many or so few is drawn
    again, `TRIES` times, so the random controls are drawn from those that can be compared. Depends on the arguments only.

    Args:
        space: of all the architectures.
        found: searcher -> what it found, in a fixed order.
        dense: searcher -> what the dense search it is compared with found; the first architecture of each replicate counts.
        seed: of the random architectures.
        count: random controls of each found architecture.
        tolerance: largest difference in kept weights, as a fraction.
        message: is told what is left out and why; default a warning in the log.

    Returns:
        "<searcher>/random", "<searcher>/dense" and "<searcher>/<other>" -> proposals, with the seed of the found trial and the
        sampler {"control_of": searcher, "replicate", "found_index", "kept_wanted"} and "group" where the found one has a density.
    """
    say = message or logging.getLogger(__name__).warning
    proposals: dict[str, list[Proposal]] = {}
    for searcher, trials in found.items():
        randoms = proposals.setdefault(control_name(searcher, RANDOM), [])
        proposals.setdefault(control_name(searcher, DENSE), [])
        by_replicate = {trial.replicate: trial.architecture for trial in reversed(dense.get(searcher, ()))}
        for index, trial in enumerate(trials):
            wanted = kept_by(space, trial)
            sampler = {
                "control_of": searcher,
                "replicate": trial.replicate,
                "found_index": index,
                "kept_wanted": wanted,
            }
            sampler |= {"group": group} if (group := group_of(trial.note)) is not None else {}
            who = f"{searcher}, replicate {trial.replicate}, architecture {index}"
            for k in range(count):
                generator = rng("control", seed, searcher, trial.replicate, index, k)
                try:
                    architecture = _random(space, trial.architecture, wanted, generator, tolerance)
                except MatchError as error:
                    say(f"{who}: no random control: {error}")
                else:
                    randoms.append(Proposal(architecture, dict(sampler), seed=trial.seed))
            rivals = {other: _nearest(found[other], trial) for other in found if other != searcher}
            for kind, rival in {DENSE: by_replicate.get(trial.replicate), **rivals}.items():
                try:
                    if rival is None:
                        raise MatchError("it found nothing in this replicate")
                    architecture = match(
                        space, rival, kept_weights=wanted, tolerance=tolerance, like=trial.architecture
                    )
                except MatchError as error:
                    say(f"{who}: no control from the {kind} search: {error}")
                else:
                    if same_but_density(architecture, trial.architecture):
                        architecture = (
                            trial.architecture
                        )  # then it becomes a copy of the found one, and is not trained again
                    controls = proposals.setdefault(control_name(searcher, kind), [])
                    controls.append(Proposal(architecture, dict(sampler), seed=trial.seed))
    return proposals


def _nearest(trials: Sequence[FoundTrial], like: FoundTrial) -> Architecture | None:
    """What another search found in the same replicate; of several, the first of the nearest density."""
    same = [trial for trial in trials if trial.replicate == like.replicate]
    density = like.note.get("density")

    def distance(trial: FoundTrial) -> float:
        other = trial.note.get("density")
        return abs(math.log(other / density)) if other and density else 0.0

    return min(same, key=distance).architecture if same else None


def same_but_density(one: Architecture, two: Architecture) -> bool:
    """Whether two architectures take the same decisions, densities left out."""

    def rest(architecture: Architecture) -> dict[str, Any]:
        return {n: v for n, v in architecture.decisions if n.rpartition(".")[2] != "density"}

    return rest(one) == rest(two)


def group_of(note: Mapping[str, Any]) -> Any:
    """Which architectures a found one is compared with: those of its "group", else of its "density"; None for all."""
    return note.get("group", note.get("density"))


def kept_by(space: Space, found: FoundTrial) -> int:
    """Convolution and linear weights a found architecture keeps."""
    said = found.note.get("kept_weights")
    return int(said) if said is not None else total_kept_weights(space.meta(found.architecture))


def _random(space: Space, found: Architecture, wanted: int, generator: random.Random, tolerance: float) -> Architecture:
    last: MatchError | None = None
    for _ in range(TRIES):
        try:
            return match(space, space.sample(generator), kept_weights=wanted, tolerance=tolerance, like=found)
        except MatchError as error:
            last = error
    raise MatchError(f"none of {TRIES} random architectures can keep {wanted:,} weights; the last: {last}")
