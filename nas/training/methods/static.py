"""Static sparse training: random masks, drawn once and never changed. The baseline every other method has to beat."""

from __future__ import annotations

import torch
from torch import nn

from nas.training.methods.base import Holder, SparsityMethod, targets
from ops.layers import draw_masks_


class Static(SparsityMethod):
    """Random masks at the layers' densities and patterns, exact counts.

    Source: random pruning at initialisation, Liu et al. 2022 (arXiv:2202.02643).
    """

    def begin(self, model: nn.Module, total_steps: int, generator: torch.Generator) -> None:
        draw_masks_(model, generator)
        self._holder = Holder(targets(model))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._holder.hold(optimizer)
