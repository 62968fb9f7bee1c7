"""The rows, the chains made of them, the networks, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cpu_kernels
from benchmarks.kernels import layers, networks, ours
from ops.layers import is_depthwise, sparse_layers


def test_the_main_layers_are_the_twenty() -> None:
    main = layers.select("main")
    assert len(main) == 20
    assert len({case.name for case in layers.CASES}) == len(layers.CASES)


@pytest.mark.parametrize(
    ("name", "mflop"),
    [("c3_64_56", 231), ("p1_96_24_56", 29), ("p1_960_320_7", 60), ("c1_144_8", 3), ("linear_1024_1000", 2)],
)
def test_operations_are_those_of_the_published_table(name: str, mflop: float) -> None:
    (case,) = layers.select(name)
    assert round(2e-6 * case.macs()) == mflop


def test_kept_operations_are_those_of_the_masks_drawn() -> None:
    (case,) = layers.select("ir_64_384_14")
    network = layers.chain(case, 1, 0.1)
    assert case.macs("unstructured", 0.1) == sum(layer.nnz for _, layer in sparse_layers(network)) * 14 * 14


@pytest.mark.parametrize("case", layers.CASES, ids=lambda c: c.name)
def test_every_unit_can_follow_itself_or_is_timed_alone(case: layers.Case) -> None:
    last, first, stride = case.unit[-1].outputs, case.unit[0].inputs, max(layer.stride for layer in case.unit)
    assert (last == first and stride == 1) or case.lengths == (0, 1)
    assert all(pair[1] <= 1 for pair in case.pairs(layers.DENSITIES))


@pytest.mark.parametrize("density", [0.5, 0.01])
def test_chains_are_of_different_layers_and_their_activations_live(density: float) -> None:
    (case,) = layers.select("c3_16_32")
    network = layers.chain(case, 5, density)
    (a, _), *_, (b, _) = [(m.weight, m) for _, m in sparse_layers(network)]
    assert not torch.equal(a, b)
    y = network(layers.example(case, 1))
    assert 0.01 < float(y.std()) < 100
    assert len(layers.chain(case, 0, density)) == 1


def test_a_selection_takes_families_names_and_patterns_and_refuses_others() -> None:
    assert [c.name for c in layers.select("c3_64_*,c1_36_32")] == ["c3_64_56", "c3_64_32", "c3_64_8", "c1_36_32"]
    assert {c.family for c in layers.select("fused pairs")} == {"fused pairs"}
    assert len(layers.select("all")) == len(layers.CASES)
    with pytest.raises(ValueError, match='nothing matches "c9"'):
        layers.select("main,c9")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("mobilenetv1", 4_231_976),
        ("mobilenetv2", 3_504_872),
        ("resnet20", 272_474),
        ("darts", 3_349_342),
    ],
)
def test_networks_have_the_known_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = networks.NETWORKS[name].build()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_resnet20_with_padded_shortcuts_is_the_paper_s() -> None:
    network = networks.resnet20(projection=False)
    assert sum(p.numel() for p in network.parameters()) == 269_722  # 0.27 M in He et al. 2016, table 6
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_sparse_network_is_sparse_but_for_stem_and_depthwise_and_well_behaved() -> None:
    network = networks.sparse("resnet20", 0.1)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    made_sparse = [layer for _, layer in sparse_layers(network)]
    assert len(made_sparse) == len(convolutions) - 1
    assert not any(is_depthwise(layer) for layer in made_sparse)
    assert sum(m.nnz for m in made_sparse) == pytest.approx(0.1 * sum(m.weight.numel() for m in made_sparse), rel=0.01)
    x = networks.example("resnet20")
    with torch.inference_mode():
        single = network(x)
        double = network.double()(x.double())
    assert 0.1 < float(single.std()) < 100
    assert float((single - double).abs().max() / double.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "torch,tvm"], "unknown tvm"),
        (["--rows", "c9"], "nothing matches"),
        (["--densities", "0"], "must be in"),
        (["--threads", "0"], "at least 1"),
        (["--networks", "vgg"], "unknown vgg"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu_kernels.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_rows_means_and_losses_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ours.known_paths()[0]
    arguments = [
        "--rows",
        "c1_144_8",
        "--densities",
        "0.1",
        "--rounds",
        "1",
        "--quick",
        "--engines",
        "torch,deepsparse",
    ]
    arguments += ["--ours", f"{path},nonesuch", "--deepsparse", str(tmp_path), "--out", str(tmp_path / "t.csv")]
    assert cpu_kernels.main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "no column deepsparse",
        "empty column nonesuch",
        "c1_144_8 unstructured d=0.1",
        "Geometric means",
        f"Losses of {path}",
    ):
        assert text in printed
    assert (tmp_path / "t.csv").exists()
