"""GDAS: per step one operation on every edge, drawn by its probability and run alone; gradients go straight through the draw.

Where a choice of inputs cannot be read off the operations on them (NASNet's blocks choose an input and the operation on it apart),
inputs are drawn in the same way.

Source: Dong and Yang 2019, GDAS (arXiv:1910.04465), section 3.2, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, StepReport, check_number
from nas.oneshot.choices import Choice, EdgeChoice
from nas.oneshot.decode import NONE
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.gumbel import gumbel_softmax, hard_choices
from nas.oneshot.mixed import Gate, Gates
from search_spaces import Architecture
from search_spaces.genotype_conversion import genotype_from_architecture
from search_spaces.genotypes import GenotypeError


@dataclass(frozen=True)
class GdasOptions(algorithm.Options):
    """Options of GDAS; defaults are those of its search in the NASNet-like space.

    Attributes:
        tau_max, tau_min: temperature of the draws in the first and the last epoch, linear between.
    """

    epochs: int = 250
    batch_size: int = 256
    weight_decay: float = 5e-4
    tau_max: float = 10.0
    tau_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_max", "tau_min"):
            check_number(name, getattr(self, name), 0.0, above=True)
        if self.tau_min > self.tau_max:
            raise ConfigError(f"tau_min: expected at most tau_max = {self.tau_max:g}, got {self.tau_min:g}")


class Gdas(GradientSearch):
    """Single paths by straight-through Gumbel-softmax.

    Every forward pass draws anew: the architecture step and the weight step of a step run different paths.
    """

    name = "gdas"
    Options: ClassVar[type[algorithm.Options]] = GdasOptions

    def __init__(self, setting: algorithm.Setting, options: GdasOptions) -> None:
        super().__init__(setting, options)
        self.tau = options.tau_max
        self.draws = True

    def make_weight_optimizer(self, parameters: Any, lr: float) -> torch.optim.SGD:
        """SGD, with Nesterov's momentum where there is any."""
        made = super().make_weight_optimizer(parameters, lr)
        for group in made.param_groups:
            group["nesterov"] = self.options.momentum > 0
        return made

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        self.tau = self.temperature(at)
        return super().step(x, y, held, at)

    def temperature(self, at: At) -> float:
        """Of the draws in this epoch."""
        options = self.options
        return float(options.tau_max - (options.tau_max - options.tau_min) * at.epoch / max(1, at.epochs - 1))

    def gates(self) -> Gates:
        """One operation per decision and, where inputs are chosen apart, as many of them as are kept.

        Drawn; the most probable if `draws` is off.
        """
        names = [name for name in self.alphas if self.mixes(name)]
        if not names:
            return {}
        alphas = [self.alphas[name] for name in names]
        soft = gumbel_softmax(alphas, self.tau, self.generator) if self.draws else [a.softmax(0) for a in alphas]
        made: Gates = {}
        for name, row, (one, index) in zip(names, soft, hard_choices(soft)):
            choice = self.alphas.choices[name]
            if isinstance(choice, EdgeChoice) and choice.keep > 1:
                made[name] = strongest_inputs(row, choice.keep)
            else:
                made[name] = Gate(one, (index,))
        return made

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the most probable path."""
        self.draws = False
        try:
            return super().logits(x)
        finally:
            self.draws = True

    def log_row(self) -> dict[str, Any]:
        return {**super().log_row(), "tau": self.tau}

    def note(self, architecture: Architecture, sparsity: Mapping[str, tuple[float, str, str]]) -> dict[str, Any]:
        """As of any search, and what GDAS's own rule would take, which may be two operations on one input.

        Spaces whose nodes read different inputs cannot hold that; what is found has the best operation on another input then.
        """
        note = super().note(architecture, sparsity)
        taken = self.best_pairs()
        if taken:
            note["gdas_pairs"] = {name: [[op, j] for op, j in pairs] for name, pairs in taken.items()}
            repeats = [name for name, pairs in taken.items() if len({j for _, j in pairs}) < len(pairs)]
            if repeats:
                note["not_held"] = (
                    f"{', '.join(repeats)}: GDAS's rule takes several operations on one input, which this space cannot hold; the "
                    "architecture has the best operation on another input instead"
                )
            if (text := self.raw_genotype(architecture, taken)) is not None:
                note["raw_genotype"] = text
        return note

    def best_pairs(self) -> dict[str, list[tuple[str, int]]]:
        """Edge choice -> the (operation, input) pairs that GDAS's rule takes."""
        probabilities = {name: p.detach() for name, p in self.probabilities().items()}
        choices = self.supernet.choices
        return {
            name: best_pairs(choice, choices, probabilities)
            for name, choice in choices.items()
            if isinstance(choice, EdgeChoice) and choice.own and all(len(names) == 1 for names in choice.operations)
        }

    def raw_genotype(self, architecture: Architecture, taken: Mapping[str, list[tuple[str, int]]]) -> str | None:
        """The cells that GDAS's rule takes, as the field writes them; None for spaces without cells."""
        try:
            genotype = genotype_from_architecture(self.setting.space, architecture)
        except GenotypeError:
            return None
        normal, reduce = (
            tuple(pair for name, pairs in taken.items() if name.startswith(f"{kind}.") for pair in pairs)
            for kind in ("normal", "reduce")
        )
        if (len(normal), len(reduce)) != (len(genotype.normal), len(genotype.reduce)):
            return None
        return str(replace(genotype, normal=normal, reduce=reduce))


def strongest_inputs(soft: Tensor, keep: int) -> Gate:
    """The `keep` inputs that a relaxed choice counts most, each with weight 1 and the gradient of its share."""
    chosen = soft.detach().topk(keep).indices
    hard = torch.zeros_like(soft).index_fill(0, chosen, 1.0)
    return Gate(hard + keep * (soft - soft.detach()), tuple(sorted(int(j) for j in chosen)))


def best_pairs(
    choice: EdgeChoice, choices: Mapping[str, Choice], probabilities: Mapping[str, Tensor]
) -> list[tuple[str, int]]:
    """The `keep` most probable (operation, input) pairs but "none", the best first; ties to the lower input, then operation."""
    pairs = []
    for j, names in enumerate(choice.operations):
        for name in names:
            for option, p in zip(choices[name].options, probabilities[name].tolist()):
                if option != NONE or len(choices[name].options) == 1:
                    pairs.append((p, str(option), j))
    return [(option, j) for _, option, j in sorted(pairs, key=lambda pair: -pair[0])[: choice.keep]]
