"""Errors a caller of `nas` may want to catch. Each says what was expected, what was found, where, and what to do.

    NasError
    ├── ConfigError        a run file, an override or a command-line value
    ├── DataError          a data set that cannot be read or makes no sense
    ├── UnknownName        a space, searcher, rule ... that does not exist (with the nearest known one)
    ├── RunError           a run folder: missing, locked, made by another config, damaged
    └── EvaluationFailed   a trial could not be evaluated (recorded as a failed row; the search goes on)

The command line prints these as one line and exits with code 2; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasError(Exception):
    """Base of all errors of this package that are about input, not about our own code."""


class ConfigError(NasError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of range."""


class DataError(NasError, ValueError):
    """A data set is missing, unreadable or unusable."""


class UnknownName(NasError, ValueError):
    """A name that is looked up in a table of known names is not there."""


class RunError(NasError, RuntimeError):
    """A run folder cannot be used as asked."""


class EvaluationFailed(NasError, RuntimeError):
    """A trial could not be evaluated."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Build the error for an unknown name: names the nearest known one and lists all.

    Args:
        kind: what the name stands for, e.g. "searcher".
        name: what was asked for.
        known: all names that would have worked.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ";"
    return UnknownName(f'unknown {kind} "{name}"{hint} known: {", ".join(names)}')
