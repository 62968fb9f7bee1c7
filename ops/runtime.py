"""Run a plan: `Runtime(plan)(x)` gives what the masked network gives in eval mode, without autograd.

The plan is scheduled (`ops.schedule`), weights are packed (`ops.prepare`), and runs of compiled steps become programs; what has no
kernel runs through torch in between. The result is a new tensor every time, and the same bits for the same input. A runtime
may be called from several threads at once: each call gets working memory of its own, the packed weights are shared.

Start with `Runtime`. `Runtime.step_calls(x)` gives one callable per step, so that each can be timed alone;
`Runtime.timed_call(x)` times every step where it stands.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ops.plan import Plan
from ops.schedule import Copy, Schedule, Step, schedule
from ops.torch_calls import fill, torch_call

if TYPE_CHECKING:
    from ops.kernels.step import KernelStep

__all__ = ["CONVERSIONS", "InputError", "Runtime"]

# Steps that change the form of a value and compute nothing.
CONVERSIONS = ("to_lanes", "from_lanes", "relayout", "fetch")

Tensors = dict[Copy, torch.Tensor]
Prepared = dict[Step, "KernelStep"]


class InputError(ValueError):
    """An input the plan was not made for."""


class Runtime:
    """An executable plan.

    Args:
        plan: made by `ops.plan.lower` on real (not meta) weights. Weights are packed and kernels compiled here; a kernel of a
            kind that was never used on this machine takes some seconds, a new network of known kinds none.
        threads: of the compiled kernels; torch has its own setting.
        progress: called as progress(done, total, name of the operation) while packing.

    Attributes:
        schedule: the executed steps.
        nbytes: of packed weights and tables.
        arena_nbytes: of working memory per concurrent call.

    Raises:
        ValueError: the plan's weights are on the meta device.
    """

    def __init__(self, plan: Plan, threads: int = 1, progress: Callable[[int, int, str], None] | None = None) -> None:
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be a whole number of at least 1, got {threads!r}")
        for op in plan.ops:
            if op.layer is not None and op.layer.weight.is_meta:
                raise ValueError(
                    f"{op.name}: the weights are on the meta device; only a network with real weights can run"
                )
        self.plan = plan
        self.threads = threads
        self.schedule = schedule(plan)
        self._dtype = getattr(torch, plan.dtype)
        self._prepared = _prepare(self.schedule, progress)
        self._idle: list[_Instance] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self._prepared.values())

    @property
    def arena_nbytes(self) -> int:
        return self.schedule.arena + 4 * _scratch(self._prepared)

    def __call__(self, x: torch.Tensor) -> Any:
        """Run the network.

        Args:
            x: a CPU tensor of the plan's input shape and type.

        Returns:
            What the network returns: a tensor, or the same structure of tensors; new memory each time.

        Raises:
            InputError: another shape, type or device.
            TypeError: no tensor.
        """
        x = self._checked(x)
        with self._lock:
            instance = self._idle.pop() if self._idle else None
        if instance is None:
            instance = _Instance(self.schedule, self._prepared, self.threads)
        result = instance.run(x)
        with self._lock:
            self._idle.append(instance)
        return result

    def step_calls(self, x: torch.Tensor) -> list[tuple[Step, Callable[[], None]]]:
        """Each executed step with a callable that runs it alone, in memory as it is after the network ran on x. Values whose
        memory was used again are overwritten, so times mean something and results do not."""
        instance = _Instance(self.schedule, self._prepared, self.threads, alone=True)
        instance.run(self._checked(x), keep=True)
        return [(step, _alone(call, instance)) for step, call in zip(self.schedule.steps, instance.calls)]

    def timed_call(self, x: torch.Tensor) -> Callable[[], npt.NDArray[np.int64]]:
        """A function that runs the whole network on x and returns the nanoseconds of each of the schedule's steps, in order.

        Every step is timed in its place, with the caches as they are there. The array is the same every time. What happens
        between the steps (Python, memory for results) is in none of them. It has working memory of its own.
        """
        x = self._checked(x)
        times = np.zeros(len(self.schedule.steps), np.int64)
        instance = _Instance(self.schedule, self._prepared, self.threads, times=times)

        def run() -> npt.NDArray[np.int64]:
            instance.run(x)
            return times

        return run

    def calls(self, x: torch.Tensor) -> list[Callable[[], None]]:
        """One callable per operation of the plan, in order, that runs the steps of this operation alone, without the
        conversions of values from one layout to another; see `step_calls`."""
        of_op: list[list[Callable[[], None]]] = [[] for _ in self.plan.ops]
        for step, call in self.step_calls(x):
            if step.kind not in CONVERSIONS:
                of_op[step.op].append(call)
        return [_all(calls) for calls in of_op]

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the runtime takes a torch tensor, got {type(x).__name__}; torch.as_tensor(x) makes one")
        if x.shape != plan.input_shape or x.dtype != self._dtype or x.device.type != "cpu":
            found = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
            raise InputError(
                f"the plan was made for an input {plan.dtype}{list(plan.input_shape)} on the CPU, got {found}; convert it, or "
                "lower the network again with an example of that shape"
            )
        return x.detach() if x.requires_grad else x


def _alone(call: Callable[[], None], instance: _Instance) -> Callable[[], None]:
    """The call outside a run; it keeps the memory it works in alive."""

    def run(keep: _Instance = instance) -> None:
        with torch.inference_mode():
            call()

    return run


def _clocked(call: Callable[[], None], times: npt.NDArray[np.int64], i: int) -> Callable[[], None]:
    now = time.perf_counter_ns

    def run() -> None:
        start = now()
        call()
        times[i] = now() - start

    return run


def _all(calls: list[Callable[[], None]]) -> Callable[[], None]:
    if len(calls) == 1:
        return calls[0]

    def run() -> None:
        for call in calls:
            call()

    return run


def _compiled(step: Step) -> bool:
    return step.kind not in ("torch", "fetch")


def _prepare(plan: Schedule, progress: Callable[[int, int, str], None] | None) -> Prepared:
    steps = [step for step in plan.steps if _compiled(step)]
    if not steps:
        return {}
    from ops.prepare import prepare  # late: importing it loads Numba

    prepared = {}
    for i, step in enumerate(steps):
        if progress is not None:
            progress(i, len(steps), plan.plan.ops[min(step.op, len(plan.plan.ops) - 1)].name)
        prepared[step] = prepare(step)
    if progress is not None:
        progress(len(steps), len(steps), "")
    return prepared


def _scratch(prepared: Prepared) -> int:
    """Floats of working memory that the most demanding step needs."""
    return max((step.scratch for step in prepared.values()), default=0)


@dataclass
class _Segment:
    """Compiled steps in a row, and where the addresses of torch's tensors go before each run.

    `first` is the number of the first step.
    """

    first: int = 0
    bound: list[tuple[Any, npt.NDArray[np.int64]]] = field(default_factory=list)
    reads: list[tuple[npt.NDArray[np.int64], int, Copy]] = field(default_factory=list)
    writes: list[tuple[npt.NDArray[np.int64], int, Copy]] = field(default_factory=list)


class _Instance:
    """Working memory and bound steps for one call at a time."""

    def __init__(
        self,
        plan: Schedule,
        prepared: Prepared,
        threads: int,
        alone: bool = False,
        times: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._schedule = plan
        self._times = times
        self._threads = threads
        size = plan.arena + 4 * _scratch(prepared) + 128
        self._arena = np.zeros(size, np.uint8)
        self._base = self._arena.ctypes.data + -self._arena.ctypes.data % 64
        self._scratch = self._base + plan.arena + -plan.arena % 64
        self._tensors: Tensors = {}
        self._constants = _holds_tensors(plan.plan.output)
        self._handed_out = _made_for_the_caller(plan)
        self.calls: list[Callable[[], None]] = []
        self._reads: list[list[Copy]] = []  # torch tensors each call reads or makes
        segment = _Segment()
        for i, step in enumerate(plan.steps):
            if _compiled(step):
                self._bind(step, prepared[step], segment)
                if not alone:
                    continue
            if segment.bound:
                self.calls.append(self._program(segment))
            segment = _Segment(first=i + 1)
            if not _compiled(step):
                call = self._torch(step) if step.kind == "torch" else self._fetch(step)
                self.calls.append(call if times is None else _clocked(call, times, i))
                self._reads.append([c for c in (*step.reads, step.writes) if c is not None and c.form == "torch"])
        if segment.bound:
            self.calls.append(self._program(segment))
        self._output = fill(plan.plan.output)
        self._mutates = any(op.mutates for op in plan.plan.ops)
        self._dead = _last_readers(self._reads, plan)

    def run(self, x: torch.Tensor, keep: bool = False) -> Any:
        tensors = self._tensors
        # what an operation changes in place may be a view of the input, which is the caller's
        tensors[self._schedule.input] = x.clone() if self._mutates else x
        with torch.inference_mode():
            for call, dead in zip(self.calls, self._dead):
                call()
                if not keep:
                    for copy in dead:
                        del tensors[copy]
        values = {
            value: tensors[copy] if copy in self._handed_out else tensors[copy].clone()
            for value, copy in self._schedule.outputs.items()
        }
        result = self._output(values)
        if self._constants:  # the network returns tensors of its own
            result = _copied(result)
        if not keep:
            tensors.clear()
        return result

    def _bind(self, step: Step, kernel: KernelStep, segment: _Segment) -> None:
        inputs = [0 if copy.form == "torch" else self._base + copy.address for copy in step.reads]
        assert step.writes is not None
        output = 0 if step.writes.form == "torch" else self._base + step.writes.address
        if step.kind == "halo":
            inputs = inputs[: len(kernel.input_slots)]
        descriptor = kernel.bind(inputs, output, self._scratch)
        segment.bound.append((kernel, descriptor))
        for copy, slot in zip(step.reads, kernel.input_slots):
            if copy.form == "torch":
                segment.reads.append((descriptor, slot, copy))
        if step.writes.form == "torch":
            segment.writes.append((descriptor, kernel.output_slot, step.writes))

    def _program(self, segment: _Segment) -> Callable[[], None]:
        program, tensors = self._compiled_run(segment), self._tensors
        reads, writes = segment.reads, segment.writes
        self._reads.append([copy for _, _, copy in (*reads, *writes)])

        def run() -> None:
            held = []
            for descriptor, slot, copy in reads:
                tensor = tensors[copy].contiguous()
                held.append(tensor)
                descriptor[slot] = tensor.data_ptr()
            for descriptor, slot, copy in writes:
                if copy in self._handed_out:  # an ordinary tensor that nothing else will share
                    with torch.inference_mode(False):
                        tensor = torch.empty(copy.shape, dtype=torch.float32, device="cpu")
                else:
                    tensor = torch.empty(copy.shape, dtype=torch.float32, device="cpu")
                tensors[copy] = tensor
                descriptor[slot] = tensor.data_ptr()
            program()

        return run

    def _compiled_run(self, segment: _Segment) -> Callable[[], None]:
        if self._times is None:
            from ops.kernels.program import Program

            return Program(segment.bound, self._threads)
        from ops.kernels.timing import TimedProgram

        times = self._times[segment.first : segment.first + len(segment.bound)]
        return TimedProgram(segment.bound, self._threads, times)

    def _fetch(self, step: Step) -> Callable[[], None]:
        (source,), target, tensors = step.reads, step.writes, self._tensors
        assert target is not None
        start = self._base - self._arena.ctypes.data + source.address
        memory = self._arena[start : start + 4 * math.prod(source.shape)].view(np.float32)
        view = torch.from_numpy(memory).view(source.shape)

        def run() -> None:
            tensors[target] = view.clone()

        return run

    def _torch(self, step: Step) -> Callable[[], None]:
        op, tensors, target = self._schedule.plan.ops[step.op], self._tensors, step.writes
        assert target is not None
        call = torch_call(op)
        places = dict(zip(op.inputs, step.reads))
        if len(step.reads) == 1:
            ((value, copy),) = places.items()

            def one() -> None:
                tensors[target] = call({value: tensors[copy]})

            return one

        def run() -> None:
            tensors[target] = call({value: tensors[copy] for value, copy in places.items()})

        return run


def _last_readers(reads: list[list[Copy]], plan: Schedule) -> list[list[Copy]]:
    """For each call, the torch tensors nobody needs after it."""
    last = {copy: i for i, copies in enumerate(reads) for copy in copies}
    kept = {plan.input, *plan.outputs.values()}
    dead: list[list[Copy]] = [[] for _ in reads]
    for copy, i in last.items():
        if copy not in kept:
            dead[i].append(copy)
    return dead


def _made_for_the_caller(plan: Schedule) -> set[Copy]:
    """Results that a conversion writes to new memory and no operation of torch reads: they need no copy."""
    read = {copy for step in plan.steps if step.kind == "torch" for copy in step.reads}
    made = {step.writes for step in plan.steps if step.kind == "from_lanes"}
    return {copy for copy in plan.outputs.values() if copy in made and copy not in read}


def _holds_tensors(template: Any) -> bool:
    if isinstance(template, dict):
        return _holds_tensors(list(template.values()))
    return isinstance(template, torch.Tensor) or (
        isinstance(template, tuple | list) and any(_holds_tensors(part) for part in template)
    )


def _copied(result: Any) -> Any:
    """Copies of all tensors in a structure."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    if isinstance(result, tuple | list):
        parts = [_copied(part) for part in result]
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(*parts)
        return type(result)(parts)
    if isinstance(result, dict):
        return {name: _copied(part) for name, part in result.items()}
    return result
