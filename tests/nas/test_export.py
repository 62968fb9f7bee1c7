"""Laws of `nas.export.export_module`: every file agrees with the network, counts are exact, folders are whole or untouched."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nas.errors import NasError
from nas.export import ExportError, export_module, folder, formats, verify
from nas.export.plain import plain_copy
from ops.counting import count
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparse_layers
from tests.nas.export_networks import Everything, imports_of, randomised, run_here

ALL_FILES = {"network.py", "weights.safetensors", "network.onnx", "network.pt2", "card.md", "verification.json"}


export_steps = importlib.import_module("nas.export.export")


def sparse_network() -> nn.Module:
    """Every pattern once, a dense layer between, one sparse layer that only training uses."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                SparseConv2d(4, 8, 3, padding=1, density=0.3),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
                SparseConv2d(8, 8, 3, padding=1, groups=2, bias=False, density=0.5, pattern="2:4"),
                SparseConv2d(8, 16, 1, density=0.25, pattern="4x1"),
                nn.Conv2d(16, 16, 3, groups=16),
                SparseConv2d(16, 8, 1, density=0.5, pattern="channel"),
            )
            self.head = SparseLinear(8, 10, density=0.1)
            self.auxiliary = SparseLinear(8, 10, density=0.5)

        def forward(self, x: Tensor) -> Any:
            x = self.features(x).mean((2, 3))
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    torch.manual_seed(1)
    net = Net()
    draw_masks_(net, torch.Generator().manual_seed(1))
    return randomised(net)


@pytest.fixture(scope="module")
def dense_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict[str, Any]]:
    torch.manual_seed(2)
    model, place = randomised(Everything()), tmp_path_factory.mktemp("dense") / "out"
    return model, place, export_module(model, torch.randn(2, 3, 16, 16), place, card={"title": "Everything"})


@pytest.fixture(scope="module")
def sparse_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict[str, Any]]:
    model, place = sparse_network(), tmp_path_factory.mktemp("sparse") / "new" / "out"
    counts = count(model, (4, 8, 8))
    card = {
        "name": "quickstart, trial 3",
        "trial": 3,
        "metrics": {
            "val_accuracy": 0.9125,
            "latency_ms": 1.25,
            "params": counts.params,
            "nnz": counts.nnz,
            "custom": 7.0,
        },
        "how": {"custom": "counted on fingers"},
        "environment": {"versions": {"torch": "x|y"}},
    }
    return model, place, export_module(model, torch.randn(1, 4, 8, 8), place, card=card)


@pytest.fixture(params=["dense", "sparse"])
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, Path, dict[str, Any]]:
    found: tuple[nn.Module, Path, dict[str, Any]] = request.getfixturevalue(f"{request.param}_export")
    return found


