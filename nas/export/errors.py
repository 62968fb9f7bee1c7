"""The one error of this package.

NasError
└── ExportError    a network that cannot be written, or whose written form does not compute the same
"""

from __future__ import annotations

from nas.errors import NasError


class ExportError(NasError, RuntimeError):
    """A network cannot be exported, or an exported form does not agree with the network; nothing was written."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, or its type's name: what fits into a one-line message."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()[:300]
    return type(error).__name__
