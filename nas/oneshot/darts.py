"""DARTS: all candidates weighted by softmax, architecture parameters by the gradient on held-out data.

Source: Liu et al. 2019, DARTS (arXiv:1806.09055), sections 2.2 to 2.4, and its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, check_whole
from nas.oneshot.gradient import GradientSearch


@dataclass(frozen=True)
class DartsOptions(algorithm.Options):
    """Options of DARTS.

    Attributes:
        order: 1, or 2 for the gradient through one step of the weights (eq. 7 and 8), about 2.5 times slower.
    """

    order: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("order", self.order, 1, 2)


class Darts(GradientSearch):
    """First or second order DARTS."""

    name = "darts"
    Options: ClassVar[type[algorithm.Options]] = DartsOptions

    perturbation = 0.01
    """Length of the step in weight space by which second derivatives are estimated; the published one."""

    def architecture_step(self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, at: At) -> None:
        if self.options.order == 1:
            super().architecture_step(x, y, held_x, held_y, at)
            return
        loss, gradients = self.unrolled(x, y, held_x, held_y, at)
        for name, gradient in gradients.items():
            self.alphas[name].grad = gradient
        self.score_function(loss)
        self.alpha_optimizer.step()

    def unrolled(
        self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, at: At
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss at w' = w - xi (mu v + dL_train/dw + lambda w), and its gradient in the mixed architecture parameters.

        dL_val(w')/da - xi (dL_train(w+)/da - dL_train(w-)/da) / 2 e, w+- = w +- e dL_val/dw', e = `perturbation` / norm of
        dL_val/dw'. The weights are as before when it returns, bit for bit.

        Source: eq. 7 and 8; momentum and weight decay as in the published code.
        """
        assert self.weight_optimizer is not None
        options, xi = self.options, self.learning_rate(at)
        weights = [p for p in self.weight_optimizer.param_groups[0]["params"] if p.requires_grad]
        names = [name for name in self.alphas if self.mixes(name)]
        if not names:  # everything is drawn: nothing to unroll for
            return self.architecture_loss(held_x, held_y, at).detach(), {}
        alphas = [self.alphas[name] for name in names]
        with self.without_alpha_gradients():
            train = torch.autograd.grad(self.loss(x, y)[0], weights, allow_unused=True)
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, g in zip(weights, train):
                momentum = self.weight_optimizer.state.get(w, {}).get("momentum_buffer")
                move = options.weight_decay * w
                if g is not None:
                    move = move + g
                if momentum is not None:
                    move = move + options.momentum * momentum
                w.sub_(move, alpha=xi)
        loss = self.architecture_loss(held_x, held_y, at)
        gradients = torch.autograd.grad(loss, [*alphas, *weights], allow_unused=True)
        direct, by_weight = gradients[: len(alphas)], gradients[len(alphas) :]
        norm = torch.cat([g.flatten() for g in by_weight if g is not None]).norm()
        epsilon = self.perturbation / float(norm) if float(norm) > 0 else 0.0
        shifted = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for w, b, g in zip(weights, before, by_weight):
                    w.copy_(b if g is None else b + sign * epsilon * g)
            shifted.append(torch.autograd.grad(self.loss(x, y)[0], alphas, allow_unused=True))
        with torch.no_grad():
            for w, b in zip(weights, before):
                w.copy_(b)
        result = {}
        for name, alpha, d, plus, minus in zip(names, alphas, direct, *shifted):
            total = torch.zeros_like(alpha) if d is None else d
            if epsilon and plus is not None and minus is not None:
                total = total - xi * (plus - minus) / (2 * epsilon)
            result[name] = total
        return loss.detach(), result
