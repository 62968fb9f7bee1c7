"""Every engine computes what the masked torch network computes, and our side is called through the public way."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.kernels import deepsparse, engines, layers, ours
from benchmarks.kernels.clock import Settings
from benchmarks.kernels.dense_twin import dense_twin, onnx_bytes
from benchmarks.kernels.run_layers import Contenders, Problem, difference, run
from ops.layers import SparseConv2d, draw_masks_

QUICK = Settings(rounds=1, cap_rounds=1, burst_ms=0.1, warm_ms=0.01)
Layer = layers.Layer
TINY = layers.Case("c1_8_4", "1x1", 4, (Layer(8, 8),), lengths=(1, 2))
TINY_K3 = layers.Case("c3_8_5", "3x3", 5, (Layer(8, 8, 3),))
TINY_RESIDUAL = layers.Case(
    "ir_4_8_6",
    "inverted residual",
    6,
    (
        Layer(4, 8, activation="relu6"),
        Layer(8, 8, 3, groups=8, activation="hardswish", sparse=False),
        Layer(8, 4, activation=""),
    ),
    residual=True,
)
TINY_LINEAR = layers.Case("linear_12_8", "linear", 0, (Layer(12, 8, 0), Layer(8, 12, 0)), lengths=(1, 2), split=2)


def expected(network: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return network(x).numpy()


@pytest.mark.parametrize("case", [TINY, TINY_K3, TINY_RESIDUAL, TINY_LINEAR], ids=lambda c: c.name)
@pytest.mark.parametrize("name", engines.ENGINES)
def test_engines_equal_the_masked_network(name: str, case: layers.Case) -> None:
    if (reason := engines.missing(name)) is not None:
        pytest.skip(reason)
    network, x = layers.chain(case, 2, 0.5), layers.example(case, 3)
    try:
        loaded = engines.ENGINES[name](network, x, 1)
    except engines.Unsupported:
        assert name in engines.CSR_ENGINES or case.size == 0
        assert case not in (TINY, TINY_LINEAR) or name == "torch_nhwc"
        return
    assert difference(loaded.output(), expected(network, x)) < 1e-6
    assert loaded.clocked.burst(QUICK) > 0


def test_deepsparse_equals_the_masked_network() -> None:
    folder = Path(os.environ.get("DEEPSPARSE_FOLDER") or deepsparse.default_folder())
    if (reason := deepsparse.missing(folder)) is not None:
        pytest.skip(reason)
    network, x = layers.chain(TINY_RESIDUAL, 2, 0.5), layers.example(TINY_RESIDUAL, 1)
    worker = deepsparse.Worker(folder)
    try:
        loaded = worker.load(network, x, 1)
        assert difference(loaded.output(), expected(network, x)) < 1e-5
        assert loaded.clocked.burst(QUICK) > 0
        worker._process.kill()  # as a crash does
        worker._process.wait()
        assert not loaded.alive()
        assert worker.load(network, x, 1).alive()
    finally:
        worker.close()


def test_a_missing_environment_of_deepsparse_is_told_with_its_cure(tmp_path: Path) -> None:
    assert "--install-deepsparse" in str(deepsparse.missing(tmp_path))


@pytest.mark.parametrize("path", [p for p in ours.known_paths() if p != "auto"])
def test_every_path_of_ours_equals_the_masked_network(path: str) -> None:
    network, x = layers.chain(TINY, 2, 0.5), layers.example(TINY, 1)
    assert difference(ours.load(network, x, path, 1).output(), expected(network, x)) < 1e-5


def test_a_path_without_a_kernel_for_any_layer_is_an_empty_column() -> None:
    network, x = layers.chain(TINY, 1, 0.5), layers.example(TINY, 1)
    with pytest.raises(engines.Unsupported, match="no layer here"):
        ours.load(network, x, "nonesuch", 1)


class EveryModule(nn.Module):
    """All that the ONNX writer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SparseConv2d(3, 8, 3, 2, 1, bias=False, density=0.5)
        self.norm = nn.BatchNorm2d(8)
        self.late_norm = nn.BatchNorm2d(16, affine=False)
        self.pools = nn.ModuleList([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.SiLU()])
        self.rest = nn.Sequential(nn.Hardswish(), nn.ReLU6(), nn.Dropout(), nn.Identity())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        x = torch.relu(self.pools[0](x) + self.pools[1](x) + self.pools[2](x))
        shifted = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.head(self.rest(self.late_norm(torch.cat([x, shifted + shifted], dim=1))))


def every_module() -> nn.Module:
    network = EveryModule().requires_grad_(False)
    draw_masks_(network, torch.Generator().manual_seed(0))
    for _ in range(3):
        network(torch.randn(8, 3, 9, 9))
    return network.eval()


def test_the_dense_twin_folds_batch_norms_and_keeps_the_function() -> None:
    network, x = every_module(), torch.randn(2, 3, 9, 9)
    twin = dense_twin(network)
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1  # the one behind the concatenation
    assert not any(isinstance(m, SparseConv2d) for m in twin.modules())
    assert difference(expected(twin, x), expected(network, x)) < 1e-5
    assert difference(expected(network, x), expected(network, x)) == 0  # not changed by making the twin


def test_the_onnx_graph_equals_the_network_in_every_module() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network, x = every_module(), torch.randn(2, 3, 9, 9)
    session = onnxruntime.InferenceSession(onnx_bytes(dense_twin(network), x), providers=["CPUExecutionProvider"])
    assert difference(session.run(None, {"x": x.numpy()})[0], expected(network, x)) < 1e-5


def test_an_operation_the_onnx_writer_does_not_know_is_named() -> None:
    with pytest.raises(NotImplementedError, match="Softplus"):
        onnx_bytes(dense_twin(nn.Sequential(nn.Softplus())), torch.zeros(1, 2))


def test_a_run_gives_a_row_per_density_with_a_time_per_contender() -> None:
    path = ours.known_paths()[0]
    contenders = Contenders(["torch", "scipy"], [path])
    rows = list(run([TINY], [0.5, 0.25], contenders, QUICK))
    assert [(r["layer"], r["density"], r["mflop"]) for r in rows] == [
        ("c1_8_4", 0.5, 0.002048),
        ("c1_8_4", 0.25, 0.002048),
    ]
    assert {"torch_us", "scipy_us", f"{path}_us"} <= set(rows[0])
    assert contenders.problems == []


def test_a_wrong_result_is_a_problem_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engines.ENGINES["scipy"]

    def wrong(network: nn.Module, x: torch.Tensor, threads: int) -> engines.Loaded:
        loaded = right(network, x, threads)
        return engines.Loaded(loaded.clocked, lambda: loaded.output() * 1.01)

    monkeypatch.setitem(engines.ENGINES, "scipy", wrong)
    contenders = Contenders(["torch", "scipy"], [])
    (row,) = run([TINY], [0.5], contenders, QUICK)
    assert np.isnan(row["scipy_us"])
    assert contenders.problems == [
        Problem("c1_8_4 unstructured 0.5 batch 1", "scipy", "differs from torch by 0.01 of the largest value")
    ]


def test_a_difference_of_shape_or_a_nan_is_infinite() -> None:
    one = np.ones((1, 2))
    assert difference(one, np.ones((2, 1))) == np.inf
    assert difference(one * np.nan, one) == np.inf
    assert difference(one * 1.5, one) == 0.5
