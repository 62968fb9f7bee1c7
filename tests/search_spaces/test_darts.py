"""The DARTS space and networks from genotypes: exact published counts, both ways between genotype and architecture, laws."""

from __future__ import annotations

import random
import time
from collections import defaultdict

import pytest
import torch
from torch import nn

from ops.counting import count
from ops.droppath import DropPath
from ops.layers import sparse_layers, sparsify
from search_spaces import Architecture, Space, SpaceError, get_space
from search_spaces.darts import network_from_genotype
from search_spaces.darts_network import AuxiliaryHead, DartsNetwork
from search_spaces.genotype_conversion import architecture_from_genotype, genotype_from_architecture
from search_spaces.genotypes import GENOTYPES, Genotype, GenotypeError

IMAGENET = {"input_shape": (3, 224, 224), "classes": 1000, "channels": 48, "cells": 14}


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta(genotype: Genotype | str, **options) -> DartsNetwork:
    with torch.device("meta"):
        return network_from_genotype(genotype, **options)


# -- exact counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "with_auxiliary", "macs"),
    [("DARTS_V2", 3_349_342, 3_825_768, 528_359_040), ("DASS_99", 1_713_790, 2_190_216, 275_103_360)],
)
def test_cifar_networks_have_the_published_counts(name: str, expected: int, with_auxiliary: int, macs: int) -> None:
    counts = count(meta(name), (3, 32, 32))
    assert (counts.params, counts.dense_macs) == (expected, macs)
    auxiliary = meta(name, auxiliary=True)
    assert params(auxiliary) == with_auxiliary
    assert count(auxiliary, (3, 32, 32)).dense_macs == macs  # the head does not run in eval mode
    assert params(meta(name, classes=100)) - expected == 90 * (16 * 36 + 1)


def test_imagenet_networks_have_the_published_counts() -> None:
    counts = count(meta("DARTS_V2", **IMAGENET), (3, 224, 224))
    assert (counts.params, counts.dense_macs) == (4_718_752, 529_911_552)
    assert params(meta("DARTS_V2", **IMAGENET, auxiliary=True)) == 5_979_528


@pytest.mark.parametrize(
    ("name", "options", "prunable", "kept"),
    [
        ("DARTS_V2", {}, 3_308_940, 33_251),
        ("DARTS_V2", IMAGENET, 4_681_416, 47_006),
        ("DASS_99", {}, 1_701_468, 17_045),
    ],
)
def test_one_percent_of_every_layer_is_the_published_number_of_weights(
    name: str, options: dict, prunable: int, kept: int
) -> None:
    network = sparsify(meta(name, **options), 0.01)
    counts = count(network, options.get("input_shape", (3, 32, 32)))
    assert sum(layer.weight.numel() for _, layer in sparse_layers(network)) == prunable
    assert sum(layer.nnz for layer in counts.layers) == kept
    assert counts.nnz == kept + counts.params - prunable
    if name == "DASS_99":
        assert counts.params - prunable == 12_322
        assert counts.macs == 2_758_586


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("DARTS_V2", {}, 3.3),
        ("PC_DARTS_cifar", {}, 3.6),
        ("GDAS_V1", {}, 3.4),
        ("DARTS_V2", IMAGENET, 4.7),
        ("PC_DARTS_image", IMAGENET, 5.3),
        ("GDAS_V1", IMAGENET, 5.0),
    ],
)
def test_sizes_agree_with_the_papers_to_their_digits(name: str, options: dict, millions: float) -> None:
    assert round(params(meta(name, **options)) / 1e6, 1) == millions


def test_the_auxiliary_heads_have_the_published_counts() -> None:
    with torch.device("meta"):
        assert params(AuxiliaryHead(576, 10, (8, 8))) == 476_426
        with_norm = params(AuxiliaryHead(768, 1000, (7, 7), 2))
        assert with_norm - params(AuxiliaryHead(768, 1000, (7, 7), 2, second_norm=False)) == 1536


def test_a_cell_has_the_weights_of_its_parts() -> None:
    c = 8
    genotype = Genotype(
        (("sep_conv_3x3", 0), ("conv_7x1_1x7", 1)), (2,), (("skip_connect", 0), ("skip_connect", 1)), (2,)
    )
    network = meta(genotype, channels=c, cells=3)
    stem = 27 * 3 * c + 2 * 3 * c
    normal = 2 * (3 * c * c + 2 * c) + 2 * (9 * c + c * c + 2 * c) + 14 * c * c + 2 * c
    wide = 2 * c  # cell 1 reduces: inputs of 3c and c
    reduce1 = (3 * c * wide + 2 * wide) + (c * wide + 2 * wide) + 2 * (wide * wide + 2 * wide)
    wider = 4 * c  # cell 2 reduces, and its first input is twice as large
    reduce2 = (c * wider + 2 * wider) + (wide * wider + 2 * wider) + 2 * (wider * wider + 2 * wider)
    assert params(network) == stem + normal + reduce1 + reduce2 + wider * 10 + 10


