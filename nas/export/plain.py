"""A copy of a network in which every layer is one of torch's own: sparse layers become plain ones, zeros written in.

What it does not do: change the network it is given, or simplify it. The copy is on the CPU, in evaluation mode, and
computes what the original computes.

Start with `plain_copy`, which also says which layers were sparse and where their zeros are (`SparseLayer`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.export.errors import ExportError, first_line
from ops.layers import sparse_layers

# Methods a subclass may replace without changing what the layer computes.
_HARMLESS = frozenset({"__init__", "__repr__", "extra_repr", "reset_parameters", "__doc__", "__module__"})


@dataclass(frozen=True)
class SparseLayer:
    """Where the zeros of one layer are.

    Attributes:
        name: the layer's name in the original network.
        pattern: canonical text, e.g. "2:4".
        target: the density asked for, in (0, 1].
        mask: bool, the weight's shape [out, in/groups, *kernel]; False is a zero.
    """

    name: str
    pattern: str
    target: float
    mask: Tensor

    @property
    def weights(self) -> int:
        """Entries of the weight, zeros included."""
        return self.mask.numel()

    @property
    def kept(self) -> int:
        """Entries the mask keeps."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """Fraction kept, exactly as in the file."""
        return self.kept / self.weights


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU in evaluation mode.

    Raises:
        ExportError: the network cannot be copied, or it has parameters that are not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ExportError(
                f"expected weights, found a parameter on the meta device: {name}; build and train the network first"
            )
        if parameter.dtype != torch.float32:
            raise ExportError(
                f"expected float32 parameters, found {name} of {parameter.dtype}; call .float() on the network first"
            )
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:
        raise ExportError(
            f"expected a network that copy.deepcopy can copy, found {type(model).__name__} which raises "
            f"{type(error).__name__}: {first_line(error)}; keep only parameters, buffers and plain values on the network"
        ) from error


def plain_copy(model: nn.Module) -> tuple[nn.Module, dict[str, SparseLayer]]:
    """Copy a network and turn its sparse layers into plain torch layers that hold the zeros.

    A layer whose masked weight equals its weight keeps the very same parameter, so weights shared between layers stay
    shared.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy, and the layers that have zeros by their names in the model, in module order.

    Raises:
        ExportError: no mask was drawn for a layer whose density is below 1, or see `detached_copy`.
    """
    plain = detached_copy(model)
    sparse: dict[str, SparseLayer] = {}
    for name, layer in sparse_layers(plain):
        mask = layer.mask.detach().clone()
        if bool(mask.all()) and layer.planned_nnz < mask.numel():
            raise ExportError(
                f"{name}: expected a mask of density {layer.density:g} ({layer.pattern}), found one that keeps every weight; "
                "train the network first, or draw masks with ops.layers.draw_masks_"
            )
        if layer.density < 1.0 or not bool(mask.all()):
            sparse[name] = SparseLayer(name, str(layer.pattern), float(layer.density), mask)
        weight = torch.where(mask, layer.weight.detach(), 0.0)
        if not torch.equal(weight, layer.weight):
            layer.weight = nn.Parameter(weight)
        base = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        for extra in [key for key in (*layer._buffers, *layer._parameters) if key not in ("weight", "bias")]:
            delattr(layer, extra)
        layer.__class__ = base  # type: ignore[assignment]
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            _settle(module)
    for module in plain.modules():
        layer_class = torch_class(module)
        if layer_class is not None and layer_class is not type(module):
            module.__class__ = layer_class
    return plain, sparse


def _settle(module: nn.Module) -> None:
    """Replace re-parametrised tensors by their present values.

    torch's own remove_parametrizations changes the class, which the copy shares with the network it was made from.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    values = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that computes exactly what `module` computes, if there is one; None for a user's module.

    A user's subclass counts as its torch base if it replaces nothing but the constructor and the printing.
    """
    if "forward" in vars(module):
        return None
    replaced: set[str] = set()
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules"):
            if cls in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Container):
                return None
            return None if any(hasattr(cls, name) for name in replaced - _HARMLESS) else cls
        if any(isinstance(value, property) for value in vars(cls).values()):
            return None
        replaced |= {name for name, value in vars(cls).items() if callable(value)}
    return None
