"""DASS: a DARTS search whose loss is that of masked weights, in three phases.

Pretrain: all weights count, and train. Prune: the masks of density k are learned, through scores, while the weights rest.
Finetune: the weights train under the learned masks. Architecture parameters move on the held-out half of the data in the first
and the last phase (`alpha_in_prune` for all three), so that in the end they are judged on masked weights. What is found is
decoded as in DARTS and made sparse at k.

With `one_step` there is one phase: every mini-batch moves architecture parameters, then weights, then scores, all at k.

Start with `Dass`; the layers are in `ops.learned_layers`, densities are spread by `nas.oneshot.sparse_parts`.

Source: Mousavi et al. 2022, DASS (arXiv:2207.06968), and its published code; its scores and phases are those of HYDRA, Sehwag
et al. 2020 (arXiv:2002.10509). Unlike the code, architecture parameters are no weights (the training loss neither moves nor
decays them), what rests is not decayed, and the learning rate begins where it is said to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, Found, Phase, Setting, StepReport
from nas.oneshot.choices import OpChoice, OverallChoice, SparsityChoice
from nas.oneshot.darts import Darts
from nas.oneshot.dass_options import PRETRAIN, PRUNE, SEARCH, SHARES, DassOptions
from nas.oneshot.decode import architecture_of
from nas.oneshot.gradient import PARTS, load_optimizer, optimizer_tensors
from nas.oneshot.living import candidate_density, dead_depthwise, kept, layers_of
from nas.oneshot.sparse_parts import SparseParts
from nas.oneshot.supernet import Structure, is_score
from ops.learned import scaled_scores
from ops.patterns import parse_pattern
from search_spaces import SpaceError
from search_spaces.architecture import Value
from search_spaces.skips import is_skip_or_pool


class Dass(Darts):
    """DASS on any space that decides how sparse its networks are."""

    name = "dass"
    sparse = True
    learned = True
    Options: ClassVar[type[algorithm.Options]] = DassOptions

    def __init__(self, setting: Setting, options: DassOptions) -> None:
        super().__init__(setting, options)
        if not self.supernet.of_kind(OverallChoice) and not self.supernet.of_kind(SparsityChoice):
            raise ConfigError(
                f'searcher "{self.name}": space "{setting.space.name}" has no layer that may be sparse; let its function call '
                "Chooser.allocate or Chooser.sparse"
            )
        self.phase = ""
        self.score_optimizer: torch.optim.SGD | None = None
        self.density, self.pattern = self._target()
        self._scores_moved = 0
        self._spread: WeakKeyDictionary[SparseParts, tuple[float, int]] = WeakKeyDictionary()
        self._resting = self._check()

    # -- phases ---------------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        if self.options.one_step:
            return (Phase(SEARCH, self.options.epochs),)
        phases = (Phase(name, getattr(self.options, f"{name}_epochs")) for name in SHARES)
        return tuple(phase for phase in phases if phase.epochs)

    def begin_phase(self, index: int, steps: int) -> None:
        phases = self.phases()
        self.phase = phases[index].name
        if self.masked and all(phase.name == PRETRAIN for phase in phases[:index]):
            self.init_scores()
        self._scores_moved += 1
        rate = self.options.score_lr if self.phase == PRUNE else self.options.lr
        self.weight_optimizer = self.make_weight_optimizer(self.trained_weights(), rate)
        if self.options.one_step:
            self.score_optimizer = self.make_weight_optimizer(self.trained_scores(), self.options.score_lr)
        self._train_only(self.trained_weights())

    @property
    def masked(self) -> bool:
        """Whether the present phase has masks."""
        return self.phase not in ("", PRETRAIN)

    def trained_weights(self) -> list[nn.Parameter]:
        """What the phase's optimizer moves: all weights; where masks are learned the scores, and the norms' scale and shift."""
        if self.phase != PRUNE:
            return super().trained_weights()
        return self.trained_scores() + list(norms(self.supernet.weights()).values())

    def trained_scores(self) -> list[nn.Parameter]:
        """Scores of the layers that follow the density."""
        return [score for key, score in self.supernet.scores().items() if key not in self._resting]

    def trains_alphas(self, at: At) -> bool:
        warm = at.phase == 0 and at.epoch < self.options.warmup_epochs
        return not warm and (self.phase != PRUNE or self.options.alpha_in_prune)

    def learning_rate(self, at: At) -> float:
        """From lr (score_lr where masks are learned) to lr_min along a cosine, by epochs of the phase."""
        return self.score_rate(at) if self.phase == PRUNE else super().learning_rate(at)

    def score_rate(self, at: At) -> float:
        """From score_lr to lr_min along a cosine, by epochs of the phase."""
        share = 0.5 * (1 + math.cos(math.pi * at.epoch / at.epochs))
        return float(self.options.lr_min + (self.options.score_lr - self.options.lr_min) * share)

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        report = super().step(x, y, held, at)
        if self.options.one_step:
            self.score_step(x, y, at)
        if self.options.one_step or self.phase == PRUNE:
            self._scores_moved += 1
        return report

    def score_step(self, x: Tensor, y: Tensor, at: At) -> None:
        """One step of SGD on the scores; the weights rest."""
        assert self.score_optimizer is not None
        self._train_only(self.trained_scores())
        try:
            self.descend(self.score_optimizer, self.score_rate(at), x, y)
        finally:
            self._train_only(self.trained_weights())

    @torch.no_grad()
    def init_scores(self) -> None:
        """Fresh scores for all layers, from the weights as they are ("scaled") or at random."""
        tensors = self.supernet.by_key()
        for key, score in self.supernet.scores().items():
            if self.options.score_init == "scaled":
                score.copy_(scaled_scores(tensors[".weight".join(key.rsplit(".score", 1))]))
                continue
            fresh = torch.empty(score.shape)
            if self.options.score_init == "kaiming_normal":
                nn.init.kaiming_normal_(fresh, generator=self.generator)
            else:
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=self.generator)
            score.copy_(fresh)

    def follow_structure(self) -> None:
        known = len(self.supernet.by_key())
        super().follow_structure()
        if len(self.supernet.by_key()) == known:
            return
        if self.score_optimizer is not None:
            group = self.score_optimizer.param_groups[0]["params"]
            there = {id(score) for score in group}
            group += [score for score in self.trained_scores() if id(score) not in there]
        self._train_only(self.trained_weights())

    def _train_only(self, parameters: Collection[nn.Parameter]) -> None:
        trained = {id(parameter) for parameter in parameters}
        for parameter in self.supernet.by_key().values():
            parameter.requires_grad_(id(parameter) in trained)
            parameter.grad = None

    # -- masks ----------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        self.set_masks(self.supernet.structure(self.values))
        return super().forward(x)

    def set_masks(self, structure: Structure) -> None:
        """Give the layers of a structure the densities of the present phase, and for "global" of the present scores."""
        if structure.parts is None:
            return
        density = self.density if self.masked else 1.0
        wanted = (density, self._scores_moved if self.options.allocation == "global" else 0)
        if self._spread.get(structure.parts) != wanted:
            structure.parts.set_all(
                density,
                self.options.allocation,
                self.pattern,
                exempt=self.options.exempt,
                scores=self._scores_of(structure),
            )
            self._spread[structure.parts] = wanted

    def _scores_of(self, structure: Structure) -> dict[str, Tensor] | None:
        """path -> score, where structures share them; None where the layers hold their own."""
        if not structure.sources or structure.parts is None:
            return None
        tensors, held = self.supernet.by_key(), {}
        for path in structure.parts.layers:
            key, part = structure.sources[f"{path}.score"]
            held[path] = tensors[key] if part is None else tensors[key][part]
        return held

    def _target(self) -> tuple[float, str]:
        """Density and pattern of the search: what the options say, else what the space offers."""
        offers: list[tuple[float, str]] = []
        for choice in self.supernet.choices.values():
            if isinstance(choice, OverallChoice):
                offers += [(density, pattern) for density, fits in choice.offers for pattern in fits]
            elif isinstance(choice, SparsityChoice):
                offers += [target for target in choice.targets if target[0] < 1]
        density, pattern = self.options.density, self.options.pattern
        fixed = None if pattern is None else parse_pattern(pattern).fixed_density
        if fixed is not None and density not in (None, fixed, 1.0):
            raise ConfigError(
                f'searcher "{self.name}": pattern {pattern} has density {fixed:g}, got density {density:g}'
            )
        if density is None:
            below = [d for d, p in offers if d < 1 and pattern in (None, p)]
            if fixed is None and not below:
                raise ConfigError(
                    f'searcher "{self.name}": space "{self.setting.space.name}" offers no density below 1'
                    + (f" with pattern {pattern}" if pattern else "")
                    + f"; offer some in [space] densities, or set options.{self.name}.density"
                )
            density = fixed if fixed is not None else min(below)
        if pattern is None:
            known = dict.fromkeys(p for _, p in sorted(offers, key=lambda offer: offer[0] != density) if p)
            fits = [p for p in known if parse_pattern(p).fixed_density in (None, density)]
            pattern = fits[0] if fits else "unstructured"
        return float(density), pattern

    def _check(self) -> set[str]:
        """See before anything is trained that masks and result will be possible. Returns the keys of scores that never matter."""
        structure = self.supernet.structure({})
        parts = structure.parts
        assert parts is not None
        following = parts.following(self.pattern, self.options.exempt)
        if self.density < 1 and not following:
            raise ConfigError(
                f'searcher "{self.name}": no layer is left to make sparse: pattern {self.pattern}, exempt '
                f"{', '.join(self.options.exempt) or 'none'}"
            )
        rule, exempt, scores = self.options.allocation, self.options.exempt, self._scores_of(structure)
        try:
            parts.set_all(self.density, rule, self.pattern, exempt=exempt, scores=scores)
            parts.set_all(1.0, rule, self.pattern, exempt=exempt, scores=scores)
            self.found()
        except (ValueError, SpaceError) as error:
            raise ConfigError(
                f'searcher "{self.name}": density {self.density:g} with pattern {self.pattern} is not possible in space '
                f'"{self.setting.space.name}": {error}'
            ) from error
        keys = structure.keys if not structure.sources else {path: key for path, (key, _) in structure.sources.items()}
        return {keys[f"{path}.score"] for path in parts.layers if path not in following}

    # -- results --------------------------------------------------------------------------------------------------------

    def log_row(self) -> dict[str, Any]:
        structure = self.supernet.structure(self.best_values())
        self.set_masks(structure)
        row = super().log_row() | {
            "kept_weights": sum(kept(layer) for layer in layers_of(structure.network)),
            "skip_pool_probability": self._skip_pool_probability(),
            "candidate_density": candidate_density(structure.network),
        }
        if not structure.sources:
            dead, channels = dead_depthwise(structure.network)
            row |= {"dead_depthwise_channels": dead, "depthwise_channels": channels}
        return row

    def _skip_pool_probability(self) -> float | None:
        """Mean probability of skipping, pooling and "none", over the choices of operations that offer any."""
        sums = []
        for name, choice in self.alphas.choices.items():
            if isinstance(choice, OpChoice):
                places = [i for i, option in enumerate(choice.options) if is_skip_or_pool(option)]
                if places:
                    sums.append(self.alphas.probabilities(name).detach()[places].sum())
        return float(torch.stack(sums).mean()) if sums else None

    def found(self) -> list[Found]:
        """The architecture as DARTS decodes it, at the density of the search; parts at the nearest offered where it is illegal."""
        decisions = self.decisions()
        (sparsity,) = self.sparsities()
        exact: dict[str, Value] = {}
        for name in self.supernet.of_kind(SparsityChoice):
            exact |= {f"{name}.density": self.density} | ({f"{name}.pattern": self.pattern} if self.density < 1 else {})
        space = self.setting.space
        try:
            architecture = architecture_of(space, decisions | exact, sparsity)
        except SpaceError:
            if not exact:
                raise
            architecture = architecture_of(space, decisions | self.parts_at(sparsity), sparsity)
        note = self.note(architecture, sparsity) | {
            "allocation": self.options.allocation,
            "exempt": list(self.options.exempt),
            "phases": {phase.name: phase.epochs for phase in self.phases()},
        }
        return [Found(architecture, note)]

    def sparsities(self) -> list[dict[str, tuple[float, str, str]]]:
        """That of the search, for the whole network and for parts."""
        wanted: dict[str, tuple[float, str, str]] = {}
        if self.supernet.of_kind(SparsityChoice):
            wanted[PARTS] = (self.density, self.pattern, "uniform")
        for name, choice in self.supernet.of_kind(OverallChoice).items():
            rule = self.options.allocation if self.options.allocation in choice.rules else choice.rules[0]
            wanted[name] = (self.density, self.pattern, rule)
        return [wanted]

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        return tensors | optimizer_tensors("score_sgd", self.score_optimizer, dict(self.supernet.scores())), facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().load(tensors, facts)
        load_optimizer("score_sgd", self.score_optimizer, dict(self.supernet.scores()), tensors)
        self._scores_moved += 1


def norms(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Of parameters by key those of norms: vectors that belong to no layer with a matrix."""
    matrices = {key.rpartition(".")[0] for key, p in weights.items() if p.ndim > 1 and not is_score(key)}
    return {key: p for key, p in weights.items() if p.ndim <= 1 and key.rpartition(".")[0] not in matrices}
