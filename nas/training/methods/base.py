"""What a sparsity method is, and `Holder`, which keeps pruned weights at zero.

A method decides which weights of a model's sparse layers are kept, and when that changes. The trainer calls it around every
step; it asks `ops` for exact counts. Layers with density 1 are not touched by any method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from ops.layers import SparseConv2d, SparseLinear, sparse_layers

SparseLayer = SparseConv2d | SparseLinear


class SparsityMethod(ABC):
    """Decides the masks during one training. Made anew for each; the trainer calls, in this order:

    `begin` once (or `load_state`, where a training goes on), then per step `before_step`, `after_backward`, (the optimizer's
    step), `after_step`; `finish` once at the end. Between two steps `state` may be asked for.
    """

    @abstractmethod
    def begin(
        self, model: nn.Module, total_steps: int, generator: torch.Generator, settle_by: int | None = None
    ) -> None:
        """Set the initial masks.

        Args:
            model: on its device, before the first step.
            total_steps: optimizer steps that will be made.
            generator: on the CPU; the only source of chance, so that one seed gives one result.
            settle_by: steps after which every layer must have its final density, and keep it; at least 1. None: whenever the
                method likes. A schedule that would take longer is shrunk into it.
        """

    def state(self) -> dict[str, Tensor]:
        """What the method knows after a step that is neither in the model nor in the optimizer nor in the generator."""
        return {}

    @abstractmethod
    def load_state(
        self, model: nn.Module, total_steps: int, state: Mapping[str, Tensor], settle_by: int | None = None
    ) -> None:
        """In place of `begin`: go on where another object was when it gave `state`. Draws nothing and leaves the model as it is.

        Args:
            model: on its device, with the weights and masks of that moment.
            total_steps: as given to that object's `begin`; so too `settle_by`.
            state: tensors on any device.

        Raises:
            KeyError, RuntimeError: the state is not one of this method on such a model.
        """

    def before_step(self, step: int) -> None:  # noqa: B027 - may do nothing
        """Before the forward pass of step 0 .. total_steps - 1."""

    def after_backward(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        """After the backward pass. True: this step changed the masks instead, the optimizer must not step."""
        return False

    @abstractmethod
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer's step (or its omission): masks must hold when this returns."""

    def finish(self) -> None:  # noqa: B027 - may do nothing
        """After the last step: leave nothing switched on. Called after errors too."""


def targets(model: nn.Module) -> list[tuple[str, SparseLayer]]:
    """The layers a method works on: sparse ones with a target density below 1, with their names, in module order."""
    return [(name, layer) for name, layer in sparse_layers(model) if layer.density < 1.0]


class Holder:
    """Sets weights and optimizer slots outside the masks to zero, for all layers in one call.

    With `weight * mask` in the forward pass the gradient outside is zero and nothing would move there by itself; but a slot
    filled before the mask changed (momentum, Adam's averages) would revive pruned weights.

    Args:
        layers: what to hold.
    """

    def __init__(self, layers: list[tuple[str, SparseLayer]]) -> None:
        self._weights: list[Tensor] = [layer.weight for _, layer in layers]
        self._layers = [layer for _, layer in layers]
        self._tensors: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._known = -1

    def masks_changed(self) -> None:
        """Say that a mask is another one than at the last `hold`."""
        self._known = -1

    @torch.no_grad()
    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero everything outside the masks."""
        if not self._layers:
            return
        if len(optimizer.state) != self._known:  # the optimizer makes its slots in its first step
            self._collect(optimizer)
        torch._foreach_mul_(self._tensors, self._masks)

    def _collect(self, optimizer: torch.optim.Optimizer) -> None:
        self._tensors, self._masks = [], []
        for weight, layer in zip(self._weights, self._layers):
            mask = torch.empty_like(weight).copy_(
                layer.mask
            )  # the weight's type and memory layout: one fast call below
            slots = list(slots_of(optimizer, weight).values())
            self._tensors += [weight, *slots]
            self._masks += [mask] * (1 + len(slots))
        self._known = len(optimizer.state)


def slots_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors that have one entry per weight: momentum_buffer, exp_avg, exp_avg_sq ..."""
    if weight not in optimizer.state:
        return {}
    state = optimizer.state[weight]
    return {name: slot for name, slot in state.items() if isinstance(slot, Tensor) and slot.shape == weight.shape}


def last_change(total_steps: int, settle_by: int | None) -> int:
    """The step after which masks have their final density at the latest: `settle_by`, or the end of the training."""
    return total_steps if settle_by is None else max(1, min(total_steps, settle_by))


def check_share(method: str, name: str, value: object, *, low: float = 0.0, high: float = 1.0) -> float:
    """An option that is a share of something, in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"method_options: {method} {name}: expected a number in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def check_steps(method: str, name: str, value: object) -> int | None:
    """An option that is a number of steps or updates, or None for the default."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"method_options: {method} {name}: expected a whole number >= 1, got {value!r}")
    return value
