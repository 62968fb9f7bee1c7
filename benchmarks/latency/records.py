"""What was measured, line by line in a file: an interrupted benchmark goes on with it, a longer one adds to it.

A line is a network measured once, as JSON. Lines are only ever added; a line cut off by a crash is skipped. Lines of another
runtime (machine, kernels, libraries, threads) or batch size stay in the file and are not read.

Start with `Records(path, runtime, batch)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Record", "Records", "RecordsError"]

VERSION = 1


LEAST_MS = 1e-6  # a step that the clock cannot see


class RecordsError(RuntimeError):
    """The file cannot be used; says why and what to do."""


@dataclass(frozen=True)
class Record:
    """One network, measured in one measuring run.

    Attributes:
        name, group: of the network; see `networks.Spec`.
        run: number of the measuring run, ascending over the file.
        ms, lo_ms, hi_ms, median_ms, p90_ms, quality: of the whole; see `hw_models.measure.Measurement`.
        rounds_ms: of the whole, the low percentile of each round, in order of time.
        sum_ms: of a call's steps.
        step_rounds_ns: int[rounds][executed steps].
    """

    name: str
    group: str
    run: int
    ms: float
    lo_ms: float
    hi_ms: float
    median_ms: float
    p90_ms: float
    quality: str
    rounds_ms: tuple[float, ...]
    sum_ms: float
    step_rounds_ns: tuple[tuple[int, ...], ...]

    @property
    def halves(self) -> tuple[float, float]:
        """Floors, ms, of the even and of the odd rounds: the same thing measured twice, interleaved."""
        return min(self.rounds_ms[::2]), min(self.rounds_ms[1::2])

    def step_ms(self) -> npt.NDArray[np.float64]:
        """float[executed steps]: the floor of each step over the rounds, scaled so that they sum up to `sum_ms`."""
        floors = np.maximum(np.asarray(self.step_rounds_ns, np.float64).min(axis=0) / 1e6, LEAST_MS)
        return np.asarray(floors * (self.sum_ms / floors.sum()))


class Records:
    """The lines of a file that hold for a runtime and a batch size.

    Args:
        path: made when the first line is added.
        runtime: `hw_models.device.runtime_id(threads)`.
        batch: inputs per call.

    Attributes:
        others: how many lines are of another runtime or batch size.

    Raises:
        RecordsError: the file cannot be read, or it is of another version.
    """

    def __init__(self, path: Path, runtime: str, batch: int = 1) -> None:
        self.path, self.runtime, self.batch = path, runtime, batch
        self.all: list[Record] = []
        self.others = 0
        self._torn = False
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise RecordsError(f"{path} cannot be read ({error}); name another folder") from error
        self._torn = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.split("\n"), start=1):
            if line:
                self._read(number, line)

    def _read(self, number: int, line: str) -> None:
        try:
            facts: dict[str, Any] = json.loads(line)
            version = facts.pop("version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):  # cut off
            return
        if version != VERSION:
            raise RecordsError(
                f"{self.path}, line {number}: expected version {VERSION}, got {version!r}; name another folder, or delete the "
                "file to measure again"
            )
        if (facts.pop("runtime"), facts.pop("batch")) != (self.runtime, self.batch):
            self.others += 1
            return
        facts["rounds_ms"] = tuple(facts["rounds_ms"])
        facts["step_rounds_ns"] = tuple(map(tuple, facts["step_rounds_ns"]))
        self.all.append(Record(**facts))

    @property
    def next_run(self) -> int:
        return 1 + max((record.run for record in self.all), default=-1)

    def add(self, records: Iterable[Record]) -> None:
        """Write lines, and wait until they are on the disk.

        Raises:
            RecordsError: they cannot be written.
        """
        new = list(records)
        head = {"version": VERSION, "runtime": self.runtime, "batch": self.batch}
        text = "".join(json.dumps({**head, **asdict(record)}, separators=(",", ":")) + "\n" for record in new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" * self._torn + text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordsError(f"{self.path} cannot be written ({error}); name another folder") from error
        self._torn = False
        self.all += new

    def of(self, name: str) -> list[Record]:
        """Every record of a network, the oldest first."""
        return [record for record in self.all if record.name == name]
