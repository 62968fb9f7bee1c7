"""Ways to find the masks of sparse layers during training.

Start with `base.SparsityMethod`, the interface, and `METHODS`, what there is. A new method is one file and one line here;
`tests/conformance/test_sparsity_methods.py` then holds it to the laws that all of them keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from nas.errors import ConfigError, unknown_name
from nas.training.methods.base import SparsityMethod
from nas.training.methods.fixed import Fixed
from nas.training.methods.gradual import Gradual
from nas.training.methods.hydra import Hydra
from nas.training.methods.rigl import RigL
from nas.training.methods.static import Static

METHODS: dict[str, type[SparsityMethod]] = {
    "static": Static,
    "gradual": Gradual,
    "rigl": RigL,
    "hydra": Hydra,
    "fixed": Fixed,
}

__all__ = ["METHODS", "SparsityMethod", "make_method"]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> SparsityMethod:
    """A method by name.

    Raises:
        UnknownName: no such method.
        ConfigError: an option that it does not have, or a senseless value.
    """
    if name not in METHODS:
        raise unknown_name("sparsity method", str(name), METHODS)
    known = list(inspect.signature(METHODS[name]).parameters)
    for key in options or {}:
        if key not in known:
            raise ConfigError(f'method_options: "{name}" has no option "{key}"; known: {", ".join(known) or "none"}')
    return METHODS[name](**(options or {}))
