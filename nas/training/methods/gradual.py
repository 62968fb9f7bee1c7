"""Gradual magnitude pruning: from dense to each layer's density along a cubic curve."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from nas.training.methods.base import Holder, SparsityMethod, check_share, check_steps, last_change, targets
from ops.masks import topk_mask
from ops.patterns import NM


def cubic_sparsity(
    t: float, *, final: float, start: float, interval: float, updates: int, initial: float = 0.0
) -> float:
    """Sparsity (share of zeros) at time t; constant before `start` and after `start + updates * interval`.

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3

    Source: Zhu and Gupta 2017 (arXiv:1710.01878), eq. 1.
    """
    progress = min(max((t - start) / (updates * interval), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


class Gradual(SparsityMethod):
    """Prune the smallest weights of each layer, a little at a time; what is pruned stays pruned.

    Time t is the number of finished optimizer steps: the update of time t follows the t-th step. The last update sets the
    exact target, so at least 1 - end of the training goes on at constant sparsity. Blocks and channels are pruned by
    the sum of their magnitudes. N:M layers stay dense until the last update and are then cut to n of m at once, since n:m has
    no intermediate densities of the same pattern. Where masks must settle before `end`, the schedule shrinks in proportion.

    Args:
        begin: share of the training after which pruning starts.
        end: share of the training at which it is complete.
        updates: how often masks change in between; default 50, or every step if there are fewer.

    Source: Zhu and Gupta 2017 (arXiv:1710.01878); per layer.
    """

    def __init__(self, begin: float = 0.0, end: float = 0.75, updates: int | None = None) -> None:
        self.begin_share = check_share("gradual", "begin", begin)
        self.end_share = check_share("gradual", "end", end)
        self.updates = check_steps("gradual", "updates", updates)
        if self.begin_share >= self.end_share:
            raise ConfigError(f"method_options: gradual begin must be below end, got begin {begin:g} and end {end:g}")

    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        self._plan(model, total_steps, settle_by)
        for _, layer in self._layers:
            layer.set_mask(torch.ones_like(layer.mask))

    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        self._plan(model, total_steps, settle_by)

    def _plan(self, model: nn.Module, total_steps: int, settle_by: int | None) -> None:
        self._layers = targets(model)
        self._holder = Holder(self._layers)
        last = last_change(total_steps, settle_by)
        shrunk = min(1.0, last / (self.end_share * total_steps))
        self._start = min(int(self.begin_share * total_steps * shrunk), last - 1)
        span = max(1, min(int(self.end_share * total_steps), last) - self._start)
        self._interval = max(1, span // min(self.updates or 50, span))
        self._updates = span // self._interval

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        since = step + 1 - self._start
        number, rest = divmod(since, self._interval)
        if since > 0 and rest == 0 and number <= self._updates:
            self._prune(step + 1, last=number == self._updates)
        self._holder.hold(optimizer)

    @torch.no_grad()
    def _prune(self, t: int, *, last: bool) -> None:
        for _, layer in self._layers:
            density = layer.density
            if not last:
                if isinstance(layer.pattern, NM):
                    continue
                sparsity = cubic_sparsity(
                    t, final=1 - density, start=self._start, interval=self._interval, updates=self._updates
                )
                density = max(density, 1 - sparsity)
            scores = layer.weight.abs().masked_fill_(~layer.mask, -1.0)  # below every kept weight, even one that is 0
            layer.set_mask(topk_mask(scores, density, layer.pattern))
        self._holder.masks_changed()
