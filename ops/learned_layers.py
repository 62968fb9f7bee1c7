"""`LearnedSparseConv2d` and `LearnedSparseLinear`: sparse layers whose mask is the top of a trained score.

Beside its weight W a layer has a score S of the same shape. W_eff = W * m(S), where m keeps the largest |S| that the layer's
density and pattern allow (the counts and ties of `ops.masks`). Backwards the choice counts as the identity of |S|:

    dL/dW = m * G        dL/dS = sign(S) * W * G        G = dL/dW_eff

so that a weight outside the mask may come back. A layer of density 1 is torch's own layer, bit for bit. With *gates*, W_eff is a
mixture over several densities and patterns of the same score: W * sum_o gates_o * m_o(S).

Nothing but the score decides a mask: it is selected again when the score, density or pattern is another (`ops.rankings`), also when
weight and score are replaced by other tensors through `torch.func.functional_call`. Whole networks: `ops.learned`.

Source: DASS, Mousavi et al. 2022 (arXiv:2207.06968), reference code; the layers are those of edge-popup, Ramanujan et al. 2020
(arXiv:1911.13299), as HYDRA uses them, Sehwag et al. 2020 (arXiv:2002.10509). Patterns and mixtures are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ops.layers import SparseConv2d, SparseLayer, SparseLinear
from ops.patterns import Pattern
from ops.rankings import Remembered, Target

REMEMBERED_SHAPES = 4
"""Of how many shapes of its score a layer remembers the masks; more than one where widths share weights."""


class LearnedLayer(SparseLayer):
    """What both learned layers share; use the two below.

    Attributes:
        score: float of weight's shape, a parameter.
        mask: bool of weight's shape, computed from the score at the layer's density and pattern (gates or not); a copy.
    """

    score: Tensor

    def _become_sparse(self, density: float, pattern: str | Pattern) -> None:
        self.register_parameter("score", nn.Parameter(torch.empty_like(self.weight)))
        self.register_buffer("dense_grad", None, persistent=False)
        self._capture = False
        self._options: tuple[Target, ...] = ()
        self._gates: Tensor | None = None
        self._remembered: dict[tuple[int, ...], Remembered] = {}
        self._density, self._pattern = self._legal_target(density, pattern, "")
        self.init_scores("kaiming_uniform")

    def _parameters_shared(self) -> None:
        self.score = nn.Parameter(torch.empty_like(self.weight))

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        return self._masks(Target(self._density, self._pattern)).bool()

    @property
    def options(self) -> tuple[Target, ...]:
        """What `gates` weigh: (density, pattern) each."""
        return self._options

    def set_options(self, options: Iterable[tuple[float, str | Pattern | None]]) -> None:
        """Say what `gates` mix; gates that are set are dropped.

        Args:
            options: (density, pattern) each; pattern None is the layer's own.

        Raises:
            PatternError, ValueError: as `set_target`; nothing is changed then.
        """
        self._options = tuple(
            Target(*self._legal_target(density, self._pattern if pattern is None else pattern, ""))
            for density, pattern in options
        )
        self._gates = None

    @property
    def gates(self) -> Tensor | None:
        """float[options] or None. With gates W_eff = W * sum_o gates_o * m_o, differentiable in them; None: W * m as usual.

        They are of one step: neither saved nor copied with the layer.
        """
        return self._gates

    @gates.setter
    def gates(self, gates: Tensor | None) -> None:
        if gates is not None and tuple(gates.shape) != (len(self._options),):
            raise ValueError(
                f"expected one gate for each of the {len(self._options)} options, got shape {list(gates.shape)}; "
                "set_options says what the gates weigh"
            )
        self._gates = gates

    def effective_weight(self) -> Tensor:
        """W * m, or the mixture if there are gates; the weight itself at density 1, unless the score is trained."""
        factor = self._factor()
        effective = self.weight if factor is None else self.weight * factor
        if self._capture and torch.is_grad_enabled() and effective.requires_grad:
            effective = effective.view_as(effective)
            effective.register_hook(self._add_dense_grad)
        return effective

    def init_scores(self, how: str, generator: torch.Generator | None = None) -> None:
        """Fresh scores, in place.

        Args:
            how: "kaiming_uniform" (a = sqrt 5) and "kaiming_normal", both random, as when DASS builds its layers and before its
                search; "scaled", S = sqrt(6 / fan_in) * W / max |W|, with which the first mask is that of the largest |W|.
            generator: for the random ones; None is torch's own.

        Raises:
            ValueError: no such initialisation.

        Source: "scaled" is HYDRA's, Sehwag et al. 2020 (arXiv:2002.10509), section 3.
        """
        with torch.no_grad():
            if how == "kaiming_uniform":
                nn.init.kaiming_uniform_(self.score, a=5**0.5, generator=generator)
            elif how == "kaiming_normal":
                nn.init.kaiming_normal_(self.score, generator=generator)
            elif how == "scaled":
                self.score.copy_(scaled_scores(self.weight))
            else:
                raise ValueError(
                    f'unknown initialisation of scores "{how}"; known: kaiming_uniform, kaiming_normal, scaled'
                )

    def train_weights(self, on: bool) -> None:
        """Whether weight and bias are trained. Off also drops their gradients, so that no optimizer moves or decays them."""
        _train(on, self._parameters["weight"], self._parameters["bias"])

    def train_scores(self, on: bool) -> None:
        """Whether the score is trained; off also drops its gradient."""
        _train(on, self.score)

    def forget(self) -> None:
        """Select the mask anew at the next use. Needed only where `ops.rankings.Remembered` says that it cannot see a change."""
        self._remembered.clear()

    def set_mask(self, mask: Tensor) -> NoReturn:
        """Not possible: the score decides.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "the mask of a learned layer comes from its score; freeze_masks_ makes layers whose mask can be set"
        )

    def apply_mask_(self) -> None:
        """Nothing: weights outside the mask stay, since they may come back."""

    def reset_parameters(self) -> None:
        """Fresh weights, as in torch's layer, and scores of "kaiming_uniform"."""
        super().reset_parameters()
        if "score" in self._parameters:  # torch's constructor calls this before there is one
            self.init_scores("kaiming_uniform")

    def _factor(self) -> Tensor | None:
        """What the weight is multiplied by; None for nothing."""
        train_score = self.score.requires_grad and torch.is_grad_enabled()
        if self._gates is not None:
            masks = self._masks(self._options)
            gates = self._gates.to(masks.dtype).view(-1, *[1] * (masks.ndim - 1))
            factor = (gates * masks).sum(0)  # not a matrix product, which autocast would do in 16 bits
        elif self._density == 1 and not train_score:
            return None
        else:
            factor = self._masks(Target(self._density, self._pattern))
        return cast(Tensor, _StraightThrough.apply(self.score, factor)) if train_score else factor

    def _masks(self, targets: Target | tuple[Target, ...]) -> Tensor:
        """1 where kept, 0 elsewhere: float of the score's shape for one target, [targets, *shape] for several."""
        # Dynamo would take what is remembered for constant, so a compiled graph ends here and goes on with the masks.
        return _masks_uncompiled(self, targets) if torch.compiler.is_compiling() else self._remember(targets)

    def _remember(self, targets: Target | tuple[Target, ...]) -> Tensor:
        score = self.score
        shape = tuple(score.shape)
        known = self._remembered.get(shape)
        if known is None or not known.still(score):
            self._remembered.pop(shape, None)
            if len(self._remembered) == REMEMBERED_SHAPES:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[shape] = known = Remembered(score)
        return known.factors(targets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remembered": {}, "_gates": None}


@torch._disable_dynamo
def _masks_uncompiled(layer: LearnedLayer, targets: Target | tuple[Target, ...]) -> Tensor:
    return layer._remember(targets)


class LearnedSparseConv2d(LearnedLayer, SparseConv2d):
    """`nn.Conv2d` with a learned mask: same arguments, and `density` and `pattern` by name; see `SparseConv2d`."""


class LearnedSparseLinear(LearnedLayer, SparseLinear):
    """`nn.Linear` with a learned mask: same arguments, and `density` and `pattern` by name; see `SparseConv2d`."""


class _StraightThrough(torch.autograd.Function):
    """factor, as if it were |score|: backwards sign(score) * g to the score, g to the factor. Differentiable twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(score: Tensor, factor: Tensor) -> Tensor:
        return factor.view_as(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (score,) = ctx.saved_tensors
        return score.sign() * grad, grad


def scaled_scores(weight: Tensor) -> Tensor:
    """sqrt(6 / fan_in) * W / max |W|, shape of `weight` [out, in / groups, *kernel]; all 0 if the weight is.

    Source: HYDRA, Sehwag et al. 2020 (arXiv:2002.10509), section 3.
    """
    weight = weight.detach()
    fan_in = max(1, weight[0].numel())
    largest = weight.abs().max()
    return (6 / fan_in) ** 0.5 * weight / torch.where(largest > 0, largest, torch.ones_like(largest))


def _train(on: bool, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(on)
            if not on:
                parameter.grad = None
