"""RigL: sparse all the way; now and then the smallest weights are dropped and others grow where the gradient is largest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from nas.training.methods.base import Holder, SparseLayer, SparsityMethod, check_share, check_steps, targets
from nas.training.methods.units import expand, n_of_m_groups, unit_sums
from ops.layers import draw_masks_
from ops.patterns import NM


def cosine_drop(t: float, *, zeta: float, t_end: float) -> float:
    """Share of kept weights that an update at time t replaces: zeta / 2 (1 + cos(pi t / t_end)), 0 from t_end on.

    Source: Evci et al. 2020 (arXiv:1911.11134), section 3 (4).
    """
    return 0.0 if t >= t_end else zeta / 2 * (1 + math.cos(math.pi * t / t_end))


class RigL(SparsityMethod):
    """Rigged lottery. Masks start at random; counts never change.

    An update takes the place of an optimizer step. Per layer, k = int(zeta_t * kept): the k kept units of least magnitude are
    dropped, then the k units outside what is left whose dense gradient is largest grow, with weight 0 and empty optimizer
    slots; a unit that was just dropped may come back and then keeps its weight. A unit is a weight, a block or a channel
    (magnitudes and gradients summed over it). In N:M layers units move within their group: the k groups with the smallest
    kept weights swap one each (this rule is ours; so k is at most the number of groups). Ties go to the lower index.

    Args:
        zeta: share replaced by the first update; falls to 0 along a cosine.
        end: share of the training after which masks are fixed.
        interval: steps between updates; default 100, less if needed for about 10 updates. A layer with fewer than 1 / zeta
            kept units never changes.

    Source: Evci et al. 2020 (arXiv:1911.11134), algorithm 1.
    """

    def __init__(self, zeta: float = 0.3, end: float = 0.75, interval: int | None = None) -> None:
        self.zeta = check_share("rigl", "zeta", zeta)
        self.end = check_share("rigl", "end", end)
        self.interval = check_steps("rigl", "interval", interval)
        if self.zeta == 0:
            raise ConfigError(
                'method_options: rigl zeta: expected a number above 0, got 0; method "static" never changes a mask'
            )

    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        draw_masks_(model, generator)
        self._plan(model, total_steps)

    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        self._plan(model, total_steps)

    def _plan(self, model: nn.Module, total_steps: int) -> None:
        self._layers = targets(model)
        self._holder = Holder(self._layers)
        self._t_end = self.end * total_steps
        self._interval = self.interval or max(1, min(100, int(self._t_end) // 11))

    def is_update(self, step: int) -> bool:
        """Whether this step changes masks: every `interval` steps, not the first, until `end`."""
        return bool(self._layers) and step > 0 and step % self._interval == 0 and step < self._t_end

    def before_step(self, step: int) -> None:
        if self.is_update(step):
            for _, layer in self._layers:
                layer.capture_dense_grad = True

    @torch.no_grad()
    def after_backward(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        if not self.is_update(step):
            return False
        zeta = cosine_drop(step, zeta=self.zeta, t_end=self._t_end)
        for _, layer in self._layers:
            gradient = layer.dense_grad
            layer.capture_dense_grad, layer.dense_grad = False, None
            if gradient is not None:  # None: this layer took no part in the forward pass
                swap(layer, gradient, zeta)
        self._holder.masks_changed()
        return True

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._holder.hold(optimizer)

    def finish(self) -> None:
        for _, layer in getattr(self, "_layers", []):
            layer.capture_dense_grad, layer.dense_grad = False, None


@torch.no_grad()
def swap(layer: SparseLayer, gradient: Tensor, zeta: float) -> None:
    """One update of one layer: new mask, grown weights 0.

    Args:
        layer: changed in place.
        gradient: d loss / d (weight * mask), float of the weight's shape.
        zeta: share of the kept units to replace.

    Raises:
        ValueError: NaN among weights or gradients.
    """
    if not (torch.isfinite(gradient).all() and torch.isfinite(layer.weight).all()):
        raise ValueError("RigL cannot rank weights or gradients that are not finite")
    old = layer.mask.clone()
    magnitude, gradient = layer.weight.abs() * old, gradient.abs()
    if isinstance(layer.pattern, NM):
        new = _swap_in_groups(old, magnitude, gradient, layer.pattern, zeta)
    else:
        kept = _kept_units(old, layer)
        keep = _swap_units(kept, unit_sums(magnitude, layer.pattern), unit_sums(gradient, layer.pattern), zeta)
        new = expand(keep, tuple(old.shape), layer.pattern)
    layer.weight.masked_fill_(new & ~old, 0.0)
    layer.set_mask(new)


def _kept_units(mask: Tensor, layer: SparseLayer) -> Tensor:
    """bool[units]: which units are kept (a unit is kept whole or not at all)."""
    return unit_sums(mask.to(torch.float32), layer.pattern) > 0


def _swap_units(kept: Tensor, magnitude: Tensor, gradient: Tensor, zeta: float) -> Tensor:
    """bool[units] after dropping and growing k units; all arguments flat."""
    number = int(kept.sum())
    k = int(zeta * number)
    stay = _largest(magnitude.masked_fill(~kept, -1.0), number - k)
    grown = _largest(gradient.masked_fill(stay, -1.0), k)
    return stay | grown


def _swap_in_groups(mask: Tensor, magnitude: Tensor, gradient: Tensor, pattern: NM, zeta: float) -> Tensor:
    """The same within the groups of an N:M mask: one swap in each of the k groups with the smallest kept weights."""
    kept = n_of_m_groups(mask, pattern.m)
    weights, gradients = n_of_m_groups(magnitude, pattern.m), n_of_m_groups(gradient, pattern.m)
    k = min(int(zeta * int(kept.sum())), len(kept))
    weakest, position = weights.masked_fill(~kept, torch.inf).min(dim=1)
    chosen = _largest(-weakest, k).nonzero().squeeze(1)
    stay = kept[chosen].scatter(1, position[chosen, None], False)
    best = gradients[chosen].masked_fill(stay, -1.0).argmax(dim=1, keepdim=True)
    kept = kept.clone()
    kept[chosen] = stay.scatter(1, best, True)
    moved = mask.movedim(1, -1)
    return kept.view(moved.shape).movedim(-1, 1).contiguous()


def _largest(scores: Tensor, count: int) -> Tensor:
    """bool[n]: the `count` largest, ties to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).index_fill_(0, order, True)
