"""The training rows of a data set on the device, cut into batches: in another order every epoch, augmented many at a time.

Nothing is streamed and no process is started: the data are one tensor. Start with `Batches`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nas.data import Split
from nas.training.augment import augment
from nas.training.config import TrainConfig

CHUNK_BYTES = 16 << 20
"""Rows are gathered and augmented in pieces of about this size."""


class Batches:
    """The training part of a data set.

    Args:
        split: its rows.
        config: batch size and augmentation.
        device: where the batches are wanted.

    Attributes:
        size: rows per batch.
        steps: batches per epoch; rows that do not fill the last one are left out of that epoch.
    """

    def __init__(self, split: Split, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.x, self.y = split.x.to(device), split.y.to(device)
        self.size = min(config.batch_size, len(self.y))
        self.steps = len(self.y) // self.size

    def epoch(self, order: torch.Generator, chance: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x, y) of one epoch.

        Args:
            order: on the CPU; which rows come when.
            chance: on the device; of augmentation.
        """
        config = self.config
        rows = torch.randperm(len(self.y), generator=order)[: self.steps * self.size].to(self.device)
        row_bytes = self.x[0].numel() * self.x.element_size()
        piece = self.size * max(1, CHUNK_BYTES // (row_bytes * self.size))
        for chosen in rows.split(piece):
            x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            if config.augment:
                x = augment(x, config.augment, padding=config.crop_padding, cutout=config.cutout, generator=chance)
            if self.device.type == "cuda" and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            yield from zip(x.split(self.size), y.split(self.size))
