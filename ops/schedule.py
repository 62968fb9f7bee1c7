"""From a plan to the steps that are really executed, with a memory layout for every value: `schedule(plan) -> Schedule`.

A value of the plan can exist in several *copies*: in lanes (`ops.kernels.lanes`) of one blocking or another, plain in the
runtime's arena, or as a torch tensor. Each operation asks for the copies it reads; what is missing is made by a conversion,
which is a step like any other and stands in the table. Layers run where the plan says; everything else runs in lanes where its
input already is there, so that a run of sparse layers is never left.

    1. operations become steps, copies get a blocking (images, grid, block);
    2. halos are as wide as their readers need, with a refresh after the writer;
    3. inputs of a concatenation are written where they are concatenated;
    4. buffers share one arena by the time they live (`ops.memory`).

Nothing is compiled or packed here; that is `ops.prepare`. Start with `schedule`; `Schedule.frame()` is the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ops.chunks import chunk_blocks
from ops.fuse import Layer
from ops.kernels.lanes import LANES, Layout, conv_source_layout, covered, default_layout, padded_pitch
from ops.memory import GUARD, Interval, allocate
from ops.pairs import fuse_pairs
from ops.plan import Plan, PlannedOp, Ref
from ops.recognise import Native, recognise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Copy", "Schedule", "Step", "schedule"]

Blocking = tuple[int, tuple[int, int], tuple[int, int]]
# How many more tiles an output may have than the best blocking needs before its input is rearranged for it.
WORTH_RELAYOUT = 1.08
# ... and if that makes a rearrangement of a wide value one of a narrow value.
WORTH_AHEAD = 1.2


@dataclass(eq=False)
class Copy:
    """One form of a value.

    Attributes:
        value: index as in `PlannedOp.inputs`.
        form: "lanes", "plain" (contiguous, in the arena) or "torch" (a tensor made while the plan runs).
        shape: of the value.
        layout: of lanes, final after scheduling.
        base: the copy whose memory this one is a part of, and the first channel there.
        offset: byte offset in the arena, -1 for torch.
    """

    value: int
    form: str
    shape: tuple[int, ...]
    layout: Layout | None = None
    base: tuple[Copy, int] | None = None
    offset: int = -1

    @property
    def lanes(self) -> Layout:
        """The layout of a copy in lanes."""
        assert self.layout is not None
        return self.layout

    @property
    def root(self) -> Copy:
        """The copy that owns the memory."""
        return self if self.base is None else self.base[0].root

    @property
    def address(self) -> int:
        """Bytes from the start of the arena."""
        if self.base is None:
            return self.offset
        return self.base[0].address + self.base[1] * LANES * 4

    @property
    def nbytes(self) -> int:
        """Of the buffer."""
        return 4 * (self.layout.size if self.layout is not None else math.prod(self.shape))


@dataclass(eq=False)
class Step:
    """One executed step.

    Attributes:
        kind: "conv", "pair" (see `ops.pairs`), "depthwise", "linear", a `Native.kind`, "to_lanes", "from_lanes", "relayout",
            "copy", "halo", "fetch" (a plain value as a torch tensor) or "torch" (an operation torch runs).
        reads, writes: copies; "torch" steps read values by index instead.
        op: index of the plan's operation it belongs to; of the reading operation for conversions.
        layer: weights and geometry of a layer.
        kernel: "portable" or "specialised" for layers, "torch" for what torch runs, else "lanes".
        parameters: of other operations.
    """

    kind: str
    reads: tuple[Copy, ...]
    writes: Copy | None
    op: int
    layer: Layer | None = None
    kernel: str = "lanes"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Steps in order of execution.

    Attributes:
        plan: what they compute.
        steps: see `Step`.
        arena: bytes of working memory.
        input: the torch copy of the network's input.
        outputs: the torch copy of every value the network returns.
    """

    plan: Plan
    steps: tuple[Step, ...]
    arena: int
    input: Copy
    outputs: dict[int, Copy]

    def key(self, step: Step) -> str | None:
        """JSON text under which a measured time of a step can be remembered, the same for steps that cost the same; None for
        a submodule that could not be traced. It does not name the kernel, the threads or the machine."""
        if step.kind == "torch":
            return self.plan.ops[step.op].key
        facts: dict[str, Any] = {"step": step.kind, "from": [_facts(c) for c in step.reads]}
        if step.writes is not None:
            facts["to"] = _facts(step.writes)
        if step.layer is not None:
            facts["layer"] = _layer_facts(step.layer)
        for name, value in step.parameters.items():
            if name not in ("scale", "shift"):
                facts[name] = _layer_facts(value) if isinstance(value, Layer) else value
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))

    def frame(self) -> pd.DataFrame:
        """One row per step: operation, step, kernel, layouts read and written, bytes of what is written."""
        rows = [
            {
                "op": self.plan.ops[step.op].name if step.op < len(self.plan.ops) else "output",
                "step": step.kind,
                "kernel": step.kernel,
                "from": " ".join(_form(copy) for copy in step.reads),
                "to": _form(step.writes) if step.writes is not None else "torch",
                "bytes": step.writes.nbytes if step.writes is not None else 0,
            }
            for step in self.steps
        ]
        import pandas as pd  # late: running a network does not need it

        return pd.DataFrame(rows, columns=["op", "step", "kernel", "from", "to", "bytes"])

    def __str__(self) -> str:
        return f"{len(self.steps)} steps, {self.arena / 1e6:.2f} MB of working memory\n{self.frame().to_string(index=False)}"


