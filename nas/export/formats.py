"""The files of an exported network: weights and masks (safetensors), torch.export, ONNX.

What it does not do: check what it wrote (see `verify`).

Start with `write_weights`, `export_program`, `write_pt2`, `write_onnx`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nas.export.errors import ExportError, first_line

ONNX_OPSET = (
    20  # what torch.onnx translates to natively in torch 2.11 to 2.13; older runtimes than onnxruntime 1.17 lack it
)

# Warnings of the exporters about themselves, which nobody who exports a network can act on.
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"The tensor attributes? self\.[\w.]*_flat_weights\[0\].*assigned during export"),  # nn.LSTM, nn.GRU
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' known warnings about themselves, and their log lines about packages that are not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    with warnings.catch_warnings():
        for category, message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, in order of name; tensors that share memory are written as copies of their own.

    All writers here write bytes they have in memory, so that a full disk is an OSError whatever the library makes of it.
    """
    from safetensors.torch import save

    copies = {name: tensors[name].detach().clone().contiguous() for name in sorted(tensors)}
    path.write_bytes(save(copies, metadata={"format": "pt"}))


def export_program(network: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> ExportedProgram:
    """torch.export with a batch axis of any size, without traces of the files it was made from.

    Args:
        network: in evaluation mode.
        inputs: examples; the batch is axis 0 of each. At least two rows are used, so that no size 1 is taken as fixed.
        names: the names of the inputs in the forward method.

    Raises:
        ExportError: torch.export refuses the network, or its batch axis cannot vary.
    """
    batch = Dim("batch")
    examples = tuple(torch.cat([x, x])[:2].contiguous() if x.shape[0] < 2 else x for x in inputs)
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(network, examples, dynamic_shapes=tuple({0: batch} for _ in examples))
    except Exception as error:
        raise ExportError(
            f"expected a network that torch.export can record with a batch axis (axis 0 of {', '.join(names)}) of any size, "
            f"found {type(error).__name__}: {first_line(error)}; take sizes from the tensors instead of writing them down, "
            'or export the source alone with formats=("source",)'
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Save a program for torch.export.load."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def write_onnx(program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Translate a program to ONNX, batch norm folded, and write it as one file.

    Args:
        program: as `export_program` makes it.
        path: the file to write.
        inputs: names for the graph's inputs.
        outputs: names for its outputs, in the order of torch's pytree.

    Raises:
        ExportError: an operation has no translation.
    """
    import onnx

    try:
        with torch.no_grad(), quiet():
            translated = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=ONNX_OPSET,
                dynamo=True,
                verbose=False,
            )
            if translated is None:
                raise RuntimeError("torch.onnx returned nothing")
            model = translated.model_proto
        _forget_origin(model)
        onnx.checker.check_model(model)
        content = model.SerializeToString()
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(
            f"expected a network that ONNX opset {ONNX_OPSET} can express, found {type(cause).__name__}: {first_line(cause)}; "
            'leave ONNX out with formats=("source", "pt2")'
        ) from error
    path.write_bytes(content)


def _forget_origin(model: Any) -> None:
    """Remove file names, class names and notes of the exporter from an ONNX model, and name the batch axis."""
    graphs = [model.graph]
    holders = [model, *model.functions]
    while graphs:
        graph = graphs.pop()
        holders += [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    for function in model.functions:
        holders += list(function.node)
    for holder in holders:
        if hasattr(holder, "doc_string"):
            holder.doc_string = ""
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if len(dimensions) > 0 and dimensions[0].HasField("dim_param"):
            dimensions[0].dim_param = "batch"
