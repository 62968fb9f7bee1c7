"""Runs jobs as trials of Ray Tune, for those who watch and tune their cluster through it. `--executor ray` is the faster way.

Tune starts a trial wherever there is room and keeps its process for the next one (`reuse_actors`); the trial takes a job from the
`Desk`, an actor beside the driver, runs it as a Ray task would (`nas.executors.ray_worker`), and leaves the answer there. So a job
is one trial (while processes start, a trial may run several), but neither a job nor a result goes through Tune's own channels:
Tune keeps in memory and writes to disk whatever it is told, for as long as it runs. Results, files, time-outs and dead nodes are
handled as in `nas.executors.ray_tasks`.

What it does not use of Tune, and why: its schedulers. ASHA, median stopping and PBT are the search loop's own (`nas.stopping`):
trainings come in segments, so these rules are the same on every executor, stop by accuracy and never by a cost, and outlive the
driver. A restored Tune experiment has forgotten what its scheduler knew (ray issue 30838) and the trials that
started after the last snapshot. Nor its retries: the loop counts attempts. For a Tune program of your own see tune_search.py.

Tune cannot stop a function that hangs: at a time-out its process is killed here. Tune remembers every trial: about 23 kB of the
driver's memory each (2,000 trials, 2 cores, 56 trials/s where Ray tasks do 216/s); on disk nothing stays. A node whose disk is full
cannot be avoided, as Tune places its trials itself. Start with `TuneExecutor`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray import tune

from nas.errors import ConfigError
from nas.executors import ray_worker
from nas.executors.base import Placement
from nas.executors.ray_cluster import worker_environment
from nas.executors.ray_tasks import RayExecutor
from nas.executors.tune_trials import MOST_CALLS, Answer, Desk, Trials, TuneTrial, UntilClosed, Watch

STOP_S = 1.5
"""How long closing waits for the desk, and for Tune to end; Tune may go on ending in its thread."""
NAME = "jobs"
LOGGER = logging.getLogger("ray.tune")

NO_NEW_CLUSTER = "RAY_ENABLE_AUTO_CONNECT"
SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # prints nothing at verbose=0, unlike the new one
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    NO_NEW_CLUSTER: "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
}
"""Environment variables by which Tune is told to write nothing and to start several trials at once, while an executor is open."""


class _Died(ray.exceptions.RayError):
    """The process of a trial died."""


class TuneExecutor(RayExecutor):
    """See `nas.executors.base.Executor` and `nas.executors.ray_tasks.RayExecutor`, whose arguments it takes.

    Trials that wait for jobs hold their CPUs and GPUs, as many as `capacity`, until the executor is closed.

    Raises:
        ConfigError: as there; or the address is a "ray://" one, through which Tune runs on the other side of the connection.
    """

    unheard_s = math.inf  # jobs wait until Tune has started a trial for them

    def __init__(self, task: str, setup: Mapping[str, Any] | None, placement: Placement, *, scratch: str = "") -> None:
        if placement.address.startswith("ray://"):
            raise ConfigError(
                f'address: executor tune cannot work through {placement.address}; give "HOST:6379" on a machine of the cluster, '
                "submit the search as a Ray job, or use executor ray"
            )
        self._trials = Trials()
        super().__init__(task, setup, placement, scratch=scratch)
        self._references: dict[Any, int] = {}
        self._before = {name: os.environ.get(name) for name in SETTINGS}
        self._log_level = LOGGER.level
        os.environ.update(SETTINGS)
        LOGGER.setLevel(logging.CRITICAL)
        self._folder = (
            Path(tempfile.mkdtemp(prefix="nas-tune-")) if placement.folder is None else placement.folder / "tune"
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._desk: Any = (
            ray.remote(Desk).options(num_cpus=0, max_concurrency=MOST_CALLS, scheduling_strategy=here).remote()
        )
        self._trials.room = self.capacity
        self._thread = threading.Thread(target=self._tune, name="tune", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        self._trials.room = super().capacity
        return self._trials.room

    def close(self) -> None:
        if self._closed:
            return
        self._trials.closed = True
        with suppress(ray.exceptions.RayError):
            ray.get(self._desk.close.remote(), timeout=STOP_S)
        self._thread.join(STOP_S)
        super().close()
        for name, value in self._before.items():
            if name == NO_NEW_CLUSTER and self._thread.is_alive():
                continue  # a call to Ray after its end would start a cluster
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        LOGGER.setLevel(self._log_level)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tune(self) -> None:
        """Tune's loop, in a thread of its own."""
        try:
            environment = worker_environment(self._connection, self._placement.threads)
            trainable = tune.with_parameters(TuneTrial, desk=self._desk, mailbox=self._mailbox, environment=environment)
            tune.run(
                trainable,
                name=NAME,
                storage_path=str(self._folder),
                search_alg=self._trials,
                num_samples=-1,
                resources_per_trial={"cpu": self._placement.cpus, "gpu": self._placement.gpus},
                reuse_actors=True,
                max_failures=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                stop=UntilClosed(self._trials),
                callbacks=[Watch(self._desk)],
                trial_dirname_creator=lambda trial: trial.trial_id,
                verbose=0,
                raise_on_failed_trial=False,
            )
        except BaseException:
            if not self._trials.closed:
                with suppress(Exception):
                    self._desk.fail.remote(f"Ray Tune ended: {traceback.format_exc()}")

    def _launch(self, order: ray_worker.Order) -> Any:
        reference = self._desk.run.remote(order, self._trials.room)
        self._references[reference] = order.token
        return reference

    def _fetch(self, ref: Any) -> dict[str, Any]:
        self._references.pop(ref, None)
        answer: Answer = ray.get(ref)
        if answer["kind"] == "unable":
            raise ray.exceptions.RuntimeEnvSetupError(answer["reason"])
        if answer["kind"] == "died":
            if "its node" in answer["reason"]:
                raise ray.exceptions.NodeDiedError(answer["reason"])
            raise _Died(answer["reason"])
        return answer

    def _kill(self, ref: Any) -> None:
        token = self._references.pop(ref, None)
        if token is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._desk.drop.remote(token))


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> TuneExecutor:
    """For `nas.executors.make_executor`."""
    return TuneExecutor(task, setup, placement)
