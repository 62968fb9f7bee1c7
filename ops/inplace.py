"""In-place operations of a traced network (`x += y`, `ReLU(inplace=True)`, `x.add_(1)`) as ordinary ones, where that is safe.

It is safe where nothing looks at the changed memory under another name, such as a view. Only then may other passes move, fuse or
remove things around them. Start with `functionalise`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

__all__ = ["functionalise"]

_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
}
_METHODS = {name + "_" for name in ("add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "clamp", "clamp_min", "neg")}


def _mutates(node: fx.Node) -> bool:
    return bool(node.meta.get("changes")) or _says_so(node)


def _says_so(node: fx.Node) -> bool:
    """Whether a call is in place by its name or arguments (the example may have left it nothing to change)."""
    if node.op == "call_module":
        return bool(getattr(node.meta["module"], "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        if node.target in _OUT_OF_PLACE or node.target is operator.setitem:
            return True
        if "inplace" in node.kwargs:
            return bool(node.kwargs["inplace"])
        # F.relu(x, True) and the like: positional. Then the result is the argument itself.
        first = node.args[0] if node.args else None
        return (
            isinstance(first, fx.Node)
            and isinstance(node.meta["value"], torch.Tensor)
            and node.meta["value"] is first.meta["value"]
            and True in node.args
        )
    return False


def functionalise(graph: fx.Graph) -> None:
    """Let later readers of a mutated value read the mutating node instead, which then need not mutate.

    What cannot be changed so keeps `meta["pinned"]`: it mutates as in torch, so it must stay, and stay in place.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    for node in [node for node in nodes if _mutates(node)]:
        node.meta["pinned"] = True
        victim = node.args[0] if node.args else None
        if not isinstance(victim, fx.Node) or _aliased(victim, node, nodes, place):
            continue
        if not _make_pure(node):
            continue
        node.meta["pinned"] = False
        for user in list(victim.users):
            if place[user] > place[node]:
                user.replace_input_with(victim, node)


def _aliased(victim: fx.Node, node: fx.Node, nodes: list[fx.Node], place: dict[fx.Node, int]) -> bool:
    """Does anything read the victim's memory after `node` under another name (a view, or the thing it is a view of)?"""
    memory = _memory(victim.meta["value"])
    for other in nodes[: place[node]]:
        if other in (victim, node) or not memory & _memory(other.meta["value"]):
            continue
        if other.op == "get_attr" or any(place[user] > place[node] for user in other.users):
            return True
    return False


def _memory(value: Any) -> set[int]:
    """Identities of the storages behind a value."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}  # the data pointer would be 0 for all tensors on the meta device
    if isinstance(value, tuple | list):
        return set().union(*(_memory(v) for v in value)) if value else set()
    return set()


def _make_pure(node: fx.Node) -> bool:
    """Replace an in-place call by the call that returns a new tensor; False if none is known."""
    if node.op == "call_module":
        module = node.meta["module"]
        if not type(module).__module__.startswith("torch.nn"):
            return False
        node.meta["module"] = copy.copy(module)  # the same module may be called elsewhere, where it has to mutate
        node.meta["module"].inplace = False
        return True
    if node.op == "call_method":
        if node.target not in _METHODS:
            return False
        node.target = str(node.target).removesuffix("_")
        return True
    if node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return True
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False
