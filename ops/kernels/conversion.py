"""Plain tensors into the lane layout and back.

In a plain tensor float32[batch, channels, height, width] the pixels of one lane lie `block` pixels apart from those of the next,
and only runs along x are contiguous. So 4 pixels of all 16 lanes are moved at once: 16 pieces of 16 bytes, a transposition of
4 x 4 floats within each quarter of 4 vectors, and 4 vectors of the lane layout. Where the image is a single pixel, the runs go
along the channels. What does not make a whole piece is moved float by float.

The plain tensor may begin at any multiple of 4 bytes, and no byte outside of it is touched.

Start with `to_lanes_step` and `from_lanes_step`; twins: `ops.kernels.lanes.to_lanes` and `from_lanes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ops.kernels.lanes import LANES, Layout
from ops.kernels.quarters import PIECE, load_quarters, store_quarters, transposed
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import jit, keep, kernel, load, read_f32, read_i64, store, write_f32

__all__ = ["from_lanes_step", "to_lanes_step"]

_FIELDS = (
    *("x", "y", "rows", "n_rows", "channels", "plain_step", "pieces", "n_pieces", "tile_step"),
    *("size", "far", "count", "masks"),
)
X, Y, ROWS, N_ROWS, CHANNELS, PLAIN_STEP, PIECES, N_PIECES, TILE_STEP, SIZE, FAR, COUNT, MASKS = range(13)


@jit
def _gather(s, o):
    """4 pixels of all lanes from the plain address s; o: address of where the lanes are."""
    a = load_quarters(s + read_i64(o), s + read_i64(o + 32), s + read_i64(o + 64), s + read_i64(o + 96))
    b = load_quarters(s + read_i64(o + 8), s + read_i64(o + 40), s + read_i64(o + 72), s + read_i64(o + 104))
    c = load_quarters(s + read_i64(o + 16), s + read_i64(o + 48), s + read_i64(o + 80), s + read_i64(o + 112))
    d = load_quarters(s + read_i64(o + 24), s + read_i64(o + 56), s + read_i64(o + 88), s + read_i64(o + 120))
    return transposed(a, b, c, d)


@jit
def _gather_slowly(d, s, o, t):
    """The same into the tiles at t, float by float and never from outside of the tensor."""
    for i in range(d[COUNT]):
        for lane in range(16):
            at = max(d[X], min(s + read_i64(o + 8 * lane) + 4 * i, d[X] + d[SIZE] - 4))
            write_f32(t + i * d[TILE_STEP] + 4 * lane, read_f32(at))


@jit
def _mask(d, t, row_mask, column_mask):
    for i in range(d[COUNT]):
        at = t + i * d[TILE_STEP]
        store(at, keep(keep(load(at), row_mask), column_mask + 64 * i))


@kernel
def to_lanes_kernel(d, thread, threads):
    """This thread's share of the (row of tiles, channel) pairs; fields: `_FIELDS`."""
    items, step = d[N_ROWS] * d[CHANNELS], d[TILE_STEP]
    item, last = items * thread // threads, items * (thread + 1) // threads
    row, channel = item // d[CHANNELS], item % d[CHANNELS]
    while item < last:
        at = d[ROWS] + 32 * row
        source = d[X] + read_i64(at) + channel * d[PLAIN_STEP]
        target = d[Y] + read_i64(at + 8) + channel * 64
        o, row_mask = read_i64(at + 16), read_i64(at + 24)
        for p in range(d[PIECES], d[PIECES] + 16 * d[N_PIECES], 16):
            s, t = source + read_i64(p), target + read_i64(p + 8) * step
            mask = d[MASKS] + 64 * read_i64(p + 8)
            if s < d[X] or s + d[FAR] > d[X] + d[SIZE]:
                _gather_slowly(d, s, o, t)
                if d[MASKS]:
                    _mask(d, t, row_mask, mask)
            else:
                v0, v1, v2, v3 = _gather(s, o)
                if d[MASKS]:
                    v0, v1 = keep(keep(v0, row_mask), mask), keep(keep(v1, row_mask), mask + 64)
                    v2, v3 = keep(keep(v2, row_mask), mask + 128), keep(keep(v3, row_mask), mask + 192)
                store(t, v0)
                if d[COUNT] > 1:
                    store(t + step, v1)
                if d[COUNT] > 2:
                    store(t + 2 * step, v2)
                if d[COUNT] > 3:
                    store(t + 3 * step, v3)
        item, channel = item + 1, channel + 1
        if channel == d[CHANNELS]:
            row, channel = row + 1, 0


