"""From plain data to what a worker process needs: the run's config, folder, data and space. Start with `prepare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nas.config import RunConfig, load_config
from nas.data import Data, load_data
from nas.errors import ConfigError
from search_spaces import Space, SpaceError, get_space


def prepare(plain: Mapping[str, Any]) -> tuple[RunConfig, Path, Data, Space]:
    """Config, run folder, data and space from `plain` = {"config" (JSON), "name", "folder", "space_folder"}, all text.

    Raises:
        ConfigError, DataError: this machine has not what the config names; says what.
    """
    config = load_config(json.loads(plain["config"]), name=plain["name"])
    data = make_data(config)
    space_folder = Path(plain["space_folder"]) if plain["space_folder"] else None
    space = make_space(config, data.input_shape, data.classes, space_folder)
    return config, Path(plain["folder"]), data, space


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
