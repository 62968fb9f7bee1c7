"""Does what was written compute what the network computes, and does it hold what the network holds?

Every format is run on the same few random inputs (batches of 1 and 3) and compared with the network itself; the source in a fresh,
isolated process that cannot import this project. Sizes are counted again from the files.

What it does not do: accuracy (the outputs agree, so it is the network's own), latency.

Start with `random_inputs`, `difference`, `run_source`, `run_pt2`, `run_onnx`, `recount`.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas.export.errors import ExportError, first_line
from nas.export.formats import quiet

TOLERANCE = 1e-5
BATCHES = (1, 3)
SEED = 0
_FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")
_PATIENCE_S = 600


@dataclass(frozen=True)
class Difference:
    """How far outputs are from the network's own.

    Attributes:
        largest_absolute: max |found - expected| over all outputs and inputs.
        largest_relative: the same, each output divided by its largest |expected|.
    """

    largest_absolute: float
    largest_relative: float


def random_inputs(examples: Sequence[Tensor], seed: int = SEED) -> list[tuple[Tensor, ...]]:
    """Random inputs of every batch size in `BATCHES`, distributed like the examples.

    Floats are normal with the example's mean and deviation (1 if it has none); integers are uniform over the example's range.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in BATCHES:
        row = []
        for x in examples:
            shape = (batch, *x.shape[1:])
            if x.is_floating_point():
                deviation = float(x.std(correction=0)) if x.numel() else 0.0
                row.append((torch.randn(shape, generator=generator) * (deviation or 1.0) + float(x.mean())).to(x.dtype))
            elif x.dtype == torch.bool:
                row.append(torch.rand(shape, generator=generator) < 0.5)
            else:
                row.append(torch.randint(int(x.min()), int(x.max()) + 1, shape, generator=generator, dtype=x.dtype))
        found.append(tuple(row))
    return found


def run_model(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    """The network's own outputs, one per batch.

    Raises:
        ExportError: it raises, or an output is not a finite tensor.
    """
    outputs = []
    for batch in batches:
        try:
            with torch.no_grad():
                output = model(*(x.clone() for x in batch))
        except Exception as error:
            raise ExportError(
                f"expected a network that takes inputs of shape {[tuple(x.shape) for x in batch]}, found "
                f"{type(error).__name__}: {first_line(error)}; pass an example input with the batch as axis 0"
            ) from error
        for tensor in pytree.tree_leaves(output):
            if not isinstance(tensor, Tensor):
                raise ExportError(
                    f"expected outputs that are tensors, found {type(tensor).__name__}; return tensors only"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ExportError(
                    f"expected finite outputs, found NaN or infinity on random inputs of shape {[tuple(x.shape) for x in batch]}; "
                    "train the network, or pass an example input that looks like its data"
                )
        outputs.append(output)
    return outputs


def difference(expected: Sequence[Any], found: Sequence[Any], structure: bool = True) -> Difference:
    """Compare outputs, batch by batch.

    Args:
        expected: outputs of the network.
        found: outputs of an exported form; for `structure=False` flat lists of tensors.
        structure: whether tuples, lists and dicts must agree too.

    Raises:
        ExportError: number, structure, shapes or dtypes of the outputs differ.
    """
    absolute = relative = 0.0
    for want, got in zip(expected, found, strict=True):
        ours, our_tree = pytree.tree_flatten(want)
        theirs, their_tree = pytree.tree_flatten(got)
        if len(ours) != len(theirs) or (structure and our_tree != their_tree):
            raise ExportError(f"expected outputs like {our_tree}, found {their_tree}")
        for a, b in zip((t.detach() for t in ours), (t.detach() for t in theirs)):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ExportError(f"expected an output {a.dtype}{list(a.shape)}, found {b.dtype}{list(b.shape)}")
            if a.numel() == 0:
                continue
            gap = float((a.double() - b.double()).abs().max())
            if gap != gap:
                raise ExportError("expected finite outputs, found NaN")
            scale = float(a.double().abs().max())
            absolute = max(absolute, gap)
            relative = max(relative, gap / scale if scale > 0 else gap)
    return Difference(absolute, relative)


def run_source(folder: Path, batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    """Outputs of network.py in a fresh process that can import torch and safetensors only; its smoke test is run too.

    Raises:
        ExportError: the process fails; with its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        questions, answers = Path(scratch) / "questions.pt", Path(scratch) / "answers.pt"
        buffer = io.BytesIO()
        torch.save(list(batches), buffer)
        questions.write_bytes(buffer.getvalue())
        command = [sys.executable, "-I", str(_FRESH_PROCESS), str(folder), str(questions), str(answers)]
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"network.py: expected an answer within {_PATIENCE_S} s in a fresh process, found none"
            ) from error
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise ExportError(
                f"network.py: expected that the generated source runs in a fresh process, found: {last[0]}"
            )
        answered: list[Any] = torch.load(answers, weights_only=True)
    return answered


def run_pt2(path: Path, batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    """Outputs of a saved torch.export program, loaded again."""
    with quiet(), torch.no_grad():
        module = torch.export.load(path).module()
        return [module(*(x.clone() for x in batch)) for batch in batches]


def run_onnx(path: Path, batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    """Outputs of an ONNX file in onnxruntime on the CPU: one flat list of tensors per batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    answers = []
    for batch in batches:
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, batch, strict=True)})
        answers.append([torch.from_numpy(output) for output in outputs])
    return answers


