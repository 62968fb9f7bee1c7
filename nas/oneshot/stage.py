"""The part of a run before its trials: every one-shot search of every replicate is trained, then its architectures are proposed.

A job is one supernet, in a folder of its own below oneshot/; a folder with a result.json is done. `plan_stage` says what there is
to train, `run_stage` trains it on an executor, `proposals` turns the results into trials to be, controls included.

Does not know how a supernet is trained (`nas.oneshot.engine`), nor what becomes of the trials (`nas.loop`).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nas.checkpoint import read_facts, write_bytes, write_json
from nas.config import RunConfig
from nas.data import Data
from nas.errors import ConfigError, EvaluationFailed, RunError
from nas.executors.base import Event, Executor, Job
from nas.oneshot.algorithm import Options
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.engine import RESULT, Result, read_result
from nas.oneshot.job import job_folder, make_algorithm
from nas.oneshot.searcher import make_options
from nas.searchers.base import Proposal
from search_spaces import Architecture, Space

MAX_LOST = 3
"""A search whose process dies this often is given up for this start; each time it goes on from its checkpoint."""
MAX_BLAMELESS = 20
"""The same where the executor says that the search had no part in it (its machine left the cluster)."""
DENSE = "darts"
"""The search whose architectures are the dense controls."""
CONTROLS = "controls.json"
TRACE = "error.txt"
"""In a search's folder: the traceback of its last failure."""
_SHARED = ("batch_size", "augment", "checkpointing")
"""Options that a dense search takes over from the search it is compared with."""


class StageProgress(Protocol):
    """What the stage tells whoever watches it."""

    def stage_started(self, jobs: Mapping[str, bool]) -> None: ...
    def stage_progress(self, job: str, info: Mapping[str, Any]) -> None: ...
    def stage_finished(self, job: str, *, failed: bool = False) -> None: ...
    def stage_ended(self) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class SupernetJob:
    """One supernet to train.

    Attributes:
        name: its folder, e.g. "darts-s0".
        algorithm: key of `ALGORITHMS`.
        replicate: from 0.
        seed: of everything in it, and of the training of what it finds.
        options: all of them, JSON.
    """

    name: str
    algorithm: str
    replicate: int
    seed: int
    options: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class StagePlan:
    """What the stage of a run has to train.

    Attributes:
        jobs: in the order in which they are started.
        own: searcher -> its replicates' jobs, whose architectures it proposes.
        dense: sparse searcher -> jobs of the dense search that it is compared with; only searchers with controls.
    """

    jobs: tuple[SupernetJob, ...]
    own: dict[str, tuple[SupernetJob, ...]]
    dense: dict[str, tuple[SupernetJob, ...]]


def plan_stage(config: RunConfig, space: Space, data: Data) -> StagePlan | None:
    """The supernets that a run needs; None if no searcher of its is a one-shot one. Builds one supernet of each kind to see that it
    can be built.

    A searcher of sparse networks with `controls` is compared with a dense search of as many epochs of the supernet: with the run's
    own `darts` if that is listed, else with one that is trained for the purpose, with the searcher's batch size and whatever
    options.darts says.

    Raises:
        ConfigError: an option is wrong, or a space has nothing to search.
    """
    names = [name for name in config.search.searchers if name in ALGORITHMS]
    if not names:
        return None
    chosen = {name: make_options(name, config.search.options.get(name, {})) for name in names}
    epochs = {}
    for name in names:
        given = config.search.options.get(name, {})
        algorithm = make_algorithm(name, given, config, data, space, config.run.seed)
        epochs[name] = sum(phase.epochs for phase in algorithm.phases() if phase.of_supernet)
        del algorithm
    compared = [name for name in names if ALGORITHMS[name].sparse and chosen[name].controls]
    most = max((chosen[name].seeds for name in compared), default=0)
    own: dict[str, tuple[SupernetJob, ...]] = {}
    dense: dict[str, tuple[SupernetJob, ...]] = {}
    jobs: list[SupernetJob] = []
    for name in names:
        count = max(chosen[name].seeds, most if name == DENSE else 0)  # every replicate needs a dense one
        made = _replicates(name, name, chosen[name], count, config.run.seed)
        own[name] = made[: chosen[name].seeds]
        jobs += made
        if name == DENSE:
            dense = {searcher: made[: chosen[searcher].seeds] for searcher in compared}
    if DENSE not in names:
        known: dict[str, tuple[SupernetJob, ...]] = {}
        for name in compared:
            like = {key: value for key, value in asdict(chosen[name]).items() if key in _SHARED}
            wanted = make_options(DENSE, {**like, **config.search.options.get(DENSE, {}), "epochs": epochs[name]})
            key = json.dumps(_plain(wanted), sort_keys=True)
            if key not in known:
                _check_dense(name, _plain(wanted), config, data, space)
            if len(known.get(key, ())) < chosen[name].seeds:
                folder = f"dense-{name}" if key not in known else known[key][0].name.rpartition("-")[0]
                known[key] = _replicates(folder, DENSE, wanted, chosen[name].seeds, config.run.seed)
            dense[name] = known[key][: chosen[name].seeds]
        jobs += [job for made in known.values() for job in made]
    return StagePlan(tuple(jobs), own, dense)


