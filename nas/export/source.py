"""A network as one readable file of plain torch source.

The generated class is flat: one attribute per layer in the order of their first use, one statement per operation. It computes
what the network computes in evaluation mode; whatever a network does in training only (auxiliary heads, dropped paths written by
hand) is not in it, while torch's own dropout and batch norm layers are, and train as ever.

What it does not do: values of weights (see `formats.write_weights`), or networks whose Python code depends on the data.

Start with `generate`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.export.literals import literal
from nas.export.members import Layer, Members, collect, member_path
from nas.export.plain import SparseLayer
from nas.export.statements import INDENT, forward_lines, group_of, wrapped
from nas.export.trace import trace


@dataclass(frozen=True)
class Source:
    """Generated source and what belongs to it.

    Attributes:
        text: the file's content.
        state: what the weights file must hold, by name in the generated class.
        masks: bool, "<layer>.mask" -> the weight's shape; the sparse layers the forward pass uses.
        attributes: the layer's name in the network -> its dotted name in the generated class.
        inputs: argument names of the forward method.
        parameters: names in `state` that are parameters, not buffers.
    """

    text: str
    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    attributes: dict[str, str]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]


def generate(model: nn.Module, sparse: dict[str, SparseLayer], inputs: Sequence[Tensor], title: str) -> Source:
    """Generate the source of a plain network.

    Args:
        model: a network as `plain_copy` makes it.
        sparse: its sparse layers by name, for the comments and the masks.
        inputs: example inputs; the batch is axis 0 of each.
        title: first line of the file's docstring.

    Raises:
        ExportError: the network cannot be recorded, or a layer or an operation cannot be written; names it.
    """
    recording = trace(model, inputs)
    wrapper = "" if recording.module is model else "layer."
    members = collect(recording)
    arguments, body = forward_lines(recording, members)
    by_attribute = {}
    attributes = {}
    for name, layer in sparse.items():
        attribute = members.name_of(f"{wrapper}{name}" if name else wrapper.rstrip("."))
        if attribute is not None:
            by_attribute[attribute] = layer
            attributes[name] = attribute
    state = members.state()
    masks = {f"{attribute}.mask": layer.mask for attribute, layer in by_attribute.items()}
    text = "\n".join(
        [
            *_docstring(title, arguments, inputs, by_attribute),
            *_imports(body, members),
            "HERE = Path(__file__).resolve().parent",
            "",
            "",
            "class Network(nn.Module):",
            *_init_lines(members, by_attribute),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *body,
            "",
            "",
            *_load_lines(bool(masks)),
            *_main_lines(inputs),
            "",
        ]
    )
    parameters = tuple(name for name in state if _is_parameter(members, name))
    return Source(text, state, masks, attributes, tuple(arguments), parameters)


def _is_parameter(members: Members, name: str) -> bool:
    for own in members.tensors.values():
        if own.attribute == name:
            return isinstance(own.tensor, nn.Parameter)
    for layer in members.layers.values():
        if name.startswith(f"{layer.attribute}."):
            key = name[len(layer.attribute) + 1 :]
            return key in dict(layer.module.named_parameters(remove_duplicate=False))
    return False


def _docstring(
    title: str, arguments: Sequence[str], inputs: Sequence[Tensor], sparse: dict[str, SparseLayer]
) -> list[str]:
    title = " ".join(title.replace("\\", "/").replace('"""', "'''").split()).rstrip('"')
    shapes = ", ".join(
        f"{name} {str(x.dtype).removeprefix('torch.')}[batch{''.join(f', {n}' for n in x.shape[1:])}]"
        for name, x in zip(arguments, inputs)
    )
    lines = [
        f'"""{title}',
        "",
        "A plain PyTorch network. It needs torch, and safetensors to load its weights; nothing else.",
        "",
        "    from network import load",
        "    network = load()                 # reads weights.safetensors beside this file; evaluation mode",
        f"    outputs = network({', '.join(arguments)})",
        "",
        f"Inputs: {shapes}.",
        "Batch norm and dropout layers behave as ever in training mode; whatever else the original network did in training only",
        "is left out.",
    ]
    if sparse:
        layers = "1 layer keeps" if len(sparse) == 1 else f"{len(sparse)} layers keep"
        total, kept = sum(s.weights for s in sparse.values()), sum(s.kept for s in sparse.values())
        lines += [
            "",
            f"Sparse: {layers} {kept:,} of {total:,} weights (density {kept / total:.4g}). The weights file holds",
            "the zeros, masks.safetensors says which weights are kept. To fine-tune without losing the zeros:",
            "",
            "    network, masks = load().train(), load_masks()",
            "    ...",
            "    optimizer.step()",
            "    apply_masks(network, masks)",
        ]
    return [*lines, '"""', ""]


