"""Drop-path: in training, the output of an operation is zeroed for some of the images of a batch.

Start with `DropPath`, and `set_progress` for the schedule: the rate grows linearly from 0 over training.
"""

from __future__ import annotations

import torch
from torch import nn


class DropPath(nn.Module):
    """Zero whole samples with probability `rate * progress`, scale the others by 1 / (1 - that); in eval mode nothing.

    Args:
        rate: probability of dropping at the end of training, in [0, 1).

    Attributes:
        progress: fraction of training done, in [0, 1]; starts at 0, so nothing is dropped until a schedule is set.

    Source: Larsson et al. 2017 (arXiv:1605.07648); the linear schedule as in Zoph et al. 2018 (arXiv:1707.07012).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop-path rate: expected a probability in [0, 1), got {rate}")
        self.rate = rate
        self.progress = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, ...] to the same shape."""
        drop = self.rate * self.progress
        if not self.training or drop == 0:
            return x
        keep = 1 - drop
        mask = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def set_progress(module: nn.Module, fraction: float) -> None:
    """Tell every `DropPath` in `module` how much of training is done.

    Args:
        module: the network.
        fraction: in [0, 1]; larger is taken as 1.

    Raises:
        ValueError: a negative or NaN fraction.
    """
    if not fraction >= 0:
        raise ValueError(f"set_progress: expected a fraction of training in [0, 1], got {fraction}")
    for part in module.modules():
        if isinstance(part, DropPath):
            part.progress = min(1.0, float(fraction))
