"""`search`: the whole path, from a run file to a folder with a front, a report and an exported module.

Start the same command again and it goes on where it stopped; a finished run says so. Everything is in the run's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from nas.artifacts import clean_scratch
from nas.config import RunConfig, load_config
from nas.data import Data, from_datasets
from nas.errors import ConfigError, NasError, RunError, unknown_name
from nas.evaluate import TrialEvaluator
from nas.executors import CLUSTER, EXECUTORS, InlineExecutor, make_executor
from nas.executors.base import Executor, Placement
from nas.executors.travel import run_id
from nas.executors.workers import check_storage
from nas.export import ExportError
from nas.finish import export_trial, test_front, winner
from nas.folder import make_folder, open_run
from nas.keep import Keeper
from nas.latency import check_pricing, open_table
from nas.lock import RunLock
from nas.loop import SearchLoop
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.job import SupernetTrainer
from nas.oneshot.searcher import OneShot
from nas.oneshot.stage import plan_stage, proposals, run_stage
from nas.report.html import write_report
from nas.report.plots import save_front
from nas.report.progress import SearchProgress
from nas.run import GIVEN, Run, load_run
from nas.searchers import SEARCHERS, Proposal, Searcher, fitted_options, make_searcher
from nas.searchers.dense import is_density
from nas.setup import make_data, make_space
from nas.shipped import SHIPPING, ship
from nas.stopping import make_rule
from nas.storage import Storage, run_storage
from nas.store import Store
from nas.tensorboard import TensorBoard, library
from nas.training.trainer import check_training
from nas.verify import verify_front
from search_spaces import Architecture, Space, SpaceError

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "optuna",
    "pandas",
    "networkx",
    "sqlalchemy",
    "scikit-learn",
    "onnx",
    "onnxruntime",
)

DataLike = Data | tuple[Dataset, Dataset, Dataset]


def search(
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    executor: str | None = None,
    address: str | None = None,
    storage: str | None = None,
    standby: bool = False,
    space: Callable[..., nn.Module] | Space | None = None,
    data: DataLike | None = None,
    quiet: bool = False,
) -> Run:
    """Run a search, or continue one, and return it.

    Args:
        config: a TOML file, or the same as nested dicts; default: all defaults.
        overrides: dotted keys, e.g. {"train.epochs": 20}.
        out: the run's folder; default runs/<name>.
        workers: overrides run.workers, or run.max_concurrent where the executor is one of a cluster.
        executor: overrides run.executor.
        address: overrides run.address.
        storage: URL of a PostgreSQL server in place of the file run.db, e.g. "postgresql+psycopg://user@host/name"; default the
            environment variable NAS_STORAGE. The password is best left to ~/.pgpass or PGPASSWORD. A run keeps its database.
        standby: if another driver has the run, wait until it ends or dies, then take over.
        space: your own space function (or Space) in place of the config's. It then runs in this process, as objects do not
            travel to workers; name it "module:function" in the config to use several.
        data: (train, val, test) torch datasets, or a `Data`, in place of the config's; also in this process only.
        quiet: no progress on the screen.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError: something asked for is wrong; nothing was started.
        RunError: the folder holds another run, is in use, or cannot be written.
    """
    settings = dict(overrides or {})
    if executor is not None:
        settings["run.executor"] = executor
    if address is not None:
        settings["run.address"] = address
    if data is not None:
        settings["data.name"] = "(given as objects)"
    config_path = Path(config) if isinstance(config, str | Path) else None
    checked = load_config(config if config is not None else {}, settings)
    if workers is not None:
        settings["run.max_concurrent" if checked.run.executor in CLUSTER else "run.workers"] = workers
        checked = load_config(config if config is not None else {}, settings)
    if address and checked.run.executor not in SHIPPING:
        raise ConfigError(
            f"address: executor {checked.run.executor} has no cluster; say --executor ray, too, or leave it out"
        )
    if space is not None:  # in place of the config's space and its options
        options = {key.removeprefix("space."): value for key, value in settings.items() if key.startswith("space.")}
        name = space.name if isinstance(space, Space) else space.__qualname__
        checked = replace(checked, space={**options, "name": f"{GIVEN} {name}"})
    folder = Path(out) if out is not None else Path("runs") / checked.run.name
    try:
        where = run_storage(folder, checked.run.name, storage)
        return _Search(checked, folder, config_path, space, data, quiet, where, standby).run()
    except SpaceError as error:
        raise ConfigError(f"[space] {error}") from error


class _Search:
    """One call of `search`: prepared, looped, finished."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        config_path: Path | None,
        space: Callable[..., nn.Module] | Space | None,
        data: DataLike | None,
        quiet: bool,
        storage: Storage,
        standby: bool,
    ) -> None:
        _check_names(config)
        if config.run.executor == "workers" and space is None and data is None:
            check_storage(storage.url, folder)  # before a database is made in the folder
        self.config = config
        self.folder = folder
        self.config_folder = config_path.resolve().parent if config_path else Path.cwd()
        self.objects = space is not None or data is not None
        if self.objects and config.run.trial_timeout_s:
            raise ConfigError(
                "trial_timeout_s: cannot be enforced for a space or data given as objects, which run in this process; "
                "name them in the config, or set it to 0"
            )
        if config.run.tensorboard:
            library()  # missing: said before anything is made
        self.quiet = quiet
        self.storage = storage
        self.standby = standby
        self.data: Data = (
            make_data(config) if data is None else data if isinstance(data, Data) else from_datasets(*data)
        )
        self.space = self._make_space(space)
        self.drawn = _drawn(self.space, config.run.seed)
        check_training(config.train, self.data)
        open_table().close()
        if not _finished(folder, storage):
            check_pricing(config, config_path)
        multi_trial = [name for name in config.search.searchers if name in SEARCHERS]
        self.totals = dict.fromkeys(multi_trial, config.search.trials)
        self.searchers = {name: self._searcher(name) for name in self.totals}
        self.stage = None if _finished(folder, storage) else plan_stage(config, self.space, self.data)

    def run(self) -> Run:
        make_folder(self.folder)
        wait: dict[str, Any] = {"standby": self.standby, "message": self._message}
        with nullcontext() if self.storage.url else RunLock(self.folder, **wait):
            with open_run(self.folder, self.config, self.data, self.config_folder, self.storage, **wait) as store:
                clean_scratch(self.folder)
                self._search(store)
            return Run(self.folder, self.space, self.storage)

    def _message(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    # -- preparing ------------------------------------------------------------------------------------------------------

    def _make_space(self, space: Callable[..., nn.Module] | Space | None) -> Space:
        if isinstance(space, Space):
            return space
        return make_space(self.config, self.data.input_shape, self.data.classes, self.config_folder, function=space)

    # -- searching ------------------------------------------------------------------------------------------------------

    def _search(self, store: Store) -> None:
        totals, searchers = dict(self.totals), dict(self.searchers)
        dense, why_not = self._dense_baseline()
        if dense is not None:
            totals["dense"], searchers["dense"] = self.config.search.dense_baselines, dense
        also = TensorBoard(self.folder, store.curve) if self.config.run.tensorboard else None
        with SearchProgress(totals, self.config.objectives, quiet=self.quiet, also=also) as progress:
            store.on_message(progress.message)
            if self.objects and self.config.run.executor in CLUSTER:
                progress.message(
                    f"everything runs in this process, not on executor {self.config.run.executor}: a space or data given as "
                    "objects do not travel; name them in the run file"
                )
            if why_not:
                progress.message(f"no dense baseline: {why_not}")
            if store.get_meta("finished"):
                progress.message("this run is finished already; nothing to do")
            else:
                for name, found in self._found(progress).items():
                    totals[name] = len(found)
                    searchers[name] = OneShot(self.space, self.config.objectives, self.config.run.seed, proposals=found)
                progress.expect(totals)
                keeper = Keeper(self.folder, store, self.config.objectives, self.config.run.keep_weights)
                keeper.begin()
                if any(len(store.trials(name)) < total or _unfinished(store, name) for name, total in totals.items()):
                    threads_before = torch.get_num_threads()
                    executor = self._executor(progress)
                    try:
                        loop = SearchLoop(
                            store,
                            searchers,
                            totals,
                            executor,
                            objectives=self.config.objectives,
                            seed=self.config.run.seed,
                            epochs=self.config.train.epochs,
                            progress=progress,
                            stopping=make_rule(self.config.stopping, self.config.train.epochs, self.config.run.seed),
                            on_finished=keeper.finished,
                        )
                        loop.run()
                    finally:
                        executor.close()
                        torch.set_num_threads(threads_before)
                self._finish(store, progress)
                store.set_meta("finished", True)
                keeper.begin()

    def _searcher(self, name: str) -> Searcher:
        options = fitted_options(name, self.config.search.trials) | self.config.search.options.get(name, {})
        return make_searcher(name, self.space, self.config.objectives, self.config.run.seed, options)

    def _dense_baseline(self) -> tuple[Searcher | None, str]:
        """The searcher of dense networks; or None and why there can be none."""
        if not self.config.search.dense_baselines:
            return None, ""
        if not any(is_density(name) for architecture in self.drawn for name, _ in architecture.decisions):
            return None, "the space decides no density"
        try:
            searcher = self._searcher("dense")
            searcher.propose([], 0)
        except Exception as error:  # density 1 is not offered, or some of the user's networks cannot be built
            return None, str(error)
        return searcher, ""

    def _found(self, progress: SearchProgress) -> dict[str, list[Proposal]]:
        """What one-shot searchers and their controls propose, after the supernets were trained."""
        if self.stage is None:
            return {}
        threads_before = torch.get_num_threads()
        try:
            results = run_stage(self.stage, self.folder, lambda jobs: self._trainers(jobs, progress), progress)
        finally:
            torch.set_num_threads(threads_before)
        return proposals(self.stage, results, self.space, self.folder, self.config.run.seed, progress.message)

    def _trainers(self, jobs: int, progress: SearchProgress) -> Executor:
        """What trains so many supernets. No time-out: that of trials is not for them."""
        run = self.config.run
        if self._in_this_process():
            torch.set_num_threads(run.threads)
            train = SupernetTrainer(self.config, self.folder, self.data, self.space)
            return InlineExecutor(
                lambda payload, _: train(payload, lambda info: progress.stage_progress(payload["job"], info))
            )
        placement = self._placement(progress)
        most = placement.workers or jobs
        return make_executor(
            run.executor,
            "nas.oneshot.job:setup",
            self._setup(),
            replace(placement, workers=min(most, jobs), timeout_s=None),
        )

    def _executor(self, progress: SearchProgress) -> Executor:
        run = self.config.run
        if self._in_this_process():
            torch.set_num_threads(run.threads)
            return InlineExecutor(TrialEvaluator(self.config, self.folder, self.data, self.space))
        return make_executor(run.executor, "nas.evaluate:setup", self._setup(), self._placement(progress))

    def _in_this_process(self) -> bool:
        return self.objects or (self.config.run.executor == "local" and self.config.run.workers == 0)

    def _placement(self, progress: SearchProgress) -> Placement:
        run = self.config.run
        return Placement(
            workers=run.max_concurrent if run.executor in CLUSTER else run.workers,
            threads=run.threads,
            timeout_s=run.trial_timeout_s or None,
            cpus=run.cpus_per_trial,
            gpus=run.gpus_per_trial,
            address=run.address,
            folder=self.folder.resolve(),
            setup_needs=ship(self.config, self.folder, self.data),
            storage=self.storage.url,
            run=self.storage.run,
            message=progress.message,
        )

    def _setup(self) -> dict[str, str]:
        """From which worker processes make what they need."""
        return {
            "config": json.dumps(self.config.as_dict()),
            "name": self.config.run.name,
            "folder": str(self.folder.resolve()),
            "run_id": run_id(self.folder),
            "space_folder": str(self.config_folder),
        }

    # -- finishing ------------------------------------------------------------------------------------------------------

    def _finish(self, store: Store, progress: SearchProgress) -> None:
        run = Run(self.folder, self.space, self.storage)
        if self.config.final.verify:
            verify_front(run, store, self.data, progress)
        test_front(run, store, self.data, progress)
        best = winner(run)
        if best is not None:
            save_front(run, self.folder / "front.png")
        if best is not None and self.config.final.export:
            progress.message(f"exporting trial {best}")
            try:
                export_trial(run, best, self.folder / "exported")
            except (
                ExportError,
                RunError,
                SpaceError,
            ) as error:  # this network only; the run's results do not depend on it
                progress.message(f"trial {best} could not be exported: {error}")
        progress.message("writing the report")
        write_report(run, self.folder / "report.html")


def _check_names(config: RunConfig) -> None:
    known = {*SEARCHERS, *ALGORITHMS}
    for name in config.search.searchers:
        if name not in known or name == "dense":
            raise unknown_name("searcher", name, known - {"dense"})
    for name in config.search.options:
        if name not in known:
            raise unknown_name("searcher in [search] options", name, known)
    if config.run.executor not in EXECUTORS:
        raise unknown_name("executor", config.run.executor, EXECUTORS)


def _drawn(space: Space, seed: int) -> list[Architecture]:
    """A few architectures; one that cannot be drawn at all is found out here, before anything is made."""
    drawn: list[Architecture] = []
    errors: list[SpaceError] = []
    for attempt in range(8):
        try:
            drawn.append(space.sample(seed + attempt))
        except SpaceError as error:
            errors.append(error)
    if not drawn:
        raise errors[0]
    return drawn


def _finished(folder: Path, storage: Storage) -> bool:
    """Whether there is a run that is finished already; anything that is wrong with it is said later."""
    try:
        return Run(folder, storage=storage).finished
    except NasError:
        return False


def _unfinished(store: Store, searcher: str) -> bool:
    return any(trial.state in ("proposed", "running") for trial in store.trials(searcher))


__all__ = ["DataLike", "load_run", "search"]
