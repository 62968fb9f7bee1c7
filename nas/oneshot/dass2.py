"""`dass2`: one search for sparse architectures at every density, with a guard against collapse. Ours.

What it takes over from DASS: the loss that moves the architecture parameters is that of masked weights. What it changes:

- masks are those of the weights' magnitudes and nest; every step draws a density, so one supernet serves all of them, and
  architecture parameters have a part for each density;
- density is spread over the layers that run (ERK, or one ranking of all), not equally, so depthwise layers stay alive;
- every step runs one path, as the found network will: no gap between a mixture and what is made of it, and little memory;
- paths are drawn uniformly at first, and a share of them always: the parameters move only when all operations were trained alike,
  so that skip connections gain nothing from being there early;
- architectures are compared at equal kept weights: what is handed out for a density is the best of many paths, each with the
  density that gives it the same number of kept weights, by the loss of its masked, inherited weights on the architecture's half.

Start with `Dass2`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, Found, Setting, StepReport, check_number, check_one_of, check_whole
from nas.oneshot.alphas import Alphas
from nas.oneshot.budget import PathBudget
from nas.oneshot.choices import Choice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.decode import architecture_of
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.mixed import Gates
from nas.oneshot.paths import Genes, PathSpace, evolve
from search_spaces.architecture import Value


@dataclass(frozen=True)
class Dass2Options(algorithm.Options):
    """Options of dass2.

    Attributes:
        densities: overall fractions kept to search for; default those the space offers below 1.
        allocation: how a density is spread over the layers that run: "erk", "uniform" or "global" (one ranking).
        pattern: of the masks; default the first that has these densities.
        warmup: share of the search in which paths are uniform and the architecture parameters rest.
        dense: share of the warm-up in which nothing is masked.
        uniform: share of the paths that is drawn uniformly afterwards.
        candidates: paths that are compared for each density, in the first round.
        rounds: further rounds of as many children of the best.
        selection_rows: rows of the architecture's half that they are compared on.
        keep: architectures handed out per density.
    """

    lr: float = 0.05
    weight_decay: float = 5e-4
    alpha_lr: float = 3e-3
    densities: tuple[float, ...] = ()
    allocation: str = "erk"
    pattern: str = ""
    warmup: float = 0.4
    dense: float = 0.25
    uniform: float = 0.25
    candidates: int = 48
    rounds: int = 3
    selection_rows: int = 1024
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "densities", tuple(float(d) for d in self.densities))
        for density in self.densities:
            check_number("densities", density, 0.0, 1.0, above=True)
        check_one_of("allocation", self.allocation, ("erk", "uniform", "global"))
        for name in ("warmup", "dense", "uniform"):
            check_number(name, getattr(self, name), 0.0, 1.0 + 1e-9)
        for name, low in (("candidates", 2), ("rounds", 0), ("selection_rows", 2), ("keep", 1)):
            check_whole(name, getattr(self, name), low)


class Dass2(GradientSearch):
    """Nested magnitude masks, one path per step, architecture parameters per density, choice at equal kept weights."""

    name = "dass2"
    sparse = True
    learned = True
    Options: ClassVar[type[algorithm.Options]] = Dass2Options

    def __init__(self, setting: Setting, options: Dass2Options) -> None:
        super().__init__(setting, options)
        self.paths = PathSpace(self.supernet.choices)
        self.densities, self.pattern = self._densities()
        for name, choice in self.supernet.of_kind(SparsityChoice).items():  # masks have one pattern
            self.paths.allowed[name] = tuple(
                i for i, (d, p) in enumerate(choice.targets) if d == 1 or p == self.pattern
            )
        shared = self.alphas.choices
        by_density: dict[str, Choice] = {f"{n}@{d:g}": c for d in self.densities for n, c in shared.items()}
        self.alphas = Alphas({**shared, **by_density}, generator=self.generator, scale=0.0, device=setting.device)
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.tensors(),
            lr=options.alpha_lr,
            betas=options.alpha_betas,
            weight_decay=options.alpha_weight_decay,
        )
        self.searched = tuple(shared)
        self.budget = PathBudget(self.supernet, self.paths, options.allocation, self.pattern)
        self.chance = random.Random(setting.seed + 1)
        self.now = self.densities[0]
        self.genes: Genes | None = None
        self._gradient = False
        self.baselines: dict[str, float] = {}
        self.selection: list[Batch] = []

    def searches(self, name: str) -> bool:
        return not isinstance(self.supernet.choices[name], OverallChoice)

    def _densities(self) -> tuple[tuple[float, ...], str]:
        """What to search for, and the pattern of the masks."""
        offered: dict[float, tuple[str, ...]] = {}
        for choice in self.supernet.choices.values():
            if isinstance(choice, OverallChoice):
                offered |= {d: fits for d, fits in choice.offers if d < 1 and fits}
            elif isinstance(choice, SparsityChoice):
                for d, p in choice.targets:
                    if d < 1:
                        offered[d] = (*offered.get(d, ()), p)
        densities = self.options.densities or tuple(sorted(offered, reverse=True))
        if not densities:
            raise ConfigError(
                f'searcher "dass2": space "{self.setting.space.name}" offers no density below 1, so there is nothing sparse to '
                "search; offer some in [space] densities, or use darts"
            )
        free = [p for fits in offered.values() for p in fits if ":" not in p]
        pattern = self.options.pattern or (free[0] if free else "unstructured")
        return tuple(sorted(set(densities), reverse=True)), pattern

    # -- the step -------------------------------------------------------------------------------------------------------

    def begin_phase(self, index: int, steps: int) -> None:
        super().begin_phase(index, steps)
        self.budget.refresh_scores()

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        options = self.options
        warm = at.fraction < options.warmup
        dense = at.fraction < options.warmup * options.dense
        self.now = self.densities[int(self.chance.random() * len(self.densities))]
        if at.step % 8 == 0:
            self.budget.refresh_scores()
        if not warm:
            self._choose(uniform=False, density=self.now)
            self._architecture_step(*held())
        uniform = warm or self.chance.random() < options.uniform
        self._choose(uniform=uniform, density=1.0 if dense else self.now)
        return self.weight_step(x, y, at)

    def _choose(self, *, uniform: bool, density: float) -> None:
        """Draw a path and put masks of this density on its layers."""
        probabilities = {} if uniform else self._probabilities(self.now)
        self.genes = self.paths.draw(probabilities, self.generator)
        self.values = self.paths.values(self.genes)
        self.follow_structure()
        self.budget.set_density(self.genes, density)

    def _probabilities(self, density: float) -> dict[str, Tensor]:
        """softmax(shared + the density's own) of every choice."""
        return {name: (self.alphas[name] + self.alphas[f"{name}@{density:g}"]).softmax(0) for name in self.searched}

    def _architecture_step(self, x: Tensor, y: Tensor) -> None:
        """One step of Adam on the architecture parameters of this path and density."""
        self._gradient = True
        loss, _ = self.loss(x, y)
        tensors = self.alphas.tensors()
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for alpha, gradient in zip(tensors, gradients):
            alpha.grad = gradient
        self._score_function(float(loss.detach()))
        self.alpha_optimizer.step()
        self._gradient = False

    def _score_function(self, loss: float) -> None:
        """Gradients for the choices that cannot be mixed."""
        key = f"{self.now:g}"
        baseline = self.baselines.setdefault(key, loss)
        self.baselines[key] = 0.9 * baseline + 0.1 * loss
        assert self.genes is not None
        for name in self.searched:
            if isinstance(self.alphas.choices[name], ValueChoice):
                p = self._probabilities(self.now)[name].detach()
                chosen = F.one_hot(torch.tensor(self.genes.taken[name][0]), len(p)).to(p)
                for alpha in (self.alphas[name], self.alphas[f"{name}@{key}"]):
                    alpha.grad = (loss - baseline) * (chosen - p)

    def forward(self, x: Tensor) -> Tensor:
        assert self.genes is not None
        probabilities = self._probabilities(self.now) if self._gradient else None
        with self.autocast():
            return self.supernet(x, self._gates(self.genes, probabilities), self.values)

    def _gates(self, genes: Genes, probabilities: dict[str, Tensor] | None = None) -> Gates:
        """Gates of a path; parts have the densities of the budget, but where their own choice is to get a gradient."""
        gates = self.paths.gates(genes, probabilities)
        if probabilities is None:
            return {n: g for n, g in gates.items() if not isinstance(self.paths.choices[n], SparsityChoice)}
        return gates

    # -- results --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the most probable path at the lowest density."""
        before = self.genes, self.values, self.now
        self.now = self.densities[-1]
        self.genes = self.paths.most_probable(self._probabilities(self.now))
        self.values = self.paths.values(self.genes)
        self.budget.set_density(self.genes, self.now)
        try:
            return self.forward(x).float()
        finally:
            self.genes, self.values, self.now = before

    def log_row(self) -> dict[str, Any]:
        by_density = {f"{d:g}": {n: p.tolist() for n, p in self._probabilities(d).items()} for d in self.densities}
        return {"alphas": by_density[f"{self.densities[-1]:g}"], "alphas_by_density": by_density}

    @property
    def compared_rows(self) -> int:
        return int(self.options.selection_rows)

    def compare_on(self, batches: list[Batch]) -> None:
        self.selection = batches

    def found(self) -> list[Found]:
        """For every density the best paths at equal kept weights."""
        if not self.selection:
            raise RuntimeError("no rows to compare architectures on: call compare_on first")
        self.budget.refresh_scores()
        result = []
        for density in self.densities:
            kept = self.budget.usual_kept(density)
            ranked = self._ranked(density, kept)
            for loss, genes in ranked[: self.options.keep]:
                result.append(self._handed_out(density, kept, loss, genes, len(ranked)))
        return result

    def _ranked(self, density: float, kept: int) -> list[tuple[float, Genes]]:
        options = self.options
        generator = torch.Generator().manual_seed(self.setting.seed)
        chance = random.Random(self.setting.seed)
        p = {name: value.detach() for name, value in self._probabilities(density).items()}
        first = [self.paths.most_probable(p)]
        first += [self.paths.draw(p if i % 2 else {}, generator) for i in range(options.candidates - 1)]
        return evolve(
            self.paths, first, lambda genes: self._masked_loss(genes, kept), rounds=options.rounds, chance=chance
        )

    @torch.no_grad()
    def _masked_loss(self, genes: Genes, kept: int) -> float:
        """Loss of a path with `kept` weights, inherited, on the rows of `selection`; infinite where it cannot keep so many."""
        values = self.paths.values(genes)
        self.supernet.structure(values)
        density = self.budget.density_for(genes, kept)
        if density is None:
            return float("inf")
        self.budget.set_density(genes, density)
        gates = self._gates(genes)
        total, rows = 0.0, 0
        for x, y in self.selection:
            with self.autocast():
                logits = self.supernet(x, gates, values)
            total += float(F.cross_entropy(logits.float(), y, reduction="sum"))
            rows += len(y)
        return total / rows

    def _handed_out(self, density: float, kept: int, loss: float, genes: Genes, compared: int) -> Found:
        space = self.setting.space
        decisions: dict[str, Value] = self.paths.decisions(genes)
        own = self.budget.density_for(genes, kept) or density
        overall = self.supernet.of_kind(OverallChoice)
        sparsity: dict[str, tuple[float, str, str]] = {}
        for name, choice in overall.items():
            rule = self.options.allocation if self.options.allocation in choice.rules else choice.rules[0]
            sparsity[name] = (round(own, 6), self.pattern, rule)
        if not overall:
            decisions |= self.budget.part_densities(genes, kept)
        architecture = architecture_of(space, decisions, sparsity)
        note = self.note(architecture, {})
        note |= {"group": f"{density:g}", "density": density, "own_density": own, "kept_wanted": kept}
        note |= {"masked_loss": loss, "compared": compared}
        return Found(architecture, note)

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        version, numbers, gauss = self.chance.getstate()
        return tensors, facts | {"chance": [version, list(numbers), gauss], "baselines": self.baselines}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().load(tensors, facts)
        version, numbers, gauss = facts["chance"]
        self.chance.setstate((version, tuple(numbers), gauss))
        self.baselines = dict(cast("dict[str, float]", facts["baselines"]))
