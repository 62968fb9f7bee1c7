"""What the architectures in a supernet cost: a table of times for every candidate of every choice, and the expectation from them.

Latency is taken to be additive: a network costs what its candidates cost, each by itself, and the rest (stem, reductions,
classifier).
A candidate is priced as it is in a found network: batch norms folded, all channels, random masks at the density asked for. The
rest is what one whole network costs beyond its candidates.

Start with `price_choices`, or `Prices` where the space also decides widths and depths. The expectation itself is
`hw_models.expected`.

Source: FBNet, Wu et al. 2019 (arXiv:1812.03443), section 3.3 (lookup table); densities are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from hw_models.expected import ExpectedLatency
from hw_models.latency_grid import LatencyGrid
from nas.oneshot.choices import Choice, EdgeChoice, OpChoice
from nas.oneshot.decode import NONE
from nas.oneshot.lone import CandidatePlace, LoneCandidate, build_whole, candidate_places, decisions_of_first
from nas.oneshot.supernet import PathGates
from search_spaces.architecture import Value

if TYPE_CHECKING:
    from hw_models.predictor import Predictor
    from nas.oneshot.algorithm import Setting
    from nas.oneshot.supernet import Supernet

REST = "rest"
"""Name of the table of everything that is not searched."""


@dataclass(frozen=True)
class Entry:
    """One table: a decision, and the input it is on where an operation is shared by several.

    Attributes:
        name: of the table.
        decision: name of the op choice.
        edge: name of the edge choice and input that it is on; None where it is on none.
    """

    name: str
    decision: str
    edge: tuple[str, int] | None


class SupernetLatency:
    """The expected latency of one structure of a supernet.

    Args:
        choices: of the supernet.
        entries: in the order of their tables.
        grids: name -> table.
        rest: table of what is not searched, with one candidate.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        entries: Sequence[Entry],
        grids: Mapping[str, LatencyGrid],
        rest: LatencyGrid,
    ) -> None:
        self.choices = dict(choices)
        self.entries = tuple(entries)
        self.grids = dict(grids)
        self.rest = rest
        self._tables = ExpectedLatency({**self.grids, REST: rest})

    def __call__(
        self, probabilities: Mapping[str, Tensor], density: float | Tensor = 1.0, device: torch.device | None = None
    ) -> Tensor:
        """Expected latency.

        Args:
            probabilities: decision -> float[options] of every op choice, and of the edge choices that have some (they sum to 1); of
                n inputs of which k are kept, one counts min(1, k p), or k / n where there are no probabilities.
            density: kept fraction of every layer that may be sparse.
            device: where to compute; default that of the probabilities.

        Returns:
            Scalar, ms, differentiable.

        Raises:
            KeyError: a decision without probabilities.
        """
        shares = {entry.name: self.share(entry, probabilities) for entry in self.entries}
        where = device or next((p.device for p in probabilities.values()), torch.device("cpu"))
        shares[REST] = torch.ones(1, device=where)
        self._tables.to(where)
        result: Tensor = self._tables(shares, density)
        return result

    def share(self, entry: Entry, probabilities: Mapping[str, Tensor]) -> Tensor:
        """How much each candidate of a table counts: float[options]."""
        p = probabilities[entry.decision]
        if entry.edge is None:
            return p
        name, j = entry.edge
        choice = self.choices.get(name)
        if not isinstance(choice, EdgeChoice):  # a single input, which is always kept
            return p
        if name not in probabilities:
            return p * (choice.keep / len(choice.options))
        return p * (choice.keep * probabilities[name][j]).clamp(max=1.0)

    def of_path(self, path: PathGates, density: float = 1.0) -> Tensor:
        """Latency of one architecture, given by its gates (`Supernet.gates_of`)."""
        return self(path_probabilities(self.choices, path), density)


