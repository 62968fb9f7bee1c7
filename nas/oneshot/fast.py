"""Weighted sums of candidates, faster than one candidate after the other, with the same numbers. Start with `weighted_sum`.

Candidates are run layer by layer (`Runner`):
- what depends on the input alone (ReLU, pooling, the batch norm after it, slices) is computed once for all candidates and for all
  mixed operations that read the same state;
- the weight of a candidate that ends in a batch norm is that batch norm's scale;
- images are in torch.channels_last;
- on the CPU the backward pass of depthwise convolutions is ours (`nas.oneshot.fast_depthwise`), and so are batch norms, with the
  ReLU that follows or the sum that they end in (`nas.oneshot.fast_norms`).

A module whose class is not known here is called as it is, with its input as it came. The slow obvious twin is
`nas.oneshot.mixed.plain_sum`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.fast_depthwise import depthwise, is_fast
from nas.oneshot.fast_norms import constant, normalised_sum
from nas.oneshot.fast_norms import is_fast as is_fast_norm
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
    runner = Runner(None if board.checkpointing and torch.is_grad_enabled() else board, x, weights)
    candidates = list(mixed.candidates)
    total: Tensor | None = None
    for i in chosen:
        candidate = candidates[i]
        if isinstance(candidate, Zero):
            continue
        term = runner.run(candidate, runner.x, i) if is_known(candidate) else candidate(x) * weights[i]
        total = _plus(total, term)
    total = _plus(total, runner.rest())
    if total is None:  # nothing but "none"
        return cast(Tensor, candidates[chosen[0]](x)) * weights[chosen[0]]
    return total if runner.x is x else total.contiguous()


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


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
        weights: of the candidates.

    Attributes:
        x: the input in the memory format that is fastest.
        common: identities of what others may have computed or may want.
        ends: terms put off: the norm that is left to be taken, if any; of what; times which weight.
    """

    def __init__(self, board: GateBoard | None, x: Tensor, weights: Tensor) -> None:
        self.board = board
        self.weights = weights
        self.common = {id(x)}
        self.ends: list[tuple[nn.BatchNorm2d | None, Tensor, int]] = []
        self.x = self._channels_last(x) if x.ndim == 4 and not x.is_cuda else x

    def run(self, module: nn.Module, x: Tensor, i: int) -> Tensor | None:
        """module(x) times the i-th weight; None if it is to come with `rest`."""
        layers = deque(_layers(module))
        while layers:
            layer = layers.popleft()
            if _has_hooks(layer):
                x = layer(x)
            elif isinstance(layer, nn.Conv2d):
                x = self._convolution(layer, x)
            elif isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
                if id(x) in self.common and not layer.affine:
                    x = self._once(x, ("norm", layer.eps), lambda x=x, norm=layer: _normalised(norm, x))  # type: ignore[misc]
                elif not layers:
                    return self._last(layer, x, i)
                else:
                    relu = type(layers[0]) is nn.ReLU and not _has_hooks(layers[0]) and is_fast_norm(x)
                    x = _normalised(layer, x, relu)
                    if relu:
                        layers.popleft()
            elif isinstance(layer, FactorizedReduce) and _can_be_halved(layer):
                x = self._halves(layer, x)
                layers.appendleft(layer.norm)
            else:
                x = self._simple(layer, x)
        return self._last(None, x, i)

    def rest(self) -> Tensor | None:
        """The sum of the terms that `run` has put off."""
        total: Tensor | None = None
        left = self.ends
        while left:
            eps = next((norm.eps for norm, *_ in left if norm is not None), 0.0)
            now = [end for end in left if end[0] is None or end[0].eps == eps]
            left = [end for end in left if end[0] is not None and end[0].eps != eps]
            part = normalised_sum(
                [x for _, x, _ in now], *self._scales(now), eps=eps, normed=[norm is not None for norm, *_ in now]
            )
            total = _plus(total, part)
        return total

    def _scales(self, ends: Sequence[tuple[nn.BatchNorm2d | None, Tensor, int]]) -> tuple[Tensor, Tensor | None]:
        """Scale float32[len(ends), channels] and shift float32[channels] of a sum of terms."""
        indices = [i for *_, i in ends]
        own = self.weights if indices == list(range(len(self.weights))) else self.weights[indices]
        scales = own.float().unsqueeze(1).expand(-1, ends[0][1].shape[1])
        norms = [norm for norm, *_ in ends]
        if all(norm is None or norm.weight is None for norm in norms):
            return scales, None
        one, zero = constant(scales.shape[1], 1.0), constant(scales.shape[1], 0.0)
        factors = torch.stack([one if norm is None or norm.weight is None else norm.weight for norm in norms])
        shifts = torch.stack([zero if norm is None or norm.bias is None else norm.bias for norm in norms])
        return scales * factors, (scales * shifts).sum(0)

    def _last(self, norm: nn.BatchNorm2d | None, x: Tensor, i: int) -> Tensor | None:
        """x, normalised if there is a norm, times the i-th weight."""
        if is_fast_norm(x):
            self.ends.append((norm, x, i))
            return None
        weight = self.weights[i]
        if norm is None:
            return x * weight
        weight = weight if x.dtype in (torch.float16, torch.bfloat16) else weight.to(x.dtype)
        # Not merely expanded: torch's batch norm of version 2.13 then reads beyond it on the CPU, and gradients are NaN.
        scale = weight.expand(x.shape[1]).contiguous() if norm.weight is None else norm.weight * weight
        shift = None if norm.bias is None else norm.bias * weight
        return F.batch_norm(x, None, None, scale, shift, True, 0.0, norm.eps)

    def _simple(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A layer without parameters, or one that is called as it is."""
        if isinstance(layer, nn.ReLU) and not layer.inplace:
            return self._once(x, "relu", lambda: F.relu(x))
        if isinstance(layer, nn.MaxPool2d):
            key = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
            return self._once(x, ("max", *key), lambda: cast(Tensor, layer(x)))
        if isinstance(layer, nn.AvgPool2d):
            window = (layer.kernel_size, layer.stride, layer.padding)
            how = (layer.ceil_mode, layer.count_include_pad, layer.divisor_override)
            return self._once(x, ("average", *window, *how), lambda: cast(Tensor, layer(x)))
        return cast(Tensor, layer(x))

    def _convolution(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if is_fast(conv, x):
            x = x.contiguous(memory_format=torch.channels_last)
            return depthwise(x, weight_of(conv), conv.stride[0], conv.dilation[0])
        return cast(Tensor, conv(x))

    def _halves(self, module: FactorizedReduce, x: Tensor) -> Tensor:
        """All of a factorised reduction but the norm."""
        x = self._simple(module.relu, x)
        parts = []
        for start, conv in enumerate((module.conv0, module.conv1)):
            quarter = self._once(x, ("quarter", start), lambda x=x, start=start: _quarter(x, start))  # type: ignore[misc]
            parts.append(F.conv2d(quarter, weight_of(conv)))
        return torch.cat(parts, dim=1)

    def _channels_last(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x
        return self._once(x, "channels last", lambda: x.contiguous(memory_format=torch.channels_last))

    def _once(self, x: Tensor, key: object, make: Callable[[], Tensor]) -> Tensor:
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


def _normalised(norm: nn.BatchNorm2d, x: Tensor, relu: bool = False) -> Tensor:
    """norm(x), and the ReLU of it where `is_fast_norm`."""
    if not is_fast_norm(x):
        return cast(Tensor, norm(x))
    scale = constant(x.shape[1], 1.0) if norm.weight is None else norm.weight
    return normalised_sum([x], scale.unsqueeze(0), norm.bias, eps=norm.eps, relu=relu)


def _can_be_halved(module: FactorizedReduce) -> bool:
    return all(type(m) in _CONVOLUTIONS and not _has_hooks(m) for m in (module.conv0, module.conv1)) and not _has_hooks(
        module.relu
    )


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a chain of chains, in order; what has hooks is not taken apart."""
    if not _is_chain(module) or _has_hooks(module):
        return [module]
    return [layer for child in module._modules.values() if child is not None for layer in _layers(child)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
