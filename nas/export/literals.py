"""Python values and torch functions as source text.

What it does not do: tensors (they travel in the weights file), objects of user classes.

Start with `literal` and `function_name`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nas.export.errors import ExportError

# Where a function may be found, in the order it is looked for, and how the generated source calls it.
_NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("F", F),
    ("torch", torch),
    ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft),
    ("torch.special", torch.special),
    ("math", math),
)


def literal(value: Any, where: str) -> str:
    """The source text of a plain value: numbers, strings, torch dtypes and devices, functions of torch, and containers of them.

    Args:
        value: what to write.
        where: what the value is for, named in the error.

    Raises:
        ExportError: the value has no text that would build it again with nothing but torch.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is Ellipsis or type(value) in (bool, int, float, complex):
        return "..." if value is Ellipsis else repr(value)
    if type(value) is str:
        return quoted(value)
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, slice):
        return f"slice({', '.join(literal(v, where) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        items = [literal(item, where) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(literal(item, where) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(k, where)}: {literal(v, where)}' for k, v in value.items())}}}"
    if inspect.isroutine(value):
        return function_name(value, where)
    raise ExportError(
        f"{where}: expected a plain value (number, string, dtype, tuple, list, dict), found {type(value).__name__}; "
        "its source cannot be written without its class: pass plain values to functions and layers of torch"
    )


def quoted(text: str) -> str:
    """A string literal with double quotes."""
    return json.dumps(text)


def function_name(function: Callable[..., Any], where: str) -> str:
    """How plain torch source calls a function, e.g. "F.gelu", "torch.cat", "math.sqrt".

    Raises:
        ExportError: the function is not part of torch's public names or of Python.
    """
    name = getattr(function, "__name__", "")
    for prefix, namespace in _NAMESPACES:
        short = name.removeprefix(f"{prefix.rpartition('.')[2]}_")  # torch.linalg.norm calls itself linalg_norm
        for candidate in (name, short):
            if getattr(namespace, candidate, None) is function:
                return f"{prefix}.{candidate}"
    if getattr(function, "__module__", None) == "builtins":
        return name
    raise ExportError(
        f"{where}: expected a function of torch, torch.nn.functional or math, "
        f"found {getattr(function, '__module__', '?')}.{name or function!r}; do not wrap it (torch.fx.wrap)"
    )


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of a function's arguments by name; empty for functions written in C."""
    name = getattr(function, "__name__", "")
    shown = getattr(F, f"_{name}", None) if getattr(F, name, None) is function else None
    for candidate in (shown, function):  # F.max_pool2d hides its signature, F._max_pool2d shows it
        try:
            parameters = inspect.signature(candidate).parameters.values()  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        found = {p.name: p.default for p in parameters if p.default is not p.empty}
        if found:
            return found
    return {}
