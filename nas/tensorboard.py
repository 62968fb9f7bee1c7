"""Learning curves for TensorBoard: RUN/tensorboard/<trial> gets a point per epoch as it arrives, and the decisions at the end.

What TensorBoard shows of a trial is its curve in the run's database, each epoch once, whatever died in between: an epoch that comes
again with the same numbers is not written again, one that comes with others takes back what was written from there on (TensorBoard
drops the steps from a mark onwards), and an epoch that was never heard of is added when the trial is finished.

No file is held open: a record is appended and the file closed, so that ten thousand trials need no more handles than one. The
formats of the records are tensorboardX's or TensorBoard's own, whichever is installed. Start with `TensorBoard`.
"""

from __future__ import annotations

import importlib
import math
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nas.errors import ConfigError
from nas.objectives import number

if TYPE_CHECKING:
    from nas.store import Trial

FOLDER = "tensorboard"
"""In the run's folder."""
CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "density")
FINAL = "final/"
"""What the names of a finished trial's metrics begin with, to tell them from curves."""
SUPERNET_STEPS = 1000
"""Steps of a whole one-shot search: its phases have epochs of different kinds, so its axis is the share that is done."""

_HPARAMS = "_hparams_/session_start_info"
_LIBRARIES = (
    {
        "tensorboardX.proto.event_pb2": ("Event", "SessionLog"),
        "tensorboardX.proto.summary_pb2": ("Summary",),
        "tensorboardX.summary": ("hparams",),
        "tensorboardX.record_writer": ("masked_crc32c",),
    },
    {
        "tensorboard.compat.proto.event_pb2": ("Event", "SessionLog"),
        "tensorboard.compat.proto.summary_pb2": ("Summary",),
        "torch.utils.tensorboard.summary": ("hparams",),
        "tensorboard.compat.tensorflow_stub.pywrap_tensorflow": ("masked_crc32c",),
    },
)


def library() -> SimpleNamespace:
    """Event, SessionLog, Summary, hparams and masked_crc32c of whichever package is installed.

    Raises:
        ConfigError: neither is.
    """
    reasons = []
    for modules in _LIBRARIES:
        try:
            return SimpleNamespace(
                **{name: getattr(importlib.import_module(m), name) for m, names in modules.items() for name in names}
            )
        except Exception as error:  # a package that is there and broken is of no use either
            reasons.append(str(error))
    raise ConfigError(
        f"[run] tensorboard: expected the package tensorboardX or tensorboard, found neither ({'; '.join(reasons)}); install one "
        "with: pip install 'sparse-nas[watch]', or set tensorboard = false"
    )


class TensorBoard:
    """Listens to a search and writes what it hears; a `nas.report.progress.Listener`.

    Args:
        folder: the run's.
        curve: trial -> its learning curve as it was recorded, one row per epoch.

    Raises:
        ConfigError: neither tensorboardX nor tensorboard is installed.
    """

    def __init__(self, folder: Path, curve: Callable[[int], Sequence[Mapping[str, Any]]]) -> None:
        self._folder = folder / FOLDER
        self._curve = curve
        self._library = library()
        self._open: dict[str, Points] = {}

    def trial_progress(self, trial: Trial, info: Mapping[str, Any]) -> None:
        """A row of a trial's history, or something without an epoch, which is no point."""
        if info.get("epoch") is not None:
            self._points(_name(trial)).add(int(info["epoch"]), _chosen(info))

    def trial_finished(self, trial: Trial) -> None:
        """Its curve is known in full now, and its metrics; a copy has its original's and gets none."""
        if trial.copy_of is not None:
            return
        points = self._points(_name(trial))
        last = 0
        for row in self._curve(trial.trial):
            last = int(row["epoch"])
            points.add(last, _chosen(row))
        if trial.state != "failed" and not points.described:
            metrics = {name: number(trial.metrics, name) for name in trial.metrics}
            found = {FINAL + name: value for name, value in metrics.items() if value is not None}
            about = {"searcher": trial.searcher, "state": trial.state, **trial.architecture.as_dict()}
            points.describe(about, found, last)
        del self._open[_name(trial)]

    def stage_progress(self, job: str, info: Mapping[str, Any]) -> None:
        """How a supernet does; a point at the end of each of its epochs."""
        if info.get("accuracy") is not None and info.get("step") == 0:
            step = round(SUPERNET_STEPS * float(info["done"]))
            self._points(f"oneshot/{job}").add(step, {"supernet_accuracy": float(info["accuracy"])})

    def _points(self, name: str) -> Points:
        if name not in self._open:
            self._open[name] = Points(self._folder / name, self._library)
        return self._open[name]


