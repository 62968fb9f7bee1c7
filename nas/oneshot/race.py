"""A race of candidates: all are trained a little at equal budgets, the better half goes on. Start with `Race`.

Every candidate is the network of an architecture with weights inherited from a supernet. In its first leg it is pruned by magnitude
to its densities; it is judged on fixed rows. What is cheap about it: most candidates are trained for a leg only.

Source: successive halving, Jamieson and Talwalkar 2016 (arXiv:1502.07943), algorithm 1; pruning as in Zhu and Gupta 2017
(arXiv:1710.01878), eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.algorithm import Batch, StepReport
from nas.oneshot.gradient import load_optimizer, optimizer_tensors
from nas.training.methods.gradual import cubic_sparsity
from ops.layers import sparse_layers
from ops.masks import topk_mask
from ops.patterns import NM

PRUNINGS = 10
"""Times that masks change in the first leg."""


@dataclass(frozen=True)
class Leg:
    """One candidate's turn.

    Attributes:
        round: 0 for the first, in which all run.
        place: among the candidates of this round.
        epoch, epochs: of the turn.
    """

    round: int
    place: int
    epoch: int
    epochs: int

    @property
    def last(self) -> bool:
        """Whether the candidate is judged after this epoch."""
        return self.epoch + 1 == self.epochs


def schedule(candidates: int, epochs: int) -> list[Leg]:
    """Every epoch of a race: all candidates for `epochs`, then the better half for as long, until one is left."""
    legs: list[Leg] = []
    number, left = 0, candidates
    while True:
        legs += [Leg(number, place, epoch, epochs) for place in range(left) for epoch in range(epochs)]
        if left == 1:
            return legs
        number, left = number + 1, max(1, left // 2)
        if left == 1:  # one is left: it has won, there is nothing to find out
            return legs


class Runner:
    """One candidate.

    Args:
        network: sparse layers have their targets; the weights are inherited. On its device.
        lr, weight_decay: of AdamW.
    """

    def __init__(self, network: nn.Module, lr: float, weight_decay: float) -> None:
        self.network = network
        self.layers = [layer for _, layer in sparse_layers(network) if layer.density < 1]
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
        for layer in self.layers:
            layer.set_mask(torch.ones_like(layer.mask))

    def step(self, x: Tensor, y: Tensor, lr: float, pruned: float | None) -> StepReport:
        """One step of training.

        Args:
            x, y: the batch.
            lr: learning rate.
            pruned: share of the way from dense to the target that masks must have gone after it; None leaves them.
        """
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        output = self.network(x)
        logits = output[0] if isinstance(output, tuple) else output
        loss = F.cross_entropy(logits.float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if pruned is not None:
            self.prune(pruned)
        for layer in self.layers:
            layer.apply_mask_()
        return StepReport(loss.detach(), (logits.detach().argmax(1) == y).sum())

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Prune by magnitude, `share` of the way to the target; N:M layers at the end only."""
        for layer in self.layers:
            density = layer.density
            if share < 1:
                if isinstance(layer.pattern, NM):
                    continue
                sparsity = cubic_sparsity(share, final=1 - density, start=0.0, interval=1.0, updates=1)
                density = max(density, 1 - sparsity)
            scores = layer.weight.abs().masked_fill_(~layer.mask, -1.0)
            layer.set_mask(topk_mask(scores, density, layer.pattern))

    @torch.no_grad()
    def judge(self, batches: list[Batch]) -> float:
        """Mean loss on fixed rows, in eval mode."""
        self.network.eval()
        total, rows = 0.0, 0
        for x, y in batches:
            output = self.network(x)
            logits = output[0] if isinstance(output, tuple) else output
            total += float(F.cross_entropy(logits.float(), y, reduction="sum"))
            rows += len(y)
        return total / rows

    def state(self) -> dict[str, Tensor]:
        """Weights, masks, statistics and optimizer slots."""
        tensors = {f"network/{name}": t.detach() for name, t in self.network.state_dict().items()}
        return tensors | optimizer_tensors("adamw", self.optimizer, dict(self.network.named_parameters()))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        plain = {name.removeprefix("network/"): t for name, t in tensors.items() if name.startswith("network/")}
        self.network.load_state_dict(plain)
        load_optimizer("adamw", self.optimizer, dict(self.network.named_parameters()), tensors)


@dataclass
class Race:
    """One race.

    Attributes:
        runners: key (JSON) of each candidate still in it -> runner, in the order they run.
        losses: key -> loss at its last judgement, of all that ever ran.
        judged: keys judged in this round.
    """

    runners: dict[str, Runner]
    losses: dict[str, float]
    judged: list[str]

    def run(self, leg: Leg, x: Tensor, y: Tensor, *, step: int, steps: int, lr: float) -> StepReport:
        """One step of the candidate whose turn it is; in the first leg masks close until two thirds of it."""
        key = list(self.runners)[leg.place]
        pruned = None
        if leg.round == 0:
            total = leg.epochs * steps
            done = leg.epoch * steps + step + 1
            every = max(1, (2 * total // 3) // PRUNINGS)
            if done % every == 0 or done == total:
                pruned = 1.0 if done == total else min(1.0, done / max(1, 2 * total // 3))
        return self.runners[key].step(x, y, lr, pruned)

    def finish(self, leg: Leg, rows: list[Batch]) -> None:
        """After the last step of a turn: judge; after the last of a round, the better half stays. Ties keep the earlier."""
        key = list(self.runners)[leg.place]
        loss = self.runners[key].judge(rows)
        self.losses[key] = loss if loss == loss else float("inf")
        self.judged.append(key)
        if len(self.judged) == len(self.runners):
            best = sorted(self.runners, key=lambda k: self.losses[k])[: max(1, len(self.runners) // 2)]
            self.runners = {k: self.runners[k] for k in self.runners if k in best}
            self.judged = []

    @property
    def winner(self) -> str:
        """The best of those still in it."""
        return min(self.runners, key=lambda k: self.losses.get(k, float("inf")))

    def facts(self) -> dict[str, Any]:
        """JSON; with `Runner.state` of each runner, everything."""
        return {"runners": list(self.runners), "losses": self.losses, "judged": self.judged}
