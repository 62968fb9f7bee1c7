"""What the generated class holds: one attribute per layer, parameter and buffer, with readable and legal names.

What it does not do: write the class (see `source`).

Start with `collect`.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass, field

from torch import Tensor, nn

from nas.export.constructors import constructor
from nas.export.trace import Recording, Scope

_MODULE = nn.Module()


@dataclass(frozen=True)
class Layer:
    """A layer of torch: its path in the network, its attribute in the generated class, how it is built, where it belongs."""

    path: str
    attribute: str
    module: nn.Module
    text: str
    scopes: tuple[Scope, ...]


@dataclass(frozen=True)
class OwnTensor:
    """A parameter or buffer that belongs to no layer of torch."""

    path: str
    attribute: str
    tensor: Tensor
    scopes: tuple[Scope, ...]


@dataclass
class Members:
    """Attributes of the generated class, in the order they are first used.

    Attributes:
        layers: by path in the network.
        tensors: by path in the network.
        ties: pairs (dotted name, dotted name it is the same tensor as).
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    tensors: dict[str, OwnTensor] = field(default_factory=dict)
    ties: list[tuple[str, str]] = field(default_factory=list)

    def state(self) -> dict[str, Tensor]:
        """Everything the weights file must hold: names in the generated class -> tensors, shared ones once."""
        tied = {name for name, _ in self.ties}
        found = {own.attribute: own.tensor.detach() for own in self.tensors.values()}
        for layer in self.layers.values():
            for key, tensor in layer.module.state_dict().items():
                found[f"{layer.attribute}.{key}"] = tensor
        return {name: tensor for name, tensor in found.items() if name not in tied}

    def name_of(self, path: str) -> str | None:
        """The dotted name in the generated class of a layer or tensor of the network; None if the forward pass never uses it."""
        if path in self.tensors:
            return self.tensors[path].attribute
        if path in self.layers:
            return self.layers[path].attribute
        head, _, tail = path.rpartition(".")
        while head:
            if head in self.layers:
                return f"{self.layers[head].attribute}.{tail}"
            head, _, last = head.rpartition(".")
            tail = f"{last}.{tail}"
        return None


def collect(recording: Recording) -> Members:
    """Name everything the recorded forward pass uses.

    Raises:
        ExportError: a layer whose constructor call cannot be recovered.
    """
    members = Members()
    taken: set[str] = set()
    names: dict[int, str] = {}  # id of a tensor -> the first dotted name it got
    for node in recording.graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path not in members.layers:
            module = recording.module.get_submodule(path)
            layer = Layer(
                path, attribute_name(path, taken), module, constructor(module, path), recording.scopes.get(node, ())
            )
            members.layers[path] = layer
    for layer in members.layers.values():
        for kind in (layer.module.named_parameters, layer.module.named_buffers):
            for key, tensor in kind(remove_duplicate=False):
                name = f"{layer.attribute}.{key}"
                if id(tensor) in names:
                    members.ties.append((name, names[id(tensor)]))
                names.setdefault(id(tensor), name)
    for node in recording.graph.nodes:
        path = str(node.target)
        if node.op == "get_attr" and members.name_of(path) is None:
            owner, _, key = path.rpartition(".")
            tensor = getattr(recording.module.get_submodule(owner), key)
            own = OwnTensor(path, attribute_name(path.lstrip("_"), taken), tensor, recording.scopes.get(node, ()))
            members.tensors[path] = own
            if id(tensor) in names:
                members.ties.append((own.attribute, names[id(tensor)]))
            names.setdefault(id(tensor), own.attribute)
    return members


def attribute_name(path: str, taken: set[str]) -> str:
    """A legal attribute of an nn.Module for a module path: "stage1.0.class" -> "stage1_0_class", "0" -> "layer0".

    Args:
        path: dotted path in the network.
        taken: names in use; the new one is added.
    """
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in path)
    if not name or name[0].isdigit():
        name = f"layer{name}"
    if keyword.iskeyword(name) or hasattr(_MODULE, name) or name.startswith("__"):
        name = f"{name.strip('_')}_"
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate


def member_path(name: str) -> str:
    """How code inside the class refers to a dotted name: "encoder.layers.0.weight" -> "self.encoder.layers[0].weight"."""
    return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