@kernel
def from_lanes_kernel(d, thread, threads):
    """This thread's share of the (row of tiles, channel) pairs; fields: `_FIELDS`."""
    items, step = d[N_ROWS] * d[CHANNELS], d[TILE_STEP]
    item, last = items * thread // threads, items * (thread + 1) // threads
    row, channel = item // d[CHANNELS], item % d[CHANNELS]
    while item < last:
        at = d[ROWS] + 40 * row
        source = d[X] + read_i64(at + 8) + channel * 64
        target = d[Y] + read_i64(at) + channel * d[PLAIN_STEP]
        for p in range(d[PIECES], d[PIECES] + 24 * d[N_PIECES], 24):
            s, t, o = source + read_i64(p + 8) * step, target + read_i64(p), read_i64(at + 16) + read_i64(p + 16)
            v0, v1, v2, v3 = transposed(load(s), load(s + step), load(s + 2 * step), load(s + 3 * step))
            store_quarters(v3, t + read_i64(o + 24), t + read_i64(o + 56), t + read_i64(o + 88), t + read_i64(o + 120))
            store_quarters(v2, t + read_i64(o + 16), t + read_i64(o + 48), t + read_i64(o + 80), t + read_i64(o + 112))
            store_quarters(v1, t + read_i64(o + 8), t + read_i64(o + 40), t + read_i64(o + 72), t + read_i64(o + 104))
            store_quarters(v0, t + read_i64(o), t + read_i64(o + 32), t + read_i64(o + 64), t + read_i64(o + 96))
        single = read_i64(at + 24)
        for _ in range(read_i64(at + 32)):
            s, t = source + read_i64(single), target + read_i64(single + 8)
            for i in range(read_i64(single + 16)):
                write_f32(t + 4 * i, read_f32(s + i * step))
            single += 24
        item, channel = item + 1, channel + 1
        if channel == d[CHANNELS]:
            row, channel = row + 1, 0


def to_lanes_step(layout: Layout, fill_halo: bool = False) -> KernelStep:
    """Prepare float32[batch, channels, height, width] -> lanes.

    Args:
        fill_halo: also make the halo valid and put 0 wherever there is no pixel, as `movement.halo_step` would do afterwards.

    Returns:
        The step; its input is the plain tensor.
    """
    view = _view(layout, not fill_halo)
    if fill_halo:
        top, left, height, run = layout.halo[0], layout.halo[2], layout.rows, layout.columns
    else:
        top, left, height, run = 0, 0, min(view.block[0], view.image[0]), min(view.block[1], view.image[1])
    starts = _starts(run) if run >= PIECE else [0]
    lanes = aligned(np.stack([view.lane_offsets(view.images), view.lane_offsets(view.last_images)]))
    pieces = aligned(np.array([(4 * start, start) for start in starts], np.int64))
    row_masks = aligned(view.row_masks(np.arange(height) - top))
    column_masks = aligned(view.column_masks(np.arange(max(run, PIECE)) - left))
    group, y = (axis.reshape(-1) for axis in np.mgrid[: layout.groups, :height])
    last = (group == layout.groups - 1).astype(np.int64)
    rows = np.empty((group.size, 4), np.int64)
    rows[:, 0], rows[:, 1] = view.row_offsets(group, y - top)
    rows[:, :2] -= 4 * left, 4 * left * view.tile_step
    rows[:, 2] = lanes.ctypes.data + 8 * LANES * last
    rows[:, 3] = row_masks.ctypes.data + 4 * LANES * (last * height + y)
    table = aligned(rows)
    numbers = {
        **{"rows": table.ctypes.data, "n_rows": len(rows), "pieces": pieces.ctypes.data, "n_pieces": len(starts)},
        **{"far": int(lanes.max()) + 4 * PIECE, "count": min(run, PIECE)},
        **{"masks": column_masks.ctypes.data if fill_halo else 0},
    }
    arrays = (lanes, pieces, table, row_masks, column_masks)
    return KernelStep(to_lanes_kernel.address, view.descriptor(numbers), (X,), Y, arrays=arrays)


