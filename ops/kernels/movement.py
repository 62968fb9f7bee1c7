"""Values in lanes moved into other layouts, and halos refreshed. Plain tensors come and go by `ops.kernels.conversion`.

- `halo_step`, in place: puts 0 wherever there is no pixel and fills the halo. The neighbour of a tile at a block's edge is the tile
  at the opposite edge, one lane (or one row of lanes) on. So a halo vector is an unaligned load, `shift` floats beyond its source,
  and a mask. **The load may reach 60 bytes beyond either end of the buffer** (`ops.memory.GUARD` covers that); what it reads there
  is masked off, whatever it is.
- `relayout_step`: lanes into lanes of any other blocking, float by float.
- `copy_step`: the same blocking with other pitch or halo; writes a part of a wider buffer, for instance.

Start with `halo_step`. Twins: `ops.kernels.lanes.to_lanes` and `from_lanes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from ops.kernels.conversion import from_lanes_step, to_lanes_step
from ops.kernels.lanes import LANES, Layout
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import intrinsic, jit, keep, kernel, load, load_any, read_i64, store, vec

__all__ = [
    "copy_step",
    "from_lanes_step",
    "gather",
    "halo_step",
    "relayout_step",
    "share",
    "tile_runs",
    "to_lanes_step",
]

VECTOR = 4 * LANES  # bytes


@intrinsic
def gather(typingctx: Any, address: Any, table: Any) -> Any:
    """The 16 floats at address + int64 at `table`, lane by lane: plain loads, as gather instructions are slow where they are
    mitigated and no faster elsewhere."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, place = ir.IntType(64), ir.IntType(32)
        value = ir.Constant(ir.VectorType(ir.FloatType(), LANES), ir.Undefined)
        for lane in range(LANES):
            at = builder.add(args[1], ir.Constant(number, 8 * lane))
            at = builder.add(args[0], builder.load(builder.inttoptr(at, number.as_pointer()), align=8))
            one = builder.load(builder.inttoptr(at, ir.FloatType().as_pointer()), align=4)
            value = builder.insert_element(value, one, ir.Constant(place, lane))
        return value

    return vec(types.int64, types.int64), code


_FIELDS = ("x", "y", "table", "entries", "vectors")
X, Y, TABLE, ENTRIES, VECTORS = range(5)


@jit
def share(runs, vectors, thread, threads):
    """(first run, its first vector, vectors to do) of a thread, of `runs` runs of `vectors` vectors; cut anywhere."""
    first = runs * vectors * thread // threads
    return first // vectors, first % vectors, runs * vectors * (thread + 1) // threads - first


@kernel
def halo_kernel(d, thread, threads):
    """Entries: (bytes to the tile written, bytes to the floats read, address of the mask); `vectors`: channels."""
    entry, begin, left = share(d[ENTRIES], d[VECTORS], thread, threads)
    while left > 0:
        end = min(d[VECTORS], begin + left)
        at = d[TABLE] + 24 * entry
        y, x, mask = d[Y] + read_i64(at), d[Y] + read_i64(at + 8), read_i64(at + 16)
        offset, stop = 64 * begin, 64 * end
        while offset + 192 < stop:
            v0, v1 = load_any(x + offset), load_any(x + offset + 64)
            v2, v3 = load_any(x + offset + 128), load_any(x + offset + 192)
            store(y + offset, keep(v0, mask))
            store(y + offset + 64, keep(v1, mask))
            store(y + offset + 128, keep(v2, mask))
            store(y + offset + 192, keep(v3, mask))
            offset += 256
        while offset < stop:
            store(y + offset, keep(load_any(x + offset), mask))
            offset += 64
        left -= end - begin
        entry, begin = entry + 1, 0


@kernel
def relayout_kernel(d, thread, threads):
    """Entries: bytes to the tile written, then for each lane bytes to the float read; `vectors`: channels."""
    entry, begin, left = share(d[ENTRIES], d[VECTORS], thread, threads)
    while left > 0:
        end = min(d[VECTORS], begin + left)
        at = d[TABLE] + 136 * entry
        y = d[Y] + read_i64(at)
        for offset in range(64 * begin, 64 * end, 64):
            store(y + offset, gather(d[X] + offset, at + 8))
        left -= end - begin
        entry, begin = entry + 1, 0


@kernel
def copy_kernel(d, thread, threads):
    """Entries: (bytes to a run of vectors read, to the run written)."""
    entry, begin, left = share(d[ENTRIES], d[VECTORS], thread, threads)
    while left > 0:
        end = min(d[VECTORS], begin + left)
        at = d[TABLE] + 16 * entry
        x, y = d[X] + read_i64(at), d[Y] + read_i64(at + 8)
        for offset in range(64 * begin, 64 * end, 64):
            store(y + offset, load(x + offset))
        left -= end - begin
        entry, begin = entry + 1, 0


