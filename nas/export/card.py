"""card.md: what an exported network is, every number with how it was got, a table of its layers, and how to use it.

What it does not do: measure anything; it says what it is given and what the files hold.

Start with `card_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.export.folder import MASKS, ONNX, PT2, SOURCE, VERIFICATION, WEIGHTS

_SPARSE = "on the sparse CPU kernels of the search, not on the files here"

# How the numbers of a run were got, for those that come without an explanation of their own.
MEANINGS: dict[str, str] = {
    "val_accuracy": "fraction right on the validation part; no weight was trained on it, the search selects by it",
    "val_loss": "mean cross-entropy on the validation part",
    "test_accuracy": "fraction right on the test part, measured once after the search; nothing was selected by it",
    "latency_ms": f"measured milliseconds of one forward pass, {_SPARSE}",
    "latency_lo_ms": "lower end of the interval around latency_ms",
    "latency_hi_ms": "upper end of the interval around latency_ms",
    "latency_search_ms": "latency_ms as the search knew it; measured (again) for the networks handed out",
    "latency_search_lo_ms": "lower end of the 90 % interval of the prediction the search went by",
    "latency_search_hi_ms": "upper end of the 90 % interval of the prediction the search went by",
    "latency_search_source": "where that prediction came from",
    "latency_verified": "1 if latency_ms was measured again after the search",
    "latency_source": "where the latencies come from",
    "latency_quality": "how steady the machine was while they were measured",
    "energy_mj": "millijoules of one forward pass, from latency_ms by the method beside",
    "energy_method": "how energy_mj was got",
    "params": "all parameters of the network, zeros included; counted again from the files, see Size",
    "nnz": "parameters less the weights that masks set to zero; counted again from the files, see Size",
    "density": "fraction of the convolution and linear weights that is kept",
    "weight_bytes": "4 per kept parameter, and a bit per weight for each layer with zeros",
    "dense_macs": "multiply-accumulates of convolution and linear layers for one input, zeros included",
    "macs": "multiply-accumulates of convolution and linear layers for one input, zeros left out",
    "duration_s": "seconds the trial took",
}
_HEADINGS = ("title", "name", "description", "how", "metrics")


def title_of(card: Mapping[str, Any]) -> str:
    """The network's title in one line."""
    return " ".join(str(card.get("title") or card.get("name") or "A network").split())


