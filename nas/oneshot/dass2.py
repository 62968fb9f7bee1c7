"""`dass2`: one search for sparse architectures at every density, with a guard against collapse. Ours.

It keeps from DASS that architecture parameters descend the loss of masked weights. What it changes:

- there is one phase of search, not three: after a short dense start every step draws one of the densities, and masks are those of
  the weights' magnitudes, so they nest, and one supernet serves all densities; architecture parameters have a part for each;
- density is spread over the layers by ERK (or one ranking of all), not equally, so depthwise layers stay alive;
- every operation that has a skip connection beside it gets one more on top, which fades out: what a skip gains by easing the
  training of the supernet is not credited to it (the idea of DARTS-, Chu et al. 2021, arXiv:2009.01027, section 3.2);
- latency on the sparse kernels, at the density of the step, can be part of the loss of the architecture parameters;
- architectures are compared at equal kept weights (or equal latency): for every density, candidates drawn from the architecture
  parameters and at random race against each other with inherited weights (`nas.oneshot.race`), each at the density that gives it
  the same budget.

Start with `Dass2`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, Found, Phase, Setting, StepReport
from nas.oneshot.alphas import Alphas
from nas.oneshot.budget import DRAWN, PathBudget
from nas.oneshot.choices import Choice, EdgeChoice, OpChoice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.dass2_options import Dass2Options
from nas.oneshot.decode import architecture_of
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.mixed import Gate, Gates
from nas.oneshot.paths import Genes, PathSpace
from nas.oneshot.pricing import Prices
from nas.oneshot.race import Leg, Race, Runner, schedule
from nas.oneshot.supernet import PathGates
from search_spaces import Architecture
from search_spaces.architecture import Value

SKIP = "skip_connect"
TOLERANCE = 0.05
"""How far from the usual latency a candidate may be."""

REFRESHED = 8
"""Steps between two looks at the weights' magnitudes."""


