"""NNI's model spaces and ours: one as the other. Needs the package nni (`pip install 'sparse-nas[nni]'`), 3.0.

`space_from_nni` makes a mutable of NNI (a `MutableDict`, or a ModelSpace of `nni.nas` or its hub, which need pytorch_lightning) a
space of ours, so that every searcher, density and pattern of ours applies. `space_to_nni` gives the decisions of a space of ours as
a `MutableDict`, and `architecture_from_nni` takes a sample of it back. Samples are plain JSON; `nni.load`, which runs pickles, is
not used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

from torch import nn

from nas.errors import ConfigError
from search_spaces import Architecture, Space, SpaceError
from search_spaces.architecture import Value
from search_spaces.chooser import Chooser

MAX_OPTIONS = 10_000
"""Of one decision; a choice of several among many has one option per combination."""


def space_from_nni(
    mutable: Any,
    name: str,
    build: Callable[[Any], nn.Module] | None = None,
    *,
    densities: Sequence[float] = (),
    rules: Sequence[str] = ("uniform",),
    points: int = 5,
) -> Space:
    """A space of ours with the choices of an NNI mutable.

    Categorical becomes a decision among its values; CategoricalMultiple one among the combinations it allows; Numerical one among
    `points` values spread over its range (by its quantiles), or among its own steps where it is quantized.

    Args:
        mutable: anything with `simplify()` and `freeze(sample)`: `nni.mutable.MutableDict`, a ModelSpace, ...
        name: of the space.
        build: makes a module of what `freeze` gives; not needed where that is a module, as of a ModelSpace.
        densities: if given, the network's overall density is decided too, and spread by one of `rules`.
        rules: allocation rules among which to decide.
        points: options of a Numerical.

    Raises:
        ConfigError: nni is not installed, or a choice cannot be listed.
    """
    choices = {label: _options(label, symbol, points) for label, symbol in mutable.simplify().items()}

    def network(c: Chooser) -> nn.Module:
        sample = {}
        for label, values in choices.items():
            codes = [_code(value) for value in values]
            sample[label] = values[codes.index(c.choice(label, codes))]
        frozen = mutable.freeze(sample)
        module = frozen if build is None else build(frozen)
        return c.allocate("sparsity", module, list(densities), list(rules)) if densities else module

    return Space(network, name)


def space_to_nni(space: Space, draws: int = 500, seed: int = 0) -> Any:
    """The decisions of a space as an `nni.mutable.MutableDict` of Categoricals, label = name of the decision.

    NNI's samples decide everything at once: decisions that only some architectures ask are among them, and count for nothing in
    the others. The decisions are those of `draws` random architectures.

    Raises:
        ConfigError: nni is not installed.
    """
    mutables = _nni()
    offered: dict[str, list[Value]] = {}
    generator = random.Random(seed)

    def decide(name: str, options: tuple[Value, ...]) -> Value:
        seen = offered.setdefault(name, [])
        seen.extend(option for option in options if option not in seen)
        return generator.choice(options)

    for _ in range(draws):
        space.draw(decide)
    return mutables.MutableDict({name: mutables.Categorical(values, label=name) for name, values in offered.items()})


def architecture_from_nni(space: Space, sample: Mapping[str, Any]) -> Architecture:
    """The architecture of `space` that a sample of `space_to_nni(space)` stands for; labels that it does not ask are ignored.

    Raises:
        SpaceError: a decision is missing, or its value is not offered by this architecture.
    """

    def decide(name: str, options: tuple[Value, ...]) -> Value:
        if name not in sample:
            raise SpaceError(f"{space.name}: the sample does not decide {name!r}; options: {list(options)}")
        if sample[name] not in options:
            raise SpaceError(f"{space.name}: decision {name!r}: expected one of {list(options)}, got {sample[name]!r}")
        return sample[name]

    return space.draw(decide)


def sample_from_architecture(architecture: Architecture) -> dict[str, Any]:
    """The decisions of an architecture as NNI's labels; JSON."""
    return dict(architecture.as_dict())


def _nni() -> Any:
    try:
        import nni.mutable
    except ModuleNotFoundError as error:
        raise ConfigError(
            "NNI's spaces need the Python package nni, which is not installed; install it with pip install 'sparse-nas[nni]'"
        ) from error
    return nni.mutable


def _options(label: str, symbol: Any, points: int) -> list[Any]:
    """The values of one choice, in a fixed order."""
    mutables = _nni()
    if isinstance(symbol, mutables.Categorical):
        return list(symbol.values)
    if isinstance(symbol, mutables.CategoricalMultiple):
        values, chosen = list(symbol.values), symbol.n_chosen
        sizes = range(len(values) + 1) if chosen is None else [chosen]
        count = sum(comb(len(values), size) for size in sizes)
        if count > MAX_OPTIONS:
            raise ConfigError(f"{label}: {count:,} combinations of {len(values)} values are too many to list")
        return [list(picked) for size in sizes for picked in combinations(values, size)]
    if isinstance(symbol, mutables.Numerical):
        shares = [(i + 0.5) / points for i in range(points)]
        spread = [float(symbol.distribution.ppf(share)) for share in shares]
        step = symbol.quantize
        return list(dict.fromkeys(spread if step is None else [round(value / step) * step for value in spread]))
    raise ConfigError(
        f"{label}: expected a Categorical, CategoricalMultiple or Numerical, found {type(symbol).__name__}; simplify the space"
    )


def _code(value: Any) -> Value:
    """A value as an option of ours: scalars as they are, anything else as text."""
    return value if isinstance(value, str | int | float | bool) else repr(value)