def schedule(plan: Plan) -> Schedule:
    """Decide what is executed for a plan, and where every value is."""
    builder = _Builder(plan)
    builder.run()
    builder.steps = chunk_blocks(builder.steps, builder.narrowed, builder.nbytes)
    builder.steps = fuse_pairs(builder.steps, builder.refreshed)
    _share_concatenations(builder)
    steps = _with_halos(builder)
    arena = _placed(steps)
    return Schedule(plan, tuple(steps), arena, builder.input, builder.outputs)


def _layer_facts(layer: Layer) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "pattern", "post_ops", "residual")
    return {name: getattr(layer, name) for name in names} | {"weight": tuple(layer.weight.shape), "nnz": layer.nnz}


def _facts(copy: Copy) -> list[Any]:
    layout = copy.layout
    return [copy.form, copy.shape, None if layout is None else [*layout.blocking, layout.halo, layout.pitch]]


def _form(copy: Copy) -> str:
    if copy.layout is None:
        return copy.form
    images, (gh, gw), (bh, bw) = copy.layout.blocking
    return f"{f'{images}x' if images > 1 else ''}{gh}x{gw} of {bh}x{bw}"


# --- 1. steps and blockings ------------------------------------------------------------------------------------------


class _Builder:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: list[Step] = []
        self.input = Copy(0, "torch", plan.input_shape)
        self.copies: dict[int, list[Copy]] = {0: [self.input]}  # those that are up to date
        self.halo: dict[Copy, tuple[int, int, int, int]] = {}
        self.refreshed: set[Copy] = set()
        self.readers: dict[int, list[int]] = {}
        for i, op in enumerate(plan.ops):
            for value in op.inputs:
                self.readers.setdefault(value, []).append(i)
        for value in _refs(plan.output):
            self.readers.setdefault(value, []).append(len(plan.ops))
        self.outputs: dict[int, Copy] = {}
        self.shapes: dict[int, tuple[int, ...]] = {0: plan.input_shape}
        self.dtypes = {0: plan.dtype, **{i + 1: op.dtype for i, op in enumerate(plan.ops)}}
        self.mutates = any(op.mutates for op in plan.ops)

    def run(self) -> None:
        for i, op in enumerate(self.plan.ops):
            self.shapes[i + 1] = op.output_shape
            self.copies[i + 1] = []
            if not self._native(i, op):
                self._torch(i, op)
        last = len(self.plan.ops)
        for value in sorted(_refs(self.plan.output)):
            self.outputs[value] = self._as_torch(value, last)

    # copies of values, made where they are missing

    def _find(self, value: int, form: str) -> Copy | None:
        return next((copy for copy in self.copies[value] if copy.form == form), None)

    def _add(self, step: Step) -> Copy:
        assert step.writes is not None
        self.steps.append(step)
        self.copies[step.writes.value].append(step.writes)
        return step.writes

    def _as_torch(self, value: int, op: int) -> Copy:
        found = self._find(value, "torch")
        if found is not None:
            return found
        source = self._find(value, "plain") or self.copies[value][0]
        copy = Copy(value, "torch", self.shapes[value])
        return self._add(Step("fetch" if source.form == "plain" else "from_lanes", (source,), copy, op))

    def _as_plain(self, value: int, op: int) -> Copy:
        found = self._find(value, "plain") or self._find(value, "torch")
        if found is not None:
            return found
        copy = Copy(value, "plain", self.shapes[value])
        return self._add(Step("from_lanes", (self.copies[value][0],), copy, op))

    def _as_lanes(self, value: int, blocking: Blocking, op: int) -> Copy:
        lanes = [copy for copy in self.copies[value] if copy.form == "lanes"]
        for copy in lanes:
            if copy.lanes.blocking == blocking:
                return copy
        source = lanes[0] if lanes else self._as_plain(value, op)
        copy = self._new_lanes(value, blocking)
        return self._add(Step("relayout" if lanes else "to_lanes", (source,), copy, op))

    def _new_lanes(self, value: int, blocking: Blocking) -> Copy:
        batch, channels, height, width = self.shapes[value]
        layout = Layout(batch, channels, height, width, *blocking, pitch=padded_pitch(channels))
        return Copy(value, "lanes", self.shapes[value], layout)

    def _in_lanes(self, value: int) -> bool:
        return any(copy.form == "lanes" for copy in self.copies[value])

    def narrowed(self, copy: Copy, channels: int) -> Copy:
        """A new copy in the same blocking and with the same halo for part of the channels of a value."""
        layout = copy.lanes.with_channels(channels, padded_pitch(channels))
        part = Copy(copy.value, "lanes", (copy.shape[0], channels, *copy.shape[2:]), layout)
        self.copies[copy.value].append(part)
        if copy in self.halo:
            self.halo[part] = self.halo[copy]
        if copy in self.refreshed:
            self.refreshed.add(part)
        return part

    def nbytes(self, copy: Copy) -> int:
        """Bytes of a copy in lanes with the halo known by now."""
        return 4 * copy.lanes.with_halo(self.halo.get(copy, (0, 0, 0, 0))).size

    # operations

    def _torch(self, i: int, op: PlannedOp) -> None:
        reads = tuple(self._as_torch(value, i) for value in op.inputs)
        self._add(Step("torch", reads, Copy(i + 1, "torch", op.output_shape), i, kernel="torch"))
        if op.mutates:  # any tensor may have changed: its other copies are out of date
            for copies in self.copies.values():
                copies[:] = [copy for copy in copies if copy.form == "torch"] or copies

    def _native(self, i: int, op: PlannedOp) -> bool:
        if op.dtype != "float32" or 0 in op.output_shape or any(0 in s for s in op.input_shapes):
            return False
        if any(self.dtypes[value] != "float32" for value in op.inputs):
            return False
        if op.layer is not None:
            if op.kernel == "torch":
                return False
            if op.layer.kind == "linear":
                self._linear(i, op, op.layer)
            else:
                self._conv(i, op, op.layer)
            return True
        native = None if op.mutates else recognise(op)
        return native is not None and self._other(i, op, native)

    def _linear(self, i: int, op: PlannedOp, layer: Layer) -> None:
        reads = tuple(self._as_plain(value, i) for value in op.inputs)
        self._add(Step("linear", reads, Copy(i + 1, "plain", op.output_shape), i, layer, op.kernel))

    def _conv(self, i: int, op: PlannedOp, layer: Layer) -> None:
        kind = "depthwise" if layer.kind == "depthwise_conv2d" and op.kernel == "portable" else "conv"
        kernel = (layer.weight.shape[2], layer.weight.shape[3])
        target = self._ahead(i, op, layer)
        if target is None:
            target = self._target(op, kernel, _two(layer.stride), _four(layer.padding), _two(layer.dilation))
        reads = [self._source(op.inputs[0], target, kernel, layer.stride, layer.padding, layer.dilation, i)]
        if op.residual:
            reads.append(self._as_lanes(op.inputs[1], target.blocking, i))
        copy = self._new_lanes(i + 1, target.blocking)
        self._add(Step(kind, tuple(reads), copy, i, layer, op.kernel))

    def _ahead(self, i: int, op: PlannedOp, layer: Layer) -> Layout | None:
        """For a 1x1 convolution that widens and whose only reader strides: the layout that one needs, so that the narrow
        value is rearranged and not the wide one. None where it does not apply or wastes too many tiles."""
        readers = self.readers.get(i + 1, [])
        follower = self.plan.ops[readers[0]] if len(readers) == 1 and readers[0] < len(self.plan.ops) else None
        if follower is None or follower.layer is None or follower.kernel == "torch" or follower.inputs[0] != i + 1:
            return None
        next_ = follower.layer
        widens = layer.weight.shape[2:] == (1, 1) and layer.weight.shape[0] >= 2 * layer.weight.shape[1]
        if next_.kind == "linear" or not widens or max(next_.stride) == 1 or max(layer.stride) > 1:
            return None
        shape, stride = _quad(op.output_shape), _two(next_.stride)
        after = default_layout(*_quad(follower.output_shape), cover=covered(shape[2:], stride))
        kernel = (next_.weight.shape[2], next_.weight.shape[3])
        wanted = conv_source_layout(after, shape, kernel, stride, _four(next_.padding), _two(next_.dilation))
        best = default_layout(*shape)
        return wanted.with_halo((0, 0, 0, 0)) if wanted.tiles <= WORTH_AHEAD * best.tiles else None

    def _target(
        self,
        op: PlannedOp,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> Layout:
        """The layout of the result: that of an existing copy of the input if it is nearly the best, else the best."""
        batch, channels, height, width = _quad(op.output_shape)
        best = default_layout(batch, channels, height, width, covered(_quad(op.input_shapes[0])[2:], stride))
        found = []
        for copy in self.copies[op.inputs[0]]:
            if copy.form != "lanes":
                continue
            images, grid, block = copy.lanes.blocking
            smaller = (block[0] // stride[0], block[1] // stride[1])
            fits = block == (smaller[0] * stride[0], smaller[1] * stride[1])
            if fits and grid[0] * smaller[0] >= height and grid[1] * smaller[1] >= width:
                layout = Layout(batch, channels, height, width, images, grid, smaller)
                wanted = conv_source_layout(layout, _quad(op.input_shapes[0]), kernel, stride, padding, dilation)
                if wanted.blocking == copy.lanes.blocking:
                    found.append(layout)
        near = [layout for layout in found if layout.tiles <= WORTH_RELAYOUT * best.tiles]
        return min(near, key=lambda layout: layout.tiles, default=best)

    def _source(
        self, value: int, target: Layout, kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any, op: int
    ) -> Copy:
        """The input in the blocking a sliding window needs, its halo noted."""
        shape = _quad(self.shapes[value])
        wanted = conv_source_layout(target, shape, kernel, _two(stride), _four(padding), _two(dilation))
        copy = self._as_lanes(value, wanted.blocking, op)
        old = self.halo.get(copy, (0, 0, 0, 0))
        self.halo[copy] = _widest(old, wanted.halo)
        gap = wanted.grid[0] * wanted.block[0] > shape[2] or wanted.grid[1] * wanted.block[1] > shape[3]
        if any(wanted.halo) or (gap and any(padding)):  # pixels beyond the image are read, and must be 0
            self.refreshed.add(copy)
        return copy

    def _other(self, i: int, op: PlannedOp, native: Native) -> bool:
        """An operation that is no layer: in lanes where its inputs are, plain where they are in the arena, else torch."""
        shapes = [self.shapes[value] for value in native.inputs]
        if native.kind == "view":
            return self._view(i, op, native.inputs[0])
        if native.kind == "global_average":
            return self._global(i, op, native)
        if native.kind == "gate":
            if not self._in_lanes(native.inputs[0]):
                return False
            copy = next(copy for copy in self.copies[native.inputs[0]] if copy.form == "lanes")
            gated = (copy, self._as_plain(native.inputs[1], i))
            self._add(Step("gate", gated, self._new_lanes(i + 1, copy.lanes.blocking), i))
            return True
        if all(len(shape) == 4 for shape in shapes) and any(self._in_lanes(value) for value in native.inputs):
            if native.kind in ("max_pool", "avg_pool"):
                return self._pool(i, op, native)
            blocking = self._common_blocking(native.inputs)
            reads = tuple(self._as_lanes(value, blocking, i) for value in native.inputs)
            kind = "concat" if native.kind == "concat" else native.kind
            self._add(Step(kind, reads, self._new_lanes(i + 1, blocking), i, parameters=native.parameters))
            return True
        plain = all(self._find(value, "plain") is not None for value in native.inputs)
        if plain and native.kind in ("activate", "add") and all(shape == op.output_shape for shape in shapes):
            reads = tuple(self._as_plain(value, i) for value in native.inputs)
            step = Step(f"plain_{native.kind}", reads, Copy(i + 1, "plain", op.output_shape), i)
            self._add(replace(step, parameters=native.parameters))
            return True
        return False

    def _common_blocking(self, values: tuple[int, ...]) -> Blocking:
        """The blocking most of the values already have; ties prefer fewer tiles."""
        votes: dict[Blocking, int] = {}
        tiles: dict[Blocking, int] = {}
        for value in values:
            for copy in self.copies[value]:
                if copy.form == "lanes":
                    votes[copy.lanes.blocking] = votes.get(copy.lanes.blocking, 0) + 1
                    tiles[copy.lanes.blocking] = copy.lanes.tiles
        return min(votes, key=lambda blocking: (-votes[blocking], tiles[blocking]))

    def _pool(self, i: int, op: PlannedOp, native: Native) -> bool:
        given = native.parameters
        (kh, kw), (ph, pw) = given["kernel_size"], given["padding"]
        dilation = given.get("dilation", (1, 1))
        padding = (ph, ph, pw, pw)
        target = self._target(op, (kh, kw), given["stride"], padding, dilation)
        source = self._source(native.inputs[0], target, (kh, kw), given["stride"], padding, dilation, i)
        self._add(Step(native.kind, (source,), self._new_lanes(i + 1, target.blocking), i, parameters=given))
        return True

    def _global(self, i: int, op: PlannedOp, native: Native) -> bool:
        lanes = self._find(native.inputs[0], "lanes")
        if lanes is None:
            return False
        self._add(Step("global_average", (lanes,), Copy(i + 1, "plain", op.output_shape), i))
        return True

    def _view(self, i: int, op: PlannedOp, value: int) -> bool:
        if self.mutates or math.prod(op.output_shape) != math.prod(self.shapes[value]):
            return False
        if self._find(value, "plain") is None and not self._in_lanes(value):
            return False
        source = self._as_plain(value, i)
        if source.form != "plain":
            return False
        self.copies[i + 1].append(Copy(i + 1, "plain", op.output_shape, base=(source, 0)))
        return True


# --- 2. and 3. halos and concatenations ----------------------------------------------------------------------------------


def _share_concatenations(builder: _Builder) -> None:
    """Write the inputs of a concatenation where they are concatenated; halos become equal."""
    for step in builder.steps:
        if step.kind != "concat" or step.writes is None:
            continue
        whole, first = step.writes, 0
        for part in step.reads:
            channels = part.shape[1]
            again = sum(other is part for other in step.reads) > 1
            if part.base is None and not again and not _has_parts(builder, part):
                part.base = (whole, first)
                builder.halo[whole] = _widest(builder.halo.get(whole, (0,) * 4), builder.halo.get(part, (0,) * 4))
            first += channels


def _has_parts(builder: _Builder, copy: Copy) -> bool:
    copies = (copy for step in builder.steps for copy in (*step.reads, step.writes))
    return any(c is not None and c.base is not None and c.base[0] is copy for c in copies)


def _with_halos(builder: _Builder) -> list[Step]:
    """Final layouts, and a refresh after every writer of a copy whose halo is read."""
    for copy in {copy for step in builder.steps for copy in (*step.reads, step.writes)}:
        if copy is not None and copy.form == "lanes":
            halo = builder.halo.get(copy.root, (0, 0, 0, 0))
            copy.layout = replace(copy.lanes, halo=halo, pitch=copy.root.lanes.pitch)
    steps: list[Step] = []
    for step in builder.steps:
        steps += _copies(step) if step.kind == "concat" else [step]
        if step.writes is not None and step.writes in builder.refreshed:
            steps.append(Step("halo", (step.writes,), step.writes, step.op))
    return steps


def _copies(step: Step) -> list[Step]:
    """A concatenation's inputs that were not written in place, copied there."""
    assert step.writes is not None
    copies, first = [], 0
    for part in step.reads:
        channels = part.shape[1]
        if part.base != (step.writes, first):
            layout = step.writes.lanes.with_channels(channels, step.writes.lanes.pitch)
            place = Copy(step.writes.value, "lanes", part.shape, layout, (step.writes, first))
            copies.append(Step("copy", (part,), place, step.op))
        first += channels
    return copies


# --- 4. memory -----------------------------------------------------------------------------------------------------------


def _placed(steps: list[Step]) -> int:
    """Give every copy in the arena its offset; returns the arena's bytes."""
    born: dict[Copy, int] = {}
    dies: dict[Copy, int] = {}
    for i, step in enumerate(steps):
        for copy in (*step.reads, *((step.writes,) if step.writes is not None else ())):
            if copy.form != "torch":
                born.setdefault(copy.root, i)
                dies[copy.root] = i
    roots = list(born)
    offsets, size = allocate([Interval(born[root], dies[root], root.nbytes + GUARD) for root in roots])
    for root, offset in zip(roots, offsets):
        root.offset = offset + GUARD
    return size + 2 * GUARD


def _widest(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int]:
    return _four([max(pair) for pair in zip(a, b)])


def _refs(template: Any) -> Iterator[int]:
    if isinstance(template, Ref):
        yield template.index
    elif isinstance(template, dict):
        yield from _refs(list(template.values()))
    elif isinstance(template, tuple | list):
        for part in template:
            yield from _refs(part)


def _two(numbers: Any) -> tuple[int, int]:
    a, b = numbers
    return int(a), int(b)


def _four(numbers: Any) -> tuple[int, int, int, int]:
    a, b, c, d = numbers
    return int(a), int(b), int(c), int(d)


_quad = _four
