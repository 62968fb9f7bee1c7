"""Record what a network computes, as a torch.fx graph whose leaves are the layers of torch.nn.

What it does not do: write anything; look at values. A network whose Python code depends on the values of its tensors cannot be
recorded, and the error says which of its modules is in the way.

Start with `trace`, which returns a `Recording`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute, TraceError

from nas.export.errors import ExportError, first_line
from nas.export.plain import torch_class

_INPLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
# torch builds these from sizes, and so never sees that a size is still symbolic.
_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace", "eye", "rand", "randn", "tensor")

CURE = (
    "let the forward method branch only on plain Python values, use torch.where for choices that depend on the data, "
    'or leave the source out with formats=("onnx", "pt2")'
)


@dataclass(frozen=True)
class Scope:
    """The module whose forward method made a node: its path ("" for the network) and its class's name."""

    path: str
    kind: str


@dataclass
class Recording:
    """What a network computes.

    Attributes:
        module: the network the graph refers to by module paths; a bare layer is wrapped, so it is not always the one given.
        graph: the operations in the order they run; dead ones are gone.
        scopes: for every node, the modules it was made in, outermost first; the network itself is left out.
        inputs: names of the inputs in use, in order.
    """

    module: nn.Module
    graph: torch.fx.Graph
    scopes: dict[Node, tuple[Scope, ...]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()


class _Answers:
    """Answers to Python's questions for a number or a length, from the examples, if they do not depend on the batch."""

    tracer: Any
    node: Node

    def __index__(self) -> int:
        return operator.index(self.tracer.known_value(self.node))

    def __int__(self) -> int:
        return int(self.tracer.known_value(self.node))

    def __float__(self) -> float:
        return float(self.tracer.known_value(self.node))

    def __len__(self) -> int:
        return int(self.tracer.known_length(self.node))


class _Attribute(_Answers, Attribute):
    """An attribute of a recorded value, such as its shape."""


class _InplaceProxy(_Answers, Proxy):
    """A proxy that records `x += y` and `x[i] = y` as what they are; torch's own records `x + y`, and refuses the other."""

    def __getattr__(self, name: str) -> Attribute:
        return _Attribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _inplace(name: str) -> Callable[[Proxy, Any], Proxy]:
    function = getattr(operator, name)

    def method(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _INPLACE_OPERATORS:
    setattr(_InplaceProxy, f"__{_name}__", _inplace(_name))


class ExampleRun:
    """Runs a graph along while it is recorded, only as far as somebody asks."""

    def __init__(self, inputs: Sequence[Tensor], defaults: Sequence[Any]) -> None:
        self.pending = [*inputs, *defaults]
        self.known: dict[Node, Any] = {}

    @torch.no_grad()
    def value(self, node: Node, root: nn.Module) -> Any:
        """What a node returns for these inputs."""
        for each in node.graph.nodes:
            if each not in self.known:
                self.known[each] = self._run(each, root)
            if each is node:
                break
        return self.known[node]

    def _run(self, node: Node, root: nn.Module) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.known.__getitem__)
        if node.op == "placeholder":
            value = self.pending.pop(0) if self.pending else None
            return value.clone() if isinstance(value, Tensor) else value
        if node.op == "get_attr":
            owner, _, key = str(node.target).rpartition(".")
            return getattr(
                root.get_submodule(owner), key
            ).clone()  # a copy: code that changes it must not change the network
        if node.op == "call_module":
            return root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Tracer(torch.fx.Tracer):
    def __init__(self, runs: Sequence[ExampleRun]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.runs = runs
        self.running = False
        self.stack: list[Scope] = []
        self.node_scopes: dict[Node, tuple[Scope, ...]] = {}
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return torch_class(m) is not None

    def proxy(self, node: Node) -> Proxy:
        return _InplaceProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.node_scopes[node] = tuple(self.stack)
        return node

    def known_value(self, node: Node) -> Any:
        """A Python value that is the same for every batch size."""
        values = self._values(node)
        if any(isinstance(value, Tensor) for value in values):
            raise TraceError(f"Python code asks for the value of the tensor {node.name}, which depends on the data")
        if any(value != values[0] for value in values):
            raise TraceError(f"Python code asks for the value of {node.name}, which depends on the size of the batch")
        return values[0]

    def known_length(self, node: Node) -> int:
        lengths = {len(value) for value in self._values(node)}
        if len(lengths) > 1:
            raise TraceError(f"Python code asks for the length of {node.name}, which depends on the size of the batch")
        return lengths.pop()

    def _values(self, node: Node) -> list[Any]:
        self.running = True
        try:
            return [run.value(node, self.root) for run in self.runs]
        finally:
            self.running = False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.known_value(obj.node))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        items: Any = obj
        return iter([items[i] for i in range(self.known_length(obj.node))])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        leaf = self.is_leaf_module(m, path)
        if not leaf:
            self.stack.append(Scope(path, type(m).__name__))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = f"{path} ({type(m).__name__})"
            raise
        finally:
            if not leaf:
                self.stack.pop()


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Recording:
    """Record the evaluation-time computation of a plain network.

    Args:
        model: a network as `plain_copy` makes it; in evaluation mode.
        inputs: an example for each positional argument it is called with, the batch as axis 0; further arguments keep their
            defaults. The examples answer questions about sizes that do not depend on the batch (`if x.shape[1] > 3`).

    Raises:
        ExportError: the network cannot be recorded; names the module that is in the way.
    """
    root = nn.Sequential() if torch_class(model) is not None else model
    if root is not model:
        root.add_module("layer", model)
        root.eval()
    where = type(model).__name__
    fixed = _defaults(root, len(inputs))
    tracer = _Tracer(
        [ExampleRun([x[:1].expand(n, *x.shape[1:]) for x in inputs], list(fixed.values())) for n in (2, 3)]
    )
    try:
        with _factories_accept_proxies():
            graph = tracer.trace(root, concrete_args=fixed or None)
    except Exception as error:
        place = tracer.failed_in or f"the network itself ({where})"
        raise ExportError(
            f"expected a network that torch.fx can record, found one that it cannot: in {place}: "
            f"{type(error).__name__}: {first_line(error)}; {CURE}"
        ) from error
    _remove_dead(graph, root, len(inputs))
    names = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    return Recording(root, graph, tracer.node_scopes, names)


def _defaults(model: nn.Module, inputs: int) -> dict[str, Any]:
    """The defaults of the arguments that are not among the first `inputs` ones."""
    parameters = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    fixed = {}
    for parameter in parameters[inputs:]:
        if parameter.default is parameter.empty:
            raise ExportError(
                f"expected an example for every input of {type(model).__name__}, found {inputs} of at least "
                f"{inputs + 1}: {parameter.name} has no default; pass a tuple of example tensors"
            )
        fixed[parameter.name] = parameter.default
    return fixed


@contextlib.contextmanager
def _factories_accept_proxies() -> Iterator[None]:
    """Let `torch.arange(x.shape[1])` and the like be recorded instead of refused."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            found: list[Proxy] = []
            torch.fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, Proxy) else None)
            if found:
                return found[0].tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return factory

    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in originals.items():
            setattr(torch, name, wrapped(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def changes_its_input(node: Node, model: nn.Module) -> bool:
    """Whether a node may change a tensor in place, so that it counts even if nobody reads its result."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.startswith("__")
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if node.target is operator.setitem or name in _INPLACE_OPERATORS or "out" in node.kwargs:
        return True
    if name.endswith("_") or name == "_assert":
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False) or bound.arguments.get("kwargs", {}).get("inplace", False))


def _remove_dead(graph: torch.fx.Graph, model: nn.Module, inputs: int) -> None:
    """Remove what nobody reads: unused results, arguments left at their defaults and the recorder's own checks of them."""
    extra = [node for node in graph.nodes if node.op == "placeholder"][inputs:]
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node.users:
            continue
        if node.op == "placeholder":
            if node in extra:
                graph.erase_node(node)
        elif _checks_a_default(node) or not changes_its_input(node, model):
            graph.erase_node(node)


def _checks_a_default(node: Node) -> bool:
    return any(isinstance(arg, str) and "has been specialized to have value" in arg for arg in node.args)
