"""Random changes to whole batches of images at once, on whatever device they are on. Start with `augment`.

Blank pixels are 0: with normalised data, the mean of the training part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def augment(x: Tensor, names: tuple[str, ...], *, padding: int, cutout: int, generator: torch.Generator) -> Tensor:
    """Apply the named changes, each image with its own draw.

    Args:
        x: float[n, c, h, w].
        names: of "crop", "flip", "cutout"; the order does not matter.
        padding: largest shift of a crop, in pixels.
        cutout: side of the blanked square, in pixels.
        generator: on x's device.

    Returns:
        A new tensor of the same shape (x itself if there is nothing to do).
    """
    if "crop" in names or "flip" in names:
        rows, device = len(x), x.device
        shift = torch.zeros((2, rows), dtype=torch.int64, device=device)
        if "crop" in names:
            shift = torch.randint(-padding, padding + 1, (2, rows), generator=generator, device=device)
        flip = torch.zeros(rows, dtype=torch.bool, device=device)
        if "flip" in names:
            flip = torch.rand(rows, generator=generator, device=device) < 0.5
        x = shift_and_flip(x, shift[0], shift[1], flip)
    if "cutout" in names:
        high, wide = x.shape[2:]
        centre = torch.rand((2, len(x)), generator=generator, device=x.device)
        x = blank(x, (centre[0] * high).long(), (centre[1] * wide).long(), cutout)
    return x


def shift_and_flip(x: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Move each image's window by (down, right) pixels, blank outside, then mirror it left-right where asked.

    Equal to padding with zeros and cropping; one gather for the whole batch.

    Args:
        x: float[n, c, h, w].
        down, right: int64[n], in pixels; positive moves the window, so the content moves up and left.
        flip: bool[n].
    """
    n, c, h, w = x.shape
    rows = torch.arange(h, device=x.device) + down[:, None]
    columns = torch.arange(w, device=x.device).expand(n, w)
    columns = torch.where(flip[:, None], w - 1 - columns, columns) + right[:, None]
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    index = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    moved = x.flatten(2).gather(2, index.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
    return moved.mul_(inside[:, None])


def blank(x: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """Set a square of `size` pixels around (row, column) to 0, clipped at the border.

    Args:
        x: float[n, c, h, w].
        row, column: int64[n]; the square is [row - size // 2, row - size // 2 + size), likewise for columns.
        size: side in pixels.

    Source: cutout, DeVries and Taylor 2017 (arXiv:1708.04552).
    """
    h, w = x.shape[2:]
    top, left = (row - size // 2)[:, None], (column - size // 2)[:, None]
    i, j = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    outside = ~(((i >= top) & (i < top + size))[:, :, None] & ((j >= left) & (j < left + size))[:, None, :])
    return x * outside[:, None]
