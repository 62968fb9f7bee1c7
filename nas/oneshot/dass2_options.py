"""The options of `dass2`, checked when they are made. Start with `Dass2Options`."""

from __future__ import annotations

from dataclasses import dataclass

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import check_number, check_one_of, check_whole
from ops.patterns import PatternError, parse_pattern


@dataclass(frozen=True)
class Dass2Options(algorithm.Options):
    """Options of dass2.

    Attributes:
        densities: overall fractions kept to search for; default those the space offers below 1.
        allocation: how a density is spread over the layers: "erk", "uniform" or "global" (one ranking).
        pattern: of the masks; default the first that has these densities.
        dense: share of the search before anything is masked.
        warmup: share of the search before the architecture parameters move; the longer of this and `warmup_epochs` counts.
        skip_guard: weight of the extra skip at the start; it falls to 0 along a line.
        candidates: that race for each density.
        race_epochs: of every turn in a race; 0: no race, the most probable architecture is handed out.
        race_lr, race_weight_decay: of the candidates' AdamW.
        selection_rows: rows of the architecture's half that candidates are judged on.
        budget: what candidates have equally much of: "kept" weights, or "latency" on the sparse kernels.
        latency_weight: w of the loss that moves the architecture parameters, cross-entropy + w log(expected ms); 0 for none.
    """

    epochs: int = 30
    alpha_lr: float = 3e-3
    densities: tuple[float, ...] = ()
    allocation: str = "erk"
    pattern: str = ""
    dense: float = 0.3
    warmup: float = 0.3
    skip_guard: float = 1.0
    candidates: int = 8
    race_epochs: int = 2
    race_lr: float = 3e-3
    race_weight_decay: float = 0.01
    selection_rows: int = 2048
    budget: str = "kept"
    latency_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "densities", tuple(float(d) for d in self.densities))
        for density in self.densities:
            check_number("densities", density, 0.0, 1.0, above=True)
        names = [f"{density:g}" for density in self.densities]
        if len(set(names)) < len(names):
            raise ConfigError(f"densities: expected different ones (to six digits), got {list(self.densities)}")
        if self.pattern:
            try:
                fixed = parse_pattern(self.pattern).fixed_density
            except PatternError as error:
                raise ConfigError(f"pattern: {error}") from error
            if fixed is not None:
                raise ConfigError(
                    f'pattern: expected one of free density, because every network gets a density of its own, got "{self.pattern}" '
                    f"(always {fixed:g})"
                )
        check_one_of("allocation", self.allocation, ("erk", "uniform", "global"))
        check_one_of("budget", self.budget, ("kept", "latency"))
        for name in ("dense", "warmup"):
            check_number(name, getattr(self, name), 0.0, 1.0 + 1e-9)
        for name in ("skip_guard", "latency_weight", "race_weight_decay"):
            check_number(name, getattr(self, name), 0.0)
        check_number("race_lr", self.race_lr, 0.0, above=True)
        for name, low in (("candidates", 1), ("race_epochs", 0), ("selection_rows", 2)):
            check_whole(name, getattr(self, name), low)
