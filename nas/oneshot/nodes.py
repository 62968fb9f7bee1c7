"""The nodes of a network (units, not weights), masks that drop some of them, and the smaller network that is left.

A *node* is a hidden unit: an output of a hidden linear layer, or an output channel of a convolution. Nodes that can only be dropped
together are one node of one *set*: channels tied by an addition or a product, and those of a depthwise convolution, which has its
input's. The network's inputs and outputs are no nodes, nor is what is tied to them.

Dropping a node masks the rows that write it and the columns that read it, so whatever batch norm makes of its empty channel reaches
nothing: the masked network computes exactly what the network without these nodes computes. Biases and batch-norm shifts of
dropped nodes are set to zero as well. Then their values are zero, and where a layer without a mask reads or writes them, gradients
are zero too, so they stay dropped in training.

Start with `node_sets`, `draw_node_mask`, `apply_node_mask_` and `without_nodes`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nas.oneshot.node_ties import NodeError, NodeSet, Port, tie
from ops.layers import SparseConv2d, SparseLayer, SparseLinear, is_depthwise
from ops.masks import zero_count
from ops.trace import PlanError, trace

__all__ = [
    "NodeError",
    "NodeMask",
    "NodeSet",
    "Port",
    "apply_node_mask_",
    "draw_node_mask",
    "kept_weights",
    "layer_masks",
    "node_sets",
    "without_nodes",
]


@dataclass(frozen=True, eq=False)
class NodeMask:
    """Which nodes of a network are kept.

    Attributes:
        sets: of the network.
        kept: per set bool[size], on the CPU; True is kept.
    """

    sets: tuple[NodeSet, ...]
    kept: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for nodes, kept in zip(self.sets, self.kept, strict=True):
            if kept.dtype != torch.bool or tuple(kept.shape) != (nodes.size,):
                raise ValueError(
                    f"nodes of {nodes.name}: expected a bool mask of shape [{nodes.size}], "
                    f"got {str(kept.dtype).removeprefix('torch.')}{list(kept.shape)}"
                )
            if not bool(kept.any()):
                raise ValueError(
                    f"nodes of {nodes.name}: the mask keeps none of {nodes.size}; at least one must be left"
                )


def node_sets(network: nn.Module, input_shape: Sequence[int]) -> tuple[NodeSet, ...]:
    """The sets of nodes of a network, in the order in which they are first written.

    Args:
        network: on any device, the meta device too; left as it is.
        input_shape: of one input, without the batch axis.

    Raises:
        NodeError: it cannot be decided which nodes belong together: an operation that mixes or reorders channels (concatenation,
            grouped convolution, layer norm), one that makes something of zero (sigmoid, adding a number), a part that cannot be
            traced, or a layer that only runs in training.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    example = torch.zeros((2, *input_shape), device="meta" if device.type == "meta" else "cpu")
    try:
        traced = trace(network, example)
    except PlanError as error:
        raise NodeError(str(error)) from error
    for path, reason in traced.opaque.items():
        raise NodeError(
            f"{path or type(network).__name__}: cannot be looked into ({reason}), so its nodes are not known; "
            "node masks work on chains of linear layers and convolutions, with additions: mlp and convnet"
        )
    sets, called = tie(traced.graph)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and name not in called:
            raise NodeError(
                f"{name}: does not run in evaluation mode (an auxiliary head, say), so who reads the nodes is not known; "
                "leave it out of the network"
            )
    return sets


