"""Run an exported network on the sparse CPU kernels: `runtime("exported/")`.

Needs torch, numpy and numba beside this project's `ops`; nothing of the search.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from nas.errors import NasError
from nas.weights_file import load_weights
from ops.plan import Choose, lower
from ops.runtime import Runtime

__all__ = ["DeployError", "exported_shape", "load_network", "runtime"]

# As written by nas.export (nas/export/folder.py, which imports what a deployed network must not need).
_SOURCE, _WEIGHTS, _VERIFICATION = "network.py", "weights.safetensors", "verification.json"


class DeployError(NasError, ValueError):
    """A folder that is no usable export, or an input it cannot be run on; says which and what to do."""


def runtime(
    folder: str | Path,
    *,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    threads: int = 1,
    choose: Choose | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Runtime:
    """Load an exported network for the sparse CPU kernels of this machine.

    Args:
        folder: written by `nas export` or `Run.export`, with network.py among its formats.
        batch: inputs per call; a runtime is made for one batch size.
        input_shape: of one input, without the batch axis; as exported unless given.
        threads: of the sparse kernels.
        choose: picks the kernel of each layer, see `ops.plan.lower`.
        progress: called as progress(done, total, name of the operation) while weights are packed; the first time on a machine
            that takes some seconds, because kernels are compiled.

    Returns:
        A callable: float32[batch, *input_shape] -> the network's result, equal to the exported network up to rounding.

    Raises:
        DeployError: the folder is no export, lacks network.py, or the input shape is unknown or does not fit.
    """
    place = Path(folder).expanduser()
    network = load_network(place)
    shape = input_shape if input_shape is not None else exported_shape(place)
    if batch < 1:
        raise DeployError(f"the batch must be at least 1, got {batch}")
    try:
        plan = lower(network, torch.zeros(batch, *shape), choose)
    except ValueError as error:
        raise DeployError(f"{place}: {error}") from error
    return Runtime(plan, threads, progress)


def load_network(folder: Path) -> nn.Module:
    """The exported network itself, in eval mode.

    Raises:
        DeployError: no export, or damaged.
    """
    source = folder / _SOURCE
    if not source.is_file():
        raise DeployError(
            f'expected an exported network in {folder}, found no {_SOURCE} there; export with the format "source" among '
            "`formats` (it is by default)"
        )
    spec = importlib.util.spec_from_file_location(f"exported_network_{abs(hash(str(source.resolve())))}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        network: nn.Module = module.load(folder) if _installed("safetensors") else _loaded(module, folder)
    except Exception as error:
        raise DeployError(f"{source}: the network cannot be loaded: {type(error).__name__}: {error}") from error
    return network.eval()


def _installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _loaded(module: ModuleType, folder: Path) -> nn.Module:
    """What the export's own `load` does, where the package it takes for that is not installed."""
    network: nn.Module = module.Network()
    load_weights(network, folder / _WEIGHTS)
    return network


def exported_shape(folder: Path) -> tuple[int, ...]:
    """Shape of one input, as exported.

    Raises:
        DeployError: the folder does not say, or the network has several inputs.
    """
    try:
        content: dict[str, Any] = json.loads((folder / _VERIFICATION).read_text(encoding="utf-8"))
        inputs = content["inputs"]
    except (OSError, ValueError, KeyError) as error:
        raise DeployError(
            f"{folder / _VERIFICATION} does not say the input shape ({type(error).__name__}: {error}); pass input_shape=..."
        ) from error
    if len(inputs) != 1:
        raise DeployError(f"{folder}: the runtime takes networks of one input, this one has {len(inputs)}")
    return tuple(int(n) for n in inputs[0]["shape"])
