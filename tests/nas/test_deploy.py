"""Exported networks run on the sparse kernels, with little installed, and folders that are no export are told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import nas
from nas.deploy import DeployError, runtime
from nas.errors import NasError
from nas.export import export_module
from nas.weights_file import WeightsFileError, load_weights, read_tensors
from ops.layers import SparseConv2d, SparseLinear, draw_masks_
from ops.plan import PlannedOp
from ops.runtime import InputError
from tests.nas.export_networks import randomised

ROOT = Path(__file__).resolve().parent.parent.parent


class Network(nn.Module):
    """A residual block between a stem and a classifier; every pattern that is not unstructured once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            SparseConv2d(16, 32, 1, density=0.25, pattern="4x1", bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(),
            SparseConv2d(32, 32, 3, padding=1, groups=32, density=0.6),
            nn.Hardswish(),
            SparseConv2d(32, 16, 1, density=0.5, pattern="2:4"),
        )
        self.head = SparseLinear(16, 10, density=0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def _every_layer_sparse(op: PlannedOp, kernels: list[str]) -> str:
    return kernels[-1]


def _expected(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(4)
    net = Network()
    draw_masks_(net, torch.Generator().manual_seed(4))
    return randomised(net)


@pytest.fixture(scope="module")
def exported(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "exported"
    export_module(network, torch.randn(1, 3, 21, 18), folder, formats=["source"])
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize("choose", [None, _every_layer_sparse], ids=["default", "sparse"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_export_runs_as_the_network_did(network: nn.Module, exported: Path, batch: int, choose: object) -> None:
    run = nas.runtime(exported, batch=batch, choose=choose)
    x = torch.randn(batch, 3, 21, 18)
    expected = _expected(network, x)
    assert (run(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(run(x), run(x))


def test_the_masks_of_the_network_are_those_of_the_plan(network: nn.Module, exported: Path) -> None:
    layers = {op.name: op for op in runtime(str(exported)).plan.ops if op.layer is not None}
    for name in ("block.0", "block.3", "block.5", "head"):
        layer = network.get_submodule(name)
        assert isinstance(layer, SparseConv2d | SparseLinear)
        planned = layers[name.replace(".", "_")]
        assert planned.nnz == int(layer.mask.sum())
        assert planned.kernel != "torch" or planned.density > 0.5


def test_another_size_and_threads_and_two_callers_at_once(network: nn.Module, exported: Path) -> None:
    run = runtime(exported, batch=2, input_shape=(3, 30, 17), threads=2, choose=_every_layer_sparse)
    inputs = torch.randn(4, 2, 3, 30, 17)
    first = [run(x) for x in inputs]
    for x, y in zip(inputs, first, strict=True):
        expected = _expected(network, x)
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()
    right: list[bool] = []

    def call(start: int) -> None:
        right.extend(torch.equal(run(inputs[k % 4]), first[k % 4]) for k in range(start, start + 20))

    callers = [threading.Thread(target=call, args=(start,)) for start in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 40


@pytest.mark.parametrize("shape", [(1, 3, 21, 18), (2, 3, 18, 21), (2, 4, 21, 18), (3, 21, 18)])
def test_an_input_of_another_size_is_told_at_the_call(exported: Path, shape: tuple[int, ...]) -> None:
    run = runtime(exported, batch=2)
    with pytest.raises(InputError, match=r"made for an input float32\[2, 3, 21, 18\]"):
        run(torch.zeros(shape))


def test_a_place_without_an_export_is_told(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DeployError, match=rf"expected an exported network in {place}, found no network\.py"):
            runtime(place)
    assert issubclass(DeployError, NasError)


def test_an_export_without_source_says_how_to_get_one(copy: Path) -> None:
    (copy / "network.py").unlink()
    with pytest.raises(DeployError, match='export with the format "source"'):
        runtime(copy)


def test_an_older_export_runs_where_the_input_shape_is_given(network: nn.Module, copy: Path) -> None:
    verification = copy / "verification.json"
    content = json.loads(verification.read_text())
    del content["inputs"]
    verification.write_text(json.dumps(content))
    with pytest.raises(DeployError, match=r"verification\.json does not say the input shape .*input_shape="):
        runtime(copy)
    verification.unlink()
    with pytest.raises(DeployError, match="does not say the input shape"):
        runtime(copy)
    x = torch.randn(1, 3, 21, 18)
    torch.testing.assert_close(runtime(copy, input_shape=(3, 21, 18))(x), _expected(network, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_below_one_is_told(exported: Path, batch: int) -> None:
    with pytest.raises(DeployError, match=f"at least 1, got {batch}"):
        runtime(exported, batch=batch)


def test_a_shape_the_network_does_not_take_is_told(exported: Path) -> None:
    with pytest.raises(DeployError, match=r"fails on an input float32\[1, 5, 8, 8\]"):
        runtime(exported, input_shape=(5, 8, 8))


def test_damaged_files_are_told(copy: Path) -> None:
    (copy / "weights.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DeployError, match="cannot be loaded"):
        runtime(copy)


def test_a_network_that_cannot_be_imported_is_told(copy: Path) -> None:
    (copy / "network.py").write_text("import nothing_of_this_name")
    with pytest.raises(DeployError, match="cannot be loaded"):
        runtime(copy)


def test_weights_are_read_without_safetensors_as_with_it(exported: Path, tmp_path: Path) -> None:
    path = exported / "weights.safetensors"
    found, expected = read_tensors(path), load_file(path)
    assert list(found) == list(expected)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    other = tmp_path / "other.safetensors"
    for tensors in (
        {"a": torch.zeros(0, 3), "b": torch.tensor(True), "c": torch.arange(3)},
        {"h": torch.randn(2, 2).bfloat16()},
    ):
        save_file(tensors, other, metadata={"what": "a test"})
        for name, tensor in read_tensors(other).items():
            assert torch.equal(tensor, tensors[name])
            assert tensor.dtype == tensors[name].dtype


def test_tied_weights_are_loaded_once_and_foreign_ones_told(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    tied, path = Tied(), tmp_path / "weights.safetensors"
    save_model(tied, str(path))
    loaded = Tied()
    load_weights(loaded, path)
    assert torch.equal(loaded.b.weight, tied.b.weight)
    with pytest.raises(WeightsFileError, match=r"missing \['weight'\], without a place \['a.bias'"):
        load_weights(nn.Linear(3, 3, bias=False), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsFileError, match="a part of one"):
        load_weights(Tied(), path)


def test_a_network_of_two_inputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x) + y

    export_module(Two(), (torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)), tmp_path / "out", formats=["source"])
    with pytest.raises(DeployError, match="one input, this one has 2"):
        runtime(tmp_path / "out")


def test_the_readme_example_runs_as_printed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"<!-- deploy -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, Tensor] = {}
    exec(code.replace("exported/", str(exported)), scope)
    assert scope["y"].shape == (1, 10)
    assert "multiply-adds" in capsys.readouterr().out


# Everything the project requires but torch, numpy and numba.
REFUSED = (
    *("scipy", "pandas", "networkx", "optuna", "sklearn", "sqlalchemy", "matplotlib", "rich", "safetensors"),
    *("onnx", "onnxscript", "onnxruntime", "PIL", "platformdirs", "threadpoolctl", "tomli_w"),
)
SCRIPT = """
import sys


class Refuser:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split():
            raise ModuleNotFoundError(f"a deployed network must not need {name}", name=name)


sys.meta_path.insert(0, Refuser())

from nas import runtime

import torch

torch.set_num_threads(1)
run = runtime(sys.argv[1], batch=2, choose=lambda op, kernels: kernels[-1])
assert {op.kernel for op in run.plan.ops if op.layer is not None} != {"torch"}
torch.save(run(torch.load(sys.argv[3])), sys.argv[4])
"""


def test_torch_numpy_and_numba_are_enough(network: nn.Module, exported: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 21, 18)
    torch.save(x, tmp_path / "x.pt")
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(exported),
        " ".join(REFUSED),
        str(tmp_path / "x.pt"),
        str(tmp_path / "y.pt"),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    expected = _expected(network, x)
    assert (torch.load(tmp_path / "y.pt") - expected).abs().max() <= 1e-4 * expected.abs().max()
