"""Inverted residual blocks in chunks of channels, so that the wide values in their middle stay in the second-level cache.

    expand (1x1) -> depthwise -> project (1x1)      becomes, for every chunk of the wide channels,
    expand its rows -> depthwise its channels -> add the projection of its columns to the result

All chunks use the same two small buffers. No kernel knows of this: a chunk is three ordinary steps on a part of the weights, and
the projection of every chunk but the first takes the result so far as its residual. Start with `chunk_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ops.extract import Layer

if TYPE_CHECKING:
    from ops.schedule import Copy, Step

__all__ = ["CACHE_BYTES", "chunk_blocks"]

CACHE_BYTES = 1000 * 1024  # of wide values per chunk: a second-level cache of 1 MB
LEAST_CHANNELS = 16
# Times as many channels in the middle as at the ends. A block that is as wide at its end reads and writes its whole result for
# every chunk: MobileNetV1 at density 0.1 took 3.3 ms in chunks, 3.0 without; for MobileNetV2 there is hardly a difference in
# time where the third-level cache is fast (100 GB/s), and less memory.
WIDENS = 3


def chunk_blocks(steps: list[Step], narrowed: Callable[[Copy, int], Copy], nbytes: Callable[[Copy], int]) -> list[Step]:
    """The steps with every block whose wide values exceed the cache cut into chunks.

    Args:
        steps: in order, halo refreshes not among them.
        narrowed: makes a copy like another one with fewer channels.
        nbytes: of a copy, its halo included.
    """
    readers: dict[Copy, int] = {}
    for step in steps:
        for copy in step.reads:
            readers[copy] = readers.get(copy, 0) + 1
    result: list[Step] = []
    i = 0
    while i < len(steps):
        block = steps[i : i + 3]
        if len(block) == 3 and _is_block(block, readers):
            wide = [step.writes for step in block[:2]]
            size = sum(nbytes(copy) for copy in wide if copy is not None)
            channels = wide[0].shape[1] if wide[0] is not None else 0
            pieces = min(-(-size // CACHE_BYTES), channels // LEAST_CHANNELS)
            if pieces > 1:
                result += _chunked(block, pieces, narrowed)
                i += 3
                continue
        result.append(steps[i])
        i += 1
    return result


def _is_block(steps: list[Step], readers: dict[Copy, int]) -> bool:
    expand, depthwise, project = steps
    kinds = (expand.kind, depthwise.kind, project.kind)
    if kinds != ("conv", "depthwise", "conv") or len(depthwise.reads) != 1:
        return False
    for a, b in ((expand, depthwise), (depthwise, project)):
        if a.writes is not b.reads[0] or readers.get(b.reads[0]) != 1 or a.writes in b.reads[1:]:
            return False
    layers = [step.layer for step in steps]
    assert all(layer is not None for layer in layers)
    first, middle, last = (layer for layer in layers if layer is not None)
    wide = first.weight.shape[0]
    if wide < WIDENS * max(first.weight.shape[1], last.weight.shape[0]):
        return False
    same = middle.weight.shape[0] == wide  # no channel multiplier
    return same and all(layer.groups == 1 and layer.weight.shape[2:] == (1, 1) for layer in (first, last))


def _chunked(steps: list[Step], pieces: int, narrowed: Callable[[Copy, int], Copy]) -> list[Step]:
    expand, depthwise, project = steps
    first, middle, last = expand.layer, depthwise.layer, project.layer
    assert first is not None
    assert middle is not None
    assert last is not None
    assert expand.writes is not None
    assert depthwise.writes is not None
    assert project.writes is not None
    channels = first.weight.shape[0]
    bounds = [channels * k // pieces for k in range(pieces + 1)]
    buffers: dict[int, tuple[Copy, Copy]] = {}
    result: list[Step] = []
    for k, (start, end) in enumerate(pairwise(bounds)):
        if end - start not in buffers:
            buffers[end - start] = narrowed(expand.writes, end - start), narrowed(depthwise.writes, end - start)
        wide, filtered = buffers[end - start]
        result.append(replace(expand, writes=wide, layer=_rows(first, start, end)))
        result.append(replace(depthwise, reads=(wide,), writes=filtered, layer=_rows(middle, start, end)))
        reads = (filtered, *project.reads[1:]) if k == 0 else (filtered, project.writes)
        part = _columns(last, start, end, k == 0, k == pieces - 1)
        result.append(replace(project, reads=reads, layer=part))
    return result


def _rows(layer: Layer, start: int, end: int) -> Layer:
    return replace(
        layer,
        weight=layer.weight[start:end],
        mask=None if layer.mask is None else layer.mask[start:end],
        bias=None if layer.bias is None else layer.bias[start:end],
        groups=layer.groups if layer.groups == 1 else end - start,
    )


def _columns(layer: Layer, start: int, end: int, first: bool, last: bool) -> Layer:
    return replace(
        layer,
        weight=layer.weight[:, start:end],
        mask=None if layer.mask is None else layer.mask[:, start:end],
        bias=layer.bias if first else None,
        residual=layer.residual if first else True,
        post_ops=layer.post_ops if last else (),
    )
