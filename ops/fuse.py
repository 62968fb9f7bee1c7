"""Passes over a traced network: less work, same result. In the order `simplify` runs them:

1. in-place operations become ordinary ones (`x += y`, `ReLU(inplace=True)`) where that is safe, and are pinned where not;
2. what does nothing in eval mode goes: Dropout, Identity;
3. what depends on no input is computed now;
4. the same function of the same values is computed once (several branches that each start with a ReLU, for example);
5. what nobody reads goes (auxiliary heads in eval mode, for example);
6. convolutions and linear layers are taken out of their modules as a `Layer` (`ops.extract`);
7. a batch norm, an addition and an activation that directly follow a layer are folded into it (`ops.followers`). The mask
   stays: folding scales rows, it moves no zero.

It chooses no kernels; that is `ops.plan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ops.extract import Layer, hooked, layer_of
from ops.followers import fold_followers
from ops.inplace import functionalise

__all__ = ["Layer", "simplify"]


def simplify(graph: fx.Graph) -> None:
    """Run all passes on a graph made by `ops.trace.trace`, in place."""
    functionalise(graph)
    _drop_identities(graph)
    _fold_constants(graph)
    _merge_equals(graph)
    graph.eliminate_dead_code(_keeps)
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            node.meta["layer"] = layer
    fold_followers(graph)
    graph.eliminate_dead_code(_keeps)


def _keeps(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.meta.get("pinned", False)


# --- identities and constants -------------------------------------------------------------------------------------

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        nothing = node.op == "call_module" and (
            type(node.meta["module"]) is nn.Identity
            or (isinstance(node.meta["module"], nn.modules.dropout._DropoutNd) and not node.meta["module"].training)
        )
        if node.op == "call_function" and node.target in _DROPOUTS:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            nothing = training is False or rate == 0
        if nothing and not hooked(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _fold_constants(graph: fx.Graph) -> None:
    """Mark what depends on no input; the plan then embeds its value. Random draws are left alone."""
    for node in graph.nodes:
        inputs = node.all_input_nodes
        node.meta["constant"] = node.op == "get_attr" or (
            node.op in ("call_function", "call_method")
            and bool(inputs)
            and all(n.meta["constant"] for n in inputs)
            and not node.meta.get("pinned")
            and not _random(node)
        )


def _random(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("rand", "dropout", "bernoulli", "normal", "multinomial"))


def _merge_equals(graph: fx.Graph) -> None:
    """Compute equal calls once: functions, methods, and torch's modules that have no parameters or buffers.

    Not where something is still changed in place: two equal values may then have to differ later.
    """
    if any(node.meta.get("pinned") for node in graph.nodes):
        return
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":
            module = node.meta["module"]
            if not type(module).__module__.startswith("torch.nn") or hooked(node) or module.state_dict():
                continue
            call: Any = (type(module), repr(module))
        elif node.op in ("call_function", "call_method") and not _random(node):
            call = node.target
        else:
            continue
        key = (node.op, call, _hashable(node.args), _hashable(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _hashable(argument: Any) -> Any:
    """An fx argument as a key: nodes stand for themselves, numbers carry their type (1, 1.0 and True differ)."""
    if isinstance(argument, tuple | list):
        return (type(argument).__name__, *(_hashable(a) for a in argument))
    if isinstance(argument, dict):
        return ("dict", *((name, _hashable(a)) for name, a in sorted(argument.items())))
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, repr(argument))
