"""`SparseConv2d` and `SparseLinear`: torch's layers with a mask that is stored, never guessed from zeros.

A layer has a *target* (`density`, `pattern`: what is wanted, checked for legality at once) and a `mask` (what is kept now; a bool
buffer, all True when built). Whoever trains the network draws the masks; the layer multiplies by them, reports `nnz`, and hands
out the gradient at the product for methods that grow weights. A layer of density 1 is torch's own layer, bit for bit.

Masking the optimizer's state is not done here: a layer does not know its optimizer.
Start with `sparsify(module, density, pattern)`, `draw_masks_(module, generator)` and `sparse_layers(module)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.masks import check_density, check_fixed_density, kept_count, random_mask
from ops.patterns import Pattern, check_pattern, parse_pattern


class SparseLayer(nn.Module):
    """What both sparse layers share; use the two below. W_eff = weight * mask, with weight and mask of equal shape.

    Attributes:
        weight: float[out, in / groups, *kernel], the parameter. Zero outside the mask after `apply_mask_`.
        mask: bool of weight's shape, a buffer; True is kept.
        dense_grad: gradient of the loss at W_eff, float of weight's shape, summed over backward passes since capturing was switched
            on; None before. Not in the state dict.
    """

    weight: Tensor
    mask: Tensor
    dense_grad: Tensor | None

    def _become_sparse(self, density: float, pattern: str | Pattern) -> None:
        """Second half of the constructors: everything the plain layer does not have."""
        self.register_buffer("mask", torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device))
        self.register_buffer("dense_grad", None, persistent=False)
        self._capture = False
        self._density, self._pattern = self._legal_target(density, pattern, "")

    def _parameters_shared(self) -> None:
        """The weight was replaced by another layer's: make what has its shape and device."""
        self.mask = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)

    @property
    def density(self) -> float:
        """The target: fraction of the weights to keep, in (0, 1]. Change it with `set_target`."""
        return self._density

    @property
    def pattern(self) -> Pattern:
        """The target's pattern; without meaning at density 1."""
        return self._pattern

    def set_target(self, density: float, pattern: str | Pattern | None = None, name: str = "") -> None:
        """Change density and pattern. The mask stays as it is, but at density 1 it becomes all True.

        Args:
            density: fraction to keep, in (0, 1].
            pattern: None leaves it.
            name: of the layer, for messages.

        Raises:
            PatternError: the pattern is impossible on this weight; names axis, length, group and cure.
            ValueError: density out of range, or not that of an N:M pattern.
        """
        self._density, self._pattern = self._legal_target(density, self._pattern if pattern is None else pattern, name)
        if self._density == 1:
            self.mask.fill_(True)

    @property
    def nnz(self) -> int:
        """Number of weights the mask keeps now."""
        if self.mask.is_meta:
            raise RuntimeError(
                "a mask on the meta device has no values to count; planned_nnz says how many are to be kept"
            )
        return int(self.mask.sum())

    @property
    def planned_nnz(self) -> int:
        """Number of weights a mask drawn at the target keeps."""
        return kept_count(self.weight.shape, self._density, self._pattern) if self._density < 1 else self.weight.numel()

    def effective_weight(self) -> Tensor:
        """weight * mask; the weight itself at density 1. Gradients arrive at the weight masked."""
        if self._capture and torch.is_grad_enabled() and self.weight.requires_grad:
            effective = self._masked()
            effective.register_hook(self._add_dense_grad)
            return effective
        return self.weight if self._density == 1 else self._masked()

    def _masked(self) -> Tensor:
        # Read as bytes: float x bool is 3 times slower on the CPU (256 x 256: 40 us against 13 us).
        return self.weight * self.mask.view(torch.uint8)

    def set_mask(self, mask: Tensor) -> None:
        """Take over a mask and set the weights outside it to exactly 0.

        Any structure is taken: a method may pass through masks that are not yet of the target's pattern.

        Args:
            mask: bool of weight's shape; copied.

        Raises:
            TypeError: not bool.
            ValueError: another shape, or zeros in a layer of density 1.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a bool mask, got {mask.dtype}; mask.bool() if 0 means dropped")
        if mask.shape != self.mask.shape:
            raise ValueError(f"expected a mask of the weight's shape {list(self.weight.shape)}, got {list(mask.shape)}")
        if reason := self._not_dense(mask):
            raise ValueError(reason)
        with torch.no_grad():
            self.mask.copy_(mask)
        self.apply_mask_()

    def apply_mask_(self) -> None:
        """Set the weights outside the mask to exactly 0, in place. Call it after each step of the optimizer."""
        if self._density < 1:
            with torch.no_grad():
                self.weight.masked_fill_(~self.mask, 0)

    @property
    def capture_dense_grad(self) -> bool:
        """Whether backward passes of forward passes made from now on add to `dense_grad`. Switching it on starts from None."""
        return self._capture

    @capture_dense_grad.setter
    def capture_dense_grad(self, on: bool) -> None:
        self._capture = bool(on)
        if on:
            self.dense_grad = None

    def reset_parameters(self) -> None:
        """Fresh weights, as in torch's layer, and a mask that is all True."""
        super().reset_parameters()  # type: ignore[misc]
        if isinstance(self._buffers.get("mask"), Tensor):  # torch's constructor calls this before there is a mask
            self.mask.fill_(True)

    def extra_repr(self) -> str:
        target = f", density={self._density:.6g}" + (f", pattern={self._pattern}" if self._density < 1 else "")
        return super().extra_repr() + target

    def _add_dense_grad(self, grad: Tensor) -> None:
        grad = grad.detach()
        self.dense_grad = grad.clone() if self.dense_grad is None else self.dense_grad + grad

    def _legal_target(self, density: float, pattern: str | Pattern, name: str) -> tuple[float, Pattern]:
        return _legal_target(self, density, pattern, name or type(self).__name__)

    def _not_dense(self, mask: Tensor) -> str | None:
        if self._density == 1 and not mask.is_meta and not bool(mask.all()):
            zeros = mask.numel() - int(mask.sum())
            return (
                f"the mask has {zeros} zeros of {mask.numel()}, but the layer has density 1; give it its density first "
                "(density=... when building it, or set_target)"
            )
        return None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mask = state_dict.get(prefix + "mask")
        errors = args[-1]
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            errors.append(f"{prefix}mask: expected bool, got {mask.dtype}")
        elif isinstance(mask, Tensor) and (reason := self._not_dense(mask)):
            errors.append(f"{prefix}mask: {reason}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


class SparseConv2d(SparseLayer, nn.Conv2d):
    """`nn.Conv2d` with a fixed mask: same arguments, and `density` and `pattern` by name.

    Args:
        density: fraction of the weights to keep, in (0, 1].
        pattern: what stands or falls together, e.g. "2:4"; see `ops.patterns.parse_pattern`.

    Raises:
        PatternError: the pattern is impossible on this weight.
        ValueError: density out of range, or not that of an N:M pattern.
    """

    def __init__(
        self, *args: Any, density: float = 1.0, pattern: str | Pattern = "unstructured", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._become_sparse(density, pattern)

    def forward(self, input: Tensor) -> Tensor:
        """float[batch, in, h, w] -> float[batch, out, h', w']; batch may be absent."""
        return self._conv_forward(input, self.effective_weight(), self.bias)


class SparseLinear(SparseLayer, nn.Linear):
    """`nn.Linear` with a fixed mask: same arguments, and `density` and `pattern` by name; see `SparseConv2d`."""

    def __init__(
        self, *args: Any, density: float = 1.0, pattern: str | Pattern = "unstructured", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._become_sparse(density, pattern)

    def forward(self, input: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        return F.linear(input, self.effective_weight(), self.bias)


def sparsify(
    module: nn.Module,
    density: float = 1.0,
    pattern: str | Pattern = "unstructured",
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Replace every `nn.Conv2d` and `nn.Linear` (not their subclasses) by its sparse twin, in place.

    The twins share the parameters, so an optimizer made before goes on working; hooks on the replaced layers are not carried over.
    A layer used at several places stays one layer. Layers that are sparse already are left as they are. If anything is
    illegal, nothing is replaced.

    Args:
        module: the network; changed.
        density: target of every replaced layer, in (0, 1].
        pattern: target of every replaced layer; legality is checked where density < 1.
        where: `where(name, layer)` says which layers to replace; None means all. Names as in `module.named_modules()`.

    Returns:
        `module` itself, unless it is a convolution or linear layer: then its twin.

    Raises:
        PatternError: illegal on a layer; names the layer and the cure.
        ValueError: density out of range, or not that of an N:M pattern.
    """
    chosen = {
        layer: name
        for name, layer in module.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear) and (where is None or where(name, layer))
    }
    for layer, name in chosen.items():
        _legal_target(layer, density, pattern, name or type(layer).__name__)
    return _replace(module, {layer: _twin(layer, density, pattern) for layer in chosen})


def sparse_layers(module: nn.Module) -> list[tuple[str, SparseConv2d | SparseLinear]]:
    """Name and layer of every sparse layer, in the order of `module.named_modules()`."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, SparseConv2d | SparseLinear)]


def draw_masks_(module: nn.Module, generator: torch.Generator) -> None:
    """Give every sparse layer of density below 1 a random mask at its target and zero the weights outside, in place.

    Args:
        module: the network, or a sparse layer.
        generator: on any device; layers are drawn in module order, so its state decides all masks.
    """
    for _, layer in sparse_layers(module):
        if layer.density < 1:
            layer.set_mask(
                random_mask(layer.weight.shape, layer.density, layer.pattern, generator).to(layer.mask.device)
            )


def is_depthwise(layer: nn.Module) -> bool:
    """Whether the layer is a convolution with one input channel per group, and more than one group."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.in_channels == layer.groups


def _legal_target(layer: nn.Module, density: float, pattern: str | Pattern, name: str) -> tuple[float, Pattern]:
    density = check_density(density, f"density of {name}")
    if density == 1:
        return density, parse_pattern(pattern)  # legal or not: a dense layer has no structure
    checked = check_pattern(pattern, tuple(layer.weight.shape), getattr(layer, "groups", 1), name)  # type: ignore[arg-type]
    check_fixed_density(checked, density, name)
    return density, checked


def _replace(module: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put every twin wherever its layer is used; returns the twin of `module` if it has one."""
    for parent in list(module.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in twins:
                parent._modules[child_name] = twins[child]
    return twins.get(module, module)


def _twin(
    layer: nn.Module,
    density: float,
    pattern: str | Pattern,
    conv: type[SparseConv2d] = SparseConv2d,
    linear: type[SparseLinear] = SparseLinear,
) -> SparseConv2d | SparseLinear:
    """The sparse layer of class `conv` or `linear` that shares the other's weight and bias."""
    common: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta", "density": density, "pattern": pattern}
    twin: SparseConv2d | SparseLinear
    if isinstance(layer, nn.Conv2d):
        twin = conv(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **common,
        )
    else:
        assert isinstance(layer, nn.Linear)  # by the caller's choice
        twin = linear(layer.in_features, layer.out_features, **common)
    for parameter_name in ("weight", "bias"):
        twin.register_parameter(parameter_name, layer._parameters[parameter_name])
    twin._parameters_shared()
    return twin.train(layer.training)