def test_every_format_agrees_with_the_network(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    _, place, verification = exported
    assert set(verification["formats"]) == {"source", "onnx", "pt2"}
    for gap in verification["formats"].values():
        assert 0 <= gap["largest_relative_difference"] <= 1e-5
    assert verification["formats"]["source"]["largest_absolute_difference"] <= 1e-6
    assert json.loads((place / "verification.json").read_text()) == verification
    masks = {"masks.safetensors"} if verification["counts"]["layers"] else set()
    assert {path.name for path in place.iterdir()} == ALL_FILES | masks
    assert set(verification["files"]) == (ALL_FILES | masks) - {"verification.json"}


def test_the_source_imports_nothing_of_ours_and_no_file_names_this_project_or_its_place(
    exported: tuple[nn.Module, Path, dict[str, Any]],
) -> None:
    _, place, _ = exported
    assert imports_of((place / "network.py").read_text()) <= {"torch", "safetensors", "math", "pathlib"}
    unwanted = [
        str(Path(__file__).parents[2]),
        str(place.parent),
        "search_spaces",
        "tests.nas",
        "nas.export",
        "ops.layers",
    ]
    for path in place.iterdir():
        content = path.read_bytes()
        assert [word for word in unwanted if word.encode() in content] == [], path.name


def test_every_snippet_of_the_card_runs(sparse_export: tuple[nn.Module, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, place, _ = sparse_export
    code = "\n".join(re.findall(r"```python\n(.*?)```", (place / "card.md").read_text(), flags=re.S))
    assert code.count("outputs = ") == 3
    code += """
for name, mask in masks.items():
    assert not network.get_parameter(name.removesuffix("mask") + "weight")[~mask].any()
print(*outputs.shape)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=place, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["4", "10"], done.stderr


def test_the_card_gives_every_number_and_how_it_was_got(sparse_export: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    _, place, verification = sparse_export
    text = (place / "card.md").read_text()
    assert text.startswith("# quickstart, trial 3\n")
    assert "| val_accuracy | 0.9125 | fraction right on the validation part" in text
    assert "| custom | 7 | counted on fingers |" in text
    assert "| trial | 3 |" in text
    assert "| versions.torch | x\\|y |" in text
    assert "dense kernels" in text
    for row in verification["counts"]["layers"]:
        assert f"| `{row['attribute']}` | {row['name']} |" in text
    assert verification["latency"] == {"latency_ms": 1.25}


def test_counts_in_the_files_are_exact(sparse_export: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    model, place, verification = sparse_export
    whole, counts = count(model, (4, 8, 8)), verification["counts"]
    assert counts["params"] + counts["unused"]["params"] == whole.params
    assert counts["nnz"] + counts["unused"]["nnz"] == whole.nnz
    assert counts["unused"] == {"params": 90, "nnz": 50}
    kept = {name: layer.nnz for name, layer in sparse_layers(model) if name != "auxiliary"}
    assert {row["name"]: row["kept"] for row in counts["layers"]} == kept
    assert {row["name"]: row["pattern"] for row in counts["layers"]} == {
        "features.0": "unstructured",
        "features.3": "2:4",
        "features.4": "4x1",
        "features.6": "channel",
        "head": "unstructured",
    }
    weights, masks = load_file(place / "weights.safetensors"), load_file(place / "masks.safetensors")
    assert set(masks) == {f"features_{i}.mask" for i in (0, 3, 4, 6)} | {"head.mask"}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert not weights[name.removesuffix("mask") + "weight"][~mask].any()


def test_the_model_is_left_as_it_was() -> None:
    model = sparse_network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        plain_copy(model)[0](torch.randn(2, 4, 8, 8))
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_zeros_are_written_into_the_weights_even_where_training_left_other_values() -> None:
    model = sparse_network()
    for _, layer in sparse_layers(model):
        layer.weight.data[~layer.mask] = 5.0
    source, network = run_here(model, torch.randn(2, 4, 8, 8))
    for name, mask in source.masks.items():
        assert not network.get_parameter(name.removesuffix("mask") + "weight")[~mask].any()
    assert "# 87 of 288 weights kept (density 0.3021), unstructured" in source.text


def test_sparse_layers_inside_layers_of_torch_keep_their_masks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.linear1 = SparseLinear(8, 16, density=0.25)
    model = nn.Sequential(nn.Linear(4, 8), layer)
    draw_masks_(model, torch.Generator().manual_seed(0))
    source, network = run_here(model, torch.randn(2, 5, 4))
    assert set(source.masks) == {"layer1.linear1.mask"}
    assert int((network.layer1.linear1.weight != 0).sum()) == 32
    assert "# linear1: 32 of 128 weights kept" in source.text


def test_a_network_whose_masks_were_never_drawn_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(head=SparseLinear(8, 4, density=0.1)))
    with pytest.raises(
        ExportError, match=r"head: expected a mask of density 0\.1 \(unstructured\).*keeps every weight.*draw_masks_"
    ):
        export_module(model, torch.randn(1, 8), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_several_inputs_and_outputs_travel_through_every_format(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.rnn = nn.GRU(8, 3, batch_first=True)

        def forward(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
            x = self.mix(self.embed(tokens) * weights[:, :, None])
            return {"z": self.rnn(x)[0], "a": x.argmax(-1)}

    examples = (torch.randint(0, 7, (2, 5)), torch.randn(2, 5))
    found = export_module(Two().eval(), examples, tmp_path / "out")
    assert set(found["formats"]) == {"source", "onnx", "pt2"}
    assert "Inputs: tokens int64[batch, 5], weights float32[batch, 5]." in (tmp_path / "out" / "network.py").read_text()


def test_without_the_source_a_network_that_fx_cannot_record_is_exported(tmp_path: Path) -> None:
    class Named(NamedTuple):
        logits: Tensor

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row for row in Named(self.layer(x)).logits.unbind(1) if isinstance(row, Tensor)], 1)

    model = Net().eval()
    with pytest.raises(ExportError, match=r"torch\.fx.*in the network itself \(Net\).*formats="):
        export_module(model, torch.randn(2, 3), tmp_path / "out", formats=("source",))
    assert list(tmp_path.iterdir()) == []
    found = export_module(model, torch.randn(2, 3), tmp_path / "out", formats=("pt2",))
    assert set(found["formats"]) == {"pt2"}
    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == {"layer.weight", "layer.bias"}
    assert not (tmp_path / "out" / "network.py").exists()


# Folders. What is checked in a fresh process above is run in this one here, which is quicker.


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_source(place: Path, batches: Any) -> list[Any]:
        network = export_steps._load(place)
        return [network(*batch) for batch in batches]

    monkeypatch.setattr(export_steps, "run_source", run_source)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


def quick(place: Path, model: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    return export_module(model or linear(), torch.randn(2, 3), place, formats=("source",), **options)


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["notes.txt", "network.py", "verification.json"])
def test_a_folder_with_other_contents_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(
        ExportError, match=rf"expected an empty folder or an earlier export, found .*mine.*{name}.*another folder"
    ):
        quick(tmp_path / "mine")
    assert snapshot(tmp_path) == {f"mine/{name}": b"{}"}
    with pytest.raises(NasError, match="found a file"):
        quick(tmp_path / "mine" / name)


@pytest.mark.usefixtures("here")
def test_an_export_replaces_an_earlier_one_but_never_one_with_files_of_the_users(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    quick(place)
    first = snapshot(place)
    (place / "__pycache__").mkdir()
    (place / "__pycache__" / "network.pyc").write_text("as Python leaves it")
    quick(place)
    assert set(snapshot(place)) == set(first)
    assert snapshot(place)["weights.safetensors"] != first["weights.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o666 & ~umask}
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        quick(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("broken", ["write_weights", "recount", "_swap"])
def test_an_export_that_fails_leaves_the_earlier_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    quick(tmp_path / "out")
    before = snapshot(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder if broken == "_swap" else export_steps, broken, full)
    with pytest.raises(ExportError, match=r"expected to write .*out, found: No space left on device; free some space"):
        quick(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"expected a writable folder, found .*file"):
        quick(tmp_path / "file" / "out")


# Checks that must be able to fail.


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) * 1e-3


@pytest.mark.usefixtures("here")
def test_a_network_whose_source_does_not_compute_the_same_is_not_shipped(tmp_path: Path) -> None:
    hooked = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    hooked[0].register_forward_hook(lambda module, args, output: output * 1.0001)
    with pytest.raises(
        ExportError, match=r"network\.py: expected the network's outputs to a relative difference of 1e-05, found "
    ):
        quick(tmp_path / "out", hooked)
    with pytest.raises(ExportError, match="relative difference"):
        quick(tmp_path / "out", nn.Sequential(Noisy()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("key", "value"), [("params", 9), ("nnz", 7)])
def test_another_networks_card_is_refused(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ExportError, match=rf"card: expected {key} = 8 as counted from the files, found {value}"):
        quick(tmp_path / "out", card={"metrics": {key: value}})
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_outputs_that_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x, 3

    for model, example, says in [
        (Infinite(), torch.randn(2, 3), "NaN or infinity on random inputs"),
        (Counting(), torch.randn(2, 3), "expected outputs that are tensors, found int"),
        (linear(), torch.randn(2, 4), r"takes inputs of shape \[\(1, 4\)\].*example input"),
        (linear(), torch.full((2, 3), float("nan")), "finite example inputs"),
        (linear(), torch.randn(2, 3).double(), r"call \.float\(\)"),
        (linear(), torch.tensor(1.0), "batch as axis 0"),
        (linear(), (), "at least one example input"),
    ]:
        with pytest.raises(ExportError, match=says):
            export_module(model, example, tmp_path / "out")
    with pytest.raises(ExportError, match="expected formats among source, onnx, pt2, found tflite"):
        export_module(linear(), torch.randn(2, 3), tmp_path / "out", formats=("tflite",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_the_fresh_process_has_neither_this_project_nor_numpy(tmp_path: Path) -> None:
    quick(tmp_path / "out")
    source = tmp_path / "out" / "network.py"
    attempt = """
found = []
for name in ("numpy", "onnxruntime", "ops.masks", "nas", "search_spaces", "hw_models"):
    try:
        __import__(name)
        found.append(name)
    except ModuleNotFoundError:
        pass
raise SystemExit(f"could import {found}")
"""
    source.write_text(attempt + source.read_text())
    with pytest.raises(ExportError, match=r"fresh process, found: could import \[\]"):
        verify.run_source(tmp_path / "out", [(torch.randn(2, 3),)])


def test_difference_is_the_largest_over_all_outputs() -> None:
    want = [{"a": torch.tensor([1.0, -4.0]), "b": (torch.tensor([100.0]),)}]
    found = [{"a": torch.tensor([1.5, -4.0]), "b": (torch.tensor([101.0]),)}]
    assert verify.difference(want, found) == verify.Difference(1.0, 0.125)
    assert verify.difference(want, want) == verify.Difference(0.0, 0.0)
    assert verify.difference([torch.zeros(2)], [torch.full((2,), 0.5)]) == verify.Difference(0.5, 0.5)
    for other in (
        [torch.zeros(3)],
        [torch.zeros(2, dtype=torch.int64)],
        [(torch.zeros(2),)],
        [torch.tensor([0.0, float("nan")])],
    ):
        with pytest.raises(ExportError):
            verify.difference([torch.zeros(2)], other)


def test_a_weight_outside_its_mask_is_found_in_the_file(
    sparse_export: tuple[nn.Module, Path, Any], tmp_path: Path
) -> None:
    _, place, _ = sparse_export
    weights = load_file(place / "weights.safetensors")
    weights["head.weight"] += 1.0
    formats.write_weights(weights, tmp_path / "weights.safetensors")
    (tmp_path / "masks.safetensors").write_bytes((place / "masks.safetensors").read_bytes())
    with pytest.raises(ExportError, match=r"out\.head: expected zeros outside the mask"):
        verify.recount(tmp_path, ["head.weight"], {"out.head": "head"}, {"out.head": "unstructured"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_operating_system_error_whatever_the_library_says() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        formats.write_weights({"a": torch.zeros(3)}, Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device"):
        formats.write_pt2(formats.export_program(linear(), [torch.randn(2, 3)], ["x"]), Path("/dev/full"))