class Points:
    """The points of one folder: what is there already, and how to add some.

    Args:
        folder: made when the first point comes.
        library: from `library`.
    """

    def __init__(self, folder: Path, library: SimpleNamespace) -> None:
        self._library = library
        self._folder = folder
        self._file: Path | None = None
        self._before = sorted(folder.glob("events.out.tfevents.*"))
        self._written: dict[int, dict[str, float]] = {}
        self.described = False
        for file in self._before:
            for event in read_events(file, library):
                self._remember(event)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a point, in place of what was written of this step and after it; nothing if it is there already."""
        values = {tag: _single(value) for tag, value in values.items()}
        there = self._written.get(step, {})
        if all(tag in there and _same(there[tag], value) for tag, value in values.items()):
            return
        events = []
        if any(known >= step for known in self._written):
            start = self._library.SessionLog(status=self._library.SessionLog.START)
            events.append(self._library.Event(wall_time=time.time(), step=step, session_log=start))
        self._append([*events, self._event(step, values)])

    def describe(self, about: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write what TensorBoard's table of hyperparameters shows, the metrics as points of `step`; once."""
        summaries = self._library.hparams(dict(about), dict(metrics))
        events = [self._library.Event(wall_time=time.time(), summary=summary) for summary in summaries]
        self._append([*events, self._event(step, metrics)])

    def _event(self, step: int, values: Mapping[str, float]) -> Any:
        summary = self._library.Summary
        rows = [summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        return self._library.Event(wall_time=time.time(), step=step, summary=summary(value=rows))

    def _append(self, events: list[Any]) -> None:
        if self._file is None:  # never one of an earlier process: its last record may be torn
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{len(self._before):04d}"
            self._file = self._folder / name
            events = [self._library.Event(wall_time=time.time(), file_version="brain.Event:2"), *events]
        data = b"".join(_framed(event.SerializeToString(), self._library.masked_crc32c) for event in events)
        with self._file.open("ab") as file:
            file.write(data)
        for event in events:
            self._remember(event)

    def _remember(self, event: Any) -> None:
        if event.HasField("session_log"):
            self._written = {step: values for step, values in self._written.items() if step < event.step}
        for value in event.summary.value if event.HasField("summary") else ():
            if value.tag == _HPARAMS:
                self.described = True
            elif value.HasField("simple_value") and not value.tag.startswith(FINAL):
                self._written.setdefault(event.step, {})[value.tag] = value.simple_value


def read_events(file: Path, library: SimpleNamespace) -> Iterator[Any]:
    """The events of a file, up to the first that is torn or damaged."""
    data = file.read_bytes()
    at = 0
    while at + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + size]
        check = data[at + 12 + size : at + 16 + size]
        if len(check) < 4 or struct.unpack("<I", check)[0] != library.masked_crc32c(body):
            return
        yield library.Event.FromString(body)
        at += 16 + size


def _framed(body: bytes, check: Callable[[bytes], int]) -> bytes:
    """A TFRecord: length, its checksum, the body, its checksum."""
    length = struct.pack("<Q", len(body))
    return length + struct.pack("<I", check(length)) + body + struct.pack("<I", check(body))


def _name(trial: Trial) -> str:
    return f"{trial.trial:05d}"


def _chosen(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(row[name]) for name in _present(row, CURVES)}


def _present(row: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if isinstance(row.get(name), int | float))


def _single(value: float) -> float:
    """As a 32-bit float keeps it, which is what TensorBoard's points are."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
