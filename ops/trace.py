"""Record what a network does with one example input, as a `torch.fx` graph whose nodes know their values.

Differences from plain `torch.fx.symbolic_trace`: the example runs along, so shapes are concrete (Python code that looks at
`x.shape`, iterates over `x.chunk(2)` or asks `x.dim()` traces); a submodule that cannot be traced (it branches on values, or
calls `.item()`) becomes one call in the graph instead of a failure. It optimises nothing; that is `ops.fuse`.

Start with `trace`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ops.layers import SparseConv2d, SparseLinear

__all__ = ["PlanError", "Traced", "trace"]


class PlanError(ValueError):
    """A network or an input that no plan can be made of; says which and why."""


class Traced:
    """A recorded network.

    Attributes:
        graph: nodes carry `meta["value"]` (what they returned for the example), `meta["changes"]` (whether they changed an
            input in place), `meta["scope"]` (dotted path of the module
            whose code made the call) and, for calls of modules, the module itself in `meta["module"]`.
        opaque: dotted paths of the submodules that could not be traced, with the reason.
    """

    def __init__(self, graph: fx.Graph, opaque: dict[str, str]) -> None:
        self.graph = graph
        self.opaque = opaque


class _Whole(nn.Module):
    """One module around the network, so that a network that is itself a layer is traced as a call of that layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)


class _Proxy(fx.Proxy):
    """A proxy that answers questions about its shape from the example value; the plan holds for that shape only."""

    @property
    def _value(self) -> Any:
        return self.node.meta["value"]

    @property
    def shape(self) -> Any:
        return self._value.shape

    @property
    def ndim(self) -> int:
        return self._value.ndim

    @property
    def dtype(self) -> Any:
        return self._value.dtype

    @property
    def device(self) -> Any:
        return self._value.device

    @property
    def is_cuda(self) -> bool:
        return self._value.is_cuda

    def size(self, dim: int | None = None) -> Any:
        return self._value.size() if dim is None else self._value.size(dim)

    def dim(self) -> int:
        return self._value.dim()

    def numel(self) -> int:
        return self._value.numel()

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, i) for i in range(len(self._value)))


class _Tracer(fx.Tracer):
    """fx's tracer, running the example along; `opaque` modules are not looked into."""

    def __init__(self, example: torch.Tensor, opaque: dict[str, str]) -> None:
        super().__init__()
        self._example = example
        self._opaque = opaque
        self._running = False
        self._active: list[str] = []
        self.culprit: str | None = None  # innermost module whose code was running when tracing failed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self._opaque
            or isinstance(m, SparseConv2d | SparseLinear)
            or bool(m._forward_hooks or m._forward_pre_hooks)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._running:  # a leaf is being executed for its value
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self._active.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or path
            raise
        self._active.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        node.meta["scope"] = _inner(self._active[-1]) if self._active else ""
        if kind == "call_module":
            node.meta["module"] = self.root.get_submodule(str(node.target))
        read = [t for n in node.all_input_nodes for t in _tensors(n.meta["value"])]
        versions = [t._version for t in read]
        self._running = True
        try:
            node.meta["value"] = self._run(node)
        finally:
            self._running = False
        node.meta["changes"] = versions != [t._version for t in read]
        return node

    def _run(self, node: fx.Node) -> Any:
        """What the node returns for the example; runs each node once."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        if node.op == "placeholder":
            return self._example
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value.detach() if isinstance(value, torch.Tensor) else value
        if node.op == "call_module":
            return node.meta["module"](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return args[0]  # output


def trace(module: nn.Module, example_input: torch.Tensor) -> Traced:
    """Record one evaluation-mode pass of a network on the CPU.

    Args:
        module: takes one tensor. It is deep-copied and left as it is, training mode included.
        example_input: with batch axis.

    Returns:
        The graph, on a copy of the network in eval mode. Its result on the example equals the network's.

    Raises:
        PlanError: the input is no tensor, or the network fails on it.
    """
    if not isinstance(example_input, torch.Tensor):
        raise PlanError(f"the example input must be one tensor with a batch axis, got {type(example_input).__name__}")
    meta = any(p.is_meta for p in module.parameters())

    def fresh() -> nn.Module:
        whole = _Whole(_copied(module)).eval()
        return whole if meta else whole.cpu()

    example = example_input.detach().to("meta" if meta else "cpu")
    whole = fresh()
    with torch.no_grad():
        try:
            expected = whole(example.clone())
        except Exception as error:
            raise PlanError(
                f"the network {type(module).__name__} fails on an input {_describe(example)}: "
                f"{type(error).__name__}: {error}. Lower it with an input it accepts"
            ) from error
        opaque: dict[str, str] = {}
        while True:
            tracer = _Tracer(example.clone(), opaque)
            try:
                graph = tracer.trace(whole)
            except Exception as error:
                culprit = tracer.culprit or "network"
                reason = f"{type(error).__name__}: {error}"
            else:
                output = next(node for node in graph.nodes if node.op == "output")
                if meta or _same(output.meta["value"], expected):
                    return Traced(graph, {_inner(path): reason for path, reason in opaque.items()})
                culprit, reason = "network", "its traced operations do not give its own result"
            if culprit in opaque:  # cannot be: an opaque module is not looked into
                raise PlanError(f"{type(module).__name__}: {_inner(culprit)} cannot be called on its own: {reason}")
            opaque[culprit] = reason
            whole = fresh()  # code that failed half-way may have left proxies in the modules


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value that count their changes."""
    if isinstance(value, torch.Tensor) and not value.is_inference():
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _copied(module: nn.Module) -> nn.Module:
    """A deep copy; tensors that carry a gradient graph (weights as torch's pruning leaves them) are copied without it."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _same(found: Any, expected: Any) -> bool:
    """Equal structures of equal tensors, up to rounding; NaN equals NaN."""
    try:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except (AssertionError, TypeError, ValueError):
        return False
    return True


def _inner(path: str) -> str:
    """The path of a submodule of the user's network: without the wrapper's name."""
    return path.removeprefix("network").removeprefix(".")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