def numbers_of(card: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The measured numbers of a card: name -> value and how it was got."""
    how = card.get("how") or {}
    found: dict[str, tuple[Any, str]] = {}
    for key, value in {**card, **(card.get("metrics") or {})}.items():
        if key in _HEADINGS:
            continue
        if isinstance(value, Mapping):
            if "value" in value:
                found[key] = (value["value"], str(value.get("how", how.get(key, MEANINGS.get(key, "")))))
        elif key in (card.get("metrics") or {}) or key in MEANINGS or key in how or isinstance(value, float):
            found[key] = (value, str(how.get(key, MEANINGS.get(key, ""))))
    return found


def card_text(
    card: Mapping[str, Any],
    verification: Mapping[str, Any],
    inputs: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
) -> str:
    """The text of card.md.

    Args:
        card: title (or name), description, metrics (name -> number), how (name -> how a number was got) and anything else: numbers
            {"value": ..., "how": ...} bring their own explanation, other mappings become sections, plain values say where the
            network comes from.
        verification: as written to verification.json.
        inputs: argument names of the network.
        shapes: their shapes without the batch axis.
        dtypes: their dtypes, e.g. "float32".
    """
    formats = verification["formats"]
    lines = [f"# {title_of(card)}", ""]
    if card.get("description"):
        lines += [str(card["description"]), ""]
    described = [f"`{n}`: {d} [batch{''.join(f', {x}' for x in s)}]" for n, s, d in zip(inputs, shapes, dtypes)]
    lines += [f"Inputs: {'; '.join(described)}; any batch size.", ""]
    lines += _numbers(card)
    lines += _files(formats, verification)
    lines += _layers(verification["counts"])
    lines += _usage(formats, inputs, shapes, dtypes, bool(verification["counts"]["layers"]))
    lines += _sections(card)
    return "\n".join(lines).rstrip("\n") + "\n"


def _numbers(card: Mapping[str, Any]) -> list[str]:
    found = numbers_of(card)
    lines = []
    facts = [
        (key, _plain(value))
        for key, value in card.items()
        if key not in _HEADINGS and key not in found and not isinstance(value, Mapping)
    ]
    if facts:
        lines += ["## Origin", "", *_table(("name", "value"), facts), ""]
    if found:
        rows = [(key, _plain(value), how) for key, (value, how) in found.items()]
        lines += ["## Numbers", "", *_table(("name", "value", "how it was got"), rows), ""]
    if any(key.startswith("latency") for key in found):
        lines += [
            "Latencies are those of the sparse runtime that the search measures with. The files here run on dense kernels, which",
            "multiply the zeros too: they have this accuracy and this size, and a latency of their own.",
            "",
        ]
    return lines


def _files(formats: Mapping[str, Any], verification: Mapping[str, Any]) -> list[str]:
    rows = []
    told = {
        "source": (
            SOURCE,
            "plain PyTorch source; in a fresh process with torch and safetensors, without the search's own packages",
        ),
        "onnx": (ONNX, "ONNX; in onnxruntime on the CPU"),
        "pt2": (PT2, "torch.export; loaded with torch.export.load"),
    }
    for key, (file, what) in told.items():
        if key in formats:
            gap = formats[key]
            gaps = (f"{gap[f'largest_{kind}_difference']:.2g}" for kind in ("absolute", "relative"))
            rows.append((f"`{file}`", what, *gaps))
    batches = " and ".join(str(n) for n in verification["batches"])
    return [
        "## Files",
        "",
        f"Largest difference between each file's outputs and the trained network's, on random inputs (batches of {batches});",
        f"relative to the largest output. Above {verification['tolerance']:g} nothing would have been written. More in",
        f"`{VERIFICATION}`.",
        "",
        *_table(("file", "what, and how it was checked", "absolute", "relative"), rows),
        "",
        f"`{WEIGHTS}` holds the weights, zeros included"
        + (f"; `{MASKS}` says which weights are kept." if verification["counts"]["layers"] else "."),
        "",
    ]


def _layers(counts: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Size",
        "",
        f"Counted from the files: {counts['params']:,} parameters, {counts['nnz']:,} of them not masked to zero.",
        "",
    ]
    if not counts["layers"]:
        return [*lines, "No layer is sparse.", ""]
    rows = [
        (
            f"`{row['attribute']}`",
            row["name"],
            " x ".join(str(n) for n in row["shape"]),
            row["pattern"],
            f"{row['kept']:,}",
            f"{row['weights']:,}",
            f"{row['density']:.4f}",
        )
        for row in counts["layers"]
    ]
    return [*lines, *_table(("layer", "name in the search", "weight", "pattern", "kept", "of", "density"), rows), ""]


def _usage(
    formats: Mapping[str, Any],
    inputs: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    sparse: bool,
) -> list[str]:
    """Snippets that run as they stand, one after the other, with this folder as the working directory."""
    arguments = ", ".join(inputs)
    made = []
    for name, shape, dtype in zip(inputs, shapes, dtypes):
        size = ", ".join(str(n) for n in (4, *shape))
        call = f"torch.randn({size})" if dtype.startswith("float") else f"torch.zeros({size}, dtype=torch.{dtype})"
        made.append(f"{name} = {call}")
    lines = ["## Use", "", "In this folder:", "", *_python("import torch", "", *made)]
    if "source" in formats:
        lines += _python(
            "from network import load",
            "",
            "network = load()",
            "with torch.no_grad():",
            f"    outputs = network({arguments})",
        )
    if "source" in formats and sparse:
        lines += ["Fine-tuning that keeps the zeros:", ""]
        lines += _python(
            "from network import apply_masks, load_masks",
            "",
            "network, masks = load().train(), load_masks()",
            "optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)",
            "# for every batch: optimizer.zero_grad(); loss.backward(); and then",
            "optimizer.step()",
            "apply_masks(network, masks)",
        )
    if "onnx" in formats:
        feed = ", ".join(f'"{name}": {name}.numpy()' for name in inputs)
        lines += _python(
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])',
            f"outputs = session.run(None, {{{feed}}})",
        )
    if "pt2" in formats:
        lines += _python(
            f'module = torch.export.load("{PT2}").module()',
            "with torch.no_grad():",
            f"    outputs = module({arguments})",
        )
    return lines


def _python(*code: str) -> list[str]:
    return ["```python", *code, "```", ""]


def _sections(card: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in card.items():
        if key not in _HEADINGS and isinstance(value, Mapping) and "value" not in value:
            rows = [(name, _plain(each)) for name, each in _flat(value)]
            lines += [f"## {key[:1].upper()}{key[1:].replace('_', ' ')}", "", *_table(("name", "value"), rows), ""]
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(' --- ' for _ in head)}|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
