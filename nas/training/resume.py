"""What a training is between two epochs, as tensors and JSON: taken out of one, put into another. Start with `TrainingState`.

Knows model, optimizer and chance; `nas.training.session` adds the rest. What a module keeps elsewhere than in its parameters and
buffers is not seen. Files are `nas.checkpoint`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingState:
    """A training after some epoch.

    Attributes:
        tensors: by name; parts are "model", "optimizer", "chance" and "method", e.g. "model/0.weight". They may be the training's
            own, so copy or save them before it goes on.
        facts: JSON: "history", "factors" and "device".
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def epochs(self) -> int:
        """How many epochs were trained."""
        return len(self.facts["history"])

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, by their names in it."""
        return {
            key.removeprefix(f"{name}/"): value for key, value in self.tensors.items() if key.startswith(f"{name}/")
        }


class Chance:
    """All sources of chance of one training: a stream per use, unrelated to each other, and torch's own for the layers.

    Args:
        seed: of all of them.
        device: on which batches are augmented and layers run.

    Attributes:
        order: of batches, on the CPU.
        augment: on the device.
        masks: on the CPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.order = torch.Generator().manual_seed(self._derive("order"))
        self.augment = torch.Generator(device).manual_seed(self._derive("augment"))
        self.masks = torch.Generator().manual_seed(self._derive("masks"))
        torch.default_generator.manual_seed(self._derive("layers"))
        if device.type == "cuda":
            torch.cuda.manual_seed(self._derive("layers"))

    def state(self) -> dict[str, Tensor]:
        """Where every stream is."""
        found = {
            "order": self.order.get_state(),
            "augment": self.augment.get_state(),
            "masks": self.masks.get_state(),
            "layers": torch.default_generator.get_state(),
        }
        if self.device.type == "cuda":
            found["layers_cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def load_state(self, state: Mapping[str, Tensor], device: str, epochs: int) -> None:
        """Set every stream to where it was.

        Args:
            state: what `state` gave.
            device: type of the device it was on. On one of another type the streams of that device cannot go on and begin anew, at
                a place that depends on seed and epochs alone.
            epochs: how many were trained.
        """
        self.order.set_state(state["order"])
        self.masks.set_state(state["masks"])
        torch.default_generator.set_state(state["layers"])
        if device == self.device.type:
            self.augment.set_state(state["augment"])
        else:
            self.augment.manual_seed(self._derive(f"augment after {epochs}"))
        if self.device.type == "cuda":
            if "layers_cuda" in state:
                torch.cuda.set_rng_state(state["layers_cuda"], self.device)
            else:
                torch.cuda.manual_seed(self._derive(f"layers after {epochs}"))

    def _derive(self, stream: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{stream}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "little")


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that are in no state dict; shared ones once."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set them, in place.

    Raises:
        ValueError: another set of names, or another shape or type; names the first.
    """
    mine = model_state(model)
    for name in (*mine, *state):
        if name not in mine or name not in state:
            raise ValueError(f"{name} is only in the {'state' if name in state else 'network'}")
        one, two = mine[name], state[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            raise ValueError(
                f"{name} is {two.dtype}{list(two.shape)} in the state, {one.dtype}{list(one.shape)} in the network"
            )
    for name, tensor in mine.items():
        tensor.copy_(state[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The slots by "number of the parameter.name"; numbers follow the order of the groups."""
    return {
        f"{number}.{name}": slot
        for number, parameter in enumerate(parameters_of(optimizer))
        for name, slot in optimizer.state.get(parameter, {}).items()
        if isinstance(slot, Tensor)
    }


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Replace all slots of a fused optimizer; they get device and memory layout of their parameter.

    Raises:
        ValueError: a slot of a parameter that is not there.
    """
    parameters = parameters_of(optimizer)
    optimizer.state.clear()
    for key, saved in state.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"{key} is a slot of no parameter: the optimizer has {len(parameters)}")
        parameter = parameters[int(number)]
        like = parameter.detach() if saved.shape == parameter.shape else saved
        slot = torch.empty_like(like, dtype=saved.dtype, device=parameter.device).copy_(saved)
        optimizer.state[parameter][name] = slot


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Its parameters in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