def checked(name: str, expected: Sequence[Any], found: Sequence[Any], structure: bool = True) -> Difference:
    """`difference`, refused above `TOLERANCE`.

    Raises:
        ExportError: the outputs differ; names the file and the size of the difference.
    """
    try:
        gap = difference(expected, found, structure)
    except ExportError as error:
        raise ExportError(f"{name}: {error}; nothing was written") from error
    if gap.largest_relative > TOLERANCE:
        raise ExportError(
            f"{name}: expected the network's outputs to a relative difference of {TOLERANCE:g}, found {gap.largest_relative:.3g} "
            f"(absolute {gap.largest_absolute:.3g}); nothing was written. A hook, a random operation or a value changed while the "
            "network runs is the usual cause: move it into the forward method"
        )
    return gap


def recount(
    folder: Path, parameters: Sequence[str], attributes: dict[str, str], patterns: dict[str, str]
) -> dict[str, Any]:
    """Count parameters and zeros again, from the files alone.

    Args:
        folder: where weights.safetensors and, for a sparse network, masks.safetensors are.
        parameters: names of the tensors that are parameters.
        attributes: sparse layers: name in the network -> name in the file.
        patterns: sparse layers: name in the network -> canonical pattern.

    Returns:
        params, nnz (params less the entries masks set to zero), layers: name, attribute, pattern, shape, weights, kept, density,
        nonzero (kept values that are not 0.0 by chance).

    Raises:
        ExportError: a weight outside its mask is not zero.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "weights.safetensors")
    masks = load_file(folder / "masks.safetensors") if attributes else {}
    params = sum(weights[name].numel() for name in parameters)
    layers = []
    zeros = 0
    for name, attribute in attributes.items():
        weight, mask = weights[f"{attribute}.weight"], masks[f"{attribute}.mask"]
        if bool((weight[~mask] != 0).any()):
            raise ExportError(f"{name}: expected zeros outside the mask in weights.safetensors, found other values")
        kept = int(mask.sum())
        zeros += mask.numel() - kept
        layers.append(
            {
                "name": name,
                "attribute": attribute,
                "pattern": patterns[name],
                "shape": list(weight.shape),
                "weights": mask.numel(),
                "kept": kept,
                "density": kept / mask.numel(),
                "nonzero": int((weight != 0).sum()),
            }
        )
    return {"params": params, "nnz": params - zeros, "layers": layers}
