"""Run a plan: `Runtime(plan)(x)` gives what the masked network gives in eval mode, without autograd.

Steps run one after another; dense layers and everything that is no layer run through torch, sparse layers on the kernel the
plan names. A runtime owns its buffers: it is not for two threads at once (make one per thread). The result is a new tensor
every time, and the same bits for the same input.

Start with `Runtime`. `Runtime.calls(x)` gives one callable per operation, so that each can be timed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ops.formats import CSR
from ops.fuse import Layer
from ops.plan import Plan, PlannedOp, Ref

__all__ = ["InputError", "Runtime"]

Values = list[Any]
Step = Callable[[Values], None]


class InputError(ValueError):
    """An input the plan was not made for."""


class Runtime:
    """An executable plan.

    Args:
        plan: made by `ops.plan.lower` on real (not meta) weights. Weights are packed here; compiled kernels are loaded at the
            first call.

    Raises:
        ValueError: the plan's weights are on the meta device.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._dtype = getattr(torch, plan.dtype)
        self._steps = [_step(op, i + 1) for i, op in enumerate(plan.ops)]
        self._output = _getter(plan.output)
        kept = _read(plan.output)
        last: dict[int, int] = {}
        for i, op in enumerate(plan.ops):
            last[i + 1] = i  # a value nobody reads goes at once
            for value in op.inputs:
                last[value] = i
        self._dead = [tuple(v for v, step in last.items() if step == i and v not in kept) for i in range(len(plan.ops))]
        self._program = list(zip(self._steps, self._dead))
        self._values: Values = [None] * (len(plan.ops) + 1)

    def __call__(self, x: torch.Tensor) -> Any:
        """Run the network.

        Args:
            x: a CPU tensor of the plan's input shape and type.

        Returns:
            What the network returns: a tensor, or the same structure of tensors; new memory each time.

        Raises:
            InputError: another shape, type or device.
            TypeError: no tensor.
        """
        values = self._start(x)
        with torch.inference_mode():
            for step, dead in self._program:
                step(values)
                for value in dead:
                    values[value] = None
        # Copied outside inference mode: an ordinary tensor that shares nothing with the buffers or with x.
        result = _copied(self._output(values))
        values[:] = [None] * len(values)
        return result

    def calls(self, x: torch.Tensor) -> list[Callable[[], None]]:
        """One callable per operation of the plan, in order, that runs this operation alone on the values it gets when the
        network runs on x. They stay valid as long as they are kept, and keep all intermediate values alive."""
        values: Values = list(self._start(x))
        with torch.inference_mode():
            for step in self._steps:
                step(values)
        return [_alone(step, values) for step in self._steps]

    def _start(self, x: torch.Tensor) -> Values:
        plan = self.plan
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the runtime takes a torch tensor, got {type(x).__name__}; torch.as_tensor(x) makes one")
        if x.shape != plan.input_shape or x.dtype != self._dtype or x.device.type != "cpu":
            found = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
            raise InputError(
                f"the plan was made for an input {plan.dtype}{list(plan.input_shape)} on the CPU, got {found}; convert it, or "
                "lower the network again with an example of that shape"
            )
        values = self._values
        values[0] = x.detach() if x.requires_grad else x
        return values


def _alone(step: Step, values: Values) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            step(values)

    return call


def _step(op: PlannedOp, out: int) -> Step:
    """The function that computes one operation from the list of values and puts its result at `out`."""
    if op.layer is None:
        return _torch_call(op, out)
    if op.layer.weight.is_meta:
        raise ValueError(f"{op.name}: the weights are on the meta device; only a network with real weights can run")
    return KERNELS[op.kernel](op, op.layer, out)


# --- layers -----------------------------------------------------------------------------------------------------------------


def _torch_layer(op: PlannedOp, layer: Layer, out: int) -> Step:
    """Dense through torch, the masked weight as it is."""
    (source,) = op.inputs
    weight, bias = layer.weight.contiguous(), layer.bias
    activation = {(): None, ("relu",): torch.relu_, ("relu6",): lambda t: torch.nn.functional.hardtanh_(t, 0.0, 6.0)}
    post: Callable[[torch.Tensor], Any] | None = activation[layer.post_ops]

    if layer.kind == "linear":
        linear = torch.nn.functional.linear

        def run(values: Values) -> None:
            y = values[out] = linear(values[source], weight, bias)
            if post is not None:
                post(y)

        return run

    top, bottom, left, right = layer.padding
    conv, pad = torch.conv2d, torch.nn.functional.pad
    even = top == bottom and left == right
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    padding = (top, left) if even else (0, 0)

    def run_conv(values: Values) -> None:
        x = values[source] if even else pad(values[source], (left, right, top, bottom))
        y = values[out] = conv(x, weight, bias, stride, padding, dilation, groups)
        if post is not None:
            post(y)

    return run_conv


