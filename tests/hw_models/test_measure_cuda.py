"""Measuring on CUDA, on a device made of a queue and a clock that the test moves; and on a real one where there is one."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hw_models.cuda_backend import Conditions, Sample, TorchCuda
from hw_models.measure import MeasurementError
from hw_models.measure_cuda import CudaMeasurer

LAUNCH_MS, EVENT_MS, GRAPH_LAUNCH_MS, GRAPH_START_MS, FLUSH_MS = 0.010, 0.001, 0.006, 0.004, 0.1


class Event:
    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms


class Device:
    """A queue. The host's time passes while it launches, the device's while it works; waiting brings them together."""

    def __init__(self) -> None:
        self.host_ms = self.free_ms = self.worked_ms = 0.0
        self.graph: list[Callable[[], None]] | None = None  # being captured
        self.hot = False
        self.diary: list[str] = []
        self.failure: Exception | None = None
        self.samples: list[Sample] = []

    # what a measurer is given
    def record(self) -> Event:
        self.host_ms += EVENT_MS
        self.diary.append("event")
        return Event(max(self.host_ms, self.free_ms))

    def elapsed_ms(self, start: Event, end: Event) -> float:
        assert end.at_ms <= self.host_ms, "read before it was waited for"
        return end.at_ms - start.at_ms

    def synchronize(self) -> None:
        assert self.graph is None
        self.diary.append("wait")
        self.host_ms = max(self.host_ms, self.free_ms)
        if self.failure is not None:
            raise self.failure

    def capture(self, call: Callable[[], object], copies: int) -> Callable[[], object]:
        self.graph = []
        try:
            for _ in range(copies):
                call()
            work = self.graph
        finally:
            self.graph = None

        def replay() -> None:
            self.host_ms += GRAPH_LAUNCH_MS
            self.free_ms = max(self.host_ms, self.free_ms) + GRAPH_START_MS
            for job in work:
                job()

        return replay

    def flush_l2(self) -> None:
        self.work("flush", lambda: FLUSH_MS)()
        self.hot = False

    def sample(self) -> Sample | None:
        return self.samples.pop(0) if self.samples else None

    def runtime(self) -> str:
        return "fake/1"

    # what tests make
    def work(self, name: str, ms: Callable[[], float], kernels: int = 1) -> Callable[[], None]:
        def execute() -> None:
            took = ms()
            self.free_ms = max(self.host_ms, self.free_ms) + took
            self.worked_ms += took
            self.hot = True

        def call() -> None:
            self.diary.append(name)
            for _ in range(kernels):
                if self.graph is not None:
                    self.graph.append(execute)
                else:
                    self.host_ms += LAUNCH_MS
                    execute()

        return call

    def kernel(self, name: str, ms: float, kernels: int = 1) -> Callable[[], None]:
        return self.work(name, lambda: ms, kernels)

    def sleep(self, seconds: float) -> None:
        self.host_ms += seconds * 1e3

    def measurer(self, **settings: Any) -> CudaMeasurer:
        return CudaMeasurer(backend=self, clock_ns=lambda: round(self.host_ms * 1e6), sleep=self.sleep, **settings)


@pytest.mark.parametrize("ms", [0.06, 0.2, 1.0, 7.0, 300.0])
def test_work_longer_than_its_launch_takes_the_same_eager_and_as_a_graph(ms: float) -> None:
    device = Device()
    report = device.measurer().measure_both({"a": device.kernel("a", ms)})
    times = report.times["a"]
    assert times.eager.floor_ms == pytest.approx(ms, rel=0.01)
    assert times.graph is not None
    assert times.graph.floor_ms == pytest.approx(ms + GRAPH_START_MS, rel=0.01)
    assert times.eager.quality == times.graph.quality == "ok"
    assert times.launch_share == pytest.approx(0.0, abs=0.01)
    assert (report.runtime, report.cold) == ("fake/1", False)


@pytest.mark.parametrize("kernels", [1, 3, 8])
def test_short_kernels_wait_for_their_launch_when_eager_and_not_in_a_graph(kernels: int) -> None:
    device = Device()
    times = device.measurer().measure_both({"a": device.kernel("a", 0.002, kernels)}).times["a"]
    assert times.eager.floor_ms == pytest.approx(kernels * LAUNCH_MS, rel=0.02)
    assert times.graph is not None
    # the start of a graph is longer than the kernel: it holds many, or this would read 0.006
    assert times.graph.floor_ms == pytest.approx(kernels * 0.002, rel=0.05)
    assert times.launch_share == pytest.approx(0.8, abs=0.02)


def test_each_mode_alone_gives_what_both_give_together() -> None:
    device = Device()
    items = {"a": device.kernel("a", 0.002), "b": device.kernel("b", 0.3)}
    both = device.measurer().measure_both(items).times
    eager, graph = device.measurer().measure(items), device.measurer(mode="graph").measure(items)
    assert list(eager) == list(graph) == list(both) == ["a", "b"]
    for name in items:
        assert eager[name].floor_ms == pytest.approx(both[name].eager.floor_ms, rel=1e-6)
        assert graph[name].floor_ms == pytest.approx(both[name].graph.floor_ms, rel=1e-6)  # type: ignore[union-attr]


def test_hot_and_cold_are_different_times_and_cold_is_flushed_before_every_call() -> None:
    def fresh() -> tuple[Device, Callable[[], None]]:
        device = Device()
        return device, device.work("a", lambda: 0.02 if device.hot else 0.05)

    device, call = fresh()
    hot = device.measurer().measure({"a": call})["a"]
    assert "flush" not in device.diary
    assert hot.floor_ms == pytest.approx(0.02, rel=0.02)

    device, call = fresh()
    cold = device.measurer(cold=True, warm_ms=0).measure_both({"a": call})
    assert cold.cold
    assert cold.times["a"].eager.floor_ms == pytest.approx(0.05)  # not a microsecond of the flush
    assert cold.times["a"].graph is not None
    assert cold.times["a"].graph.floor_ms == pytest.approx(0.05 + GRAPH_START_MS)
    timed = [i for i, what in enumerate(device.diary) if what == "flush"]
    assert all(device.diary[i + 1] == "event" for i in timed)
    assert len(timed) >= 2 * 8 * 10  # eager and graph, rounds, repeats


def test_a_round_waits_once_and_short_calls_come_ten_and_more_between_events() -> None:
    device = Device()
    measurer = device.measurer(spacing_s=0, cap_rounds=8)
    measurer.measure({"a": device.kernel("a", 0.5)})
    # the last eight rounds
    ends = [i for i, what in enumerate(device.diary) if what == "wait"][-9:]
    for start, end in itertools.pairwise(ends):
        work = device.diary[start + 1 : end]
        assert work.count("event") == 2 * (1 + measurer.blocks)
        runs = "".join("|" if what == "event" else "x" for what in work).strip("|").split("||")
        assert {len(run) for run in runs} == {10}


def test_a_block_lasts_its_minimum_and_slow_calls_are_made_few_times() -> None:
    calls = {}
    for ms in (0.02, 1.5, 40.0, 1000.0):
        device = Device()
        found = device.measurer(min_block_ms=2.0).measure({"a": device.kernel("a", ms)})["a"]
        assert found.floor_ms == pytest.approx(ms, rel=0.06)
        calls[ms] = device.diary.count("a")
    assert calls[0.02] >= 8 * 10 * 100
    assert calls[40.0] <= 8 * 6 + 60
    assert calls[1000.0] <= 8 * 2 + 60


def test_nothing_is_timed_before_the_device_is_warm() -> None:
    device = Device()
    # the first call compiles, and clocks rise over the first 20 ms of work
    call = device.work("a", lambda: 500.0 if device.worked_ms == 0 else 0.3 if device.worked_ms < 520 else 0.1)
    found = device.measurer().measure({"a": call})["a"]
    assert found.floor_ms == pytest.approx(0.1, rel=0.03)
    assert found.p90_ms == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("warm_ms", [0.0, 25.0, 500.0])
def test_warming_up_is_work_of_the_given_time_and_never_cold(warm_ms: float) -> None:
    worked, flushes = {}, {}
    for cold in (False, True):
        device = Device()
        seen: list[float] = []
        device.sample = lambda: seen.append(device.worked_ms)  # type: ignore[method-assign]  # noqa: B023
        device.measurer(warm_ms=warm_ms, cold=cold).measure({"a": device.kernel("a", 0.2)})
        worked[cold], flushes[cold] = seen[0], device.diary.count("flush")
    # what is worked before the first round has ended: the warm-up, finding the size of a block, the round
    own_ms = 0.2 * (1 + 3 * 10 + 11 * 10)
    assert warm_ms + own_ms - 1e-6 <= worked[False] <= 2.5 * warm_ms + own_ms + 0.2
    assert flushes == {False: 0, True: 3 * 10 + 8 * 11 * 10}


def test_the_first_block_of_a_round_is_not_counted() -> None:
    device = Device()
    call = device.work("a", lambda: 5.0 if device.host_ms > device.free_ms else 0.1)  # slow when it was idle
    found = device.measurer(blocks=1).measure({"a": call})["a"]
    assert found.p90_ms == pytest.approx(0.1)


def test_a_call_that_queues_nothing_ends() -> None:
    device = Device()
    found = device.measurer(spacing_s=0, rounds=3).measure({"nothing": lambda: None})["nothing"]
    assert found.floor_ms < 0.001


def test_the_floor_ignores_disturbed_rounds_and_quality_says_if_it_was_reached() -> None:
    device = Device()
    call = device.work("a", lambda: 0.5 if int(device.host_ms / 200) % 3 == 0 else 1.0)
    found = device.measurer(spacing_s=0.2).measure({"a": call})["a"]
    assert found.floor_ms == pytest.approx(0.5, rel=0.01)
    assert found.quality == "ok"
    assert found.p90_ms > 0.9
    device = Device()
    call = device.work("a", lambda: 0.5 + device.host_ms / 1e4)  # ever slower
    assert device.measurer(cap_rounds=9).measure({"a": call})["a"].quality in ("thin", "unreached")


def test_items_are_interleaved_and_told_to_progress() -> None:
    device = Device()
    seen: list[str] = []
    measurer = device.measurer(progress=lambda done, total, name: seen.append(name), rounds=4, cap_rounds=4)
    measurer.measure({name: device.kernel(name, 0.1) for name in "abc"})
    assert [sorted(seen[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4


def reading_back(device: Device) -> Callable[[], None]:
    kernel = device.kernel("a", 0.1)

    def call() -> None:
        if device.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        kernel()

    return call


def test_what_cannot_be_captured_has_an_eager_time_and_a_reason() -> None:
    device = Device()
    report = device.measurer().measure_both({"reads": reading_back(device), "plain": device.kernel("b", 0.1)})
    reads, plain = report.times["reads"], report.times["plain"]
    assert reads.eager.floor_ms == pytest.approx(0.1, rel=0.02)
    assert reads.graph is None
    assert reads.no_graph == "RuntimeError: operation not permitted when stream is capturing"
    assert math.isnan(reads.launch_share)
    assert (plain.no_graph, plain.graph is None) == ("", False)
    with pytest.raises(
        MeasurementError, match=r'capturing "reads" as a CUDA graph raised RuntimeError: .* eager'
    ) as error:
        device.measurer(mode="graph").measure({"reads": reading_back(device)})
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize("method", ["measure", "measure_both"])
def test_a_call_that_raises_is_named_and_so_is_one_whose_kernel_does(method: str) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(MeasurementError, match='"layer7": the call raised ZeroDivisionError: by nothing'):
        getattr(Device().measurer(), method)({"layer7": broken})

    device = Device()

    def illegal() -> None:
        device.failure = RuntimeError("an illegal memory access was encountered")

    with pytest.raises(MeasurementError, match='"layer8": the call raised RuntimeError: an illegal memory access'):
        getattr(device.measurer(), method)({"layer8": illegal})


def test_conditions_span_the_rounds_and_name_what_held_the_clocks_down() -> None:
    device = Device()
    device.samples = [
        Sample(1980, 2600, 40, 300, 0),
        Sample(1700, 2600, 60, 700, 0x4),
        Sample(1800, 2500, 55, 650, 0x4 | 0x20),
        Sample(1980, 2600, 50, 500, 0x1),  # idle holds nothing down
    ]
    report = device.measurer().measure_both({"a": device.kernel("a", 0.1)})
    seen = report.conditions
    assert seen == Conditions(
        4,
        (1700, 1980),
        (2500, 2600),
        (40, 60),
        (300, 700),
        {"software power cap": 0.5, "software thermal slowdown": 0.25},
    )
    measurer = device.measurer()
    measurer.measure({"a": device.kernel("a", 0.1)})
    assert measurer.conditions() == Conditions(0, None, None, None, None, {})


@pytest.mark.parametrize("settings", [{"mode": "both"}, {"launches": 0}, {"warm_ms": -1}, {"rounds": 0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Measurer needs"):
        CudaMeasurer(**settings)


def test_quick_is_the_same_with_less() -> None:
    device = Device()
    quick = device.measurer(mode="graph", cold=True).quick()
    assert (quick.mode, quick.cold, quick.backend) == ("graph", True, device)
    assert quick.measure({"a": device.kernel("a", 0.1)})["a"].floor_ms == pytest.approx(0.1 + GRAPH_START_MS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_without_a_device_nothing_fails_until_something_is_measured() -> None:
    measurer = CudaMeasurer()
    with pytest.raises(MeasurementError, match=r"needs a CUDA device; torch .* sees none on this machine"):
        measurer.measure({"a": lambda: None})


# --- torch's backend, without a device: that it asks torch and NVML for the right things ---


class Stream:
    def __init__(self, name: str, diary: list[str]) -> None:
        self.name, self.diary = name, diary

    def wait_stream(self, other: "Stream") -> None:
        self.diary.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda as on a machine with one device, as far as `TorchCuda` uses it."""
    diary: list[str] = []
    current = [Stream("main", diary)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream
        yield
        current[0] = before

    @contextmanager
    def graph(made: Any) -> Iterator[None]:
        current[0] = Stream("capture", diary)
        diary.append("capture")
        yield  # an error leaves the stream as it is, as a failing end of a capture does
        current[0] = made.before

    def new_graph() -> Any:
        return SimpleNamespace(before=current[0], replay=lambda: diary.append("replay"))

    properties = SimpleNamespace(name="NVIDIA X-1", major=9, minor=0, L2_cache_size=2**20, uuid="1234")
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "current_stream": lambda device=None: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "Stream": lambda device: Stream("side", diary),
        "stream": on,
        "synchronize": lambda device: diary.append("synchronize"),
        "CUDAGraph": new_graph,
        "graph": graph,
        "device": lambda device: on(current[0]),
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return diary


def test_torch_captures_after_a_call_on_a_side_stream_and_replays(torch_cuda: list[str]) -> None:
    backend = TorchCuda()
    replay = backend.capture(lambda: torch_cuda.append(f"call on {torch.cuda.current_stream().name}"), 2)  # type: ignore[attr-defined]
    replay()
    assert torch_cuda == [
        "side waits for main",
        "call on side",
        "main waits for side",
        "synchronize",
        "capture",
        "call on capture",
        "call on capture",
        "replay",
    ]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(torch_cuda: list[str]) -> None:
    backend, before = TorchCuda(), torch.cuda.current_stream()

    def call() -> None:
        if torch.cuda.current_stream().name == "capture":  # type: ignore[attr-defined]
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        backend.capture(call, 1)
    assert torch.cuda.current_stream() is before


class NVMLError(Exception):
    pass


def nvml(**changes: Any) -> Any:
    clocks = {0: 1980, 1: 2600}
    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 0,
        "NVML_CLOCK_MEM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: clocks[kind],
        "nvmlDeviceGetTemperature": lambda handle, kind: 41,
        "nvmlDeviceGetPowerUsage": lambda handle: 250_000,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
    }
    return SimpleNamespace(**{**functions, **changes})


