"""Random choices that gradients pass through, for all architecture parameters at once. Start with `gumbel_softmax`.

Source: Gumbel-softmax, Jang et al. 2017 (arXiv:1611.01144), section 2.2, and its straight-through form; as in the published code of
GDAS, Dong and Yang 2019 (arXiv:1910.04465).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TRIES = 8
"""Draws before noise that is not finite is taken as it is: then the parameters are not numbers, and the loss will say so."""


def gumbel_softmax(alphas: Sequence[Tensor], tau: float, generator: torch.Generator) -> list[Tensor]:
    """softmax((log softmax(alpha) + g) / tau) of each, g = -log(Exp(1)): relaxed random choices by softmax(alpha).

    Noise is drawn again while anything is infinite or not a number.

    Args:
        alphas: float[options] each, on one device.
        tau: temperature, positive.
        generator: on the CPU, so that a search draws the same on any device.

    Returns:
        float[options] each, summing to 1, differentiable.
    """
    padded = pad_sequence(list(alphas), batch_first=True, padding_value=float("-inf"))
    sizes = [len(alpha) for alpha in alphas]
    logs = padded.log_softmax(1)
    for _ in range(TRIES):
        noise = -torch.empty(padded.shape).exponential_(generator=generator).log()
        soft = ((logs + noise.to(padded)) / tau).softmax(1)
        if bool(torch.isfinite(soft.detach()).all()):
            break
    return [row[:size] for row, size in zip(soft, sizes)]


def hard_choices(soft: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Each relaxed choice made hard: (one-hot float[options] with the gradient of the relaxed one, index of its 1).

    The values are exactly 0 and 1.
    """
    padded = pad_sequence([row.detach() for row in soft], batch_first=True, padding_value=-1.0)
    chosen = padded.argmax(1).tolist()
    made = []
    for row, index in zip(soft, chosen):
        index = min(index, len(row) - 1)  # of NaN anything may be the largest
        straight = row - row.detach()
        one = torch.zeros_like(row)
        one[index] = 1.0
        made.append((one + straight, index))
    return made