def run_stage(
    plan: StagePlan, folder: Path, executor: Callable[[int], Executor], progress: StageProgress
) -> dict[str, Result]:
    """Train all supernets of a plan that have no result yet.

    Args:
        plan: from `plan_stage`.
        folder: the run's.
        executor: makes one for so many jobs, whose task is a `nas.oneshot.job.SupernetTrainer`; it is closed here.
        progress: is told what happens.

    Returns:
        Job name -> result, of all jobs of the plan.

    Raises:
        EvaluationFailed: some searches failed; names all of them, with their folders. What the others found is kept.
        RunError: a result is damaged.
    """
    waiting = [job for job in plan.jobs if not (job_folder(folder, job.name) / RESULT).is_file()]
    if waiting:
        done = {job.name: job not in waiting for job in plan.jobs}
        progress.stage_started(done)
        made = executor(len(waiting))
        try:
            failed = _Stage(waiting, folder, made, progress).run()
        finally:
            made.close()
            progress.stage_ended()
        if failed:
            raise _all_failures(failed, folder, len(plan.jobs))
    return {job.name: read_result(job_folder(folder, job.name)) for job in plan.jobs}


def proposals(
    plan: StagePlan,
    results: Mapping[str, Result],
    space: Space,
    folder: Path,
    seed: int,
    message: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Proposal]]:
    """What one-shot searchers and their controls hand out: searcher name -> proposals, in order.

    Names of controls are "<searcher>/random" and "<searcher>/dense". Controls are drawn once and kept in oneshot/controls.json;
    `message` is told which there cannot be.

    Raises:
        RunError: that file is damaged.
    """
    handed = {
        name: [proposal for job in jobs for proposal in _found(job, results[job.name])]
        for name, jobs in plan.own.items()
    }
    if plan.dense:
        path = folder / "oneshot" / CONTROLS
        if not path.is_file():
            drawn = _draw_controls(plan, results, space, seed, message)
            write_json(path, _plain_proposals(drawn), "the controls of one-shot searches")
        handed |= _read_controls(path)
    return {name: made for name, made in handed.items() if made}


