"""FBNet: candidates mixed by a random softmax, a loss in which accuracy and expected latency multiply.

    loss = cross-entropy * alpha * log(expected latency in microseconds) ** beta

Latencies come from the machine's model where there is one, else candidates are measured when the first one is needed
(`nas.oneshot.pricing`); they are kept in the checkpoint, so that a search that goes on sees the same ones.

Source: Wu et al. 2019, FBNet (arXiv:1812.03443), sections 3.2 to 3.4; schedules of section 4.1. Weights and architecture parameters
take turns step by step here, not in two parts of an epoch; the ratio is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hw_models.relaxation import fbnet_loss
from nas.errors import EvaluationFailed
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, Found, StepReport, check_number, check_whole
from nas.oneshot.choices import EdgeChoice
from nas.oneshot.decode import architecture_of, decode
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.gumbel import gumbel_softmax
from nas.oneshot.halves import derive
from nas.oneshot.mixed import Gate, Gates
from nas.oneshot.pcdarts import warmup_of
from nas.oneshot.pricing import Prices
from search_spaces.architecture import Value


@dataclass(frozen=True)
class FBNetOptions(algorithm.Options):
    """Options of FBNet; defaults are the paper's, but for grad_clip, of which it says nothing.

    Attributes:
        latency_alpha, latency_beta: of the loss.
        tau, tau_decay: temperature tau * exp(-tau_decay * epoch).
        warmup_share: of the epochs, in which architecture parameters rest; the longer of this and `warmup_epochs` counts.
        weight_share: of the steps afterwards that move weights; the others move architecture parameters.
        samples: architectures to hand out besides the most probable one, drawn from the probabilities.
        threads: CPU threads of latencies that have to be measured.
    """

    epochs: int = 90
    batch_size: int = 192
    lr: float = 0.1
    lr_min: float = 0.0
    weight_decay: float = 1e-4
    alpha_lr: float = 0.01
    alpha_betas: tuple[float, float] = (0.9, 0.999)
    alpha_weight_decay: float = 5e-4
    latency_alpha: float = 0.2
    latency_beta: float = 0.6
    tau: float = 5.0
    tau_decay: float = 0.045
    warmup_share: float = 1 / 9
    weight_share: float = 0.8
    samples: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latency_alpha", "tau"):
            check_number(name, getattr(self, name), 0.0, above=True)
        for name in ("latency_beta", "tau_decay"):
            check_number(name, getattr(self, name), 0.0)
        check_number("warmup_share", self.warmup_share, 0.0, 1.0)
        check_number("weight_share", self.weight_share, 0.0, 1.0, above=True)
        check_whole("samples", self.samples, 0)
        check_whole("threads", self.threads, 1)


class FBNet(GradientSearch):
    """FBNet.

    Where the space decides densities, a step's latency is the mean over those that architectures are handed out at.
    """

    name = "fbnet"
    Options: ClassVar[type[algorithm.Options]] = FBNetOptions
    alpha_scale = 0.0

    def __init__(self, setting: algorithm.Setting, options: FBNetOptions) -> None:
        super().__init__(setting, options)
        self.tau = options.tau
        self.draws = True
        self.mixed: dict[str, Tensor] = {}
        """The probabilities that the last forward pass mixed by."""
        self.latency_ms: float | None = None
        targets = [next(iter(sparsity.values()), (1.0, "", "")) for sparsity in self.sparsities()]
        self.densities = tuple(density for density, _, _ in targets)
        pattern = next((pattern for density, pattern, _ in targets if density < 1), "unstructured")
        self.prices = Prices(setting, self.densities, pattern, threads=options.threads)

    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        self.tau = self.temperature(at)
        return super().step(x, y, held, at)

    def temperature(self, at: At) -> float:
        """Of the draws in this epoch."""
        return float(self.options.tau * math.exp(-self.options.tau_decay * at.epoch))

    def warmup(self, epochs: int) -> int:
        return max(super().warmup(epochs), warmup_of(self.options.warmup_share, epochs))

    def trains_alphas(self, at: At) -> bool:
        """After the warm-up so often that weights get their share of the steps; at least once an epoch."""
        share = self.options.weight_share
        turns = min(at.steps, max(1, round(at.steps * (1 - share) / share)))
        return super().trains_alphas(at) and (at.step + 1) * turns // at.steps > at.step * turns // at.steps

    def gates(self) -> Gates:
        names = [name for name in self.alphas if self.mixes(name)]
        if not names:
            return {}
        alphas = [self.alphas[name] for name in names]
        soft = gumbel_softmax(alphas, self.tau, self.generator) if self.draws else [a.softmax(0) for a in alphas]
        self.mixed = dict(zip(names, soft))
        kept = {n: c.keep if isinstance(c, EdgeChoice) else 1 for n, c in self.alphas.choices.items()}
        return {name: Gate(row * kept[name]) for name, row in self.mixed.items()}

    def architecture_loss(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Cross-entropy times the latency factor, both of the same draw."""
        loss, _ = self.loss(x, y)
        latency = self.latency(self.mixed)
        self.latency_ms = float(latency.detach())
        if self.latency_ms != self.latency_ms:  # the loss is not a number either, which whoever runs this will see
            return loss * latency
        if not self.latency_ms > 1e-3:
            raise EvaluationFailed(
                f"fbnet: the expected latency is {self.latency_ms:g} ms, but its loss takes the logarithm of microseconds, which "
                "must be above 1: the networks are too small for it; use darts, or larger networks"
            )
        return fbnet_loss(loss, latency, self.options.latency_alpha, self.options.latency_beta)

    def latency(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Expected latency at these probabilities of the structure at hand, ms: the mean over the densities handed out."""
        priced = self.prices.of(self.values)
        return torch.stack([priced(probabilities, d, self.setting.device) for d in self.densities]).mean()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the mixture by the probabilities themselves, without noise."""
        self.draws = False
        try:
            return super().logits(x)
        finally:
            self.draws = True

    def log_row(self) -> dict[str, Any]:
        return {**super().log_row(), "tau": self.tau, "expected_latency_ms": self.latency_ms}

    def found(self) -> list[Found]:
        """The most probable architecture, then `samples` drawn ones, each at every density handed out."""
        result = super().found()
        for one in result:
            one.note["derived"] = "argmax"
        for number in range(self.options.samples):
            decisions = self.sampled(number)
            for sparsity in self.sparsities():
                architecture = architecture_of(self.setting.space, decisions | self.parts_at(sparsity), sparsity)
                note = self.note(architecture, sparsity) | {"derived": f"sample {number}"}
                result.append(Found(architecture, note))
        return result

    def sampled(self, number: int) -> dict[str, Value]:
        """Decisions drawn from the probabilities: a function of these, the seed and the number."""
        chance = torch.Generator().manual_seed(derive(self.setting.seed, f"fbnet sample {number}"))
        rows = gumbel_softmax([alpha.detach() for alpha in self.alphas.tensors()], 1.0, chance)
        return decode(self.supernet.choices, dict(zip(self.alphas, rows)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        return tensors, {**facts, "prices": dict(self.prices.known), "latency_ms": self.latency_ms}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().load(tensors, facts)
        self.prices.take_over(facts["prices"])
        self.latency_ms = facts["latency_ms"]
