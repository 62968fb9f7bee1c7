"""Values of a run file as the types that annotated dataclass fields ask for. Start with `typed`."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from nas.errors import ConfigError


def typed(value: Any, hint: Any, label: str) -> Any:
    """`value` as the type that `hint` names: whole numbers become floats and lists tuples where that is wanted.

    Args:
        value: of a TOML or JSON file.
        hint: bool, int, float, str, Literal, unions, tuple[X, ...], tuple[X, Y], dict[str, X], Any.
        label: names the place in the message.

    Raises:
        ConfigError: it is none of the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return typed(value, choice, label)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{label}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    elif origin is tuple:
        if isinstance(value, list | tuple):
            several = len(arguments) > 1 and arguments[1] is not Ellipsis
            if several and len(value) != len(arguments):
                raise ConfigError(f"{label}: expected {len(arguments)} values, got {value!r}")
            hints = arguments if several else (arguments[0],) * len(value)
            return tuple(typed(v, h, label) for v, h in zip(value, hints, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): typed(v, arguments[1], f"{label}.{k}") for k, v in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # a whole number of more than 308 digits
                return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    elif hint is type(None) and value is None:
        return None
    names = {tuple: "a list", dict: "a table"}
    expected = names.get(origin, getattr(hint, "__name__", str(hint)))
    raise ConfigError(f"{label}: expected {expected}, got {value!r}")