# -- the network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GENOTYPES))
def test_every_published_genotype_builds_runs_and_traces(name: str) -> None:
    network = network_from_genotype(name, channels=4, cells=4, classes=7, input_shape=(1, 15, 12)).eval()
    x = torch.randn(2, 1, 15, 12)
    y = network(x)
    assert y.shape == (2, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), y)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 14, 14), (2, 1, 1), (3, 28, 9)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("cells", [1, 2, 3, 5])
def test_any_image_size_and_depth_works_with_the_auxiliary_head(shape: tuple, stem: str, cells: int) -> None:
    network = network_from_genotype(
        "AmoebaNet", channels=4, cells=cells, input_shape=shape, stem=stem, auxiliary=True, classes=3
    )
    logits, auxiliary = network.train()(torch.randn(4, *shape))
    assert logits.shape == auxiliary.shape == (4, 3)
    assert network.eval()(torch.randn(4, *shape)).shape == (4, 3)


def test_the_auxiliary_head_stands_after_the_second_reduction() -> None:
    network = meta("DARTS_V2", auxiliary=True)
    assert network.auxiliary_after == 13
    assert isinstance(network.auxiliary, nn.Sequential)
    assert network.auxiliary[2].in_channels == 4 * 4 * 36


def test_large_images_get_the_imagenet_stem() -> None:
    assert meta("DARTS_V2", input_shape=(3, 128, 160), channels=8, cells=3).stem[0].stride == (2, 2)
    assert meta("DARTS_V2", input_shape=(3, 96, 96), channels=8, cells=3).stem[0].stride == (1, 1)


def test_drop_path_spares_identities_and_grows_with_progress() -> None:
    network = network_from_genotype("DARTS_V1", channels=4, cells=3, drop_path=0.2)
    assert {m.rate for m in network.modules() if isinstance(m, DropPath)} == {0.2}
    network.set_progress(0.25)
    assert {m.progress for m in network.modules() if isinstance(m, DropPath)} == {0.25}
    normal, reduce = network.cells[0].nodes, network.cells[1].nodes
    assert normal.dropped == [[True, True], [False, True], [False, True], [True, False]]
    assert all(reduce.dropped[0])  # strided identities have weights
    assert "drop" not in " ".join(network.state_dict())


def test_the_same_weights_load_with_and_without_drop_path() -> None:
    one = network_from_genotype("DARTS_V2", channels=4, cells=3)
    two = network_from_genotype("DARTS_V2", channels=4, cells=3, drop_path=0.3)
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one.train()(x), two.train()(x))  # no progress yet: nothing dropped
    two.set_progress(1.0)
    assert not torch.allclose(one(x), two(x))
    torch.testing.assert_close(one.eval()(x), network_eval(one, two, x))


def network_eval(one: nn.Module, two: nn.Module, x: torch.Tensor) -> torch.Tensor:
    two.load_state_dict(one.state_dict())
    return two.eval()(x)


def test_a_node_of_two_nones_is_zero_and_one_none_is_left_out() -> None:
    nothing = (("none", 0), ("none", 1))
    genotype = Genotype(
        (*nothing, ("none", 0), ("conv_1x1", 1)), (2, 3), (*nothing, ("none", 2), ("conv_1x1", 1)), (2, 3)
    )
    network = network_from_genotype(genotype, channels=4, cells=4, input_shape=(3, 8, 8)).eval()
    assert [len(ops) for ops in network.cells[0].nodes.ops] == [1, 1]
    out = network.cells[0](*[torch.randn(1, 12, 8, 8)] * 2)
    assert (out[:, :4] == 0).all()
    assert (out[:, 4:] != 0).any()
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_reduction_cells_that_concatenate_an_input_are_refused() -> None:
    genotype = Genotype((("conv_1x1", 0),) * 2, (0, 2), (("conv_1x1", 0),) * 2, (0, 2))
    with pytest.raises(SpaceError, match=r"reduction cells cannot concatenate their inputs .*\(0, 2\)"):
        network_from_genotype(genotype)


# -- the space ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space() -> Space:
    return get_space("darts", input_shape=(3, 32, 32), classes=10, channels=36, cells=20)


SPACE_GENOTYPES = [
    "DARTS_V1",
    "DARTS_V2",
    "PC_DARTS_cifar",
    "PC_DARTS_image",
    "GDAS_V1",
    "DASS_99",
    "DASS_95",
    "DASS_90",
    "DASS_ONE_FOR",
    "DARTS_ORIG_120",
]


