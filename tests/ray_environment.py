"""The environment variables that Ray sets in this process, undone after a test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def restored_environment() -> Iterator[None]:
    """Put variables back as they were, but for how Ray authenticates: a process that has started Ray once keeps to that, and so
    must what it starts later."""
    before: Mapping[str, str] = dict(os.environ)
    try:
        yield
    finally:
        kept = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
        os.environ.clear()
        os.environ.update({**before, **kept})
