"""Masks that are given: training leaves them as they are. For networks whose masks somebody found before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.errors import EvaluationFailed
from nas.training.methods.base import Holder, SparsityMethod, targets


class Fixed(SparsityMethod):
    """Keeps the masks that the layers have, whatever their structure and counts; draws nothing."""

    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        layers = targets(model)
        if layers and all(bool(layer.mask.all()) for _, layer in layers):
            raise EvaluationFailed(
                f"expected masks to train with, found none: all {len(layers)} layers with a density below 1 keep every weight. "
                'Method "fixed" trains masks that a search has found; use train.method = "static" to have them drawn'
            )
        for _, layer in layers:
            layer.apply_mask_()
        self._holder = Holder(layers)

    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        self._holder = Holder(targets(model))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._holder.hold(optimizer)
