"""Population based training: the worst trainings go on with the training settings of the best. See `PopulationBased`."""

from __future__ import annotations

from bisect import bisect_left, insort

from nas.searchers.base import rng
from nas.stopping.base import GO_ON, Decision, Settings, StoppingRule, at_intervals, not_reported, plain

SETTINGS = ("lr", "weight_decay")
FACTORS = (0.8, 1.2)
SHARE = 4
"""The best and the worst 1/SHARE of the trainings at an epoch."""


class PopulationBased(StoppingRule):
    """Never stops anything. At each interval a training in the worst quarter takes over the settings of one in the best quarter.

    The factors on lr and weight_decay of a training drawn from the best quarter of that epoch, each times 0.8 or 1.2, become those
    of the worse one. Its weights are taken over only if it computes the same network (equal digest): weights of another
    architecture do not fit, which is where a search of architectures differs from the paper's population of equal networks. A
    training that is as good as the one drawn stays as it is.

    Source: Jaderberg et al. 2017, "Population Based Training of Neural Networks" (arXiv:1711.09846): exploit by truncation
    selection, explore by perturbing. The paper selects among 20 %; a quarter is ours. Each is judged by those that have come to its
    epoch so far, as the paper's asynchronous form does.

    Args:
        min_epochs: the first epoch at which settings change.
        interval: epochs between two changes.
        startup: other trainings that must have reached an epoch before any is changed there.
        seed: of the draws: of whom to take over, and of the factors.
    """

    name = "pbt"

    def __init__(self, *, min_epochs: int = 1, interval: int = 1, startup: int = 4, seed: int = 0) -> None:
        super().__init__(min_epochs=min_epochs, startup=startup)
        if interval < 1:
            raise ValueError(f"expected an interval of at least 1 epoch, got {interval}")
        self.interval = interval
        self.seed = seed
        self._known: dict[int, tuple[str, Settings]] = {}  # trial -> digest, factors
        self._at: dict[int, dict[int, float]] = {}
        self._sorted: dict[
            int, list[tuple[float, int]]
        ] = {}  # epoch -> (value, -trial): of equals the earlier is the better

    def rungs(self, epochs: int) -> list[int]:
        return at_intervals(self.min_epochs, self.interval, epochs)

    def introduce(self, trial: int, digest: str, settings: Settings) -> None:
        self._known[trial] = (digest, dict(settings))

    def report(self, trial: int, epoch: int, value: float) -> None:
        if epoch < self.min_epochs:
            return
        values = self._at.setdefault(epoch, {})
        if trial not in values:
            values[trial] = plain(value)
            insort(self._sorted.setdefault(epoch, []), (values[trial], -trial))

    def decide(self, trial: int, epoch: int) -> Decision:
        own = self._at.get(epoch, {}).get(trial)
        if own is None:
            raise not_reported(self.name, trial, epoch)
        ordered = self._sorted[epoch]
        quarter = len(ordered) // SHARE
        if len(ordered) <= self.startup or bisect_left(ordered, (own, -trial)) >= quarter:
            return GO_ON
        draw = rng(self.seed, self.name, trial, epoch)
        value, negative = ordered[len(ordered) - 1 - draw.randrange(quarter)]
        if value <= own:
            return GO_ON
        donor = -negative
        digest, settings = self._known.get(donor, ("", {}))
        own_digest = self._known.get(trial, ("", {}))[0]
        changed = {name: settings.get(name, 1.0) * draw.choice(FACTORS) for name in SETTINGS}
        return Decision(
            settings=changed,
            donor=donor if digest and digest == own_digest else None,
            reason=f"pbt: val_accuracy {own:.4g} after epoch {epoch} is in the worst quarter of {len(ordered)}; takes over from "
            f"trial {donor}",
        )
