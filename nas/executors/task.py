"""Finding the task, setting it up, and running one job: the same in every executor, so that all fail alike.

Exceptions of user code are data here, `SystemExit` included. Start with `load_task` and `run_job`.
"""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import nas.errors
from nas.errors import EvaluationFailed, NasError, UnknownName, unknown_name
from nas.executors.base import Evaluate, Report, encode

MAX_ERROR_LENGTH = 20_000


def load_task(task: str, setup: Mapping[str, Any]) -> Evaluate:
    """Import `task` and call it with `setup`.

    Raises:
        UnknownName: there is no such module or function.
        Exception: whatever the import or the function raises.
    """
    module_name, colon, name = task.partition(":")
    if not (module_name and colon and name):
        raise UnknownName(f'expected a task "module:function", got {task!r}')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise UnknownName(f'task "{task}": there is no module {missing!r} on the Python path') from error
        raise
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"task in {module_name}", name, known)
    evaluate = function(dict(setup))
    if not callable(evaluate):
        raise TypeError(
            f'task "{task}": expected a function that returns evaluate(payload, report), it returned {type(evaluate).__name__}'
        )
    return evaluate


def run_job(evaluate: Evaluate, payload: dict[str, Any], report: Report) -> tuple[bytes | None, dict[str, Any]]:
    """Run one job; never raises but for Ctrl-C.

    Returns:
        (encoded result, {}) or (None, failure) with failure = {"error", "type", "message"}, all text.
    """
    try:
        return encode(evaluate(payload, report), "the result"), {}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failure = describe(error)
    gc.collect()  # a network that did not fit is in a cycle with its traceback; the next job needs the room
    return None, failure


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as text: "error" is the traceback without our own frames, "type" and "message" name it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    except Exception as second:
        text = f"{type(error).__name__} (no traceback: {type(second).__name__})"
    try:
        message = str(error)
    except Exception:
        message = "(no text)"
    return {
        "error": shorten(text),
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": shorten(message),
    }


def setup_error(failure: Mapping[str, Any], task: str) -> NasError:
    """The error for a setup that raised: our own kinds as they were, others with their traceback."""
    module, _, name = str(failure["type"]).rpartition(".")
    kind = getattr(nas.errors, name, None) if module == "nas.errors" else None
    if isinstance(kind, type) and issubclass(kind, NasError):
        return kind(failure["message"])
    return EvaluationFailed(f'task "{task}" could not be set up, so no trial was run: {name}: {failure["message"]}')


def poisoned(failure: Mapping[str, Any]) -> bool:
    """Whether the process is of no further use: after most CUDA errors every later call fails too (memory is an exception)."""
    out_of_memory = "OutOfMemory" in failure["type"]
    return not out_of_memory and ("AcceleratorError" in failure["type"] or "CUDA error" in failure["message"])


def free_device_memory() -> None:
    """Give cached GPU memory back, if torch is loaded and has used a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def shorten(text: str, limit: int = MAX_ERROR_LENGTH) -> str:
    """`text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... ({len(text) - limit} characters left out) ...\n{text[-limit // 2 :]}"
