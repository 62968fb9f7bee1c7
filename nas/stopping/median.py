"""The median rule: a training whose best is below what others were on average ends. See `MedianRule`."""

from __future__ import annotations

import math
from bisect import bisect_left, insort

from nas.stopping.base import GO_ON, Decision, StoppingRule, at_intervals, not_reported, plain


class MedianRule(StoppingRule):
    """Stops a training whose best value so far is strictly below the median of the others' running averages at the same epoch.

    The running average of a training at an epoch is the mean of its values from min_epochs up to there. "The others" are all
    trainings that have reached that epoch, whether they run, ended or were stopped later. So no training is stopped that has the
    best value so far: an average is never above the best.

    Source: Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization" (KDD), the median stopping rule of the
    section on automated early stopping. There the others are the completed trials only; here unfinished and stopped ones count up
    to where they came, or the first stops would wait for the first completions, and the median would be of survivors only. Values
    before min_epochs are left out, and `startup` is ours.

    Args:
        min_epochs: the first epoch that is judged, and the first that averages are over.
        interval: epochs between two judgements.
        startup: other trainings that must have reached an epoch before any is stopped there.
    """

    name = "median"

    def __init__(self, *, min_epochs: int = 1, interval: int = 1, startup: int = 4) -> None:
        super().__init__(min_epochs=min_epochs, startup=startup)
        if interval < 1:
            raise ValueError(f"expected an interval of at least 1 epoch, got {interval}")
        self.interval = interval
        self._values: dict[int, dict[int, float]] = {}  # trial -> epoch -> value
        self._averages: dict[int, list[float]] = {}  # rung -> running averages there, sorted
        self._average: dict[tuple[int, int], float] = {}  # (trial, rung) -> its own

    def rungs(self, epochs: int) -> list[int]:
        return at_intervals(self.min_epochs, self.interval, epochs)

    def report(self, trial: int, epoch: int, value: float) -> None:
        if epoch < self.min_epochs:
            return
        values = self._values.setdefault(trial, {})
        if epoch in values:
            return
        values[epoch] = plain(value)
        for rung in sorted(values):  # in order of epochs only the last one has anything new
            if rung >= epoch and (rung - self.min_epochs) % self.interval == 0:
                self._place(trial, rung, values)

    def decide(self, trial: int, epoch: int) -> Decision:
        values = self._values.get(trial, {})
        if epoch not in values or (trial, epoch) not in self._average:
            raise not_reported(self.name, trial, epoch)
        averages = self._averages[epoch]
        if len(averages) - 1 < self.startup:
            return GO_ON
        median = _median_without(averages, bisect_left(averages, self._average[trial, epoch]))
        best = max(value for at, value in values.items() if at <= epoch)
        if best >= median:
            return GO_ON
        return Decision(
            stop=True,
            reason=f"median: best val_accuracy {best:.4g} up to epoch {epoch}, the median of {len(averages) - 1} others is "
            f"{median:.4g}",
        )

    def _place(self, trial: int, rung: int, values: dict[int, float]) -> None:
        """Put the running average of a trial at a rung among the others', in place of the one that was there."""
        averages = self._averages.setdefault(rung, [])
        before = self._average.get((trial, rung))
        if before is not None:
            del averages[bisect_left(averages, before)]
        seen = [value for at, value in values.items() if at <= rung]
        average = math.fsum(seen) / len(seen)  # exact, so that the order of the reports cannot show
        self._average[trial, rung] = average
        insort(averages, average)


def _median_without(ordered: list[float], left_out: int) -> float:
    """Median of a sorted list without the element at one place; not by the mean of two infinities."""

    def at(place: int) -> float:
        return ordered[place if place < left_out else place + 1]

    count = len(ordered) - 1
    low, high = at((count - 1) // 2), at(count // 2)
    return low if low == high else (low + high) / 2
