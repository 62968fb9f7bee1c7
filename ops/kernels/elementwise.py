"""Additions, products, affine maps and activations of whole values, in lanes or plain.

In lanes, all values of a step have the same blocking, whatever their pitch and halo, and are taken vector by vector: pixels that
are not there are computed with too, and stay undefined. The target may be the buffer of an input of the same layout.

Start with `add_step`, and with `plain_add_step` for plain tensors. `ELEMENTWISE` are the activations. Twins: the same in numpy and
torch (`tests/ops/test_elementwise.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ops.kernels.activations import ACTIVATIONS, activated, exponential
from ops.kernels.lanes import LANES, Layout
from ops.kernels.movement import gather, share, tile_runs
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import (
    add,
    divide,
    fma,
    jit,
    kernel,
    larger,
    load,
    load_any,
    multiply,
    read_f32,
    read_i64,
    smaller,
    splat,
    splat_at,
    store,
    store_any,
    write_f32,
    zero,
)

__all__ = [
    "ELEMENTWISE",
    "activate_step",
    "add_step",
    "affine_step",
    "gate_step",
    "multiply_step",
    "plain_activate_step",
    "plain_add_step",
]

ELEMENTWISE = ACTIVATIONS | {"sigmoid": 100, "hardsigmoid": 101}

_CLAMPS = {
    "none": (-np.inf, np.inf),
    "relu": (0, np.inf),
    "relu6": (0, 6),
}  # activations that are max(low, min(x, high))
_ONE, _THREE, _SIX, _SIXTH = np.float32(1), np.float32(3), np.float32(6), np.float32(1 / 6)

_FIELDS = (
    *("a", "b", "y", "runs", "n_runs", "vectors", "activation", "bounds", "scale", "shift"),
    *("scratch", "lanes", "groups", "images", "count"),
)
A, B, Y, RUNS, N_RUNS, VECTORS, ACTIVATION, BOUNDS, SCALE, SHIFT, SCRATCH, LANE_TABLE, GROUPS, IMAGES, COUNT = range(15)


@jit
def _finished(x, activation, low, high):
    """x through any of `ELEMENTWISE`; `low`, `high`: bounds if it is a clamp, whose number is then 0."""
    if activation == 0:
        return smaller(larger(x, low), high)
    if activation == 100:
        one = splat(_ONE)
        return divide(one, add(one, exponential(multiply(x, splat(-_ONE)))))
    if activation == 101:
        return multiply(smaller(larger(add(x, splat(_THREE)), zero()), splat(_SIX)), splat(_SIXTH))
    return activated(x, activation)


@kernel
def activate_kernel(d, thread, threads):
    """y = act(a), run by run of (a, y)."""
    run, begin, left = share(d[N_RUNS], d[VECTORS], thread, threads)
    activation, low, high = d[ACTIVATION], splat_at(d[BOUNDS]), splat_at(d[BOUNDS] + 4)
    while left > 0:
        end = min(d[VECTORS], begin + left)
        a, y = d[A] + read_i64(d[RUNS] + 16 * run), d[Y] + read_i64(d[RUNS] + 16 * run + 8)
        for i in range(64 * begin, 64 * end, 64):
            store(y + i, _finished(load(a + i), activation, low, high))
        left -= end - begin
        run, begin = run + 1, 0


@kernel
def add_kernel(d, thread, threads):
    """y = act(a + b), run by run of (a, b, y)."""
    run, begin, left = share(d[N_RUNS], d[VECTORS], thread, threads)
    activation, low, high = d[ACTIVATION], splat_at(d[BOUNDS]), splat_at(d[BOUNDS] + 4)
    while left > 0:
        end, at = min(d[VECTORS], begin + left), d[RUNS] + 24 * run
        a, b, y = d[A] + read_i64(at), d[B] + read_i64(at + 8), d[Y] + read_i64(at + 16)
        for i in range(64 * begin, 64 * end, 64):
            store(y + i, _finished(add(load(a + i), load(b + i)), activation, low, high))
        left -= end - begin
        run, begin = run + 1, 0


@kernel
def multiply_kernel(d, thread, threads):
    """y = a · b, run by run of (a, b, y)."""
    run, begin, left = share(d[N_RUNS], d[VECTORS], thread, threads)
    while left > 0:
        end, at = min(d[VECTORS], begin + left), d[RUNS] + 24 * run
        a, b, y = d[A] + read_i64(at), d[B] + read_i64(at + 8), d[Y] + read_i64(at + 16)
        for i in range(64 * begin, 64 * end, 64):
            store(y + i, multiply(load(a + i), load(b + i)))
        left -= end - begin
        run, begin = run + 1, 0


@kernel
def affine_kernel(d, thread, threads):
    """y = act(a · scale + shift), tile by tile of (a, y)."""
    run, begin, left = share(d[N_RUNS], d[VECTORS], thread, threads)
    activation, low, high = d[ACTIVATION], splat_at(d[BOUNDS]), splat_at(d[BOUNDS] + 4)
    while left > 0:
        end = min(d[VECTORS], begin + left)
        a, y = d[A] + read_i64(d[RUNS] + 16 * run), d[Y] + read_i64(d[RUNS] + 16 * run + 8)
        for c in range(begin, end):
            x = fma(load(a + 64 * c), splat_at(d[SCALE] + 4 * c), splat_at(d[SHIFT] + 4 * c))
            store(y + 64 * c, _finished(x, activation, low, high))
        left -= end - begin
        run, begin = run + 1, 0


@kernel
def gate_kernel(d, thread, threads):
    """y = a · gate, tile by tile of (a, y). A thread has a range of channels, whose factors it puts into vectors first."""
    channels, tiles = d[VECTORS], d[N_RUNS] // d[GROUPS]
    first, last = channels * thread // threads, channels * (thread + 1) // threads
    run = d[RUNS]
    for group in range(d[GROUPS]):
        gates = d[B] + 4 * group * d[IMAGES] * channels
        table = d[LANE_TABLE] + (128 if group == d[GROUPS] - 1 else 0)
        for c in range(first, last):
            if d[IMAGES] == 1:
                store(d[SCRATCH] + 64 * c, splat_at(gates + 4 * c))
            else:
                store(d[SCRATCH] + 64 * c, gather(gates + 4 * c, table))
        for _ in range(tiles):
            a, y = d[A] + read_i64(run), d[Y] + read_i64(run + 8)
            for i in range(64 * first, 64 * last, 64):
                store(y + i, multiply(load(a + i), load(d[SCRATCH] + i)))
            run += 16


@jit
def _copied(source, target, count):
    for i in range(0, 4 * count, 4):
        write_f32(target + i, read_f32(source + i))


@jit
def _plain(d, a, b, y):
    """y = act(a) or act(a + b) for 16 floats."""
    x = load_any(a)
    if b:
        x = add(x, load_any(b))
    store_any(y, _finished(x, d[ACTIVATION], splat_at(d[BOUNDS]), splat_at(d[BOUNDS] + 4)))


@kernel
def plain_kernel(d, thread, threads):
    """y = act(a), or act(a + b) if there is a b; what is left after whole vectors goes through `scratch`."""
    vectors, rest = d[COUNT] // 16, d[COUNT] % 16
    first, last = vectors * thread // threads, vectors * (thread + 1) // threads
    b = d[B]
    for i in range(64 * first, 64 * last, 64):
        _plain(d, d[A] + i, b + i if b else b, d[Y] + i)
    if thread == threads - 1 and rest:
        end, room = 64 * vectors, d[SCRATCH]
        for i in range(0, 128, 64):
            store(room + i, zero())
        _copied(d[A] + end, room, rest)
        if b:
            _copied(b + end, room + 64, rest)
        _plain(d, room, room + 64 if b else b, room)
        _copied(room, d[Y] + end, rest)


def activate_step(source: Layout, target: Layout, activation: str) -> KernelStep:
    """Prepare act(x) in lanes.

    Args:
        activation: of `ELEMENTWISE`.

    Raises:
        ValueError: the layouts differ in more than pitch and halo, or the activation is unknown. So do the other steps here.
    """
    return _lanes_step(activate_kernel.address, (A,), (source, target), activation)


def add_step(a: Layout, b: Layout, target: Layout, activation: str = "none") -> KernelStep:
    """Prepare act(a + b) in lanes."""
    return _lanes_step(add_kernel.address, (A, B), (a, b, target), activation)


def multiply_step(a: Layout, b: Layout, target: Layout) -> KernelStep:
    """Prepare a · b in lanes, both of one shape."""
    return _lanes_step(multiply_kernel.address, (A, B), (a, b, target), "none")


def affine_step(
    source: Layout,
    target: Layout,
    scale: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32],
    activation: str = "none",
) -> KernelStep:
    """Prepare act(x · scale[c] + shift[c]) in lanes; c: channel.

    Args:
        scale, shift: float32[channels].
    """
    for name, array in (("scale", scale), ("shift", shift)):
        if array.shape != (source.channels,):
            raise ValueError(f"{name} must have one number per channel, [{source.channels}], got {list(array.shape)}")
    packed = aligned(scale.astype(np.float32)), aligned(shift.astype(np.float32))
    numbers = {"scale": packed[0].ctypes.data, "shift": packed[1].ctypes.data}
    return _lanes_step(affine_kernel.address, (A,), (source, target), activation, False, numbers, packed)


def gate_step(source: Layout, target: Layout) -> KernelStep:
    """Prepare x · gate[n, c] in lanes; n: image, c: channel (Hu et al. 2018, "Squeeze-and-Excitation Networks", eq. 4).

    Returns:
        The step; inputs are [x, gate], the gate plain float32[batch, channels].
    """
    image = np.arange(LANES) // (source.grid[0] * source.grid[1])
    last = source.batch - (source.groups - 1) * source.images
    table = aligned(np.stack([4 * source.channels * np.where(image < n, image, 0) for n in (source.images, last)]))
    numbers = {"lanes": table.ctypes.data, "groups": source.groups, "images": source.images}
    step = _lanes_step(gate_kernel.address, (A, B), (source, target), "none", False, numbers, (table,))
    step.scratch_slot, step.scratch = SCRATCH, source.channels * LANES
    return step


def plain_activate_step(count: int, activation: str) -> KernelStep:
    """Prepare act(x) for `count` floats at any multiple of 4 bytes."""
    return _plain_step(count, activation, (A,))


def plain_add_step(count: int, activation: str = "none") -> KernelStep:
    """Prepare act(a + b) for `count` floats at any multiple of 4 bytes."""
    return _plain_step(count, activation, (A, B))


def _plain_step(count: int, activation: str, inputs: tuple[int, ...]) -> KernelStep:
    numbers, bounds = _activation(activation)
    template = _template(numbers | {"count": count})
    return KernelStep(plain_kernel.address, template, inputs, Y, SCRATCH, 2 * LANES, (bounds,))


def _lanes_step(
    address: int,
    inputs: tuple[int, ...],
    layouts: tuple[Layout, ...],
    activation: str,
    whole_rows: bool = True,
    numbers: dict[str, int] | None = None,
    arrays: tuple[npt.NDArray[Any], ...] = (),
) -> KernelStep:
    act, bounds = _activation(activation)
    runs, vectors = tile_runs(*layouts, whole_rows=whole_rows)
    table = aligned(runs)
    act |= {"runs": table.ctypes.data, "n_runs": len(runs), "vectors": vectors}
    return KernelStep(address, _template(act | (numbers or {})), inputs, Y, arrays=(table, bounds, *arrays))


def _template(numbers: dict[str, int]) -> npt.NDArray[np.int64]:
    return np.array([numbers.get(name, 0) for name in _FIELDS], np.int64)


def _activation(activation: str) -> tuple[dict[str, int], npt.NDArray[np.float32]]:
    """The descriptor's fields, and the array one of them points to."""
    if activation not in ELEMENTWISE:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(sorted(ELEMENTWISE))}")
    bounds = aligned(np.array(_CLAMPS.get(activation, (0, 0)), np.float32))
    number = 0 if activation in _CLAMPS else ELEMENTWISE[activation]
    return {"activation": number, "bounds": bounds.ctypes.data}, bounds
