"""Find a space by name: the shipped ones, or a function in the user's own file."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_spaces.architecture import SpaceError
from search_spaces.space import Space, SpaceFunction

SPACES: dict[str, str] = {
    "convnet": "search_spaces.convnet:convnet_space",
    "darts": "search_spaces.darts:darts_space",
    "mlp": "search_spaces.mlp:mlp_space",
    "nasbench201": "search_spaces.nasbench201:nasbench201_space",
    "nasnet": "search_spaces.nasnet:nasnet_space",
}
"""name -> where the function of the space's options is that makes the Space (imported when asked for)."""


def get_space(
    name: str | SpaceFunction,
    *,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    folder: Path | None = None,
    **options: Any,
) -> Space:
    """Make the space called `name`, fitted to the data.

    Args:
        name: a key of `SPACES`; or "module:function" / "file.py:function"; or the function itself. A function of the user's gets
            `input_shape` and `classes` if it has parameters of these names.
        input_shape: shape of one input without the batch axis: (channels, height, width) or (features,).
        classes: number of classes.
        folder: where a relative file or a module is looked for first (the folder of the config); then the working directory.
        **options: the space's own options.

    Raises:
        SpaceError: no such space, file or function; an option it does not have; an input shape it cannot take.
    """
    fitted: dict[str, Any] = {}
    if input_shape is not None:
        fitted["input_shape"] = tuple(input_shape)
    if classes is not None:
        fitted["classes"] = classes
    if isinstance(name, str) and ":" not in name:
        if name not in SPACES:
            near = difflib.get_close_matches(name, SPACES, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise SpaceError(
                f'unknown space "{name}"{hint} known: {", ".join(sorted(SPACES))}; '
                'your own: "module:function" or "file.py:function"'
            )
        module_name, _, function_name = SPACES[name].partition(":")
        maker = getattr(importlib.import_module(module_name), function_name)
        return maker(**fitted, **options)
    function = _load(name, folder) if isinstance(name, str) else name
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise SpaceError(f'space "{name}": expected a Python function of a chooser, got {function!r}') from error
    fitted = {key: value for key, value in fitted.items() if key in parameters}
    return Space(function, function.__name__, {**fitted, **options})


def _load(reference: str, folder: Path | None) -> SpaceFunction:
    where, _, function_name = reference.rpartition(":")
    if where.endswith(".py"):
        path = find_space_file(where, folder)
        module_name = f"_space_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise SpaceError(f'space "{reference}": {path} cannot be loaded as a Python file')
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            with _importable(path.resolve().parent, folder):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise SpaceError(f'space "{reference}": running {path} raised {type(error).__name__}: {error}') from error
    else:
        try:
            with _importable(folder, Path.cwd()):
                module = importlib.import_module(where)
        except (Exception, SystemExit) as error:
            raise SpaceError(
                f'space "{reference}": module "{where}" cannot be imported ({type(error).__name__}: {error}); '
                'or name a file: "my_space.py:fn"'
            ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise SpaceError(
            f'space "{reference}": no function "{function_name}" in {where}; functions there: {", ".join(names) or "none"}'
        )
    return function


def find_space_file(name: str, folder: Path | None) -> Path:
    """The user's space file: as named if absolute, else below `folder`, else below the working directory.

    Raises:
        SpaceError: it is in none of these places.
    """
    given = Path(name).expanduser()
    places = [given] if given.is_absolute() else [start / given for start in (folder, Path.cwd()) if start is not None]
    for path in places:
        if path.is_file():
            return path
    raise SpaceError(f'space file "{name}": no file {" nor ".join(str(path) for path in places)}')


@contextmanager
def _importable(*folders: Path | None) -> Iterator[None]:
    """Let modules in `folders` be imported, as if a script there had been started."""
    added = [str(folder) for folder in folders if folder is not None and str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)