def _csr_layer(op: PlannedOp, layer: Layer, out: int) -> Step:
    """Kept weights only, into a buffer of its own."""
    from ops.kernels.csr import CSRConv2d, CSRLinear  # late: importing it loads Numba

    (source,), (shape,) = op.inputs, op.input_shapes
    mask = torch.ones_like(layer.weight, dtype=torch.bool) if layer.mask is None else layer.mask
    weight = CSR.from_dense(layer.weight.flatten(1), mask.flatten(1))
    bias = None if layer.bias is None else layer.bias.numpy()
    activation = layer.post_ops[0] if layer.post_ops else "none"
    kernel: CSRConv2d | CSRLinear
    if layer.kind == "linear":
        kernel = CSRLinear(weight, math.prod(shape[:-1]), bias=bias, activation=activation)
    else:
        kernel = CSRConv2d(
            weight,
            _pair(layer.weight.shape[2:]),
            _quad(shape),
            bias=bias,
            stride=_pair(layer.stride),
            padding=_quad(layer.padding),
            dilation=_pair(layer.dilation),
            groups=layer.groups,
            activation=activation,
        )
    result = torch.from_numpy(kernel.out).view(op.output_shape)

    def run(values: Values) -> None:
        kernel(values[source].contiguous().numpy())
        values[out] = result

    return run


# How a layer runs, by the name of its kernel.
KERNELS: dict[str, Callable[[PlannedOp, Layer, int], Step]] = {"torch": _torch_layer, "csr": _csr_layer}


def _pair(numbers: Any) -> tuple[int, int]:
    a, b = numbers
    return int(a), int(b)


def _quad(numbers: Any) -> tuple[int, int, int, int]:
    a, b, c, d = numbers
    return int(a), int(b), int(c), int(d)


# --- everything else --------------------------------------------------------------------------------------------------------


def _torch_call(op: PlannedOp, out: int) -> Step:
    """A call with its constants bound; the usual forms of arguments have a shorter way."""
    call, args, kwargs = op.call, op.args, op.kwargs
    assert call is not None
    if not _read(kwargs):
        constants = args[1:]
        if args and isinstance(args[0], Ref) and not _read(constants):
            first = args[0].index

            def one(values: Values) -> None:
                values[out] = call(values[first], *constants, **kwargs)

            return one
        if len(args) == 2 and all(isinstance(a, Ref) for a in args):
            left, right = args[0].index, args[1].index

            def two(values: Values) -> None:
                values[out] = call(values[left], values[right], **kwargs)

            return two
    positional, named = _getter(args), _getter(kwargs)

    def general(values: Values) -> None:
        values[out] = call(*positional(values), **named(values))

    return general


def _read(template: Any) -> set[int]:
    """The values a template refers to."""
    if isinstance(template, Ref):
        return {template.index}
    if isinstance(template, tuple | list):
        return {i for part in template for i in _read(part)}
    if isinstance(template, dict):
        return _read(list(template.values()))
    if isinstance(template, slice):
        return _read((template.start, template.stop, template.step))
    return set()


def _getter(template: Any) -> Callable[[Values], Any]:
    """A function that fills a template in."""
    if isinstance(template, Ref):
        index = template.index
        return lambda values: values[index]
    if not _read(template):
        return lambda values: template
    if isinstance(template, dict):
        named = {name: _getter(part) for name, part in template.items()}
        return lambda values: {name: get(values) for name, get in named.items()}
    if isinstance(template, slice):
        ends = [_getter(end) for end in (template.start, template.stop, template.step)]
        return lambda values: slice(*(get(values) for get in ends))
    parts = [_getter(part) for part in template]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return lambda values: type(template)(*(get(values) for get in parts))
    kind = type(template)
    return lambda values: kind([get(values) for get in parts])


def _copied(result: Any) -> Any:
    """Copies of all tensors in a structure."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    if isinstance(result, tuple | list):
        parts = [_copied(part) for part in result]
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(*parts)
        return type(result)(parts)
    if isinstance(result, dict):
        return {name: _copied(part) for name, part in result.items()}
    return result
