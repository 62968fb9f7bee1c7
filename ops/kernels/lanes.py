"""The activation layout of the sparse kernels: 16 blocks of an image side by side in the 16 lanes of a vector.

An image (or several) is cut into up to 16 equal blocks; lane l of every vector belongs to block l, and a *tile* is the vector
of the 16 pixels that have the same place within their blocks, for all channels:

    buffer: float32[batch_groups, top + block_height + bottom, left + block_width + right, pitch, 16]

so that a tile is one contiguous piece, the tap (ky, kx) of a convolution is a constant offset from the tile, and every vector
load is aligned. Pixels beyond a block's edge belong to the next lane; they are copied into the *halo* around the block before
a kernel larger than 1x1 reads them (`ops.kernels.movement`). Lanes can also be different images of the batch.

Known as dimension-lifted transposition (Henretty et al. 2011, "Data Layout Transformation for Stencil Computations on Short-
Vector SIMD Architectures"), here for convolutions and with the channels inside.

Start with `Layout` and `default_layout`; `to_lanes` and `from_lanes` are the slow obvious conversions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from ops.formats import CSR

__all__ = [
    "LANES",
    "Layout",
    "conv_offsets",
    "conv_source_layout",
    "covered",
    "default_layout",
    "from_lanes",
    "padded_pitch",
    "to_lanes",
]

LANES = 16


@dataclass(frozen=True)
class Layout:
    """Where the pixels of [batch, channels, height, width] are in a buffer of vectors.

    Pixel (n, c, y, x) has the lane `(n % images * grid[0] + y // block[0]) * grid[1] + x // block[1]` and the tile
    `(n // images, y % block[0], x % block[1])`. What lies in unused lanes, beyond the image within a block, or in the halo is
    undefined until a halo refresh has put zeros and neighbours there.

    Attributes:
        batch, channels, height, width: of the value.
        images: images side by side in the lanes.
        grid: blocks per image, (vertical, horizontal); images * grid[0] * grid[1] <= 16.
        block: pixels of a block, (height, width); grid * block covers the image.
        halo: vectors around each block, (top, bottom, left, right).
        pitch: channels between a tile and the next, at least `channels` (more where the buffer holds several values).
    """

    batch: int
    channels: int
    height: int
    width: int
    images: int = 1
    grid: tuple[int, int] = (4, 4)
    block: tuple[int, int] = (0, 0)
    halo: tuple[int, int, int, int] = (0, 0, 0, 0)
    pitch: int = 0

    def __post_init__(self) -> None:
        block = tuple(b or -(-size // g) for b, size, g in zip(self.block, (self.height, self.width), self.grid))
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "pitch", self.pitch or self.channels)
        if self.images * self.grid[0] * self.grid[1] > LANES or min(self.images, *self.grid) < 1:
            raise ValueError(
                f"a layout has 1 to {LANES} lanes, got {self.images} images x {self.grid[0]} x {self.grid[1]}"
            )
        if any(g * b < size for g, b, size in zip(self.grid, block, (self.height, self.width))):
            raise ValueError(
                f"a grid of {self.grid} blocks of {block} does not cover an image of {self.height}x{self.width}"
            )
        if self.pitch < self.channels or min(self.halo) < 0 or min(self.batch, self.channels, *block) < 1:
            raise ValueError(f"no layout: {self}")

    @property
    def groups(self) -> int:
        """Groups of `images` images, the outermost axis of the buffer."""
        return -(-self.batch // self.images)

    @property
    def tiles(self) -> int:
        """Tiles inside the blocks, all groups together: what a kernel computes."""
        return self.groups * self.block[0] * self.block[1]

    @property
    def rows(self) -> int:
        """Tile rows of a group in the buffer, halo included."""
        return self.halo[0] + self.block[0] + self.halo[1]

    @property
    def columns(self) -> int:
        """Tiles of a tile row in the buffer, halo included."""
        return self.halo[2] + self.block[1] + self.halo[3]

    @property
    def tile_step(self) -> int:
        """Floats from a tile to the next in its row."""
        return self.pitch * LANES

    @property
    def row_step(self) -> int:
        """Floats from a tile to the one below."""
        return self.columns * self.tile_step

    @property
    def group_step(self) -> int:
        """Floats from a group of images to the next."""
        return self.rows * self.row_step

    @property
    def origin(self) -> int:
        """Floats from the start of the buffer to tile (0, 0, 0)."""
        return self.halo[0] * self.row_step + self.halo[2] * self.tile_step

    @property
    def size(self) -> int:
        """Floats of the buffer."""
        return self.groups * self.group_step

    @property
    def blocking(self) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """(images, grid, block): values of equal blocking can be added vector by vector."""
        return self.images, self.grid, self.block

    def with_halo(self, halo: tuple[int, int, int, int]) -> Layout:
        """The same with another halo."""
        return replace(self, halo=halo)

    def with_channels(self, channels: int, pitch: int = 0) -> Layout:
        """The same for another number of channels."""
        return replace(self, channels=channels, pitch=pitch or channels)

    @cached_property
    def index(self) -> npt.NDArray[np.int64]:
        """int64[batch, channels, height, width]: the float of the buffer each pixel is at."""
        n, c, y, x = np.ogrid[: self.batch, : self.channels, : self.height, : self.width]
        group, image = np.divmod(n, self.images)
        (lane_y, tile_y), (lane_x, tile_x) = np.divmod(y, self.block[0]), np.divmod(x, self.block[1])
        lane = (image * self.grid[0] + lane_y) * self.grid[1] + lane_x
        tile = self.origin + group * self.group_step + tile_y * self.row_step + tile_x * self.tile_step
        return tile + c * LANES + lane


def padded_pitch(channels: int) -> int:
    """Channels from tile to tile that keep the same channel of neighbouring tiles out of the same cache sets.

    With 64 channels, tiles are 4 KB apart and 8 of them fight for one set of a first-level cache: 64 -> 64 channels, 3x3 on
    56x56, density 0.1 took 570 us at pitch 64, 335 at 65, 325 from 67 on.
    """
    return next(p for p in range(channels, channels + 8) if p % 8 in (3, 5))


def default_layout(batch: int, channels: int, height: int, width: int, cover: tuple[int, int] = (1, 1)) -> Layout:
    """The layout with the fewest tiles; ties prefer a 4 x 4 grid, then few images in the lanes, then square blocks.

    At batch 1 and sizes divisible by 4 this is always 4 x 4 blocks, so that networks that halve their resolution need no
    conversion in between.

    Args:
        cover: (height, width) the blocks must cover at least: for the result of a convolution that shrinks the image, the size
            of its input divided by the stride (`conv_source_layout` then finds blocks for the input).
    """
    layouts = _layouts(batch, channels, height, width, cover)
    return min(layouts, key=lambda layout: (layout.tiles, _preference(layout)))


def _layouts(batch: int, channels: int, height: int, width: int, cover: tuple[int, int]) -> list[Layout]:
    found = []
    tall, wide = max(height, cover[0]), max(width, cover[1])
    for images in {1, 2, 4, 8, 16}:
        if images > 1 and images >= 2 * batch:
            continue
        for gh, gw in product(range(1, LANES + 1), repeat=2):
            if images * gh * gw <= LANES and gh <= tall and gw <= wide:
                block = (-(-tall // gh), -(-wide // gw))
                found.append(Layout(batch, channels, height, width, images, (gh, gw), block))
    return found


def covered(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """What the blocks of a sliding window's result must cover, for an input of `size`."""
    return -(-size[0] // stride[0]), -(-size[1] // stride[1])


def _preference(layout: Layout) -> tuple[float, ...]:
    square = abs(np.log2(layout.block[0] / layout.block[1]))
    return (layout.grid != (4, 4), layout.images, float(square), layout.grid[0])


def conv_source_layout(
    target: Layout,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Layout:
    """The layout, smallest halo included, an input [batch, channels, height, width] must have for a convolution or a pooling
    into `target` to be constant offsets: the same lanes, blocks `stride` times as large.

    Raises:
        ValueError: the input does not fit into such blocks (the target's blocks are too small).
    """
    batch, channels, height, width = shape
    block = (target.block[0] * stride[0], target.block[1] * stride[1])
    reach = [dilation[i] * (kernel_size[i] - 1) for i in (0, 1)]
    top, _, left, _ = padding
    below = max(0, (target.block[0] - 1) * stride[0] + reach[0] - top - (block[0] - 1))
    beside = max(0, (target.block[1] - 1) * stride[1] + reach[1] - left - (block[1] - 1))
    return Layout(batch, channels, height, width, target.images, target.grid, block, (top, below, left, beside))


def conv_offsets(
    weight: CSR,
    kernel_size: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    source: Layout,
) -> npt.NDArray[np.int64]:
    """int64[nnz]: floats from the source tile (stride · tile_y, stride · tile_x), channel 0, lane 0, to the vector each kept
    weight is multiplied with.

    Args:
        weight: [out, in/groups * kernel_height * kernel_width], columns in the order (in, ky, kx).
        padding: (top, bottom, left, right).
        source: of the input; its halo must reach as far as `conv_source_layout` says.
    """
    rows, cols = weight.shape
    kh, kw = kernel_size
    channel, tap = np.divmod(weight.indices.astype(np.int64), kh * kw)
    group = np.repeat(np.arange(rows) // (rows // groups), np.diff(weight.indptr))
    channel += group * (cols // (kh * kw))
    dy = tap // kw * dilation[0] - padding[0]
    dx = tap % kw * dilation[1] - padding[2]
    return dy * source.row_step + dx * source.tile_step + channel * LANES


def to_lanes(x: npt.NDArray[np.float32], layout: Layout) -> npt.NDArray[np.float32]:
    """float32[layout.size] from float32[batch, channels, height, width]; halo filled, everything else 0."""
    buffer = np.zeros(layout.size, np.float32)
    buffer[layout.index] = x
    top, bottom, left, right = layout.halo
    (bh, bw), (gh, gw) = layout.block, layout.grid
    for n, y, x_ in product(range(layout.batch), range(-top, gh * bh + bottom), range(-left, gw * bw + right)):
        # a pixel near a block's edge appears once more in the halo of each block it is near to
        if 0 <= y < layout.height and 0 <= x_ < layout.width:
            group, image = divmod(n, layout.images)
            for lane_y, lane_x in product(range(gh), range(gw)):
                tile_y, tile_x = y - lane_y * bh, x_ - lane_x * bw
                if -top <= tile_y < bh + bottom and -left <= tile_x < bw + right:
                    lane = (image * gh + lane_y) * gw + lane_x
                    at = layout.origin + group * layout.group_step + tile_y * layout.row_step
                    at += tile_x * layout.tile_step + lane
                    buffer[at : at + layout.channels * LANES : LANES] = x[n, :, y, x_]
    return buffer


def from_lanes(buffer: npt.NDArray[np.float32], layout: Layout) -> npt.NDArray[np.float32]:
    """float32[batch, channels, height, width] from float32[layout.size]."""
    return buffer[layout.index]