def halo_step(layout: Layout) -> KernelStep:
    """Prepare the refresh of a halo, in place: then every pixel is wherever a kernel with this halo looks for it, and there is
    0 in the halo beyond the image, in the tiles beyond the image and in unused lanes.

    Returns:
        The step; the buffer is both input and output, and 60 bytes before and after it must be readable.
    """
    top, bottom, left, right = layout.halo
    (bh, bw), (gh, gw) = layout.block, layout.grid
    group, ty, tx = (
        axis.reshape(-1) for axis in np.mgrid[: layout.groups, -top : bh + bottom, -left : bw + right].astype(np.int64)
    )
    lane = np.arange(LANES)
    image, place = np.divmod(lane, gh * gw)
    y = ty[:, None] + place // gw * bh
    x = tx[:, None] + place % gw * bw
    inside = (image < layout.images) & (group[:, None] * layout.images + image < layout.batch)
    inside &= (y >= 0) & (y < layout.height) & (x >= 0) & (x < layout.width)
    shift = ty // bh * gw + tx // bw
    own = (ty // bh == 0) & (tx // bw == 0)
    source = np.where(
        inside.any(axis=1), _tile(layout, group, ty % bh, tx % bw) + 4 * shift, _tile(layout, group, ty, tx)
    )
    _, first, which = np.unique(inside @ (1 << lane), return_index=True, return_inverse=True)
    packed = aligned(-inside[first].astype(np.int32))
    table = np.stack([_tile(layout, group, ty, tx), source, packed.ctypes.data + VECTOR * which.reshape(-1)], axis=1)
    entries = aligned(table[~own | ~inside.all(axis=1)])
    return _step(halo_kernel.address, entries, 3, layout.channels, (Y,), packed)


def relayout_step(source: Layout, target: Layout) -> KernelStep:
    """Prepare lanes -> lanes of any other layout of the same value. The target's halo is left undefined.

    Raises:
        ValueError: the two are not layouts of one shape.
    """
    _check_shapes(source, target)
    group, ty, tx = (axis.reshape(-1, 1) for axis in _tiles(target))
    (bh, bw), (gh, gw) = target.block, target.grid
    image, place = np.divmod(np.arange(LANES), gh * gw)
    n, y, x = group * target.images + image, ty + place // gw * bh, tx + place % gw * bw
    inside = (image < target.images) & (n < target.batch) & (y < target.height) & (x < target.width)
    n, y, x = (np.where(inside, axis, 0) for axis in (n, y, x))
    lane = (n % source.images * source.grid[0] + y // source.block[0]) * source.grid[1] + x // source.block[1]
    table = np.empty((len(group), 1 + LANES), np.int64)
    table[:, :1] = _tile(target, group, ty, tx)
    table[:, 1:] = _tile(source, n // source.images, y % source.block[0], x % source.block[1]) + 4 * lane
    return _step(relayout_kernel.address, aligned(table[inside.any(axis=1)]), 1 + LANES, target.channels)


def copy_step(source: Layout, target: Layout) -> KernelStep:
    """Prepare a copy into a buffer of equal blocking and other pitch or halo. The target's halo is left as it is.

    Raises:
        ValueError: the two differ in shape or blocking.
    """
    _check_shapes(source, target)
    table, vectors = tile_runs(source, target)
    return _step(copy_kernel.address, aligned(table), 2, vectors)


def tile_runs(*layouts: Layout, whole_rows: bool = True) -> tuple[npt.NDArray[np.int64], int]:
    """The tiles of values of equal blocking as runs of contiguous vectors.

    Args:
        whole_rows: a run may be a row of tiles, where the tiles of all values are contiguous; else it is one tile.

    Returns:
        int64[runs, values]: bytes from the start of each buffer to the run; and vectors of a run.

    Raises:
        ValueError: the blockings, batches or channels differ.
    """
    first = layouts[0]
    for other in layouts[1:]:
        if (other.blocking, other.batch, other.channels) != (first.blocking, first.batch, first.channels):
            raise ValueError(
                "values are taken vector by vector only where batch, channels and blocking (images, grid, block) are equal: "
                f"got {first} and {other}; rearrange one of them with relayout_step"
            )
    group, ty, tx = (axis.reshape(-1) for axis in _tiles(first))
    vectors = first.channels
    if whole_rows and all(layout.pitch == layout.channels for layout in layouts):
        group, ty, tx = (axis[tx == 0] for axis in (group, ty, tx))
        vectors *= first.block[1]
    return np.stack([_tile(layout, group, ty, tx) for layout in layouts], axis=1), vectors


def _tiles(layout: Layout) -> tuple[npt.NDArray[np.int64], ...]:
    """(group, row, column) of every tile of the blocks."""
    return tuple(np.mgrid[: layout.groups, : layout.block[0], : layout.block[1]].astype(np.int64))


def _tile(layout: Layout, group: Any, ty: Any, tx: Any) -> Any:
    """Bytes from the start of the buffer to a tile."""
    return 4 * (layout.origin + group * layout.group_step + ty * layout.row_step + tx * layout.tile_step)


def _check_shapes(source: Layout, target: Layout) -> None:
    shapes = [(one.batch, one.channels, one.height, one.width) for one in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"both layouts must be of one shape [batch, channels, height, width], got {shapes[0]} and {shapes[1]}"
        )


def _step(
    address: int,
    table: npt.NDArray[np.int64],
    width: int,
    vectors: int,
    inputs: tuple[int, ...] = (X,),
    *more: npt.NDArray[Any],
) -> KernelStep:
    numbers = {"table": table.ctypes.data, "entries": table.size // width, "vectors": vectors}
    template = np.array([numbers.get(name, 0) for name in _FIELDS], np.int64)
    return KernelStep(address, template, inputs, Y, arrays=(table, *more))
