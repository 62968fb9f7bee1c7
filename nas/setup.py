"""From plain data to what a worker process needs: the run's config, folder, data and space. Start with `prepare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nas.config import RunConfig, load_config
from nas.data import Data, load_data
from nas.errors import ConfigError, DataError, UnknownName
from nas.shipped import DATA, SPACE, data_digest, read_data, shipped_digest, space_file
from search_spaces import Space, SpaceError, get_space
from search_spaces.registry import find_space_file


def prepare(plain: Mapping[str, Any]) -> tuple[RunConfig, Path, Data, Space]:
    """Config, run folder, data and space from `plain` = {"config" (JSON), "name", "folder", "space_folder"}, all text.

    Raises:
        ConfigError, DataError: this machine has not what the config names; says what.
    """
    config = load_config(json.loads(plain["config"]), name=plain["name"])
    folder = Path(plain["folder"])
    data = _data(config, folder)
    space_folder = Path(plain["space_folder"]) if plain["space_folder"] else None
    space = make_space(_with_space_file(config, folder, space_folder), data.input_shape, data.classes, space_folder)
    return config, folder, data, space


def _data(config: RunConfig, folder: Path) -> Data:
    """The run's data, as they are here; what the driver sent where they are not, or are others."""
    sent = folder / DATA
    try:
        data = make_data(config)
    except (DataError, UnknownName):
        if sent.is_file():
            return read_data(sent)
        raise
    if sent.is_file() and shipped_digest(sent) != data_digest(data):
        return read_data(sent)
    return data


def _with_space_file(config: RunConfig, folder: Path, space_folder: Path | None) -> RunConfig:
    """The config, with the run's own copy of the space file in place of one that is not here or is another."""
    named = space_file(config)
    copy = folder / SPACE / named.name
    if not named.name or not copy.is_file():
        return config
    with suppress(SpaceError, OSError):
        if find_space_file(str(named), space_folder).read_bytes() == copy.read_bytes():
            return config
    function = config.space["name"].rpartition(":")[2]
    return replace(config, space=config.space | {"name": f"{copy}:{function}"})


def make_data(config: RunConfig) -> Data:
    """Load the run's data set.

    Raises:
        DataError: it cannot be had; says why and what to do.
    """
    section = config.data
    return load_data(
        section.name,
        validation=section.validation,
        seed=config.run.seed,
        path=section.path or None,
        image_size=section.image_size or None,
        limit=section.limit or None,
        label=section.label or None,
        test=section.test or None,
    )


def make_space(
    config: RunConfig,
    input_shape: tuple[int, ...],
    classes: int,
    folder: Path | None,
    *,
    function: Callable[..., nn.Module] | None = None,
) -> Space:
    """The run's space, fitted to the data; `function` stands in for the one the config names.

    Raises:
        ConfigError: unknown space or option, or a space that cannot take such data.
    """
    options = {key: value for key, value in config.space.items() if key != "name"}
    for name in ("input_shape", "classes"):
        if name in options:
            raise ConfigError(f"[space] {name}: comes from the data; leave it out")
    try:
        named = config.space["name"] if function is None else function
        return get_space(named, input_shape=input_shape, classes=classes, folder=folder, **options)
    except SpaceError as error:
        raise ConfigError(f"[space] {error}") from error
    except TypeError as error:
        raise ConfigError(
            f"[space] {config.space['name']}: {error}; check the types of its options {options}"
        ) from error
