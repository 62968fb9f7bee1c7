"""The pages of optuna-dashboard on a run, kept up to date while it goes on. Start with `serve`.

They are for looking: whatever a page asks to change of trials is refused, and notes written in it last as long as the server.
"""

from __future__ import annotations

import copy
import importlib
import socket
import threading
import time
import warnings
from collections.abc import Callable, Container, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from nas.dashboard.study import METRIC_NAMES, StudyView, directions
from nas.errors import NasError, RunError
from nas.run import Run

REFRESH_S = 3.0
"""Seconds between two looks at the run, or more where a look takes long."""
LOOK_SHARE = 0.2
"""Share of the time that looking may take."""


def serve(
    run: Run,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    refresh_s: float = REFRESH_S,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the pages until Ctrl-C.

    Args:
        run: finished or not.
        host: address to listen on; anything but this machine's own shows the run to whoever reaches it.
        port: to listen on; 0 for any that is free.
        refresh_s: least seconds between two looks at the run.
        started: is told where the pages are.

    Raises:
        RunError: optuna-dashboard is not installed, the run cannot be read, or the address cannot be used.
    """
    pages = _pages()
    view = StudyView(run.objectives, run.curves)
    storage = RunStorage(run)
    storage.show(view.update(run.trials))
    try:
        server = make_server(host, port, pages(storage), server_class=_server(host), handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot listen on {host}, port {port}: {reason}; choose another with --port, or --port 0 for any"
        ) from error
    ended = threading.Event()
    threading.Thread(target=_follow, args=(run, view, storage, refresh_s, ended), daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    started(f"http://{shown}:{server.server_port}/dashboard/studies/{storage.study_id}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        ended.set()
        server.server_close()


class RunStorage(InMemoryStorage):
    """An Optuna storage with one study, whose trials are those that were shown last. Trials cannot be changed through it.

    Args:
        run: names the study and its objectives.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._trials_shown: list[FrozenTrial] = []
        self.study_id = self.create_new_study(directions(run.objectives), run.name)
        self.set_study_system_attr(self.study_id, METRIC_NAMES, list(run.objectives))
        about = {
            "folder": str(run.folder),
            "space": run.config.space["name"],
            "searchers": ", ".join(run.config.search.searchers),
            **{f"objective {name}": way for name, way in run.objectives.items()},
            **{f"constraint {name}": limit for name, limit in run.constraints.items()},
        }
        for name, value in about.items():
            self.set_study_user_attr(self.study_id, name, value)

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """From now on, the study has these trials."""
        self._trials_shown = list(trials)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials_shown if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        try:
            return self._trials_shown[trial_id]
        except IndexError:
            raise KeyError(f"no trial {trial_id}") from None

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        trial = self.get_trial(trial_id)
        return trial.distributions[param_name].to_internal_repr(trial.params[param_name])

    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        states = (state,) if isinstance(state, TrialState) else state
        return len(self.get_all_trials(study_id, deepcopy=False, states=states))

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The best feasible trial of a study with one objective."""
        done = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        if not done:
            raise ValueError("no trial is complete yet")
        sign = 1.0 if self.get_study_directions(study_id)[0] == optuna.study.StudyDirection.MINIMIZE else -1.0
        return min(done, key=lambda trial: (any(v > 0 for v in trial.constraints.values()), sign * trial.values[0]))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return trial_number

    def get_trial_number_from_id(self, trial_id: int) -> int:
        return trial_id

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("these pages show a run; they cannot change it")

    delete_study = create_new_trial = set_trial_param = set_trial_state_values = _refuse
    set_trial_intermediate_value = set_trial_user_attr = set_trial_system_attr = _refuse


def _follow(run: Run, view: StudyView, storage: RunStorage, refresh_s: float, ended: threading.Event) -> None:
    """Keep the study up to date, until the run is finished."""
    wait = refresh_s
    while not ended.wait(wait):
        began = time.monotonic()
        try:
            finished = run.finished  # asked first: what comes after is then complete
            storage.show(view.update(run.trials))
        except NasError:  # the database is busy or away for a moment; what is shown stays
            continue
        if finished:
            return
        wait = max(refresh_s, (time.monotonic() - began) / LOOK_SHARE)


def _pages() -> Callable[[RunStorage], Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("optuna_dashboard").wsgi
    except Exception as error:
        raise RunError(
            f"nas dashboard needs the package optuna-dashboard ({error}); install it with: pip install 'sparse-nas[watch]'"
        ) from error


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


def _server(host: str) -> type[WSGIServer]:
    return _Server6 if ":" in host else _Server


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""