@pytest.mark.parametrize("name", SPACE_GENOTYPES)
def test_genotypes_become_architectures_with_the_same_counts_and_come_back(space: Space, name: str) -> None:
    architecture = architecture_from_genotype(space, name)
    back = genotype_from_architecture(space, architecture)
    assert architecture_from_genotype(space, back) == architecture
    for kind in ("normal", "reduce"):  # the order within a node is not kept, nothing else changes
        assert [sorted(node) for node in back.nodes(kind)] == [sorted(node) for node in GENOTYPES[name].nodes(kind)]
    assert architecture["sparsity.density"] == 1.0
    assert params(space.meta(architecture)) == params(meta(name))


def test_a_genotype_takes_the_other_decisions_along(space: Space) -> None:
    others = {"sparsity.density": 0.1, "sparsity.pattern": "unstructured", "sparsity.rule": "uniform"}
    architecture = architecture_from_genotype(space, "DARTS_V2", others)
    assert architecture.as_dict().items() >= others.items()
    assert architecture_from_genotype(space, str(GENOTYPES["DARTS_V2"]), others) == architecture
    for wrong, message in [
        ({"sparsity.density": 0.3}, "sparsity.density: expected one of"),
        ({"sparsity.rule": "erk"}, "not decided by this architecture"),
        ({"nonsense": 1}, "not decided"),
    ]:
        with pytest.raises(SpaceError, match=message):
            architecture_from_genotype(space, "DARTS_V2", wrong)


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        ("NASNet", "4 nodes, all concatenated, got 5 nodes"),
        (
            str(GENOTYPES["DARTS_V2"]).replace("dil_conv_3x3", "sep_conv_7x7"),
            "node 3: this space offers .* got sep_conv_7x7",
        ),
        (str(GENOTYPES["DARTS_V2"]).replace("('dil_conv_3x3', 2)", "('dil_conv_3x3', 0)"), "two different states"),
        (str(GENOTYPES["DARTS_V2"]).replace("normal_concat=[2, ", "normal_concat=["), "all concatenated"),
    ],
)
def test_genotypes_that_the_space_does_not_hold_are_refused_and_build_anyway(
    space: Space, genotype: str, message: str
) -> None:
    with pytest.raises(GenotypeError, match=message):
        architecture_from_genotype(space, genotype)
    assert params(meta(genotype, channels=4, cells=3)) > 0


def test_genotypes_belong_to_cell_spaces() -> None:
    other = get_space("mlp", input_shape=(8,), classes=2)
    with pytest.raises(GenotypeError, match='not of "mlp"'):
        architecture_from_genotype(other, "DARTS_V2")
    with pytest.raises(GenotypeError, match="mlp"):
        genotype_from_architecture(other, other.sample(0))
    short = get_space("darts", cells=2)
    with pytest.raises(GenotypeError, match="no normal cell"):
        genotype_from_architecture(short, short.sample(0))


def test_closed_form_size_equals_enumeration_on_small_options() -> None:
    small = get_space("darts", cells=2, operations=["conv_1x1"], densities=[1.0, 0.5], rules=["erk", "uniform"])
    assert small.size() == sum(1 for _ in small.enumerate()) == 180 * (1 + 2 + 2 + 1)
    both = get_space("darts", cells=3, operations=["conv_1x1", "skip_connect"], densities=[1.0])
    assert both.size() == (180 * 2**8) ** 2
    mean, error = both.estimate_size(samples=5)
    assert (mean, error) == (both.size(), 0)
    assert get_space("darts", densities=[1.0]).size() == (1 * 3 * 6 * 10 * 7**8) ** 2


def test_digests_do_not_see_the_numbering_of_nodes(space: Space) -> None:
    def make(order: tuple[int, int]) -> Architecture:
        sep, pool = order
        edges = [""] * 8
        edges[2 * sep : 2 * sep + 2] = ["('sep_conv_3x3', 0)", "('sep_conv_5x5', 1)"]
        edges[2 * pool : 2 * pool + 2] = ["('max_pool_3x3', 1)", "('skip_connect', 0)"]
        edges[4:6] = [f"('dil_conv_3x3', {2 + sep})", f"('sep_conv_3x3', {2 + pool})"]
        edges[6:8] = [f"('skip_connect', {2 + pool})", "('dil_conv_5x5', 1)"]
        text = str(GENOTYPES["DARTS_V2"])
        start, end = text.index("normal=["), text.index(", normal_concat")
        return architecture_from_genotype(space, text[:start] + f"normal=[{', '.join(edges)}]" + text[end:])

    one, two = make((0, 1)), make((1, 0))
    assert one != two
    assert one.digest == two.digest
    assert one.digest != architecture_from_genotype(space, "DARTS_V2").digest


