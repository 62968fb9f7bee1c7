"""Write a trained network as files that need nothing of this project, and check every one of them.

What it does not do: train, measure latency, or write anything it has not run.

Start with `export_module`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas.export import folder as place
from nas.export.card import card_text, numbers_of, title_of
from nas.export.errors import ExportError
from nas.export.formats import ONNX_OPSET, export_program, write_onnx, write_pt2, write_weights
from nas.export.plain import SparseLayer, detached_copy, plain_copy
from nas.export.source import Source, generate
from nas.export.verify import (
    BATCHES,
    SEED,
    TOLERANCE,
    Difference,
    checked,
    random_inputs,
    recount,
    run_model,
    run_onnx,
    run_pt2,
    run_source,
)

FORMATS = ("source", "onnx", "pt2")


def export_module(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    folder: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export a network: network.py, weights.safetensors, masks.safetensors, network.onnx, network.pt2, card.md, verification.json.

    All or nothing: the files are written beside `folder`, run and compared with the network, and moved into place only if every one
    of them agrees. What is exported is the network in evaluation mode, on the CPU, in float32.

    Args:
        model: a trained network, possibly with sparse layers; it is not changed.
        example_input: a tensor, or one per argument of the network; the batch is axis 0 of each, and random inputs for the
            checks are drawn like it.
        folder: where to; an earlier export there is replaced, anything else is refused.
        card: what to say about the network in card.md, see `card.card_text`. Its params and nnz are compared with the files; its
            latencies go into verification.json as they are.
        formats: which of "source", "onnx", "pt2" to write. Without "source" the weights file has the network's own names, and
            modules that torch.fx cannot record can be exported.
        progress: called with a short text before each step.

    Returns:
        The content of verification.json.

    Raises:
        ExportError: the folder is taken or cannot be written, the network cannot be expressed in one of the formats, or a
            format does not compute the same. Nothing is left behind.
    """
    say = progress or (lambda _: None)
    destination = Path(folder).expanduser().absolute()
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ExportError(f"expected formats among {', '.join(FORMATS)}, found {', '.join(unknown) or 'none'}")
    place.check_destination(destination)
    examples = _examples(example_input)
    card = dict(card or {})

    say("preparing the network")
    original = detached_copy(model)
    plain, sparse = plain_copy(model)
    batches = random_inputs(examples)
    expected = run_model(original, batches)
    checked("the plain copy of the network", expected, run_model(plain, batches))

    with place.replaced_folder(destination) as work:
        source: Source | None = None
        exported: nn.Module = plain
        if "source" in formats:
            say(f"writing {place.SOURCE}")
            source = generate(plain, sparse, examples, title_of(card))
            (work / place.SOURCE).write_text(source.text, encoding="utf-8")
        held = _held(plain, sparse, source, len(examples))
        write_weights(held.state, work / place.WEIGHTS)
        if held.masks:
            write_weights(held.masks, work / place.MASKS)
        gaps: dict[str, Difference] = {}
        if source is not None:
            say(f"checking {place.SOURCE} in a fresh process")
            gaps["source"] = checked(place.SOURCE, expected, run_source(work, batches))
            exported = _load(work)
        if "pt2" in formats or "onnx" in formats:
            say("recording the network with torch.export")
            program = export_program(exported, examples, held.inputs)
            if "pt2" in formats:
                say(f"writing and checking {place.PT2}")
                write_pt2(program, work / place.PT2)
                gaps["pt2"] = checked(place.PT2, expected, run_pt2(work / place.PT2, batches))
            if "onnx" in formats:
                say(f"writing and checking {place.ONNX}")
                count = len(pytree.tree_leaves(expected[0]))
                outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
                write_onnx(program, work / place.ONNX, held.inputs, outputs)
                gaps["onnx"] = checked(place.ONNX, expected, run_onnx(work / place.ONNX, batches), structure=False)
        say("counting and describing")
        counts = recount(
            work, held.parameters, held.attributes, {name: layer.pattern for name, layer in sparse.items()}
        )
        counts["unused"] = _check_counts(plain, sparse, counts, held.attributes, card)
        verification = _verification(gaps, counts, card, work)
        shapes, dtypes = [tuple(x.shape[1:]) for x in examples], [str(x.dtype).removeprefix("torch.") for x in examples]
        (work / place.CARD).write_text(card_text(card, verification, held.inputs, shapes, dtypes), encoding="utf-8")
        verification["inputs"] = [{"shape": list(x.shape[1:]), "dtype": dtype} for x, dtype in zip(examples, dtypes)]
        verification["files"] = _files(work)
        (work / place.VERIFICATION).write_text(
            json.dumps(verification, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    say(f"exported to {destination}")
    return verification


def _examples(example_input: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    examples = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    for x in examples:
        if not isinstance(x, Tensor) or x.dim() < 1 or x.numel() == 0:
            raise ExportError(
                "expected example inputs that are tensors with the batch as axis 0 and at least one row, found something else"
            )
        if x.is_floating_point() and x.dtype != torch.float32:
            raise ExportError(f"expected float32 or integer example inputs, found {x.dtype}; call .float() on them")
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ExportError("expected finite example inputs, found NaN or infinity")
    if not examples:
        raise ExportError("expected at least one example input, found none")
    return tuple(x.detach().cpu() for x in examples)


def _held(plain: nn.Module, sparse: dict[str, SparseLayer], source: Source | None, inputs: int) -> Source:
    """What the files hold: by the names of the generated source, or of the network itself if there is no source."""
    if source is not None:
        return source
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    masks = {f"{name}.mask": layer.mask for name, layer in sparse.items()}
    parameters = tuple(name for name, _ in plain.named_parameters())
    names = tuple(inspect.signature(plain.forward).parameters)[:inputs]
    return Source("", state, masks, {name: name for name in sparse}, names, parameters)


def _load(work: Path) -> nn.Module:
    """The generated network, in this process: the other formats are made from it, so that all share its names."""
    spec = importlib.util.spec_from_file_location("network", work / place.SOURCE)
    if spec is None or spec.loader is None:
        raise ExportError(f"expected to import {work / place.SOURCE}, found that it cannot be")
    module = importlib.util.module_from_spec(spec)
    exec(compile((work / place.SOURCE).read_text(encoding="utf-8"), place.SOURCE, "exec"), module.__dict__)
    network: nn.Module = module.load(work)
    return network


def _check_counts(
    plain: nn.Module,
    sparse: dict[str, SparseLayer],
    counts: Mapping[str, Any],
    attributes: Mapping[str, str],
    card: Mapping[str, Any],
) -> dict[str, int]:
    """Compare the counts from the files with the network and the card; what the forward pass never uses is not in the files."""
    params = sum(p.numel() for p in plain.parameters())
    nnz = params - sum(layer.weights - layer.kept for layer in sparse.values())
    unused_zeros = sum(layer.weights - layer.kept for name, layer in sparse.items() if name not in attributes)
    unused = params - counts["params"]
    if unused < 0 or nnz != counts["nnz"] + unused - unused_zeros:
        raise ExportError(
            f"expected files with the network's {params} parameters, {nnz} of them not masked to zero, less what it does not use; "
            f"found {counts['params']} and {counts['nnz']}"
        )
    claims = numbers_of(card)
    for key, whole in (("params", params), ("nnz", nnz)):
        claimed = claims[key][0] if key in claims else None
        if claimed is not None and claimed not in (whole, counts[key]):
            raise ExportError(
                f"card: expected {key} = {counts[key]} as counted from the files, found {claimed}; is it another network's card?"
            )
    return {"params": unused, "nnz": unused - unused_zeros}


def _verification(
    gaps: Mapping[str, Difference], counts: dict[str, Any], card: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    how = {
        "source": (
            place.SOURCE,
            "a fresh isolated process with torch and safetensors, without this project and its other requirements",
        ),
        "onnx": (place.ONNX, f"onnxruntime {_version('onnxruntime')} on the CPU; opset {ONNX_OPSET}"),
        "pt2": (place.PT2, "torch.export.load in the exporting process"),
    }
    return {
        "kind": place.KIND,
        "tolerance": TOLERANCE,
        "batches": list(BATCHES),
        "seed": SEED,
        "formats": {
            key: {
                "file": how[key][0],
                "checked_in": how[key][1],
                "largest_absolute_difference": gaps[key].largest_absolute,
                "largest_relative_difference": gaps[key].largest_relative,
            }
            for key in FORMATS
            if key in gaps
        },
        "counts": counts,
        "latency": {key: _json(value) for key, (value, _) in numbers_of(card).items() if key.startswith("latency")},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "safetensors", "onnx", "onnxruntime")},
        },
    }


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def _files(work: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(work.iterdir())
    }
