"""Where trials run. `EXECUTORS` maps the names a run file may give to their classes; base.py says what each promises."""

from collections.abc import Callable

from nas.executors.base import Event, Executor, Job
from nas.executors.inline import InlineExecutor
from nas.executors.local import LocalExecutor

EXECUTORS: dict[str, Callable[..., Executor]] = {"inline": InlineExecutor, "local": LocalExecutor}

__all__ = ["EXECUTORS", "Event", "Executor", "InlineExecutor", "Job", "LocalExecutor"]
