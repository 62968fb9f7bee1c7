"""Count a network: parameters, non-zeros, bytes, multiply-accumulates; per layer and in all. Exact integers, one definition.

Counts what convolution and linear *modules* do when the network runs in eval mode, so a layer that is not run costs nothing and
one that is run twice costs twice. Works on the meta device, where neither weights nor activations take memory. Products of other
modules (attention's own, embeddings) are not counted; the modules that own such weights are listed in `Counts.uncounted`.

Start with `count(module, input_shape)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ops.layers import SparseConv2d, SparseLinear

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCount:
    """One convolution or linear module.

    Attributes:
        name: as in `module.named_modules()`.
        kind: "conv", "transposed conv" or "linear".
        shape: of the weight.
        density: nnz / weights.
        pattern: canonical text; "dense" for a layer that is not sparse or has density 1.
        nnz: kept weights.
        macs: multiply-accumulates of kept weights: nnz x output positions (input positions if transposed) x batch.
        dense_macs: as if all weights were kept.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    pattern: str
    nnz: int
    macs: int
    dense_macs: int


@dataclass(frozen=True)
class Counts:
    """A network's costs.

    Attributes:
        params: all parameters, biases and norms included, zeros included. Shared ones once; buffers are no parameters.
        nnz: params less the zeros of the masks.
        density: kept / all over the weights of convolution and linear modules (biases and norms left out); 1.0 without any.
        kept_weights: the kept ones of these; as `total_kept_weights` finds without running the network.
        weight_bytes: 4 per dense parameter; a layer with zeros in its mask costs 4 per kept weight and a bit per weight.
        dense_macs: multiply-accumulates of the convolution and linear modules that run, as if dense.
        macs: the same with kept weights only.
        conv_macs: the convolutions' part of dense_macs.
        layers: one `LayerCount` per convolution and linear module, in module order, those that do not run included.
        uncounted: names of other modules that own matrices (attention, embeddings, ...), whose products are not in the MACs.
    """

    params: int
    nnz: int
    density: float
    kept_weights: int
    weight_bytes: int
    dense_macs: int
    macs: int
    conv_macs: int
    layers: tuple[LayerCount, ...]
    uncounted: tuple[str, ...]


def count(module: nn.Module, input_shape_or_example: Sequence[int] | Tensor, batch: int = 1) -> Counts:
    """Run the module once in eval mode on zeros and count. The module is left as it was.

    Kept weights are counted by the mask where one was drawn (it has a zero), else they are those that a mask at the layer's target
    density will have. So a network has the same counts before and after its masks are drawn, and on the meta device.

    Args:
        module: the network, on any device, the meta device among them.
        input_shape_or_example: shape without the batch axis, or a tensor with one (only its shape and dtype are used).
        batch: number of samples the MACs are for.

    Returns:
        The counts.

    Raises:
        ValueError: the shape or batch is empty, or the module cannot take such an input.

    Source: bytes as in the size table of RigL, Evci et al. 2020 (arXiv:1911.11134): 32-bit values and a bitmap per sparse layer.
    """
    example = _example(module, input_shape_or_example, batch)
    positions: dict[nn.Module, int] = {}
    with _observed(module, positions), torch.no_grad():
        try:
            module(example)
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__} cannot take an input of shape {list(example.shape)}: {error}"
            ) from error

    layers = tuple(
        _layer_count(name, layer, positions.get(layer, 0))
        for name, layer in module.named_modules()
        if _kind(layer) is not None
    )
    params = sum(p.numel() for p in module.parameters())
    zeros = packed = 0
    seen: set[int] = set()  # a weight shared by two layers is stored once
    weights = kept = 0
    for found in layers:
        weight = module.get_submodule(found.name).weight
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        total = prod(found.shape)
        weights, kept = weights + total, kept + found.nnz
        zeros += total - found.nnz
        packed += -(-total // 8) if found.nnz < total else 0
    return Counts(
        params=params,
        nnz=params - zeros,
        density=kept / weights if weights else 1.0,
        kept_weights=kept,
        weight_bytes=4 * (params - zeros) + packed,
        dense_macs=sum(found.dense_macs for found in layers),
        macs=sum(found.macs for found in layers),
        conv_macs=sum(found.dense_macs for found in layers if found.kind != "linear"),
        layers=layers,
        uncounted=tuple(
            name
            for name, owner in module.named_modules()
            if _kind(owner) is None and any(p.dim() >= 2 for p in owner.parameters(recurse=False))
        ),
    )


def kept_weights(layer: nn.Module) -> int:
    """Weights a convolution or linear module keeps: by its mask if one was drawn (it has a zero), else by its target density."""
    if not isinstance(layer, SparseConv2d | SparseLinear):
        return prod(layer.weight.shape)  # type: ignore[arg-type]
    if layer.mask.is_meta:
        return layer.planned_nnz
    nnz = layer.nnz
    return nnz if nnz < layer.mask.numel() else layer.planned_nnz


def total_kept_weights(module: nn.Module) -> int:
    """Weights that all convolution and linear modules keep (see `kept_weights`), shared ones once; no biases, no norms.

    The network is not run, so it is quick, and the meta device will do.
    """
    layers = {id(layer.weight): layer for layer in module.modules() if _kind(layer) is not None}
    return sum(kept_weights(layer) for layer in layers.values())


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, _CONVS):
        return "conv"
    if isinstance(layer, _TRANSPOSED):
        return "transposed conv"
    return "linear" if isinstance(layer, nn.Linear) else None


def _layer_count(name: str, layer: Any, positions: int) -> LayerCount:
    total, nnz = prod(layer.weight.shape), kept_weights(layer)
    sparse = isinstance(layer, SparseConv2d | SparseLinear) and layer.density < 1
    return LayerCount(
        name=name,
        kind=str(_kind(layer)),
        shape=tuple(layer.weight.shape),
        density=nnz / total,
        pattern=str(layer.pattern) if sparse else "dense",
        nnz=nnz,
        macs=nnz * positions,
        dense_macs=total * positions,
    )


@contextmanager
def _observed(module: nn.Module, positions: dict[nn.Module, int]) -> Iterator[None]:
    """Eval mode, and every convolution and linear module adds the number of places its weights are applied at to `positions`."""

    def observe(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Every weight meets each output position once; the weights of a transposed convolution each input position.
        at, channels = (
            (inputs[0], layer.in_channels) if isinstance(layer, _TRANSPOSED) else (output, layer.weight.shape[0])
        )
        positions[layer] = positions.get(layer, 0) + at.numel() // channels

    training = {part: part.training for part in module.modules()}
    hooks = [part.register_forward_hook(observe) for part in training if _kind(part) is not None]
    module.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, was in training.items():
            part.training = was


def _example(module: nn.Module, given: Sequence[int] | Tensor, batch: int) -> Tensor:
    shape = tuple(given.shape[1:]) if isinstance(given, Tensor) else tuple(given)
    if batch < 1 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"expected an input shape and a batch of whole numbers >= 1, got {list(shape)} and {batch}")
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = given.dtype if isinstance(given, Tensor) else None if first is None else first.dtype
    return torch.zeros(batch, *shape, dtype=dtype, device="cpu" if first is None else first.device)
