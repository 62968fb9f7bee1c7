"""What one-shot searches wrote about themselves: a `SearchLog` per supernet of a run, finished or not. Start with `search_logs`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.checkpoint import read_facts
from nas.errors import RunError
from nas.oneshot.engine import RESULT, read_result
from search_spaces.skips import is_skip_or_pool


@dataclass(frozen=True)
class SearchLog:
    """The log of one supernet.

    Attributes:
        job: its folder below oneshot/, "<searcher>-s<replicate>".
        finished: whether there is a result.
        rows: one per epoch: "phase", "epoch" (within the phase), "train_loss", "supernet_accuracy", "alphas" (decision ->
            probabilities), ...
        choices: decision -> its options, in the order of the probabilities.
        found: architectures, best first: {"decisions", "note"}.
        facts: "algorithm", "seed", "seconds", ... of a finished one.
    """

    job: str
    finished: bool
    rows: list[dict[str, Any]]
    choices: dict[str, list[Any]] = field(default_factory=dict)
    found: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The job without its replicate: supernets that differ in their seed only."""
        return self.job.rpartition("-s")[0] or self.job

    def decisions(self) -> list[str]:
        """Those whose probabilities were logged, the most decided first; in the order of the log where that is equal."""
        last = self.rows[-1].get("alphas", {}) if self.rows else {}
        known = [name for name in last if len(last[name]) == len(self.choices.get(name, ()))]
        return sorted(known, key=lambda name: -decidedness(last[name]))

    def probabilities(self, name: str) -> list[list[float]]:
        """Of one decision: a row of as many numbers as it has options for every epoch."""
        return [row["alphas"][name] for row in self.rows if name in row.get("alphas", {})]

    def taken(self, name: str) -> tuple[int, ...]:
        """Which options of a decision the first architecture found has; none if it has not got this decision."""
        if not self.found:
            return ()
        decisions, options = self.found[0]["decisions"], self.choices[name]
        if f"{name}.density" in decisions:  # density and pattern together are one choice
            value: Any = f"{decisions[f'{name}.density']:g} {decisions.get(f'{name}.pattern', '')}".strip()
        else:
            value = decisions.get(name)
        if value in options:
            return (options.index(value),)
        inputs = str(value).split(",")
        return tuple(i for i, option in enumerate(options) if str(option) in inputs)

    def skip_share(self) -> list[float]:
        """Mean probability of skipping, pooling and "none", epoch by epoch, over the decisions that offer any; [] if none does."""
        places = {
            name: [i for i, option in enumerate(options) if isinstance(option, str) and is_skip_or_pool(option)]
            for name, options in self.choices.items()
        }
        logged = [name for name in self.decisions() if places[name]]
        shares = []
        for row in self.rows if logged else ():
            alphas = row.get("alphas", {})
            each = [sum(alphas[name][i] for i in places[name]) for name in logged if name in alphas]
            shares.append(sum(each) / len(each) if each else math.nan)
        return shares


def decidedness(probabilities: list[float]) -> float:
    """1 - entropy / log(options): 0 where all options are equal, 1 where one is certain (or there is only one)."""
    if len(probabilities) < 2:
        return 1.0
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return 1.0 - entropy / math.log(len(probabilities))


def search_logs(run_folder: str | Path) -> list[SearchLog]:
    """The supernets of a run that have a log, by name; those that cannot be read are left out."""
    found = []
    for folder in sorted((Path(run_folder) / "oneshot").glob("*-s*"), key=_place):
        with suppress(RunError):
            if (log := _read(folder)) is not None:
                found.append(log)
    return found


def _place(folder: Path) -> tuple[str, int, str]:
    group, _, replicate = folder.name.rpartition("-s")
    return group, int(replicate) if replicate.isdigit() else 0, folder.name


def _read(folder: Path) -> SearchLog | None:
    if (folder / RESULT).is_file():
        result = read_result(folder)
        found = [{"decisions": _decisions(one["architecture"]), "note": one["note"]} for one in result.found]
        choices = {name: list(options) for name, options in result.facts.get("choices", {}).items()}
        return SearchLog(folder.name, True, result.log, choices, found, result.facts)
    facts: Mapping[str, Any] = read_facts(folder) or {}
    rows = list(facts.get("log", ()))
    return SearchLog(folder.name, False, rows, dict(facts.get("choices", {}))) if rows else None


def _decisions(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return dict(architecture["decisions"])
