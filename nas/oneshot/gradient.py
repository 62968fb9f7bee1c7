"""What gradient-based supernet searches share: weights by SGD, architecture parameters by Adam, state there and back.

Start with `GradientSearch`; a subclass says how gates come from architecture parameters and how those are moved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import Algorithm, At, Batch, Found, Setting, StepReport
from nas.oneshot.alphas import Alphas
from nas.oneshot.choices import EdgeChoice, OpChoice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.decode import architecture_of, decode, genotype_text
from nas.oneshot.mixed import Gate, Gates
from nas.oneshot.supernet import Supernet
from search_spaces.architecture import Value

PARTS = "parts"
"""In `sparsities`: all parts that `Chooser.sparse` decides about, at one density."""


class GradientSearch(Algorithm):
    """A supernet, architecture parameters, two optimizers.

    Choices that cannot be mixed (widths, depths) are drawn per step from softmax(alpha) and moved by the score function: the
    gradient of log p times how much lower the loss was than its running mean.
    """

    learned = False
    """Whether layers learn masks."""

    alpha_scale = 1e-3
    """Architecture parameters start at this times N(0, 1)."""

    def __init__(self, setting: Setting, options: algorithm.Options) -> None:
        super().__init__(setting, options)
        self.supernet = self.make_supernet()
        searched = {name: c for name, c in self.supernet.choices.items() if self.searches(name)}
        if not searched:
            raise ConfigError(
                f'searcher "{self.name}": space "{setting.space.name}" has no choice that it could search (operations, inputs, '
                f"widths); its decisions are {', '.join(self.supernet.choices) or 'none'}"
            )
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.drawing = random.Random(setting.seed)
        self.alphas = Alphas(searched, generator=self.generator, scale=self.alpha_scale, device=setting.device)
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.tensors(),
            lr=options.alpha_lr,
            betas=options.alpha_betas,
            weight_decay=options.alpha_weight_decay,
        )
        self.weight_optimizer: torch.optim.SGD | None = None
        self.baseline: float | None = None
        self.values: dict[str, Value] = {}
        self.met: list[dict[str, Value]] = []
        """Values whose structure had weights that nobody had, in the order in which they were met."""

    # -- what a subclass changes ----------------------------------------------------------------------------------------

    def make_supernet(self) -> Supernet:
        """The supernet of this search."""
        return Supernet(
            self.setting.space,
            seed=self.setting.seed,
            learned=self.learned,
            checkpointing=self.options.checkpointing,
            device=self.setting.device,
        )

    def searches(self, name: str) -> bool:
        """Whether a choice gets architecture parameters."""
        choice = self.supernet.choices[name]
        if isinstance(choice, EdgeChoice):
            return not choice.own
        return isinstance(choice, OpChoice | ValueChoice)

    def gates(self) -> Gates:
        """Gates of the present architecture parameters, differentiable in them."""
        made: Gates = {}
        for name in self.alphas:
            choice = self.alphas.choices[name]
            if isinstance(choice, EdgeChoice):
                made[name] = Gate(self.alphas.probabilities(name) * choice.keep)
            elif isinstance(choice, OpChoice | SparsityChoice):
                made[name] = Gate(self.alphas.probabilities(name))
        return made

    def warmup(self, epochs: int) -> int:
        """How many of a phase's epochs pass before architecture parameters move."""
        return int(self.options.warmup_epochs)

    def trains_alphas(self, at: At) -> bool:
        """Whether this step moves architecture parameters."""
        return at.epoch >= self.warmup(at.epochs)

    def trained_weights(self) -> list[nn.Parameter]:
        """What the weight optimizer moves."""
        return list(self.supernet.weights().values())

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and logits of the present gates and values."""
        logits = self.forward(x)
        return F.cross_entropy(logits.float(), y), logits

    def architecture_loss(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """What the architecture step descends on a batch of its own half."""
        return self.loss(x, y)[0]

    # -- the step -------------------------------------------------------------------------------------------------------

    def begin_phase(self, index: int, steps: int) -> None:
        self.weight_optimizer = self.make_weight_optimizer(self.trained_weights(), self.options.lr)

    def make_weight_optimizer(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.SGD:
        """SGD with the options' momentum and weight decay."""
        options = self.options
        return torch.optim.SGD(parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay)

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        self.values = self.draw_values()
        self.follow_structure()
        if self.trains_alphas(at):
            self.architecture_step(x, y, *held(), at)
        return self.weight_step(x, y, at)

    def architecture_step(self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, at: At) -> None:
        """One step of Adam on the architecture parameters (first order)."""
        with self.without_weight_gradients():
            loss = self.architecture_loss(held_x, held_y, at)
        inputs = [a for name, a in zip(self.alphas, self.alphas.tensors()) if self.mixes(name)]
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if inputs and loss.requires_grad:
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        for alpha, gradient in zip(inputs, gradients):
            alpha.grad = torch.zeros_like(alpha) if gradient is None else gradient
        self.score_function(loss.detach())
        self.alpha_optimizer.step()

    def weight_step(self, x: Tensor, y: Tensor, at: At) -> StepReport:
        """One step of SGD on the weights."""
        assert self.weight_optimizer is not None
        return self.descend(self.weight_optimizer, self.learning_rate(at), x, y)

    def descend(self, optimizer: torch.optim.Optimizer, lr: float, x: Tensor, y: Tensor) -> StepReport:
        """One step of an optimizer of one group, at a learning rate, on the loss of a batch; architecture parameters rest."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        with self.without_alpha_gradients():
            loss, logits = self.loss(x, y)
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        if self.options.grad_clip > 0:
            with_gradient = [p for p in parameters if p.grad is not None]
            nn.utils.clip_grad_norm_(with_gradient, self.options.grad_clip, foreach=True)
        optimizer.step()
        return StepReport(loss.detach(), (logits.detach().argmax(1) == y).sum())

    def learning_rate(self, at: At) -> float:
        """From lr to lr_min along a cosine, by epochs."""
        options = self.options
        share = at.epoch / at.epochs
        return float(options.lr_min + (options.lr - options.lr_min) * 0.5 * (1 + math.cos(math.pi * share)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the present gates and values."""
        with self.autocast():
            return self.supernet(x, self.gates(), self.values)

    def autocast(self) -> Any:
        """bfloat16 on CUDA; nothing elsewhere."""
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.setting.device.type == "cuda")

    def without_alpha_gradients(self) -> Any:
        """Within it, architecture parameters are constants, which saves their part of the backward pass."""
        return _Frozen(self.alphas.tensors())

    def without_weight_gradients(self) -> Any:
        """Within it, weights and scores are constants, which saves memory and their part of the backward pass."""
        return _Frozen([p for p in self.supernet.by_key().values() if p.requires_grad])

    # -- choices that are drawn -----------------------------------------------------------------------------------------

    def mixes(self, name: str) -> bool:
        """Whether a choice's options are mixed (not drawn)."""
        return not isinstance(self.alphas.choices[name], ValueChoice)

    def draw_values(self) -> dict[str, Value]:
        """A value for every choice that cannot be mixed, from its probabilities; uniform once these are not numbers."""
        drawn: dict[str, Value] = {}
        for name, choice in self.supernet.of_kind(ValueChoice).items():
            weights = self.alphas.probabilities(name).tolist() if name in self.alphas else None
            if weights is not None and not math.isfinite(sum(weights)):
                weights = None
            drawn[name] = self.drawing.choices(choice.options, weights)[0]
        return drawn

    def best_values(self) -> dict[str, Value]:
        """The most probable value of every choice that cannot be mixed."""
        choices = self.supernet.of_kind(ValueChoice)
        return {n: c.options[int(self.alphas[n].argmax())] for n, c in choices.items() if n in self.alphas}

    def score_function(self, loss: Tensor) -> None:
        """Gradients for the choices that were drawn. Source: REINFORCE, Williams 1992, with a running mean as baseline."""
        drawn = [name for name in self.alphas if not self.mixes(name)]
        if not drawn:
            return
        value = float(loss)
        self.baseline = value if self.baseline is None else 0.9 * self.baseline + 0.1 * value
        advantage = value - self.baseline
        for name in drawn:
            alpha, choice = self.alphas[name], self.alphas.choices[name]
            chosen = F.one_hot(torch.tensor(choice.options.index(self.values[name])), len(choice.options))
            alpha.grad = advantage * (chosen.to(alpha) - alpha.detach().softmax(0))

    def follow_structure(self) -> None:
        """See that the weight optimizer knows the weights of the present structure."""
        if self.values:
            self.meet(self.values)
            self.adopt_weights()

    def meet(self, values: Mapping[str, Value]) -> None:
        """Have the structure of some values made, and remember them if it brought new weights: `load` makes it again then."""
        before = len(self.supernet.by_key())
        self.supernet.structure(values)
        if len(self.supernet.by_key()) > before:
            self.met.append(dict(values))

    def adopt_weights(self) -> None:
        """Give the weight optimizer the weights it does not have yet."""
        if self.weight_optimizer is None:
            return
        known = {id(p) for group in self.weight_optimizer.param_groups for p in group["params"]}
        fresh = [p for p in self.trained_weights() if id(p) not in known]
        self.weight_optimizer.param_groups[0]["params"] += fresh

    # -- results --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        drawn, self.values = self.values, self.best_values()
        if self.values:
            self.meet(self.values)
        try:
            return self.forward(x).float()
        finally:
            self.values = drawn

    def log_row(self) -> dict[str, Any]:
        return {"alphas": self.alphas.snapshot()}

    def probabilities(self) -> dict[str, Tensor]:
        """What is decoded: decision -> float[options]."""
        return {name: self.alphas.probabilities(name) for name in self.alphas}

    def decisions(self) -> dict[str, Value]:
        """The decisions that the architecture parameters speak for."""
        return decode(self.supernet.choices, self.probabilities())

    def found(self) -> list[Found]:
        """One architecture for every density that is offered below 1 (or the dense one, if none is)."""
        decisions = self.decisions()
        result = []
        for sparsity in self.sparsities():
            architecture = architecture_of(self.setting.space, decisions | self.parts_at(sparsity), sparsity)
            result.append(Found(architecture, self.note(architecture, sparsity)))
        return result

    def parts_at(self, sparsity: Mapping[str, tuple[float, str, str]]) -> dict[str, Value]:
        """Decisions of parts whose sparsity was not searched: that of `PARTS` in `sparsity`, or the nearest offered density."""
        decisions: dict[str, Value] = {}
        density, pattern, _ = sparsity.get(PARTS, (1.0, "", ""))
        for name, choice in self.supernet.of_kind(SparsityChoice).items():
            if name not in self.alphas:
                found = min(choice.targets, key=lambda t: (abs(t[0] - density), t[1] != pattern))
                decisions[f"{name}.density"] = found[0]
                if found[0] < 1:
                    decisions[f"{name}.pattern"] = found[1]
        return decisions

    def sparsities(self) -> list[dict[str, tuple[float, str, str]]]:
        """The overall sparsities to hand out: each density offered below 1 with its first pattern and rule."""
        overall = self.supernet.of_kind(OverallChoice)
        if not overall:
            parts = [c for n, c in self.supernet.of_kind(SparsityChoice).items() if n not in self.alphas]
            first = {d: p for c in parts for d, p in reversed(c.targets) if d < 1}
            return [{PARTS: (d, first[d], "uniform")} for d in sorted(first, reverse=True)] or [{}]
        offers = [(d, fits[0]) for choice in overall.values() for d, fits in choice.offers if d < 1 and fits]
        choices = sorted(set(offers), reverse=True) or [(1.0, "unstructured")]
        return [{name: (d, p, c.rules[0]) for name, c in overall.items()} for d, p in choices]

    def note(self, architecture: Any, sparsity: Mapping[str, tuple[float, str, str]]) -> dict[str, Any]:
        """JSON about one found architecture."""
        note: dict[str, Any] = {}
        if (text := genotype_text(self.setting.space, architecture)) is not None:
            note["genotype"] = text
        for density, pattern, rule in sparsity.values():
            note |= {"density": density, "pattern": pattern, "rule": rule, "group": f"{density:g}"}
        return note

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"weight/{key}": p.detach() for key, p in self.supernet.by_key().items()}
        tensors |= {f"alpha/{name}": value for name, value in self.alphas.state().items()}
        tensors |= optimizer_tensors("sgd", self.weight_optimizer, self.named_weights())
        tensors |= optimizer_tensors("adam", self.alpha_optimizer, {name: self.alphas[name] for name in self.alphas})
        tensors["generator"] = self.generator.get_state()
        version, numbers, gauss = self.drawing.getstate()
        return tensors, {"baseline": self.baseline, "drawing": [version, list(numbers), gauss], "met": self.met}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.met = []
        for values in facts["met"]:
            self.meet(values)
        self.met = [dict(values) for values in facts["met"]]
        with torch.no_grad():
            for key, parameter in self.supernet.by_key().items():
                if f"weight/{key}" in tensors:
                    parameter.copy_(tensors[f"weight/{key}"])
        self.alphas.load({n.removeprefix("alpha/"): v for n, v in tensors.items() if n.startswith("alpha/")})
        load_optimizer("sgd", self.weight_optimizer, self.named_weights(), tensors)
        load_optimizer("adam", self.alpha_optimizer, {name: self.alphas[name] for name in self.alphas}, tensors)
        self.generator.set_state(tensors["generator"].cpu())
        self.baseline = facts["baseline"]
        version, numbers, gauss = facts["drawing"]
        self.drawing.setstate((version, tuple(numbers), gauss))

    def named_weights(self) -> dict[str, Tensor]:
        """key -> what the weight optimizer moves."""
        moved = {id(p) for p in self.trained_weights()}
        return {key: p for key, p in self.supernet.by_key().items() if id(p) in moved}


class _Frozen:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __enter__(self) -> None:
        for tensor in self.tensors:
            tensor.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for tensor in self.tensors:
            tensor.requires_grad_(True)


def optimizer_tensors(
    prefix: str, optimizer: torch.optim.Optimizer | None, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The slots of an optimizer as tensors: "prefix/slot/name"."""
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for slot, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
            if value is not None:
                found[f"{prefix}/{slot}/{name}"] = torch.as_tensor(value).detach()
    return found


def load_optimizer(
    prefix: str,
    optimizer: torch.optim.Optimizer | None,
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put slots back where `optimizer_tensors` found them."""
    if optimizer is None:
        return
    for key, value in tensors.items():
        where, _, rest = key.partition("/")
        slot, _, name = rest.partition("/")
        if where == prefix and name in named:
            like = named[name]
            place = value.clone() if value.ndim == 0 else value.to(like.device, copy=True)
            optimizer.state[like][slot] = place
