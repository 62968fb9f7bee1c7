"""What is really executed when a network runs, and by which kernel: `lower(module, example_input) -> Plan`.

A plan is a flat list of operations in order, after dead code is gone, batch norms are folded and activations fused
(`ops.trace`, `ops.fuse`). `ops.runtime.Runtime` executes it; latency models price it. It holds for one input shape, batch
included. What a plan does not know as a layer runs through torch, under the name of the torch function or module; a submodule
that could not be looked into is one operation of kind "torch".

Start with `lower`; `print(plan)` shows a table, `plan.frame()` gives it as a DataFrame.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ops.fuse import Layer, simplify
from ops.trace import PlanError, trace

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "KERNELS",
    "LAYER_KINDS",
    "Choose",
    "Plan",
    "PlanError",
    "PlannedOp",
    "Ref",
    "legal_kernels",
    "lower",
    "rule_of_thumb",
]

LAYER_KINDS = ("conv2d", "depthwise_conv2d", "linear")
# dense through torch; kept weights only, by compiled code that serves all masks; by machine code made for one mask
KERNELS = ("torch", "portable", "specialised")
SPARSE_UP_TO = 0.5  # density up to which the sparse kernels are assumed to be faster where nothing was measured


@dataclass(frozen=True)
class Ref:
    """Stands for a value computed while the plan runs: 0 is the input, k + 1 the result of operation k."""

    index: int


@dataclass(frozen=True, eq=False)
class PlannedOp:
    """One executed operation.

    Attributes:
        name: dotted path of the layer in the network, or of the module that calls the function, "/" and the function.
        kind: one of `LAYER_KINDS`, the name of a torch function or module ("max_pool2d", "add"), or "torch" for a submodule
            that could not be traced.
        input_shapes: of the tensors it reads that depend on the network's input, batch axis included.
        output_shape: of its result; empty if that is not one tensor.
        weight_shape: [out, in/groups, kh, kw], [out, in] or empty; likewise stride, padding (top, bottom, left, right) and
            dilation are empty unless it is a convolution.
        groups: 1 unless a grouped convolution.
        bias: whether a bias is added (folded batch norms included).
        density: nnz / weights; 1.0 for a dense layer.
        nnz: kept weights of a sparse layer, all weights of a dense one, 0 for anything else.
        pattern: canonical text of a sparse layer's pattern, "" otherwise.
        macs: multiply-adds on kept weights for one input of the batch; dense_macs: on all weights.
        kernel: one of `KERNELS` for a layer; "torch" for anything else, which runs in the layout its input is in.
        post_ops: activations applied by the same kernel, in order.
        inputs: the values it reads; of a layer the input and, if `residual`, what is added before the activation.
        residual: see `inputs`.
        dtype: of the result, "" if that is not one tensor.
        mutates: whether it may change its inputs in place.
        detail: what distinguishes calls of one kind: the module's repr, or the function's home.
    """

    name: str
    kind: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    inputs: tuple[int, ...]
    weight_shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    density: float = 1.0
    nnz: int = 0
    pattern: str = ""
    macs: int = 0
    dense_macs: int = 0
    kernel: str = "torch"
    post_ops: tuple[str, ...] = ()
    residual: bool = False
    dtype: str = "float32"
    detail: str = ""
    mutates: bool = False
    layer: Layer | None = field(default=None, repr=False)
    call: Callable[..., Any] | None = field(default=None, repr=False)
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def key(self) -> str | None:
        """JSON text under which a measured time of this operation can be remembered, the same for operations that cost the
        same; None for a submodule that could not be traced. It does not name the kernel, the threads or the machine."""
        if self.kind == "torch":
            return None
        facts: dict[str, Any] = {
            "kind": self.kind,
            "dtype": self.dtype,
            "inputs": self.input_shapes,
            "output": self.output_shape,
        }
        if self.layer is not None:
            names = (
                "weight_shape",
                "stride",
                "padding",
                "dilation",
                "groups",
                "bias",
                "nnz",
                "pattern",
                "post_ops",
                "residual",
            )
            facts |= {name: getattr(self, name) for name in names}
        else:
            facts["call"] = [self.detail, _text((self.args, self.kwargs))]
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))


Choose = Callable[[PlannedOp, list[str]], str]


def rule_of_thumb(op: PlannedOp, kernels: list[str]) -> str:
    """The last kernel (the most specialised) for sparse layers up to a density of `SPARSE_UP_TO`, for depthwise convolutions
    and for dense ones of few weights per output (stems), else "torch". Measured choices are better."""
    if op.density <= SPARSE_UP_TO:
        return kernels[-1]
    few = len(op.weight_shape) == 4 and math.prod(op.weight_shape[1:]) <= 256
    return kernels[-1] if few else "torch"


def legal_kernels(op: PlannedOp) -> list[str]:
    """Kernels that compute this operation, in the order of `KERNELS`: torch always; in float32 "portable" for convolutions of
    images and for sparse linear layers, and "specialised" for convolutions that are not depthwise, where the machine has what
    it takes (`ops.kernels.specialised.specialised_available`) and the activation is one it knows."""
    layer = op.layer
    if layer is None or op.dtype != "float32" or (layer.kind == "linear" and layer.mask is None):
        return ["torch"]
    from ops.kernels.isa import compiles  # late: loads Numba

    if not compiles():
        return ["torch"]
    if layer.kind != "conv2d":
        return ["torch", "portable"]
    from ops.kernels.specialised import SPECIALISED_ACTIVATIONS, specialised_available

    special = specialised_available() and set(layer.post_ops) <= set(SPECIALISED_ACTIVATIONS)
    return list(KERNELS) if special else ["torch", "portable"]


@dataclass(frozen=True, eq=False)
class Plan:
    """The operations executed for one input shape.

    Attributes:
        ops: in execution order.
        input_shape: batch axis included.
        dtype: of the input, e.g. "float32".
        output: what the network returns, with `Ref`s for the tensors in it.
        opaque: submodules that could not be traced and why; each is an operation of kind "torch".
    """

    ops: tuple[PlannedOp, ...]
    input_shape: tuple[int, ...]
    dtype: str
    output: Any
    opaque: Mapping[str, str] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-adds on kept weights for one input."""
        return sum(op.macs for op in self.ops)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds on all weights for one input."""
        return sum(op.dense_macs for op in self.ops)

    def with_kernels(self, choose: Choose | Mapping[str, str]) -> Plan:
        """The same plan with other kernels.

        Args:
            choose: called with every operation that has more than one legal kernel; or a mapping from operation name to
                kernel, where names that are missing keep theirs.

        Raises:
            PlanError: a kernel that is not legal for its operation.
        """
        if not callable(choose):
            for op in self.ops:
                if choose.get(op.name, "torch") not in (legal := legal_kernels(op)):
                    raise _illegal(op, choose[op.name], legal)
        pick: Choose = choose if callable(choose) else lambda op, _: choose.get(op.name, op.kernel)
        return replace(self, ops=tuple(_with_kernel(op, pick) for op in self.ops))

    def frame(self) -> pd.DataFrame:
        """One row per operation; shapes as text ("1x64x8x8"); post_ops begins with "+" where a residual is added;
        `inputs` as text ("0 3": the input and the third operation)."""
        rows = [
            {
                "op": op.name,
                "kind": op.kind,
                "input": " ".join(_shape(s) for s in op.input_shapes),
                "output": _shape(op.output_shape),
                "weight": _shape(op.weight_shape),
                "stride": _shape(op.stride),
                "groups": op.groups,
                "pattern": op.pattern,
                "density": op.density,
                "nnz": op.nnz,
                "macs": op.macs,
                "dense_macs": op.dense_macs,
                "kernel": op.kernel,
                "post_ops": " ".join(("+",) * op.residual + op.post_ops),
                "inputs": " ".join(map(str, op.inputs)),
            }
            for op in self.ops
        ]
        columns = list(rows[0]) if rows else ["op", "kind", "kernel"]
        import pandas as pd  # late: running a network does not need it

        return pd.DataFrame(rows, columns=columns)

    def __str__(self) -> str:
        table = self.frame()
        shown = [
            c
            for c in ("op", "kind", "input", "output", "pattern", "density", "macs", "kernel", "post_ops")
            if c in table
        ]
        head = (
            f"plan for {self.dtype}[{_shape(self.input_shape)}]: {len(self.ops)} operations, {self.macs:,} of "
            f"{self.dense_macs:,} multiply-adds"
        )
        notes = [f"not traced: {path or 'the whole network'} ({reason})" for path, reason in self.opaque.items()]
        body = table[shown].to_string(index=False, formatters={"density": "{:.3g}".format, "macs": "{:,}".format})
        return "\n".join([head, body, *notes])


def lower(module: nn.Module, example_input: torch.Tensor, choose: Choose | None = None) -> Plan:
    """List the operations a network executes in eval mode.

    Args:
        module: takes one tensor; deep-copied, never changed. On the meta device the plan can be priced but not run; layers
            whose masks are not drawn count there by their target density.
        example_input: float[batch, ...]; its shape is the one the plan is for. The network is run on it twice.
        choose: picks a kernel for an operation out of the legal ones. Default `rule_of_thumb`.

    Returns:
        The plan, equal in result to the masked network up to rounding.

    Raises:
        PlanError: the example input is no tensor, the network fails on it, or `choose` returns a kernel that is not legal.
    """
    traced = trace(module, example_input)
    simplify(traced.graph)
    places: dict[fx.Node, int] = {}
    ops: list[PlannedOp] = []
    output: Any = None
    names: dict[str, int] = {}
    batch = example_input.shape[0] if example_input.ndim else 1
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            places[node] = 0
        elif node.op == "output":
            output = _template(node.args[0], places)
        elif not node.meta["constant"]:
            op = _planned(node, places, batch, set(traced.opaque))
            names[op.name] = names.get(op.name, 0) + 1
            if names[op.name] > 1:  # the same layer called again
                op = replace(op, name=f"{op.name}#{names[op.name]}")
            ops.append(_with_kernel(op, choose or rule_of_thumb))
            places[node] = len(ops)
    shape, dtype = tuple(example_input.shape), str(example_input.dtype).removeprefix("torch.")
    return Plan(tuple(ops), shape, dtype, output, traced.opaque)


def _with_kernel(op: PlannedOp, choose: Choose) -> PlannedOp:
    kernels = legal_kernels(op)
    kernel = choose(op, kernels) if len(kernels) > 1 else "torch"
    if kernel not in kernels:
        raise _illegal(op, kernel, kernels)
    return op if kernel == op.kernel else replace(op, kernel=kernel)


def _illegal(op: PlannedOp, kernel: str, legal: list[str]) -> PlanError:
    return PlanError(f'{op.name}: kernel "{kernel}" cannot run this {op.kind}; legal: {", ".join(legal)}')


def _planned(node: fx.Node, places: dict[fx.Node, int], batch: int, opaque: set[str]) -> PlannedOp:
    """The operation a node stands for."""
    layer: Layer | None = node.meta.get("layer")
    residual = layer is not None and layer.residual
    among = [n for n in node.args if isinstance(n, fx.Node)] if residual else node.all_input_nodes
    read = [n for n in among if n in places]
    tensors = [n.meta["value"] for n in read if isinstance(n.meta["value"], torch.Tensor)]
    value = node.meta["value"]
    is_tensor = isinstance(value, torch.Tensor)
    name, kind = _name(node, opaque)
    shared: dict[str, Any] = {
        "name": name,
        "input_shapes": tuple(tuple(t.shape) for t in tensors),
        "output_shape": tuple(value.shape) if is_tensor else (),
        "inputs": tuple(places[n] for n in read),
        "dtype": str(value.dtype).removeprefix("torch.") if is_tensor else "",
    }
    if layer is None:
        args, kwargs = _template(node.args, places), _template(node.kwargs, places)
        call, detail = _callable(node)
        mutates = bool(node.meta.get("pinned")) or kind == "torch"
        return PlannedOp(kind=kind, call=call, args=args, kwargs=kwargs, detail=detail, mutates=mutates, **shared)
    weights, rows = layer.weight.numel(), layer.weight.shape[0]
    nnz = layer.nnz
    positions = math.prod(value.shape) // (rows * batch) if rows * batch else 0
    return PlannedOp(
        kind=layer.kind,
        weight_shape=tuple(layer.weight.shape),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        density=nnz / weights if weights else 1.0,
        nnz=nnz,
        pattern=layer.pattern,
        macs=nnz * positions,
        dense_macs=weights * positions,
        post_ops=layer.post_ops,
        residual=layer.residual,
        layer=layer,
        **shared,
    )


def _name(node: fx.Node, opaque: set[str]) -> tuple[str, str]:
    """(name, kind) of a node's operation."""
    if node.op == "call_module":
        path = str(node.target).removeprefix("network").removeprefix(".")
        kind = type(node.meta["module"]).__name__
        if path in opaque:
            return f"{path or 'network'} ({kind})", "torch"
        # MaxPool2d -> max_pool2d, ReLU -> relu, GELU -> gelu
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", kind).lower()
        return path or snake, snake
    kind = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    scope = node.meta["scope"]
    return f"{scope}/{kind}" if scope else kind, kind