def _imports(body: Sequence[str], members: Members) -> list[str]:
    code = "\n".join(body)
    lines = ["import math"] if re.search(r"\bmath\.", code) else []
    lines += ["from pathlib import Path", "", "import torch"]
    if any(re.search(r"\bF\.", text) for text in (code, *(layer.text for layer in members.layers.values()))):
        lines.append("import torch.nn.functional as F")
    return [*lines, "from torch import nn", ""]


def _init_lines(members: Members, sparse: dict[str, SparseLayer]) -> list[str]:
    lines = ["    def __init__(self):", f"{INDENT}super().__init__()"]
    group = None
    for layer in members.layers.values():
        new = group_of(layer.scopes)
        if new != group:
            if new is not None:
                lines += ["", f"{INDENT}# {new.path}: {new.kind}"]
            else:
                lines.append("")
            group = new
        lines += _layer_lines(layer, sparse)
    for own in members.tensors.values():
        shape, dtype = ", ".join(str(n) for n in own.tensor.shape) or "()", own.tensor.dtype
        extra = "" if dtype == torch.float32 else f", dtype={literal(dtype, own.path)}"
        if isinstance(own.tensor, nn.Parameter):
            lines.append(f"{INDENT}self.{own.attribute} = nn.Parameter(torch.zeros({shape}{extra}))")
        else:
            lines.append(f'{INDENT}self.register_buffer("{own.attribute}", torch.zeros({shape}{extra}))')
    for name, same in members.ties:
        lines.append(f"{INDENT}{member_path(name)} = {member_path(same)}  # one tensor, two names")
    return lines


def _layer_lines(layer: Layer, sparse: dict[str, SparseLayer]) -> list[str]:
    lines = []
    for name, s in sparse.items():
        if name == layer.attribute or name.startswith(f"{layer.attribute}."):
            inner = name[len(layer.attribute) + 1 :]
            of = f"{inner}: " if inner else ""
            lines.append(
                f"{INDENT}# {of}{s.kept:,} of {s.weights:,} weights kept (density {s.density:.4g}), {s.pattern}"
            )
    return lines + wrapped(f"self.{layer.attribute} = {layer.text}", INDENT)


def _load_lines(masked: bool) -> list[str]:
    lines = '''
def load(folder=HERE):
    """The network with its trained weights, in evaluation mode."""
    from safetensors.torch import load_model

    network = Network()
    load_model(network, Path(folder) / "weights.safetensors")
    return network.eval()


'''
    if masked:
        lines += '''def load_masks(folder=HERE):
    """Which weights are kept: "<layer>.mask" -> bool tensor of the weight's shape."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "masks.safetensors")


@torch.no_grad()
def apply_masks(network, masks):
    """Set the weights that are not kept back to zero."""
    for name, mask in masks.items():
        weight = network.get_parameter(name.removesuffix("mask") + "weight")
        weight.mul_(mask.to(weight.device))


'''
    return [*lines.strip("\n").split("\n"), "", ""]


def _main_lines(inputs: Sequence[Tensor]) -> list[str]:
    lines = ['if __name__ == "__main__":', "    network = load()"]
    texts = []
    for x in inputs:
        shape = ", ".join(str(n) for n in (2, *x.shape[1:]))
        if x.is_floating_point():
            texts.append(f"torch.randn({shape})")
        else:
            texts.append(f"torch.zeros({shape}, dtype={literal(x.dtype, 'an input')})")
    lines += [
        "    with torch.no_grad():",
        f"        outputs = network({', '.join(texts)})",
        "    if isinstance(outputs, torch.Tensor):",
        "        outputs = [outputs]",
        "    tensors = outputs.values() if isinstance(outputs, dict) else outputs",
        "    shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, torch.Tensor)]",
        "    parameters = sum(p.numel() for p in network.parameters())",
        '    print(f"{parameters:,} parameters; two random inputs give outputs of shape", *shapes)',
    ]
    return lines