class Prices:
    """Tables of a supernet's structures, made as they are asked for; equal candidates are priced once.

    Args:
        setting: its space and input shape; its latency model, without which candidates are measured.
        densities: kept fractions to price at, besides 1.
        pattern: of the masks; layers on which it is illegal stay dense.
        threads: CPU threads of measurements.

    Attributes:
        known: key of what was priced -> ms; JSON.
    """

    def __init__(
        self,
        setting: Setting,
        densities: Iterable[float] = (),
        pattern: str = "unstructured",
        *,
        threads: int = 1,
    ) -> None:
        self.setting = setting
        self.densities = tuple(sorted({float(d) for d in densities if d != 1}))
        self.pattern = pattern or "unstructured"
        self.threads = threads
        self.known: dict[str, float] = {}
        self._made: dict[tuple[tuple[str, Value], ...], SupernetLatency] = {}

    def of(self, values: Mapping[str, Value] | None = None) -> SupernetLatency:
        """The latencies of one structure.

        Args:
            values: of the choices that cannot be mixed; default the largest.

        Raises:
            PlanError: a candidate that cannot be run alone.
            MeasurementError: a candidate failed while it was timed.
        """
        key = tuple(sorted((values or {}).items()))
        if key not in self._made:
            self._made[key] = self._price(dict(values or {}))
        return self._made[key]

    def take_over(self, known: Mapping[str, float]) -> None:
        """Believe these prices, as `known` gave them."""
        self.known = {str(key): float(ms) for key, ms in known.items()}
        self._made.clear()

    def _price(self, values: dict[str, Value]) -> SupernetLatency:
        choices, places = candidate_places(self.setting, values, self.densities, self.pattern)
        self._learn([lone for place in places for of in place.candidates.values() for lone in of.values()])
        grids: dict[str, LatencyGrid] = {}
        entries: dict[str, Entry] = {}
        by_name: dict[str, list[CandidatePlace]] = {}
        shared = {
            name for name, choice in choices.items() if isinstance(choice, OpChoice) and _on_several(name, choices)
        }
        for place in places:
            alone = place.edge is None or place.decision not in shared
            name = place.decision if alone or place.edge is None else f"{place.decision}@{place.edge[1]}"
            entries.setdefault(name, Entry(name, place.decision, place.edge))
            by_name.setdefault(name, []).append(place)
        for name, several in by_name.items():
            grids[name] = self._grid([place.candidates for place in several])
        return SupernetLatency(choices, list(entries.values()), grids, self._rest(values, choices, entries, grids))

    def _grid(self, occurrences: Sequence[Mapping[str, Mapping[float, LoneCandidate]]]) -> LatencyGrid:
        """The sum of several places: candidate -> density -> module, in each."""
        names = tuple(occurrences[0])
        dense = [sum(self._ms(place[name][1.0]) for place in occurrences) for name in names]
        ms = [
            [
                sum(self._ms(place[name].get(d, place[name][1.0])) for place in occurrences)
                if any(d in place[name] for place in occurrences)
                else math.nan
                for d in self.densities
            ]
            for name in names
        ]
        return LatencyGrid.from_arrays(names, self.densities, ms if self.densities else None, dense)

    def _rest(
        self,
        values: dict[str, Value],
        choices: Mapping[str, Choice],
        entries: Mapping[str, Entry],
        grids: Mapping[str, LatencyGrid],
    ) -> LatencyGrid:
        """What the network of the cheapest candidates but "none", on the first inputs, costs beyond them."""
        decisions = decisions_of_first(choices, values)
        for entry in entries.values():
            options = choices[entry.decision].options
            some = [i for i, option in enumerate(options) if option != NONE] or [0]  # with "none" others might be dead
            decisions[entry.decision] = options[min(some, key=lambda i: float(grids[entry.name].dense_ms[i]))]
        wholes = {d: build_whole(self.setting, decisions, d, self.pattern) for d in (1.0, *self.densities)}
        self._learn(wholes.values())
        path = _gates_of(choices, decisions)
        parts = SupernetLatency(choices, list(entries.values()), grids, _nothing()) if entries else None

        def beyond(density: float) -> float:
            of_parts = float(parts.of_path(path, density)) if parts is not None else 0.0
            return max(0.0, self._ms(wholes[density]) - of_parts)

        ms = [[beyond(d) for d in self.densities]] if self.densities else None
        return LatencyGrid.from_arrays((REST,), self.densities, ms, [beyond(1.0)])

    def _ms(self, lone: LoneCandidate) -> float:
        if lone.free:
            return 0.0
        return max(0.0, self.known[lone.key] - sum(self.known[end.key] for end in lone.ends) / 2)

    def _learn(self, candidates: Iterable[LoneCandidate]) -> None:
        """Price those that are not known."""
        asked = [one for lone in candidates for one in (lone, *lone.ends) if not lone.free]
        missing = {lone.key: lone for lone in asked if lone.key not in self.known}
        if not missing:
            return
        price = self._predicted if self.setting.latency is not None else self._measured
        self.known |= price(missing)

    def _predicted(self, missing: Mapping[str, LoneCandidate]) -> dict[str, float]:
        from hw_models.choices import choose_kernels
        from ops.plan import lower

        model = self.setting.latency
        assert model is not None
        plans = {key: lower(lone.module, lone.example) for key, lone in missing.items()}
        if callable(getattr(model, "price", None)):  # it prices single steps, so it can choose kernels
            plans = {key: choose_kernels(plan, cast("Predictor", model)) for key, plan in plans.items()}
        some = {key: plan for key, plan in plans.items() if plan.ops}
        ms = model.predict_many(list(some.values()))["ms"].tolist() if some else []
        return dict.fromkeys(plans, 0.0) | {key: float(value) for key, value in zip(some, ms)}

    def _measured(self, missing: Mapping[str, LoneCandidate]) -> dict[str, float]:
        from hw_models.latency import measure_many
        from hw_models.measure import Measurer

        networks = {key: (lone.module, lone.example) for key, lone in missing.items()}
        found = measure_many(networks, threads=self.threads, measurer=Measurer(threads=self.threads).quick())
        return {key: latency.ms for key, latency in found.items()}


