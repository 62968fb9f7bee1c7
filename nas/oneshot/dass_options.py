"""The options of DASS, and how its phases share the epochs. Start with `DassOptions`; the search is `nas.oneshot.dass`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nas.errors import ConfigError
from nas.oneshot.algorithm import check_number, check_one_of, check_whole
from nas.oneshot.darts import DartsOptions
from ops.learned import EXEMPT
from ops.patterns import PatternError, parse_pattern

PRETRAIN, PRUNE, FINETUNE, SEARCH = "pretrain", "prune", "finetune", "search"
SHARES = {PRETRAIN: 2, PRUNE: 1, FINETUNE: 2}
"""How phases share epochs: 100, 50 and 100 in the published code."""


@dataclass(frozen=True)
class DassOptions(DartsOptions):
    """Options of DASS; the defaults are those of its published code.

    Attributes:
        epochs: of all phases. Phases whose own epochs are not given share what the others leave of it, 2 : 1 : 2. If all
            three are given, it is their sum.
        pretrain_epochs, prune_epochs, finetune_epochs: of each phase; 0 leaves it out.
        density: fraction of the weights that is kept after pretraining; default the lowest below 1 that the space offers.
        pattern: of the masks; default the first of the space's that can have the density.
        allocation: how the density is spread over the layers: "uniform" (each alike, as published), "erk", or "global" (one ranking
            of the scores, made again whenever they move). What is found is given the same rule if the space has it, else its first.
        exempt: layers that stay dense in the supernet, beside those the space leaves dense: any of "stem", "classifier",
            "depthwise".
        score_init: of the scores where masks begin: "scaled" (the first masks keep the largest weights), "kaiming_normal",
            "kaiming_uniform".
        score_lr: of the scores, down to lr_min along a cosine.
        alpha_in_prune: move the architecture parameters while masks are learned, too.
        one_step: one phase instead of three.
    """

    epochs: int = 250
    batch_size: int = 32
    momentum: float = 0.0
    weight_decay: float = 1e-3
    order: int = 2
    pretrain_epochs: int | None = None
    prune_epochs: int | None = None
    finetune_epochs: int | None = None
    density: float | None = None
    pattern: str | None = None
    allocation: str = "uniform"
    exempt: tuple[str, ...] = ()
    score_init: str = "scaled"
    score_lr: float = 0.1
    alpha_in_prune: bool = False
    one_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None:
            check_number("density", self.density, 0.0, 1.0 + 1e-12, above=True)
        if self.pattern is not None:
            try:
                object.__setattr__(self, "pattern", str(parse_pattern(self.pattern)))
            except PatternError as error:
                raise ConfigError(f"pattern: {error}") from error
        check_one_of("allocation", self.allocation, ("uniform", "erk", "global"))
        check_one_of("score_init", self.score_init, ("scaled", "kaiming_normal", "kaiming_uniform"))
        check_number("score_lr", self.score_lr, 0.0, above=True)
        if isinstance(self.exempt, str):
            raise ConfigError(f'exempt: expected a list of names, got the text "{self.exempt}"')
        object.__setattr__(self, "exempt", tuple(self.exempt))
        for name in self.exempt:
            check_one_of("exempt", name, EXEMPT)
        self._share_epochs()

    def _share_epochs(self) -> None:
        own = {phase: getattr(self, f"{phase}_epochs") for phase in SHARES}
        for phase, epochs in own.items():
            if epochs is not None:
                check_whole(f"{phase}_epochs", epochs, 0)
                if self.one_step:
                    raise ConfigError(f"{phase}_epochs: with one_step there is a single phase; say epochs instead")
        if self.one_step:
            return
        given = sum(epochs for epochs in own.values() if epochs is not None)
        open_phases = [phase for phase, epochs in own.items() if epochs is None]
        left = self.epochs - given
        if left < len(open_phases):
            raise ConfigError(
                f"epochs: expected at least {given + len(open_phases)} ({given} of the phases that have their own, and one for "
                f"each of {', '.join(open_phases)}), got {self.epochs}"
            )
        for phase, epochs in shared_out(left, {phase: SHARES[phase] for phase in open_phases}).items():
            object.__setattr__(self, f"{phase}_epochs", epochs)
        total = sum(getattr(self, f"{phase}_epochs") for phase in SHARES)
        if total < 1:
            raise ConfigError(
                "pretrain_epochs, prune_epochs, finetune_epochs: expected at least one epoch in all, got 0"
            )
        object.__setattr__(self, "epochs", total)


def shared_out(total: int, shares: Mapping[str, int]) -> dict[str, int]:
    """`total` in whole numbers in proportion to `shares`, each at least 1: largest remainders first, the earlier of equals."""
    if not shares:
        return {}
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    whole = {name: max(1, math.floor(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: whole[n] - exact[n])[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
