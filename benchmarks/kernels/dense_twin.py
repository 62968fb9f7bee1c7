"""The network a dense engine gets: plain torch layers that hold the masked weights, batch norms folded, and its ONNX graph.

The ONNX graph is written node by node with `onnx.helper`, in opset 13, which every engine here reads. Start with `dense_twin`
and `onnx_bytes`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ops.layers import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["dense_twin", "onnx_bytes"]

OPSET, IR_VERSION = 13, 8


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLayer) or super().is_leaf_module(m, module_qualified_name)


def dense_twin(network: nn.Module) -> fx.GraphModule:
    """The same function in plain dense layers.

    Sparse layers become torch's with weight * mask, a batch norm is folded into the convolution it alone reads, and ReLUs work in
    place where nobody else reads their input. The network itself is not changed.

    Raises:
        torch.fx errors: the network branches on values.
    """
    network = copy.deepcopy(network).eval()
    twin = fx.GraphModule(network, _Tracer().trace(network))
    for name, module in list(twin.named_modules()):
        if isinstance(module, SparseLayer):
            twin.set_submodule(name, _plain(module))
    modules = dict(twin.named_modules())
    for node in list(twin.graph.nodes):
        if node.op != "call_module" or not isinstance(source := node.args[0], fx.Node):
            continue
        alone = len(source.users) == 1 and source.op == "call_module"
        module, before = modules[node.target], modules.get(str(source.target))
        if isinstance(module, nn.BatchNorm2d) and alone and isinstance(before, nn.Conv2d) and _once(twin, source):
            modules[str(source.target)] = fused = fuse_conv_bn_eval(before, module)
            twin.set_submodule(str(source.target), fused)
            node.replace_all_uses_with(source)
            twin.graph.erase_node(node)
        elif (
            isinstance(module, nn.ReLU | nn.ReLU6)
            and alone
            and isinstance(before, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        ):
            module = copy.copy(module)
            module.inplace = True
            twin.add_submodule(f"{node.name}_inplace", module)
            node.target = f"{node.name}_inplace"
    twin.delete_all_unused_submodules()
    twin.recompile()
    return twin.requires_grad_(False)


def _once(twin: fx.GraphModule, node: fx.Node) -> bool:
    return sum(n.op == "call_module" and n.target == node.target for n in twin.graph.nodes) == 1


def _plain(layer: nn.Module) -> nn.Module:
    weight = nn.Parameter(layer.effective_weight().detach().clone(), requires_grad=False)  # type: ignore[operator]
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)  # type: ignore[operator]
    plain: nn.Module
    if isinstance(layer, SparseLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    else:
        assert isinstance(layer, SparseConv2d)
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias is not None,
            device="meta",
        )
    plain.weight, plain.bias = weight, bias
    return plain.eval()


def onnx_bytes(twin: fx.GraphModule, x: torch.Tensor) -> bytes:
    """The graph of a dense twin as a serialised ONNX model with input "x" and output "y".

    Args:
        twin: made by `dense_twin`; one tensor in, one out.
        x: an example input; its shape, batch included, becomes the model's.

    Raises:
        NotImplementedError: an operation this writer does not know; names it.
    """
    writer = _Writer()
    modules = dict(twin.named_modules())
    names: dict[fx.Node, str] = {}
    for node in twin.graph.nodes:
        if node.op == "placeholder":
            names[node] = "x"
        elif node.op == "output":
            (result,) = node.args
            writer.add("Identity", [names[result]], out="y")
        else:
            inputs = [names[n] for n in node.all_input_nodes]
            if node.op == "call_module":
                names[node] = writer.module(modules[str(node.target)], inputs)
            else:
                names[node] = writer.function(node, inputs)
    with torch.inference_mode():
        shape = list(twin(x).shape)
    graph = helper.make_graph(
        writer.nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        writer.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class _Writer:
    """Collects nodes and constants; every method returns the name of the value it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: list[str], out: str = "", **attributes: Any) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def module(self, m: nn.Module, inputs: list[str]) -> str:
        (x,) = inputs
        match m:
            case nn.Conv2d():
                parts = [x, self.constant(m.weight)] + ([] if m.bias is None else [self.constant(m.bias)])
                pads = [*_two(m.padding), *_two(m.padding)]
                return self.add(
                    "Conv",
                    parts,
                    kernel_shape=_two(m.kernel_size),
                    strides=_two(m.stride),
                    pads=pads,
                    dilations=_two(m.dilation),
                    group=m.groups,
                )
            case nn.Linear():
                parts = [x, self.constant(m.weight)] + ([] if m.bias is None else [self.constant(m.bias)])
                return self.add("Gemm", parts, transB=1)
            case nn.BatchNorm2d():
                assert m.running_mean is not None
                assert m.running_var is not None
                scale = torch.ones_like(m.running_mean) if m.weight is None else m.weight
                shift = torch.zeros_like(m.running_mean) if m.bias is None else m.bias
                parts = [x, *map(self.constant, (scale, shift, m.running_mean, m.running_var))]
                return self.add("BatchNormalization", parts, epsilon=m.eps)
            case nn.ReLU():
                return self.add("Relu", [x])
            case nn.ReLU6():
                return self.add("Clip", [x, self.constant(0.0), self.constant(6.0)])
            case nn.Hardswish():
                return self.add("Mul", [x, self.add("HardSigmoid", [x], alpha=1 / 6, beta=0.5)])
            case nn.SiLU():
                return self.add("Mul", [x, self.add("Sigmoid", [x])])
            case nn.MaxPool2d() if _two(m.dilation) == [1, 1] and not m.ceil_mode:
                return self.add("MaxPool", [x], **_pooling(m))
            case nn.AvgPool2d() if not m.ceil_mode and m.divisor_override is None:
                return self.add("AveragePool", [x], count_include_pad=int(m.count_include_pad), **_pooling(m))
            case nn.AdaptiveAvgPool2d() if m.output_size in (1, (1, 1)):
                return self.add("GlobalAveragePool", [x])
            case nn.Flatten() if (m.start_dim, m.end_dim) == (1, -1):
                return self.add("Flatten", [x], axis=1)
            case nn.Identity() | nn.Dropout():
                return x
        raise NotImplementedError(f"ONNX for the module {m}")

    def function(self, node: fx.Node, inputs: list[str]) -> str:
        target, args = node.target, node.args
        if target in (operator.add, torch.add) and len(inputs) == 2:
            return self.add("Add", inputs)
        if target in (operator.add, torch.add) and len(args) == 2 and args[0] is args[1]:
            return self.add("Add", inputs * 2)
        if target is torch.cat:
            axis: Any = args[1] if len(args) > 1 else node.kwargs["dim"]
            parts: Any = args[0]
            by_node = dict(zip(node.all_input_nodes, inputs))  # a value may stand there twice
            return self.add("Concat", [by_node[part] for part in parts], axis=axis)
        if target in (F.relu, torch.relu):
            return self.add("Relu", inputs)
        if target is torch.flatten and args[1:] == (1,):
            return self.add("Flatten", inputs, axis=1)
        if target is F.pad and len(args) == 2:
            left, right, top, bottom = args[1]  # type: ignore[misc]
            pads = self.constant([0, 0, top, left, 0, 0, bottom, right], np.int64)
            return self.add("Pad", [*inputs, pads])
        if target is operator.getitem and isinstance(args[1], tuple):
            return self._sliced(inputs[0], args[1])
        raise NotImplementedError(f"ONNX for the function {target} of {args[1:]}")

    def _sliced(self, x: str, index: Sequence[Any]) -> str:
        cuts = [(axis, s) for axis, s in enumerate(index) if s != slice(None)]
        starts = [s.start or 0 for _, s in cuts]
        ends = [np.iinfo(np.int32).max if s.stop is None else s.stop for _, s in cuts]
        steps = [s.step or 1 for _, s in cuts]
        as_int: Callable[[Any], str] = lambda v: self.constant(v, np.int64)  # noqa: E731
        return self.add("Slice", [x, as_int(starts), as_int(ends), as_int([a for a, _ in cuts]), as_int(steps)])


def _two(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [int(v) for v in value]


def _pooling(m: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    stride = m.kernel_size if m.stride is None else m.stride
    return {"kernel_shape": _two(m.kernel_size), "strides": _two(stride), "pads": [*_two(m.padding), *_two(m.padding)]}
