"""Static sparse training: random masks, drawn once and never changed. The baseline every other method has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.training.methods.base import Holder, SparsityMethod, targets
from ops.layers import draw_masks_


class Static(SparsityMethod):
    """Random masks at the layers' densities and patterns, exact counts.

    Source: random pruning at initialisation, Liu et al. 2022 (arXiv:2202.02643).
    """

    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        draw_masks_(model, generator)
        self._holder = Holder(targets(model))

    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        self._holder = Holder(targets(model))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._holder.hold(optimizer)