def _callable(node: fx.Node) -> tuple[Callable[..., Any], str]:
    """(a function of the node's arguments, what to tell it by)."""
    if node.op == "call_module":
        module: nn.Module = node.meta["module"]
        # forward itself where nothing hangs on the call: about a microsecond less
        whole = module._forward_hooks or module._forward_pre_hooks or isinstance(module, torch.jit.ScriptModule)
        return (module if whole else module.forward), repr(module)
    if node.op == "call_method" and not isinstance(node.args[0].meta["value"], torch.Tensor):  # type: ignore[union-attr]
        name = str(node.target)
        return lambda owner, *args, **kwargs: getattr(owner, name)(*args, **kwargs), "method"
    if node.op == "call_method":
        return operator.attrgetter(str(node.target))(type(node.args[0].meta["value"])), "method"  # type: ignore[union-attr]
    assert callable(node.target)
    return node.target, str(getattr(node.target, "__module__", ""))


def _template(argument: Any, places: dict[fx.Node, int]) -> Any:
    """An fx argument with `Ref`s for computed values and the values themselves for constants."""
    if isinstance(argument, fx.Node):
        return Ref(places[argument]) if argument in places else argument.meta["value"]
    if isinstance(argument, tuple | list):
        parts = [_template(a, places) for a in argument]
        if isinstance(argument, tuple) and hasattr(argument, "_fields"):
            return type(argument)(*parts)
        return tuple(parts) if isinstance(argument, tuple) else parts
    if isinstance(argument, dict):
        return {name: _template(a, places) for name, a in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_template(a, places) for a in (argument.start, argument.stop, argument.step)))
    return argument


def _text(argument: Any) -> str:
    """What a call costs depends on: the arguments, with tensors by type and shape only and values without their number."""
    if isinstance(argument, Ref):
        return "$"
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype}{list(argument.shape)}"
    if isinstance(argument, tuple | list):
        return "(" + ",".join(_text(a) for a in argument) + ")"
    if isinstance(argument, dict):
        return "{" + ",".join(f"{k}:{_text(a)}" for k, a in sorted(argument.items())) + "}"
    return repr(argument)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