def test_clocks_come_from_nvml_where_it_is_installed(torch_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    backend = TorchCuda()
    assert backend.sample() == Sample(1980, 2600, 41, 250.0, 4)
    runtime = backend.runtime()
    assert runtime.startswith(f"nvidia-x-1-sm90/torch{torch.__version__}/cuda")
    assert runtime.endswith("/driver580.1")


def test_without_nvml_or_its_answer_there_are_no_samples(
    torch_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NVMLError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert TorchCuda().sample() is None
    assert TorchCuda().runtime().endswith("/driver-")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage"):
        monkeypatch.setitem(sys.modules, "pynvml", nvml(**{name: refuse}))
        assert TorchCuda().sample() is None, name


# --- a real device ---

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.gpu
def test_on_a_device_twice_the_work_takes_about_twice_the_time() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    b = torch.randn(4096, 8192, device="cuda")
    report = CudaMeasurer(rounds=4, spacing_s=0.01).measure_both({"one": lambda: a @ a, "two": lambda: a @ b})
    one, two = report.times["one"], report.times["two"]
    assert two.eager.floor_ms / one.eager.floor_ms == pytest.approx(2, rel=0.2)
    assert one.graph is not None
    assert one.graph.floor_ms == pytest.approx(one.eager.floor_ms, rel=0.1)


@needs_cuda
@pytest.mark.gpu
def test_on_a_device_many_short_kernels_are_faster_as_a_graph() -> None:
    x = torch.randn(64, device="cuda")

    def call() -> None:
        y = x
        for _ in range(20):
            y = y + 1

    times = CudaMeasurer(rounds=4, spacing_s=0.01).measure_both({"a": call}).times["a"]
    assert times.graph is not None
    assert times.graph.floor_ms < 0.8 * times.eager.floor_ms


@needs_cuda
@pytest.mark.gpu
def test_on_a_device_cold_is_slower_than_hot_and_reading_back_cannot_be_captured() -> None:
    x = torch.randn(2**20, device="cuda")
    hot = CudaMeasurer(rounds=4, spacing_s=0.01, mode="graph").measure({"a": lambda: x + 1})["a"]
    cold = CudaMeasurer(rounds=4, spacing_s=0.01, mode="graph", cold=True).measure({"a": lambda: x + 1})["a"]
    assert cold.floor_ms > hot.floor_ms
    times = CudaMeasurer(rounds=3, spacing_s=0.01).measure_both({"a": lambda: x.sum().item()}).times["a"]
    assert times.graph is None
    assert times.no_graph
    assert float((x + 1).sum()) == pytest.approx(float(x.sum()) + 2**20, rel=1e-3)  # the device still works
