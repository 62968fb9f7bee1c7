"""HYDRA: train dense, learn which weights to keep while they stand still, then train what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from nas.training.methods.base import Holder, SparseLayer, SparsityMethod, check_share, last_change, targets
from ops.learned import scaled_scores
from ops.rankings import Target, select


class Hydra(SparsityMethod):
    """Three stages. Dense until `begin`; then until `prune_end` the weights of the layers stand still and a score for each of
    their weights is trained, the mask being the largest |score| of each layer; then the mask is fixed and what it keeps is trained.

    Scores begin as S = sqrt(6 / fan_in) W / max |W|, so the first mask is that of the largest weights. They follow SGD with
    momentum along sign(S) * W * G, where G is the loss's gradient at the masked weight: also outside the mask, so that a weight
    may come back, with the value it had. The scores' learning rate falls to zero along a cosine. They are not decayed.

    In the middle stage the layers' weights have no gradient, so neither it nor weight decay moves them; biases, norms and layers
    of density 1 are trained throughout. Weights outside the mask are zero in the model at every step; the method keeps them
    aside. The last stage begins with the optimizer's slots for these weights empty. Where masks must settle before `prune_end`,
    the first two stages shrink in proportion.

    Args:
        begin: share of the training after which the scores are trained.
        prune_end: share of the training at which the masks are fixed.
        score_lr: first learning rate of the scores.
        score_momentum: in [0, 1).

    Source: Sehwag et al. 2020 (arXiv:2002.10509), its training for accuracy alone, as DASS uses it (arXiv:2207.06968, reference
    code: 600, 20 and 200 epochs, score rate 0.1, momentum 0.9; it decays scores too). Patterns are ours.
    """

    def __init__(
        self, begin: float = 0.5, prune_end: float = 0.7, score_lr: float = 0.1, score_momentum: float = 0.9
    ) -> None:
        self.begin_share = check_share("hydra", "begin", begin)
        self.end_share = check_share("hydra", "prune_end", prune_end)
        if self.begin_share >= self.end_share:
            raise ConfigError(
                f"method_options: hydra begin must be below prune_end, got begin {begin:g} and prune_end {prune_end:g}"
            )
        if isinstance(score_lr, bool) or not isinstance(score_lr, int | float) or not 0 < score_lr < math.inf:
            raise ConfigError(f"method_options: hydra score_lr: expected a number above 0, got {score_lr!r}")
        self.score_lr = float(score_lr)
        self.momentum = check_share("hydra", "score_momentum", score_momentum)
        if self.momentum == 1:
            raise ConfigError("method_options: hydra score_momentum: expected a number in [0, 1), got 1")

    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        self._plan(model, total_steps, settle_by)
        for _, layer in self._layers:
            layer.set_mask(torch.ones_like(layer.mask))
        if self._start == 0:
            self._begin_scores()

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": value for i, scores in enumerate(self._scores) for name, value in scores.state().items()}

    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        self._plan(model, total_steps, settle_by)
        for i, (_, layer) in enumerate(self._layers if state else []):
            scores = _Scores(layer)
            scores.load_state({name: state[f"{i}.{name}"] for name in scores.state()})
            self._scores.append(scores)

    def _plan(self, model: nn.Module, total_steps: int, settle_by: int | None) -> None:
        self._layers = targets(model)
        self._holder = Holder(self._layers)
        last = last_change(total_steps, settle_by)
        shrunk = min(1.0, last / (self.end_share * total_steps))
        self._start = int(self.begin_share * total_steps * shrunk)
        self._end = min(int(self.end_share * total_steps), last)
        self._scores: list[_Scores] = []

    def before_step(self, step: int) -> None:
        for scores in self._scores:
            scores.layer.capture_dense_grad = True

    def after_backward(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        if self._scores:
            progress = (step - self._start) / (self._end - self._start)
            lr = self.score_lr * 0.5 * (1 + math.cos(math.pi * progress))
            for scores in self._scores:
                scores.step(lr, self.momentum)
            self._holder.masks_changed()
        return False

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step + 1 == self._start:
            self._begin_scores()
        if step + 1 == self._end:
            self._end_scores(optimizer)
        self._holder.hold(optimizer)

    def finish(self) -> None:
        for _, layer in getattr(self, "_layers", []):
            take_gradient(layer)
        self._scores = []

    def _begin_scores(self) -> None:
        scores = [_Scores(layer) for _, layer in self._layers]
        for one in scores:
            one.draw()
        self._holder.masks_changed()
        self._scores = scores if self._start < self._end else []  # else too short a training for the middle stage

    def _end_scores(self, optimizer: torch.optim.Optimizer) -> None:
        """Fix the masks. What the optimizer remembers of the weights is of a time when all of them were there."""
        self._scores = []
        weights = [layer.weight for _, layer in self._layers]
        for slot in (slot for weight in weights for slot in optimizer.state.get(weight, {}).values()):
            if isinstance(slot, Tensor):
                slot.zero_()
        if optimizer.defaults.get("momentum"):
            for weight in weights:  # torch's fused SGD refuses a group of which some have momentum and others not yet
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))


class _Scores:
    """The scores of one layer while they are trained, and all of its weights.

    Args:
        layer: its mask becomes that of its largest weights.
    """

    def __init__(self, layer: SparseLayer) -> None:
        self.layer = layer
        self.weight = layer.weight.detach().clone()
        self.score = scaled_scores(self.weight)
        self.velocity = torch.zeros_like(self.score)

    def state(self) -> dict[str, Tensor]:
        """All of it but the layer."""
        return {"weight": self.weight, "score": self.score, "velocity": self.velocity}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, in place."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """One step along the dense gradient, and the mask of the new scores; the weight's own gradient is dropped.

        Raises:
            ValueError: scores that are not numbers, after a loss that was not.
        """
        gradient = take_gradient(self.layer)
        self.layer.weight.grad = None
        if gradient is None:  # this layer took no part in the forward pass
            return
        self.velocity.mul_(momentum).add_(self.score.sign() * (self.weight * gradient))
        self.score.add_(self.velocity, alpha=-lr)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """The layer's mask becomes that of the scores, its weights the kept ones."""
        self.layer.weight.copy_(self.weight)
        self.layer.set_mask(select(self.score, Target(self.layer.density, self.layer.pattern)))


def take_gradient(layer: SparseLayer) -> Tensor | None:
    """Take the dense gradient that a layer has captured, and switch capturing off."""
    gradient = layer.dense_grad
    layer.capture_dense_grad, layer.dense_grad = False, None
    return gradient
