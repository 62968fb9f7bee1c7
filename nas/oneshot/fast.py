"""Weighted sums of candidates, faster than one candidate after the other, with the same numbers. Start with `weighted_sum`.

Candidates are run layer by layer (`Runner`):
- what depends on the input alone (ReLU, pooling, the batch norm after it, slices) is computed once for all candidates and for all
  mixed operations that read the same state;
- the weight of a candidate that ends in a batch norm is that batch norm's scale;
- images are in torch.channels_last, and on the CPU depthwise convolutions have a backward pass of ours
  (`nas.oneshot.fast_depthwise`).

A module whose class is not known here is called as it is, with its input as it came. The slow obvious twin is
`nas.oneshot.mixed.plain_sum`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.fast_depthwise import depthwise, is_fast
from nas.oneshot.mixed import GateBoard, MixedOp
from ops.candidates import FactorizedReduce, Zero
from ops.layers import SparseConv2d
from ops.learned import LearnedSparseConv2d, weight_of

_CONVOLUTIONS = (nn.Conv2d, SparseConv2d, LearnedSparseConv2d)
_LEAVES = (*_CONVOLUTIONS, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Identity, FactorizedReduce)
_ANY_LAYOUT = ("torch.nn.", "ops.", "search_spaces.", "nas.oneshot.")

_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_takes_any_layout: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def weighted_sum(mixed: MixedOp, x: Tensor, weights: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """As `nas.oneshot.mixed.plain_sum`, in the memory format of x."""
    board = mixed.board
    # Under checkpointing nothing is shared: the second forward pass of one sum alone must do what the first one did.
    runner = Runner(None if board.checkpointing and torch.is_grad_enabled() else board, x)
    total: Tensor | None = None
    for i in chosen:
        candidate = mixed.candidates[i]
        if isinstance(candidate, Zero):
            continue
        term = runner.run(candidate, runner.x, weights[i]) if is_known(candidate) else candidate(x) * weights[i]
        total = term if total is None else total + term
    if total is None:  # nothing but "none"
        zero = next(mixed.candidates[i] for i in chosen)
        return cast(Tensor, zero(x)) * weights[chosen[0]]
    return total if runner.x is x else total.contiguous()


def laid_out(network: nn.Module, x: Tensor) -> Tensor:
    """The input of a network in the memory format that is fastest: torch.channels_last if it is images.

    Not if the network has modules of other packages, which might not take it (`Tensor.view`), and on CUDA only in 16 bits.
    """
    if x.ndim != 4 or (x.is_cuda and not torch.is_autocast_enabled("cuda")):
        return x
    known = _takes_any_layout.get(network)
    if known is None:
        known = all((type(m).__module__ + ".").startswith(_ANY_LAYOUT) for m in network.modules())
        _takes_any_layout[network] = known
    return x.contiguous(memory_format=torch.channels_last) if known else x


def is_known(module: nn.Module) -> bool:
    """Whether `Runner` knows what a module and all modules in it compute."""
    known = _known.get(module)
    if known is None:
        known = type(module) in _LEAVES or (_is_chain(module) and all(is_known(m) for m in module.children()))
        _known[module] = known
    return known


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


class Runner:
    """Runs the candidates of one mixed operation on one input.

    Args:
        board: where values that others may share are kept; None: nothing is shared.
        x: the input.

    Attributes:
        x: the input in the memory format that is fastest.
    """

    def __init__(self, board: GateBoard | None, x: Tensor) -> None:
        self.board = board
        self.common = {id(x)}
        self.x = self._channels_last(x) if x.ndim == 4 and not x.is_cuda else x

    def run(self, module: nn.Module, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """module(x), times `scale` if there is one."""
        if _has_hooks(module):
            return _times(cast(Tensor, module(x)), scale)
        if _is_chain(module):
            layers = list(module.children())
            for layer in layers[:-1]:
                x = self.run(layer, x)
            return self.run(layers[-1], x, scale) if layers else _times(x, scale)
        if isinstance(module, nn.BatchNorm2d):
            return self._norm(module, x, scale)
        if isinstance(module, FactorizedReduce):
            return self._reduce(module, x, scale)
        return _times(self._layer(module, x), scale)

    def _layer(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            return self._convolution(module, x)
        if isinstance(module, nn.ReLU) and not module.inplace:
            return self._once(x, "relu", lambda: F.relu(x))
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            return self._once(x, repr(module), lambda: cast(Tensor, module(x)))
        return cast(Tensor, module(x))

    def _convolution(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if not is_fast(conv, x):
            return cast(Tensor, conv(x))
        x = x.contiguous(memory_format=torch.channels_last)
        return depthwise(x, weight_of(conv), conv.stride[0], conv.dilation[0])

    def _norm(self, norm: nn.BatchNorm2d, x: Tensor, scale: Tensor | None) -> Tensor:
        if norm.running_mean is not None or (scale is not None and scale.ndim > 0):
            return _times(cast(Tensor, norm(x)), scale)
        if id(x) in self.common and not norm.affine:
            return _times(self._once(x, f"norm {norm.eps}", lambda: cast(Tensor, norm(x))), scale)
        weight: Tensor | None = norm.weight
        bias: Tensor | None = norm.bias
        if scale is not None:
            scale = scale if x.dtype in (torch.float16, torch.bfloat16) else scale.to(x.dtype)
            # Not just expanded: torch 2.13 then reads beyond it, and gradients are NaN (test_nasbench201...).
            weight = scale.expand(x.shape[1]).contiguous() if weight is None else weight * scale
            bias = None if bias is None else bias * scale
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)

    def _reduce(self, module: FactorizedReduce, x: Tensor, scale: Tensor | None) -> Tensor:
        x = self._layer(module.relu, x)
        parts = []
        for start, conv in enumerate((module.conv0, module.conv1)):
            if type(conv) not in _CONVOLUTIONS or _has_hooks(conv):
                parts.append(conv(F.pad(x, (-start, start * module.odd) * 2)))
                continue
            quarter = self._once(x, f"quarter {start}", lambda start=start: _quarter(x, start))  # type: ignore[misc]
            parts.append(F.conv2d(quarter, weight_of(conv)))
        return self._norm(module.norm, torch.cat(parts, dim=1), scale)

    def _channels_last(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x
        return self._once(x, "channels last", lambda: x.contiguous(memory_format=torch.channels_last))

    def _once(self, x: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave before for the same x, if x is common to several candidates."""
        if self.board is None or id(x) not in self.common:
            return make()
        y = self.board.once(x, key, make)
        self.common.add(id(y))
        return y


def _quarter(x: Tensor, start: int) -> Tensor:
    """Every second row and column from `start` on; a last row or column of zeros where an odd size has none."""
    part = x[:, :, start::2, start::2]
    height, width = (x.shape[2] + 1) // 2 - part.shape[2], (x.shape[3] + 1) // 2 - part.shape[3]
    return F.pad(part, (0, width, 0, height)) if width or height else part


def _times(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
