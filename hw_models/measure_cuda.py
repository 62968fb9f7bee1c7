"""Times on a CUDA device, by the protocol of `hw_models.measure`: interleaved rounds, a low percentile of each, their minimum.

What differs from the CPU: calls only queue work, so blocks are bracketed by device events and a round waits for the device once,
at its end. Two times are told apart, because they answer different questions:

- eager: calls as Python makes them. Short kernels wait for the CPU that launches them, and that time is counted.
- graph: the same calls captured once and replayed. A graph of a call shorter than `SHORT_MS` holds many, so that what is timed is
  the device's work and not the start of a graph.

Networks whose eager time is mostly launching are additive in neither; and only times of one measuring run may be compared. Clocks
are recorded, not locked. No CUDA device is needed until something is measured (`hw_models.cuda_backend`).

Start with `CudaMeasurer().measure_both({"name": callable})`; with `measure` it stands in for a `Measurer`.

Source: events around repeats, 25 ms of warm-up and a flushed L2 cache between cold repeats are Triton's `testing.do_bench`; the
rounds are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hw_models.cuda_backend import Conditions, CudaBackend, TorchCuda
from hw_models.measure import ROUND_MS, Measurement, MeasurementError, Measurer, _Item

__all__ = ["CudaMeasurer", "CudaReport", "CudaTimes"]

SHORT_MS = 0.05  # a graph of one call shorter than this would time its own start
GRAPH_MS = 2.0  # ... so that it holds calls for about this long
MOST_CALLS = 1000  # in a graph, and in a block
WARM_BLOCKS = 50  # a call that queues nothing warms up no longer than this
MODES = ("eager", "graph")


@dataclass(frozen=True)
class CudaTimes:
    """The two times of one callable, from one measuring run.

    Attributes:
        eager: with Python launching every kernel.
        graph: replayed from a captured graph; None if it cannot be captured.
        no_graph: why not; "" if it can.
    """

    eager: Measurement
    graph: Measurement | None
    no_graph: str = ""

    @property
    def launch_share(self) -> float:
        """The part of the eager time that a graph saves, in [0, 1): the device waiting to be told. NaN without a graph."""
        if self.graph is None:
            return math.nan
        return max(0.0, 1 - self.graph.floor_ms / self.eager.floor_ms)


@dataclass(frozen=True)
class CudaReport:
    """One measuring run.

    Attributes:
        times: by name, in the order given.
        conditions: clocks and what held them down.
        runtime: device and versions that the times hold for, as `hw_models.device.runtime_id` says it for the CPU.
        cold: whether the L2 cache was flushed before each call.
    """

    times: dict[str, CudaTimes]
    conditions: Conditions
    runtime: str
    cold: bool


class _Replay:
    """A captured graph of several calls, as one callable."""

    def __init__(self, replay: Callable[[], object], copies: int) -> None:
        self.replay, self.copies = replay, copies

    def __call__(self) -> None:
        self.replay()


@dataclass(frozen=True)
class CudaMeasurer(Measurer):
    """Settings of a measuring run on a CUDA device; those of `Measurer`, and:

    Attributes:
        spacing_s: shorter than on a CPU, because nobody else is expected to use the device.
        mode: what `measure` gives, "eager" or "graph".
        cold: flush the L2 cache before every call, each then between events of its own. Otherwise calls are hot.
        launches: calls between two events, at least, but for those of 5 ms and more; of a cold call, repeats in a block.
        warm_ms: device time of calls before anything is timed.
        backend: the device; tests bring another. Default: torch's current CUDA device.
    """

    spacing_s: float = 0.05
    mode: str = "eager"
    cold: bool = False
    launches: int = 10
    warm_ms: float = 25.0
    backend: CudaBackend | None = field(default=None, repr=False)
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES or self.launches < 1 or not self.warm_ms >= 0:
            raise ValueError(
                'CudaMeasurer needs mode "eager" or "graph", launches >= 1 and warm_ms >= 0, got '
                f'mode="{self.mode}", launches={self.launches}, warm_ms={self.warm_ms}'
            )

    @property
    def device(self) -> CudaBackend:
        """The backend in use.

        Raises:
            MeasurementError: there is no CUDA device.
        """
        if "backend" not in self._state:
            self._state["backend"] = self.backend if self.backend is not None else TorchCuda()
        backend: CudaBackend = self._state["backend"]
        return backend

    def quick(self) -> CudaMeasurer:
        """As `Measurer.quick`."""
        return replace(self, rounds=3, spacing_s=0.01, blocks=5, min_block_ms=0.4, cap_rounds=6)

    def measure(
        self,
        items: Mapping[str, Callable[[], object]],
        after_round: Mapping[str, Callable[[int], None]] | None = None,
    ) -> dict[str, Measurement]:
        """Time callables against each other, all eager or all from graphs, as `mode` says.

        Args:
            items: functions of no argument that queue work on the current stream of the device, the same every time.
            after_round: as for `Measurer.measure`.

        Returns:
            A measurement for each, in the order given.

        Raises:
            MeasurementError: one of them raised, or cannot be captured where graphs were asked for; it is named and the cause
                attached. Or there is no CUDA device.
        """
        self._state["seen"] = []
        self.device.synchronize()
        calls = items if self.mode == "eager" else {name: self._captured(name, call) for name, call in items.items()}
        return super().measure(calls, after_round)

    def measure_both(self, items: Mapping[str, Callable[[], object]]) -> CudaReport:
        """Time callables eager and from graphs, all in one interleaved measuring run; `mode` does not matter.

        What cannot be captured, because it reads values back or allocates by them, gets its eager time and the reason.

        Args:
            items: as for `measure`.

        Raises:
            MeasurementError: as for `measure`, except for captures.
        """
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        reasons: dict[str, str] = {}
        for name, call in items.items():
            calls[name, "eager"] = call
            self._warm_up(name, call)  # first, so that an error of its own is not taken for one of capturing
            try:
                calls[name, "graph"] = self._captured(name, call)
            except MeasurementError as error:
                reasons[name] = f"{type(error.__cause__).__name__}: {error.__cause__}"
        run = replace(self, mode="eager", backend=self.device)
        found = run.measure({f"{name} ({how})": call for (name, how), call in calls.items()})
        self._state["seen"] = run._state["seen"]
        times = {
            name: CudaTimes(found[f"{name} (eager)"], found.get(f"{name} (graph)"), reasons.get(name, ""))
            for name in items
        }
        return CudaReport(times, self.conditions(), self.device.runtime(), self.cold)

    def conditions(self) -> Conditions:
        """Clocks and what held them down over the last measuring run; no samples where the device cannot be asked."""
        return Conditions.over(self._state.get("seen", []))

    # --- graphs ---

    def _captured(self, name: str, call: Callable[[], object]) -> _Replay:
        """A graph of one call, or of as many as last `GRAPH_MS` if it is short; always of one if it is to be cold."""
        self._warm_up(name, call)
        try:
            graph = _Replay(self.device.capture(call, 1), 1)
            if self.cold:
                return graph
            item = _Item(name, graph)
            per_call = min(self._timed(item, self.launches) for _ in range(2))
            if per_call >= SHORT_MS:
                return graph
            copies = min(MOST_CALLS, max(self.launches, math.ceil(GRAPH_MS / max(per_call, 1e-6))))
            return _Replay(self.device.capture(call, copies), copies)
        except MeasurementError:
            raise
        except Exception as error:
            raise MeasurementError(
                f'capturing "{name}" as a CUDA graph raised {type(error).__name__}: {error}; what reads values back from the '
                "device, or allocates by them, cannot be captured: measure it eager"
            ) from error

    # --- blocks: queued, waited for, read ---

    def _queue(self, item: _Item, calls: int) -> list[tuple[Any, Any]]:
        """Queue a block; pairs of events around it, or, when cold, around each call."""
        device, call = self.device, item.call
        repeats, together = (calls, 1) if self.cold else (1, calls)
        pairs = []
        try:
            for _ in range(repeats):
                if self.cold:
                    device.flush_l2()
                start = device.record()
                for _ in range(together):
                    call()
                pairs.append((start, device.record()))
        except Exception as error:
            raise _failed(item, error) from error
        return pairs

    def _wait(self, item: _Item) -> None:
        try:
            self.device.synchronize()
        except Exception as error:  # errors of kernels come out here
            raise _failed(item, error) from error

    def _elapsed(self, item: _Item, pairs: list[tuple[Any, Any]], calls: int) -> float:
        """ms per call of a block that the device has finished."""
        return sum(self.device.elapsed_ms(*pair) for pair in pairs) / (calls * _copies(item.call))

    def _timed(self, item: _Item, calls: int) -> float:
        """ms per call of one block, waited for."""
        pairs = self._queue(item, calls)
        self._wait(item)
        return self._elapsed(item, pairs, calls)

    # --- what `Measurer.measure` asks for ---

    def _warm_up(self, name: str, call: Callable[[], object]) -> None:
        """Compile, then call for `warm_ms`, hot."""
        item, hot = _Item(name, call), replace(self, cold=False, backend=self.device)
        hot._timed(item, 1)
        spent, calls = 0.0, 1
        for _ in range(WARM_BLOCKS):
            if spent >= self.warm_ms:
                break
            spent += hot._timed(item, calls) * calls * _copies(call)
            calls = min(2 * calls, MOST_CALLS)

    def _warm(self, item: _Item) -> None:
        self._warm_up(item.name, item.call)
        copies = _copies(item.call)
        queued_ms = max(min(self._timed(item, self.launches) for _ in range(3)) * copies, 1e-6)  # of one item.call()
        least = 1 if copies > 1 else self.launches  # a graph of many calls is enough by itself
        wanted = least if self.cold else max(least, math.ceil(self.min_block_ms / queued_ms))
        item.calls = max(1, min(wanted, MOST_CALLS, int(ROUND_MS / 4 / queued_ms)))
        item.blocks = max(1, min(self.blocks, int(ROUND_MS / (queued_ms * item.calls))))

    def _round(self, item: _Item) -> None:
        """Queue all blocks, then wait once. The first is not counted: the device wakes up and the queue fills."""
        queued = [self._queue(item, item.calls) for _ in range(1 + item.blocks)]
        sample = self.device.sample()  # while it works
        self._wait(item)
        if sample is not None:
            self._state["seen"].append(sample)
        blocks = [self._elapsed(item, pairs, item.calls) for pairs in queued[1:]]
        item.rounds.append(float(np.percentile(blocks, self.percentile)))
        item.all_blocks += blocks
        item.ended_ms = self.clock_ns() / 1e6


def _copies(call: Callable[[], object]) -> int:
    """How many calls of the measured function one call makes."""
    return call.copies if isinstance(call, _Replay) else 1


def _failed(item: _Item, error: Exception) -> MeasurementError:
    return MeasurementError(f'measuring "{item.name}": the call raised {type(error).__name__}: {error}')
