"""Where trials run. `EXECUTORS` maps the names a run file may give to what makes one; base.py says what each promises.

Engines that are not there at every installation (ray, nni) are imported when one is asked for, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from nas.errors import ConfigError, unknown_name
from nas.executors.base import Event, Executor, Job, Placement
from nas.executors.inline import InlineExecutor
from nas.executors.local import LocalExecutor

EXECUTORS = {
    "inline": "nas.executors.inline",
    "local": "nas.executors.local",
    "ray": "nas.executors.ray_tasks",
    "tune": "nas.executors.tune",
    "workers": "nas.executors.workers",
    "nni": "nas.executors.nni",
}
"""Name in a run file -> module, which has `make(task, setup, placement)`."""

CLUSTER = ("ray", "tune", "workers", "nni")
"""Those that hold as many jobs as there is room for, run.max_concurrent at most."""

_NO_GPUS = {
    "workers": "start one `nas worker` per GPU with CUDA_VISIBLE_DEVICES set, and leave it 0",
    "nni": "use executor ray, or leave it 0",
}
"""Executors on clusters that do not share out GPUs, and what to do instead."""

_EXTRAS = {"ray": "ray", "tune": "ray", "nni": "nni"}
"""Executor -> the extra of this package that brings its engine."""


class _Maker(Protocol):
    def make(self, task: str, setup: Mapping[str, Any], placement: Placement) -> Executor: ...


def make_executor(name: str, task: str, setup: Mapping[str, Any], placement: Placement) -> Executor:
    """An executor by name.

    Args:
        name: key of `EXECUTORS`.
        task: "module:function" that makes `evaluate(payload, report)`.
        setup: what that function gets; JSON.
        placement: where, and how much of it.

    Raises:
        UnknownName: no such executor.
        ConfigError: its engine is not installed, or it cannot do what is asked.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if placement.gpus and name in _NO_GPUS:
        raise ConfigError(f"gpus_per_trial: executor {name} does not share out GPUs; {_NO_GPUS[name]}")
    try:
        module = cast(_Maker, importlib.import_module(EXECUTORS[name]))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(name)
        if extra is None or (error.name or "").partition(".")[0] != extra:
            raise
        raise ConfigError(
            f"executor {name}: the Python package {extra} is not installed; install it with pip install 'sparse-nas[{extra}]', "
            "or use executor local"
        ) from error
    return module.make(task, setup, placement)


__all__ = [
    "CLUSTER",
    "EXECUTORS",
    "Event",
    "Executor",
    "InlineExecutor",
    "Job",
    "LocalExecutor",
    "Placement",
    "make_executor",
]
