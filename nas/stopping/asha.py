"""Asynchronous successive halving that stops: at each rung the best 1/reduction of the trainings go on. See `Asha`."""

from __future__ import annotations

import math
from bisect import bisect_right, insort

from nas.stopping.base import GO_ON, Decision, StoppingRule, not_reported, plain


class Asha(StoppingRule):
    """Rungs at min_epochs x reduction^k epochs; a training goes on if its value is in the best 1/reduction of its rung so far.

    With n values at the rung, its own among them, and b of them better, it goes on if b < max(1, n / reduction rounded down).
    Equal values are equally good, so the best so far always goes on. The first `startup` results of a rung go on unseen.

    Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv:1810.05934), Algorithm 2.
    There, a training waits at its rung until it belongs to the best of a rung that has filled, and may be promoted much later; here
    (the "stopping" variant) it is judged at once and only by the results that have come, so nothing waits and no checkpoint is kept
    for a later promotion. The price: early arrivals have it easier than late ones. `startup` and one bracket only are ours.

    Args:
        min_epochs: the first rung.
        reduction: above 1.
        startup: results of a rung before any training is stopped there.
    """

    name = "asha"

    def __init__(self, *, min_epochs: int = 1, reduction: float = 3.0, startup: int = 4) -> None:
        super().__init__(min_epochs=min_epochs, startup=startup)
        if not 1 < reduction < math.inf:
            raise ValueError(f"expected a reduction above 1, got {reduction}")
        self.reduction = reduction
        self._at: dict[int, dict[int, float]] = {}  # epoch -> trial -> value
        self._sorted: dict[int, list[float]] = {}

    def rungs(self, epochs: int) -> list[int]:
        """min_epochs x reduction^k, rounded down; equal ones once."""
        found: list[int] = []
        power = 0
        while (rung := int(self.min_epochs * self.reduction**power + 1e-9)) < epochs:
            if not found or rung > found[-1]:
                found.append(rung)
            next_epoch = math.log((found[-1] + 1) / self.min_epochs) / math.log(self.reduction)
            power = max(power + 1, math.floor(next_epoch))  # a reduction near 1 has many powers within one epoch
        return found

    def report(self, trial: int, epoch: int, value: float) -> None:
        if epoch < self.min_epochs:
            return
        values = self._at.setdefault(epoch, {})
        if trial not in values:
            values[trial] = plain(value)
            insort(self._sorted.setdefault(epoch, []), values[trial])

    def decide(self, trial: int, epoch: int) -> Decision:
        own = self._at.get(epoch, {}).get(trial)
        if own is None:
            raise not_reported(self.name, trial, epoch)
        values = self._sorted[epoch]
        count = len(values)
        if count <= self.startup:
            return GO_ON
        better = count - bisect_right(values, own)
        if better < max(1, int(count / self.reduction + 1e-9)):
            return GO_ON
        return Decision(
            stop=True,
            reason=f"asha: val_accuracy {own:.4g} after epoch {epoch} is number {better + 1} of {count} there",
        )