class _Stage:
    """Jobs on an executor until each has ended."""

    def __init__(self, jobs: Sequence[SupernetJob], folder: Path, executor: Executor, progress: StageProgress) -> None:
        self.jobs = dict(enumerate(jobs))
        self.folder = folder
        self.executor = executor
        self.progress = progress
        self.queue = deque(self.jobs)
        self.running: dict[int, int] = {}  # job -> attempt
        self.lost = dict.fromkeys(self.jobs, 0)
        self.blameless = dict.fromkeys(self.jobs, 0)
        self.waits = False
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Job name -> message of those that failed."""
        while self.queue or self.running:
            while self.queue and len(self.running) < self.executor.capacity:
                number = self.queue.popleft()
                self.running[number] = self.lost[number] + self.blameless[number] + 1
                job = self.jobs[number]
                payload = {"job": job.name, "algorithm": job.algorithm, "seed": job.seed, "options": job.options}
                self.executor.submit(Job(number, self.running[number], payload, (f"oneshot/{job.name}",)))
            self._tell_of_workers()
            events = self.executor.poll(0.5)
            if not events and not self.running:  # no worker: such a poll returns at once
                time.sleep(0.5)
            for event in events:
                self._handle(event)
        return self.failed

    def _tell_of_workers(self) -> None:
        waited, self.waits = self.waits, self.executor.capacity <= 0
        if self.waits and not waited:
            self.progress.message("there is no worker at the moment; the one-shot searches wait for one")

    def _handle(self, event: Event) -> None:
        if self.running.get(event.trial) != event.attempt:
            return
        name = self.jobs[event.trial].name
        if event.kind == "progress":
            self.progress.stage_progress(name, event.payload)
            return
        del self.running[event.trial]
        if event.kind == "lost":
            blameless = bool(event.payload.get("blameless"))
            counts, most = (self.blameless, MAX_BLAMELESS) if blameless else (self.lost, MAX_LOST)
            counts[event.trial] += 1
            if counts[event.trial] < most:
                self.progress.message(f"search {name}: {event.error}; it goes on from its last checkpoint")
                self.queue.appendleft(event.trial)
                return
            self._fail(name, f"{event.error} ({most} times); not tried again in this start")
        elif event.kind == "failed":
            module, _, kind = str(event.payload.get("type", "")).rpartition(".")
            text = str(event.payload.get("message", ""))
            self._fail(name, text if module == "nas.errors" else f"{kind}: {text}", event.error)
        else:
            self.progress.stage_finished(name)

    def _fail(self, name: str, message: str, trace: str | None = None) -> None:
        self.failed[name] = message
        if trace:
            write_bytes(job_folder(self.folder, name) / TRACE, f"{trace}\n".encode(), "the traceback of a search")
        self.progress.message(f"search {name} failed: {message}")
        self.progress.stage_finished(name, failed=True)


def _replicates(folder: str, algorithm: str, options: Options, count: int, seed: int) -> tuple[SupernetJob, ...]:
    plain = _plain(options)
    return tuple(SupernetJob(f"{folder}-s{r}", algorithm, r, seed + r, plain) for r in range(count))


def _plain(options: Options) -> dict[str, Any]:
    """Options as JSON; None is left out, which is a default wherever it is allowed."""
    return {key: value for key, value in json.loads(json.dumps(asdict(options))).items() if value is not None}


def _check_dense(name: str, wanted: Mapping[str, Any], config: RunConfig, data: Data, space: Space) -> None:
    """See that a dense search can be made to compare `name` with."""
    try:
        make_algorithm(DENSE, wanted, config, data, space, config.run.seed)
    except ConfigError as error:
        raise ConfigError(
            f"options.{name}.controls: the dense search that {name} is to be compared with cannot be made: {error}; "
            f"with options.{name}.controls = false it runs without"
        ) from error


def _all_failures(failed: Mapping[str, str], folder: Path, total: int) -> EvaluationFailed:
    lines = [
        f"{name}: {message} ({'checkpoint, log and ' if read_facts(job_folder(folder, name)) else ''}{TRACE}: "
        f"{job_folder(folder, name)})"
        for name, message in sorted(failed.items())
    ]
    return EvaluationFailed(
        f"{len(failed)} of {total} one-shot searches failed; no trial was started, and what the others found is kept:\n  "
        + "\n  ".join(lines)
        + "\nThe same command tries them again, from their checkpoints where there are any; with other options, start in another "
        "folder (--out), or leave the searcher out of [search] searchers there"
    )


def _found(job: SupernetJob, result: Result) -> list[Proposal]:
    made = []
    for one in result.found:
        initial = f"oneshot/{job.name}/{one['initial']}" if one["initial"] else None
        architecture = Architecture.from_json(json.dumps(one["architecture"]))
        made.append(Proposal(architecture, {**one["note"], "replicate": job.replicate}, job.seed, initial))
    return made


def _read_controls(path: Path) -> dict[str, list[Proposal]]:
    try:
        return {
            name: [
                Proposal(Architecture.from_json(json.dumps(p["architecture"])), p["sampler"], p["seed"], p["initial"])
                for p in rows
            ]
            for name, rows in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: damaged ({type(error).__name__}: {error}); remove it, and the controls are drawn again, as they were"
        ) from error


def _draw_controls(
    plan: StagePlan, results: Mapping[str, Result], space: Space, seed: int, message: Callable[[str], None]
) -> dict[str, list[Proposal]]:
    from nas.oneshot.controls import FoundTrial, control_proposals

    def trials(jobs: Sequence[SupernetJob]) -> list[Any]:
        return [
            FoundTrial(job.replicate, job.seed, proposal.architecture, proposal.sampler)
            for job in jobs
            for proposal in _found(job, results[job.name])
        ]

    found = {name: trials(plan.own[name]) for name in plan.dense}
    dense = {name: trials(jobs) for name, jobs in plan.dense.items()}
    return control_proposals(space, found, dense, seed=seed, message=message)


def _plain_proposals(made: Mapping[str, Sequence[Proposal]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {
                "architecture": json.loads(p.architecture.to_json()),
                "sampler": p.sampler,
                "seed": p.seed,
                "initial": p.initial,
            }
            for p in rows
        ]
        for name, rows in made.items()
    }