def draw_node_mask(sets: Sequence[NodeSet], sparsity: float, generator: torch.Generator) -> NodeMask:
    """Keep ceil((1 - sparsity) * size) nodes of every set, at least one, chosen uniformly.

    Args:
        sets: of the network.
        sparsity: share of the nodes to drop, in [0, 1). Counts are exact for its decimal value (`ops.masks.zero_count`).
        generator: on the CPU; sets are drawn in order.

    Raises:
        ValueError: sparsity out of range.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"expected a node sparsity in [0, 1) (the share that is dropped), got {sparsity!r}")
    kept = []
    for nodes in sets:
        order = torch.randperm(nodes.size, generator=generator)
        mask = torch.ones(nodes.size, dtype=torch.bool)
        mask[order[: zero_count(nodes.size, 1 - sparsity)]] = False
        kept.append(mask)
    return NodeMask(tuple(sets), tuple(kept))


def layer_masks(network: nn.Module, mask: NodeMask) -> dict[str, Tensor]:
    """What a node mask keeps of each convolution and linear layer: name -> bool of the weight's shape, on the CPU."""
    masks = {
        name: torch.ones(layer.weight.shape, dtype=torch.bool, device="cpu")
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    for nodes, kept in zip(mask.sets, mask.kept):
        for port in nodes.writers:
            masks[port.layer][~port.spread(kept)] = False
        for port in nodes.readers:
            masks[port.layer][:, ~port.spread(kept)] = False
    return masks


def kept_weights(network: nn.Module, mask: NodeMask) -> tuple[int, int]:
    """Weights of convolutions and linear layers that a node mask keeps, and all of them; a layer used twice counts once."""
    masks = layer_masks(network, mask)
    return sum(int(kept.sum()) for kept in masks.values()), sum(kept.numel() for kept in masks.values())


@torch.no_grad()
def apply_node_mask_(network: nn.Module, mask: NodeMask) -> None:
    """Drop nodes, in place: rows and columns of dropped nodes leave the masks and become zero, and so do their biases and shifts.

    Sparse layers of density below 1 get the mask (what they had dropped before stays dropped). In other layers the weights are
    zero without a mask; training leaves them at zero (see the module).

    Args:
        network: the one `mask.sets` are of, or another build of it with the same layer names and shapes.
        mask: what to keep.
    """
    for name, kept in layer_masks(network, mask).items():
        layer = cast("nn.Conv2d | nn.Linear", network.get_submodule(name))
        kept = kept.to(layer.weight.device)
        if isinstance(layer, SparseLayer) and layer.density < 1:
            layer.set_mask(layer.mask & kept)
        else:
            layer.weight.masked_fill_(~kept, 0)
    for nodes, kept in zip(mask.sets, mask.kept):
        for port in (*nodes.writers, *nodes.norms):
            bias = cast("Tensor | None", getattr(network.get_submodule(port.layer), "bias", None))
            if bias is not None:
                bias.masked_fill_(~port.spread(kept).to(bias.device), 0)


@torch.no_grad()
def without_nodes(network: nn.Module, mask: NodeMask) -> nn.Module:
    """The network with the dropped nodes really removed: smaller layers, and equal outputs up to rounding.

    Args:
        network: left as it is; dropout apart, it and the result compute the same once the mask is applied to it.
        mask: what to keep.
    """
    small = copy.deepcopy(network)
    for nodes, kept in zip(mask.sets, mask.kept):
        for port in nodes.writers:
            _take_rows(small.get_submodule(port.layer), port.spread(kept))
        for port in nodes.norms:
            _take_rows(small.get_submodule(port.layer), port.spread(kept))
        for port in nodes.readers:
            _take_columns(small.get_submodule(port.layer), port.spread(kept))
    return small


def _take_rows(layer: nn.Module, kept: Tensor) -> None:
    """Keep these outputs of a convolution or linear layer, or these features of a batch norm."""
    rows = kept.nonzero().squeeze(1)
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.ndim:  # not batch norm's count of batches
            _replace(layer, name, tensor.index_select(0, rows.to(tensor.device)))
    if isinstance(layer, nn.Conv2d):
        if is_depthwise(layer):  # its rows are its inputs too
            layer.groups = layer.in_channels = len(rows) // (layer.out_channels // layer.in_channels)
        layer.out_channels = len(rows)
    elif isinstance(layer, nn.Linear):
        layer.out_features = len(rows)
    else:
        layer.num_features = len(rows)  # type: ignore[assignment]


def _take_columns(layer: nn.Module, kept: Tensor) -> None:
    """Keep these inputs of a convolution or linear layer."""
    columns = kept.nonzero().squeeze(1)
    names = ("weight", "mask") if isinstance(layer, SparseConv2d | SparseLinear) else ("weight",)
    for name in names:
        tensor = cast(Tensor, getattr(layer, name))
        _replace(layer, name, tensor.index_select(1, columns.to(tensor.device)))
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = len(columns)
    else:
        layer.in_features = len(columns)  # type: ignore[assignment]


def _replace(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if name in layer._parameters:
        old = cast(nn.Parameter, layer._parameters[name])
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        layer._buffers[name] = tensor