def from_lanes_step(layout: Layout) -> KernelStep:
    """Prepare lanes -> float32[batch, channels, height, width].

    Returns:
        The step; its output is the plain tensor.
    """
    view = _view(layout, True)
    (bh, bw), (height, width) = view.block, view.image
    last = width - (width - 1) // bw * bw  # pixels of a row in the last block that has any
    starts = _starts(min(bw, width)) if min(bw, width) >= PIECE else []
    if starts and PIECE <= last < bw:
        starts = sorted({*starts, last - PIECE})
    full = [sum(x * bw + start + PIECE <= width for x in range(view.grid[1])) for start in starts]
    table_size = 8 * LANES * (view.grid[1] + 1)
    pieces = aligned(np.array([(4 * s, s, 8 * LANES * f) for s, f in zip(starts, full)], np.int64))
    group, y = (axis.reshape(-1) for axis in np.mgrid[: layout.groups, : min(bh, height)])
    is_last = (group == layout.groups - 1).astype(np.int64)
    blocks = -(-(height - y) // bh)  # blocks of an image that have this row
    tables, singles = [], []
    for images in (view.images, view.last_images):
        tables += [view.stores(images, tall, wide) for tall, wide in np.ndindex(view.grid[0] + 1, view.grid[1] + 1)]
        singles.append(view.singles(images, bool(starts)))
    stores, lists = aligned(np.array(tables)), aligned(np.concatenate(singles))
    rows = np.empty((group.size, 5), np.int64)
    rows[:, 0], rows[:, 1] = view.row_offsets(group, y)
    rows[:, 2] = stores.ctypes.data + table_size * (is_last * (view.grid[0] + 1) + blocks)
    rows[:, 3] = lists.ctypes.data + 24 * len(singles[0]) * is_last
    per_block = np.array([len(s) // (-(-height // bh)) for s in singles])
    rows[:, 4] = blocks * per_block[is_last]
    table = aligned(rows)
    numbers = {"rows": table.ctypes.data, "n_rows": len(rows), "pieces": pieces.ctypes.data, "n_pieces": len(starts)}
    return KernelStep(
        from_lanes_kernel.address, view.descriptor(numbers), (X,), Y, arrays=(table, pieces, stores, lists)
    )


def _starts(run: int) -> list[int]:
    """Where the pieces of a run begin; the last two may overlap."""
    return [*range(0, run - PIECE, PIECE), run - PIECE]


@dataclass(frozen=True)
class _View:
    """A layout, or one of single pixels with its channels as pixels along x: then the runs are long.

    `image`, `block`: (height, width); `tile_step`: floats from a tile to its right neighbour.
    """

    layout: Layout
    channels: int
    image: tuple[int, int]
    block: tuple[int, int]
    tile_step: int

    @property
    def images(self) -> int:
        return self.layout.images

    @property
    def last_images(self) -> int:
        """Images of the last group."""
        return self.layout.batch - (self.layout.groups - 1) * self.images

    @property
    def grid(self) -> tuple[int, int]:
        return self.layout.grid

    def descriptor(self, numbers: dict[str, int]) -> npt.NDArray[np.int64]:
        area = self.image[0] * self.image[1]
        numbers = numbers | {
            **{"channels": self.channels, "plain_step": 4 * area, "tile_step": 4 * self.tile_step},
            **{"size": 4 * self.layout.batch * self.channels * area},
        }
        return np.array([numbers.get(name, 0) for name in _FIELDS], np.int64)

    def row_offsets(self, group: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> Any:
        """Bytes to (block 0, y, 0) of a group in the plain tensor and in lanes."""
        image = self.channels * self.image[0] * self.image[1]
        layout = self.layout
        lanes = layout.origin + group * layout.group_step + y * layout.row_step
        return 4 * (group * self.images * image + y * self.image[1]), 4 * lanes

    def places(self) -> tuple[npt.NDArray[np.int64], ...]:
        """(image, block row, block column) of every lane; image = images where there is none."""
        image, block = np.divmod(np.arange(LANES), self.grid[0] * self.grid[1])
        return np.minimum(image, self.images), *np.divmod(block, self.grid[1])

    def lane_offsets(self, images: int) -> npt.NDArray[np.int64]:
        """int64[16]: bytes to the first pixel of each lane in the plain tensor; lanes without an image read lane 0."""
        image, y, x = self.places()
        pixels = image * self.channels * self.image[0] * self.image[1]
        pixels += y * self.block[0] * self.image[1] + x * self.block[1]
        return 4 * np.where(image < images, pixels, 0)

    def stores(self, images: int, tall: int, wide: int) -> npt.NDArray[np.int64]:
        """int64[16]: as `lane_offsets`, with all lanes beyond the first `tall` x `wide` blocks at lane 0, which is written
        last."""
        image, y, x = self.places()
        return np.where((image < images) & (y < tall) & (x < wide), self.lane_offsets(images), 0)

    def singles(self, images: int, pieces: bool) -> npt.NDArray[np.int64]:
        """int64[n, 3]: (bytes to the lane, bytes to its first pixel in the plain tensor, pixels) of what pieces leave, block
        row by block row."""
        (height, width), (bh, bw), lanes = self.image, self.block, self.lane_offsets(images)
        found = []
        for y, image, x in np.ndindex(-(-height // bh), images, -(-width // bw)):
            lane = (image * self.grid[0] + y) * self.grid[1] + x
            count = min(bw, width - x * bw)
            if count < PIECE or not pieces:
                found.append((4 * lane, lanes[lane], count))
        return np.array(found, np.int64).reshape(-1, 3)

    def row_masks(self, y: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32[2, rows, 16]: -1 where a lane has an image and a pixel in row y of its block; of groups but the last, and of it."""
        image, lane_y, _ = self.places()
        row = lane_y * self.block[0] + y[:, None]
        inside = (row >= 0) & (row < self.image[0])
        return -np.stack([inside & (image < n) for n in (self.images, self.last_images)]).astype(np.int32)

    def column_masks(self, x: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32[columns, 16]: -1 where a lane has a pixel in column x of its block."""
        column = self.places()[2] * self.block[1] + x[:, None]
        return -((column >= 0) & (column < self.image[1])).astype(np.int32)


def _view(layout: Layout, along_channels: bool) -> _View:
    if along_channels and (layout.height, layout.width, *layout.block) == (1, 1, 1, 1):
        return _View(layout, 1, (1, layout.channels), (1, layout.channels), LANES)
    return _View(layout, layout.channels, (layout.height, layout.width), layout.block, layout.tile_step)
