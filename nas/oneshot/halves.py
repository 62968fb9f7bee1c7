"""The two halves of the training part that a supernet sees, and the batches that are drawn from them.

D_w trains weights (and scores), D_a architecture parameters (Liu, Simonyan, Yang 2019, "DARTS", arXiv:1806.09055, section 2.3).
Every batch is a function of (seed, stream, its number), so a search that is continued needs no more than that number.
Start with `halves` and `Batches`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.data import Split
from nas.errors import DataError
from nas.training.augment import augment

CHUNK_BYTES = 16 << 20
"""Rows are gathered and augmented in pieces of about this size."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        names: of "crop", "flip", "cutout".
        padding: largest shift of a crop, in pixels.
        cutout: side of the blanked square, in pixels.
    """

    names: tuple[str, ...] = ()
    padding: int = 4
    cutout: int = 8


def halves(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Cut rows in two, class by class: every class, and the whole, differ by one row at most.

    Args:
        y: int64[n], class codes.
        seed: of the cut.

    Returns:
        (D_w, D_a): int64 row numbers, each ascending, on the CPU.

    Raises:
        DataError: fewer than two rows.
    """
    if len(y) < 2:
        raise DataError(f"expected at least 2 rows of training data to cut in halves, found {len(y)}; use more data")
    chance = random.Random(derive(seed, "halves"))
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(y.tolist()):
        rows.setdefault(label, []).append(row)
    parts: tuple[list[int], list[int]] = ([], [])
    for label in sorted(rows):
        own = rows[label]
        chance.shuffle(own)
        larger = 0 if len(parts[0]) <= len(parts[1]) else 1  # of an odd class, the half that is behind gets more
        middle = (len(own) + 1) // 2
        parts[larger].extend(own[:middle])
        parts[1 - larger].extend(own[middle:])
    return torch.tensor(sorted(parts[0])), torch.tensor(sorted(parts[1]))


class Batches:
    """An endless stream of batches of some rows: shuffled anew in every round, augmented, on a device.

    Batch k is a function of (seed, stream, k). The rows that do not fill a round's last batch are left out of that round.

    Args:
        rows: what is drawn from, on the device already.
        batch_size: rows per batch; a part that is smaller is one batch.
        seed, stream: of the shuffling and the augmentation.
        augmentation: of images.
    """

    def __init__(
        self, rows: Split, batch_size: int, *, seed: int, stream: str, augmentation: Augmentation | None = None
    ) -> None:
        self.rows = rows
        self.batch = min(batch_size, len(rows))
        self.per_round = len(rows) // self.batch
        self._seed, self._stream = seed, stream
        self._augmentation = augmentation or Augmentation()
        self._device = rows.x.device
        self._chance = torch.Generator(self._device)
        row_bytes = rows.x[0].numel() * rows.x.element_size()
        self._in_chunk = max(1, CHUNK_BYTES // max(1, row_bytes * self.batch))
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._chunk: tuple[tuple[int, int], tuple[Tensor, ...], tuple[Tensor, ...]] = ((-1, -1), (), ())

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch `number`, from 0: float[batch, *shape] and int64[batch]."""
        turn, position = divmod(number, self.per_round)
        chunk, within = divmod(position, self._in_chunk)
        if self._chunk[0] != (turn, chunk):
            self._chunk = ((turn, chunk), *self._gather(turn, chunk))
        return self._chunk[1][within], self._chunk[2][within]

    def _gather(self, turn: int, chunk: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self._order[0] != turn:
            order = torch.Generator().manual_seed(derive(self._seed, f"{self._stream} order {turn}"))
            self._order = (turn, torch.randperm(len(self.rows), generator=order).to(self._device))
        first = chunk * self._in_chunk
        last = min(first + self._in_chunk, self.per_round)
        chosen = self._order[1][first * self.batch : last * self.batch]
        x, y = self.rows.x.index_select(0, chosen), self.rows.y.index_select(0, chosen)
        how = self._augmentation
        if how.names:
            self._chance.manual_seed(derive(self._seed, f"{self._stream} augment {turn} {chunk}"))
            x = augment(x, how.names, padding=how.padding, cutout=how.cutout, generator=self._chance)
        if self._device.type == "cuda" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.split(self.batch), y.split(self.batch)


def derive(seed: int, stream: str) -> int:
    """A seed for one use, unrelated to those of other uses."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=7).digest(), "little")