class Dass2(GradientSearch):
    """Nested magnitude masks at drawn densities, architecture parameters per density, a race at equal budgets."""

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
        self.searched: dict[str, Choice] = self.alphas.choices
        own: dict[str, Choice] = {f"{n}@{d:g}": c for d in self.densities for n, c in self.searched.items()}
        self.alphas = Alphas({**self.searched, **own}, generator=self.generator, device=setting.device)
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.tensors(),
            lr=options.alpha_lr,
            betas=options.alpha_betas,
            weight_decay=options.alpha_weight_decay,
        )
        self.budget = PathBudget(self.supernet, self.paths, options.allocation, self.pattern)
        self.prices: Prices | None = None
        if options.budget == "latency" or options.latency_weight:
            if self.budget.by_part:
                raise ConfigError(
                    'searcher "dass2": budget "latency" and latency_weight need a space that decides one density for the whole '
                    f'network (Chooser.allocate), but "{setting.space.name}" decides it part by part; use budget = "kept"'
                )
            self.prices = Prices(setting, self.densities, self.pattern)
        self.chance = random.Random(setting.seed + 1)
        self.now = self.densities[0]
        self.guard = options.skip_guard
        self.baselines: dict[str, float] = {}
        self.rows: list[Batch] = []
        self.legs = schedule(options.candidates, options.race_epochs) if options.race_epochs else []
        self.races: list[Race] = []
        self.running: Runner | None = None
        self.entered: list[dict[str, Genes]] = []

    def searches(self, name: str) -> bool:
        return not isinstance(self.supernet.choices[name], OverallChoice)

    def phases(self) -> tuple[Phase, ...]:
        search = Phase("search", self.options.epochs)
        return (search, Phase("race", len(self.legs) * len(self.densities), False)) if self.legs else (search,)

    @property
    def compared_rows(self) -> int:
        return int(self.options.selection_rows) if self.legs else 0

    def compare_on(self, batches: list[Batch]) -> None:
        self.rows = batches

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
        densities = self.options.densities or tuple(offered)
        if not offered:
            raise ConfigError(
                f'searcher "dass2": space "{self.setting.space.name}" offers no density below 1, so there is nothing sparse to '
                "search; offer some in [space] densities, or use darts"
            )
        free = [p for fits in offered.values() for p in fits if ":" not in p]
        if not free and not self.options.pattern:
            raise ConfigError(
                f'searcher "dass2": space "{self.setting.space.name}" offers only patterns of a fixed density '
                f"({', '.join(sorted({p for fits in offered.values() for p in fits}))}), but dass2 gives every network a density "
                'of its own; offer "unstructured" or a block pattern'
            )
        return tuple(sorted(set(densities), reverse=True)), self.options.pattern or free[0]

    # -- the search -----------------------------------------------------------------------------------------------------

    def begin_phase(self, index: int, steps: int) -> None:
        super().begin_phase(index, steps)
        self.budget.refresh_scores()

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        if at.phase == 1:
            return self._race_step(x, y, at)
        options = self.options
        self.now = self.densities[int(self.chance.random() * len(self.densities))]
        self.guard = options.skip_guard * (1 - at.fraction)
        if at.step % REFRESHED == 0:
            self.budget.refresh_scores()
        self.values = self.draw_values()
        self.follow_structure()
        self._mask(1.0 if at.fraction < options.dense else self.now)
        if at.fraction >= options.warmup and at.epoch >= options.warmup_epochs:
            self._move_alphas(*held())
        return self.weight_step(x, y, at)

    def _mask(self, density: float) -> None:
        """Put masks on all layers of the present structure. Parts with densities of their own have mixtures instead."""
        if not self.budget.by_part:
            self.budget.set_all(self.values, density)

    def _probabilities(self, density: float) -> dict[str, Tensor]:
        """softmax(shared + the density's own) of every choice."""
        return {name: (self.alphas[name] + self.alphas[f"{name}@{density:g}"]).softmax(0) for name in self.searched}

    def gates(self) -> Gates:
        made: Gates = {}
        for name, p in self._probabilities(self.now).items():
            choice = self.searched[name]
            if isinstance(choice, OpChoice):
                if self.guard and SKIP in choice.options:
                    extra = torch.zeros_like(p)
                    extra[choice.options.index(SKIP)] = self.guard
                    p = p + extra
                made[name] = Gate(p)
            elif isinstance(choice, EdgeChoice):
                made[name] = Gate(p * choice.keep)
            elif isinstance(choice, SparsityChoice):
                made[name] = Gate(p)
        return made

    def _move_alphas(self, x: Tensor, y: Tensor) -> None:
        """One step of Adam on the shared parameters and on those of this density."""
        with self.without_weight_gradients():
            loss, _ = self.loss(x, y)
            if self.prices is not None and self.options.latency_weight:
                mixed = {n: p for n, p in self._probabilities(self.now).items() if self._priced(n)}
                loss = loss + self.options.latency_weight * self.prices.of(self.values)(mixed, self.now).log()
        tensors = self.alphas.tensors()
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for alpha, gradient in zip(tensors, gradients):
            alpha.grad = gradient
        self._move_drawn(float(loss.detach()))
        self.alpha_optimizer.step()

    def _priced(self, name: str) -> bool:
        return isinstance(self.searched[name], OpChoice | EdgeChoice)

    def _move_drawn(self, loss: float) -> None:
        """Gradients for the choices that cannot be mixed, by the score function with a running mean per density."""
        key = f"{self.now:g}"
        baseline = self.baselines.setdefault(key, loss)
        self.baselines[key] = 0.9 * baseline + 0.1 * loss
        for name, choice in self.searched.items():
            if isinstance(choice, ValueChoice):
                p = self._probabilities(self.now)[name].detach()
                chosen = F.one_hot(torch.tensor(choice.options.index(self.values[name])), len(p)).to(p)
                for alpha in (self.alphas[name], self.alphas[f"{name}@{key}"]):
                    alpha.grad = (loss - baseline) * (chosen - p)

    def draw_values(self) -> dict[str, Value]:
        p = self._probabilities(self.now)
        return {
            name: self.drawing.choices(choice.options, p[name].tolist())[0]
            for name, choice in self.supernet.of_kind(ValueChoice).items()
        }

    # -- the race -------------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Line up the candidates of every density."""
        self.entered = [self._entries(density) for density in self.densities]
        self.races = [
            Race({key: self._runner(density, genes) for key, genes in entries.items()}, {}, [])
            for density, entries in zip(self.densities, self.entered)
        ]

    def _entries(self, density: float) -> dict[str, Genes]:
        """Who runs at a density: the most probable path, then paths drawn by probability and uniformly in turn; all on budget."""
        generator = torch.Generator().manual_seed(self.setting.seed)
        p = {name: value.detach() for name, value in self._probabilities(density).items()}
        usual = self._usual(density)
        entries: dict[str, Genes] = {}
        genes = self.paths.most_probable(p)
        for attempt in range(20 * self.options.candidates):
            key = json.dumps(sorted(self.paths.decisions(genes).items()))
            if key not in entries and self._density_for(genes, usual) is not None:
                entries[key] = genes
                if len(entries) == self.options.candidates:
                    break
            genes = self.paths.draw(p if attempt % 2 == 0 else {}, generator)
        if not entries:
            raise ConfigError(
                f'searcher "dass2": no architecture found in {20 * self.options.candidates} draws has what is usual at density '
                f"{density:g} ({usual:g}, budget {self.options.budget!r}); search for other densities"
            )
        return entries

    def _runner(self, density: float, genes: Genes) -> Runner:
        """The network of a candidate with the supernet's weights."""
        network = self.supernet.extract(self._architecture(density, genes)).to(self.setting.device)
        return Runner(network, self.options.race_lr, self.options.race_weight_decay)

    def _race_step(self, x: Tensor, y: Tensor, at: At) -> StepReport:
        if not self.races:  # not when the phase begins: a checkpoint may be about to bring them
            self._enter()
        number, turn = divmod(at.epoch, len(self.legs))
        leg, race = self.legs[turn], self.races[number]
        self.running = None
        if leg.place >= len(race.runners):  # fewer entered than asked for
            return StepReport(torch.zeros((), device=x.device), torch.zeros((), dtype=torch.int64, device=x.device))
        self.running = list(race.runners.values())[leg.place]
        with self.autocast():
            report = race.run(leg, x, y, step=at.step, steps=at.steps, lr=self._race_lr(leg))
        if leg.last and at.step + 1 == at.steps:
            race.finish(leg, self.rows)
        return report

    def _race_lr(self, leg: Leg) -> float:
        """Falls by half with every round."""
        return float(self.options.race_lr * 0.5**leg.round)

    def _usual(self, density: float) -> float:
        """What every path gets for a density: the mean over random paths of their kept weights, or of their latency in ms."""
        if self.options.budget == "kept":
            return self.budget.usual_kept(density)
        generator = torch.Generator().manual_seed(0)
        return sum(self._ms(self.paths.draw({}, generator), density) for _ in range(DRAWN)) / DRAWN

    def _density_for(self, genes: Genes, usual: float) -> float | None:
        """The density that gives a path as much as the others have; None if there is none."""
        if self.options.budget == "kept":
            return self.budget.density_for(genes, int(usual))
        low, high = 1e-3, 1.0
        if self._ms(genes, low) > usual:
            return None
        for _ in range(20):  # latency rises with density
            middle = (low + high) / 2
            low, high = (middle, high) if self._ms(genes, middle) <= usual else (low, middle)
        return low if abs(self._ms(genes, low) - usual) <= TOLERANCE * usual else None

    def _ms(self, genes: Genes, density: float) -> float:
        assert self.prices is not None
        values = self.paths.values(genes)
        with torch.no_grad():
            return float(self.prices.of(values).of_path(PathGates(self.paths.gates(genes), values), density))

    # -- results --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the supernet at the lowest density; in the race, of the candidate that ran last."""
        if self.running is not None:
            self.running.network.eval()
            output = self.running.network(x)
            return cast(Tensor, output[0] if isinstance(output, tuple) else output).float()
        before = self.now, self.values
        self.now = self.densities[-1]
        p = self._probabilities(self.now)
        choices = self.supernet.of_kind(ValueChoice)
        self.values = {n: c.options[int(p[n].argmax())] for n, c in choices.items()}
        self._mask(self.now)
        try:
            return self.forward(x).float()
        finally:
            self.now, self.values = before

    def log_row(self) -> dict[str, Any]:
        by_density = {f"{d:g}": {n: p.tolist() for n, p in self._probabilities(d).items()} for d in self.densities}
        row: dict[str, Any] = {"alphas": by_density[f"{self.densities[-1]:g}"], "alphas_by_density": by_density}
        if self.races:
            row["race_losses"] = {f"{d:g}": list(r.losses.values()) for d, r in zip(self.densities, self.races)}
        return row

    def found(self) -> list[Found]:
        """The winner of every density's race."""
        result = []
        for i, density in enumerate(self.densities):
            p = {name: value.detach() for name, value in self._probabilities(density).items()}
            genes = self.paths.most_probable(p)
            note: dict[str, Any] = {}
            if self.races:
                race = self.races[i]
                genes = self.entered[i][race.winner]
                note = {"raced": len(race.losses), "race_loss": race.losses.get(race.winner)}
                note["most_probable_won"] = race.winner == next(iter(self.entered[i]))
            architecture = self._architecture(density, genes)
            usual = self._usual(density)
            own = self._density_for(genes, usual)
            note |= self.note(architecture, {})
            note |= {"group": f"{density:g}", "density": density, "own_density": density if own is None else own}
            note |= {"kept_wanted" if self.options.budget == "kept" else "latency_wanted_ms": usual}
            result.append(Found(architecture, note))
        return result

    def _architecture(self, density: float, genes: Genes) -> Architecture:
        """The architecture of a path on the budget of a density; at that density itself where the budget cannot be met."""
        usual = self._usual(density)
        own = self._density_for(genes, usual)
        decisions: dict[str, Value] = self.paths.decisions(genes)
        overall = self.supernet.of_kind(OverallChoice)
        sparsity: dict[str, tuple[float, str, str]] = {}
        for name, choice in overall.items():
            rule = self.options.allocation if self.options.allocation in choice.rules else choice.rules[0]
            sparsity[name] = (round(density if own is None else own, 6), self.pattern, rule)
        if not overall:
            decisions |= self.budget.part_densities(genes, int(usual))
        return architecture_of(self.setting.space, decisions, sparsity)

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        version, numbers, gauss = self.chance.getstate()
        facts |= {"chance": [version, list(numbers), gauss], "baselines": self.baselines}
        facts |= {"prices": {} if self.prices is None else self.prices.known}
        facts |= {"races": [race.facts() for race in self.races]}
        for i, race in enumerate(self.races):
            for k, runner in enumerate(race.runners.values()):
                tensors |= {f"race{i}/{k}/{name}": t for name, t in runner.state().items()}
        return tensors, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().load(tensors, facts)
        version, numbers, gauss = facts["chance"]
        self.chance.setstate((version, tuple(numbers), gauss))
        self.baselines = dict(cast("dict[str, float]", facts["baselines"]))
        if self.prices is not None:
            self.prices.take_over(facts["prices"])
        if facts["races"]:  # who entered follows from the architecture parameters
            self.entered = [self._entries(density) for density in self.densities]
            self.races = [self._restored(i, of, tensors) for i, of in enumerate(facts["races"])]

    def _restored(self, number: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Race:
        runners: dict[str, Runner] = {}
        for k, key in enumerate(facts["runners"]):
            runner = self._runner(self.densities[number], self.entered[number][key])
            prefix = f"race{number}/{k}/"
            runner.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            runners[key] = runner
        return Race(runners, dict(facts["losses"]), list(facts["judged"]))