def price_choices(
    supernet: Supernet, setting: Setting, densities: Iterable[float] = (), pattern: str = "unstructured"
) -> tuple[SupernetLatency, float]:
    """Price every candidate of a supernet's largest structure.

    Args:
        supernet: of the setting's space; not changed.
        setting, densities, pattern: as for `Prices`.

    Returns:
        The expected latency (the rest included), and the rest alone, dense: ms.
    """
    priced = Prices(setting, densities, pattern).of()
    priced.choices |= supernet.choices
    return priced, float(priced.rest.dense_ms[0])


def path_probabilities(choices: Mapping[str, Choice], path: PathGates) -> dict[str, Tensor]:
    """Probabilities that give one path: 1 for what is chosen, 1 / k for each of k inputs that are kept."""
    found: dict[str, Tensor] = {}
    for name, gate in path.gates.items():
        choice = choices[name]
        if isinstance(choice, OpChoice | EdgeChoice) and gate.chosen is not None:
            row = torch.zeros(len(choice.options), dtype=torch.float64)
            row[list(gate.chosen)] = 1.0 / len(gate.chosen)
            found[name] = row
    return found


def _on_several(name: str, choices: Mapping[str, Choice]) -> bool:
    """Whether an operation is on several inputs of a sum, so that each needs a table."""
    return any(
        sum(name in names for names in choice.operations) > 1
        for choice in choices.values()
        if isinstance(choice, EdgeChoice)
    )


def _nothing() -> LatencyGrid:
    return LatencyGrid.from_arrays((REST,), dense_ms=[0.0])


def _gates_of(choices: Mapping[str, Choice], decisions: Mapping[str, Value]) -> PathGates:
    from nas.oneshot.mixed import Gate

    path = PathGates()
    for name, choice in choices.items():
        if isinstance(choice, OpChoice):
            path.gates[name] = Gate(None, (choice.options.index(decisions[name]),))
        elif isinstance(choice, EdgeChoice):
            path.gates[name] = Gate(None, tuple(int(j) for j in str(decisions[name]).split(",")))
    return path


__all__ = ["Entry", "Prices", "SupernetLatency", "path_probabilities", "price_choices"]