def test_equal_digests_mean_equal_costs() -> None:
    small = get_space("darts", channels=4, cells=3, operations=["skip_connect", "conv_1x1"], input_shape=(3, 8, 8))
    rng = random.Random(0)
    groups: dict[str, list[Architecture]] = defaultdict(list)
    fixed = {f"reduce.node{i}.inputs": "0,1" for i in range(4)} | {
        "sparsity.density": 0.5,
        "sparsity.pattern": "unstructured",
    }
    for _ in range(800):
        drawn = small.draw(
            lambda name, options: fixed.get(
                name, options[0] if name.startswith(("reduce", "sparsity")) else rng.choice(options)
            )
        )
        groups[drawn.digest].append(drawn)
    several = [sorted(set(g), key=str) for g in groups.values() if len(set(g)) > 1][:4]
    assert len(several) == 4
    for group in several:
        costs = {
            (c.params, c.nnz, c.macs, c.dense_macs)
            for c in (count(small.meta(a), (3, 8, 8)) for a in (group[0], group[-1]))
        }
        assert len(costs) == 1


def test_drawing_builds_no_operation(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an operation was built")

    monkeypatch.setattr(nn.Conv2d, "__init__", refuse)
    monkeypatch.setattr(nn.BatchNorm2d, "__init__", refuse)
    space.mutate(space.sample(0), random.Random(0))


def test_a_hundred_samples_a_second_are_drawn_from_twenty_cells(space: Space) -> None:
    start = time.process_time()
    for seed in range(100):
        space.sample(seed)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("sparse_stem", "sparse_classifier", "sparse_depthwise"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
)
def test_stem_classifier_and_depthwise_stay_dense_unless_asked(
    sparse_stem: int, sparse_classifier: int, sparse_depthwise: int
) -> None:
    space = get_space(
        "darts",
        cells=3,
        auxiliary=True,
        densities=[0.1],
        patterns=["unstructured"],
        sparse_stem=bool(sparse_stem),
        sparse_classifier=bool(sparse_classifier),
        sparse_depthwise=bool(sparse_depthwise),
    )
    network = space.meta(architecture_from_genotype(space, "DARTS_V2"))
    names = {name for name, layer in sparse_layers(network) if layer.density < 1}
    assert any(name.startswith("stem") for name in names) == sparse_stem
    assert ("classifier" in names) == sparse_classifier
    assert any("depthwise" in name for name in names) == sparse_depthwise
    assert not any(name.startswith("auxiliary") for name in names)
    assert any("pointwise" in name for name in names)


def test_a_density_is_met_over_the_layers_that_are_made_sparse(space: Space) -> None:
    for pattern, density in [("unstructured", 0.1), ("2:4", 0.5), ("4x1", 0.25)]:
        others = {"sparsity.density": density, "sparsity.pattern": pattern}
        layers = sparse_layers(space.meta(architecture_from_genotype(space, "DARTS_V2", others)))
        made = [(layer.weight.numel(), layer.planned_nnz) for _, layer in layers]
        assert sum(kept for _, kept in made) / sum(all_ for all_, _ in made) == pytest.approx(density, abs=2e-3)


def test_wrong_options_are_refused_when_the_space_is_made() -> None:
    for options, message in [
        ({"cells": 0}, "cells >= 1"),
        ({"channels": 2.5}, "channels >= 1, a whole number, got 2.5"),
        ({"input_shape": (64,)}, "mlp space"),
        ({"operations": ["sep_conv"]}, 'unknown operation "sep_conv"; did you mean'),
        ({"stem": "other"}, 'expected "cifar" or "imagenet", got \'other\''),
        ({"drop_path": 1.0}, "drop_path in"),
        ({"rules": ["erq"]}, 'unknown rule "erq"'),
        ({"rules": []}, "at least one rule"),
        ({"channels": 3, "patterns": ["16x1"]}, "16x1 is legal on none of the"),
        ({"patterns": ["2:4"], "densities": [0.1]}, "2:4 has density 0.5"),
        ({"channel": 3}, 'did you mean "channels"'),
    ]:
        with pytest.raises(ValueError, match=message):
            get_space("darts", **options)


def test_default_patterns_that_are_legal_nowhere_are_not_offered() -> None:
    odd = get_space("darts", channels=5, cells=1)
    offered = {v for seed in range(60) for n, v in odd.sample(seed).decisions if n == "sparsity.pattern"}
    assert offered == {"unstructured"}
