"""The NASNet space and NASNet-A: exact published counts, state numbering, concatenation rule, ScheduledDropPath, laws."""

from __future__ import annotations

import random
from collections import defaultdict

import networkx as nx
import pytest
import torch
from torch import nn

from ops.candidates import NASNET_PRIMITIVES
from ops.counting import count
from ops.droppath import DropPath
from search_spaces import Architecture, SpaceError, get_space
from search_spaces.genotype_conversion import architecture_from_genotype, genotype_from_architecture
from search_spaces.genotypes import GENOTYPES, Genotype, GenotypeError, swap_inputs
from search_spaces.nasnet import NASNET_A, nasnet_from_genotype, unread_states

MOBILE = {"input_shape": (3, 224, 224), "classes": 1000, "channels": 44, "cells": 4}
LARGE = {
    "input_shape": (3, 331, 331),
    "classes": 1000,
    "channels": 168,
    "cells": 6,
    "stem_channels": 96,
    "skip_reduction": True,
}


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta(genotype: Genotype = NASNET_A, **macro) -> nn.Module:
    with torch.device("meta"):
        return nasnet_from_genotype(genotype, **macro)


def test_nasnet_a_on_cifar_has_the_published_counts() -> None:
    counts = count(meta(), (3, 32, 32))
    assert (counts.params, counts.dense_macs) == (3_346_538, 544_333_312)
    assert params(meta(auxiliary=True)) == 4_978_036


def test_nasnet_a_mobile_has_the_published_counts() -> None:
    counts = count(meta(**MOBILE), (3, 224, 224))
    assert (counts.params, counts.dense_macs) == (5_289_978, 563_638_816)


def test_nasnet_a_large_has_the_published_size() -> None:
    counts = count(meta(**LARGE), (3, 331, 331))
    assert counts.params == 88_753_150  # published as 88.9 M
    assert round(counts.dense_macs / 1e9, 1) == 23.8


def test_state_numbers_are_those_of_the_other_genotypes() -> None:
    text = swap_inputs(NASNET_A)  # as TensorFlow numbers them
    assert text.nodes("normal")[0] == (("sep_conv_5x5", 0), ("sep_conv_3x3", 1))
    assert text.normal_concat == (1, 2, 3, 4, 5, 6)
    assert text.reduce_concat == NASNET_A.reduce_concat == (3, 4, 5, 6)
    for kind in ("normal", "reduce"):  # the DARTS code has the same blocks and another concatenation
        assert [sorted(n) for n in NASNET_A.nodes(kind)] == [sorted(n) for n in GENOTYPES["NASNet"].nodes(kind)]
    assert unread_states(NASNET_A.nodes("normal"), (0,)) == NASNET_A.normal_concat
    assert unread_states(NASNET_A.nodes("reduce"), (3,)) == NASNET_A.reduce_concat


def test_reductions_stand_before_the_second_and_third_stage() -> None:
    network = meta(cells=2, channels=4)
    strides = [
        any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in cell.nodes.modules()) for cell in network.cells
    ]
    assert strides == [False, False, True, False, False, True, False, False]
    assert network.previous == [0, 0, 1, 2, 3, 4, 5, 6]
    assert network.auxiliary_after == 4
    skipping = meta(cells=2, channels=4, skip_reduction=True)
    assert skipping.previous == [0, 0, 1, 1, 3, 4, 4, 6]


def test_drop_path_rates_grow_with_the_cell_and_with_progress() -> None:
    network = meta(cells=6, channels=4, drop_path=0.4)
    rates = [next(m.rate for m in cell.modules() if isinstance(m, DropPath)) for cell in network.cells]
    assert rates == pytest.approx([0.4 * (i + 1) / 20 for i in range(20)])
    mobile = meta(**{**MOBILE, "channels": 8}, drop_path=0.3)
    rates = [next(m.rate for m in cell.modules() if isinstance(m, DropPath)) for cell in mobile.cells]
    assert rates == pytest.approx([0.3 * (i + 1) / 16 for i in range(16)])  # the two cells of the stem count
    network.set_progress(0.5)
    assert {m.progress for m in network.modules() if isinstance(m, DropPath)} == {0.5}


def test_drop_path_spares_identities_also_those_with_weights() -> None:
    network = meta(cells=1, channels=4, drop_path=0.4)
    assert network.cells[0].nodes.dropped == [[True, True], [True, True], [True, False], [True, True], [True, False]]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 14, 14), (2, 1, 1), (3, 9, 28)])
def test_any_image_size_works_with_the_auxiliary_head(shape: tuple) -> None:
    network = nasnet_from_genotype(NASNET_A, channels=4, cells=1, input_shape=shape, auxiliary=True, classes=3)
    logits, auxiliary = network.train()(torch.randn(4, *shape))
    assert logits.shape == auxiliary.shape == (4, 3)


@pytest.mark.parametrize("size", [33, 40])
@pytest.mark.parametrize("skip_reduction", [False, True])
def test_the_imagenet_stem_runs_and_traces_on_odd_and_even_images(size: int, skip_reduction: bool) -> None:
    network = nasnet_from_genotype(
        NASNET_A, channels=12, cells=2, input_shape=(3, size, size), stem="imagenet", skip_reduction=skip_reduction
    ).eval()
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    x = torch.randn(1, 3, size, size)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


def test_inputs_that_nothing_reads_are_aligned_before_concatenation() -> None:
    pairs = (("conv_1x1", 1), ("conv_1x1", 1))
    genotype = Genotype(pairs, (0, 2), pairs, (0, 2))
    c = 4
    network = nasnet_from_genotype(genotype, channels=c, cells=1, input_shape=(3, 8, 8)).eval()
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    first, reduce = network.cells[0], network.cells[1]
    assert params(first.fixes) == 3 * c * c + 2 * c  # the stem's 3c channels to c
    assert params(reduce.fixes) == (2 * c) * (2 * c) + 2 * (2 * c)  # factorised: halves of 1x1 convolutions, one norm
    assert isinstance(reduce.fixes["0"].relu, nn.Identity)
    assert len(network.cells[2].fixes) == 0


# -- the space ----------------------------------------------------------------------------------------------------------


def test_nasnet_a_is_in_the_space_that_concatenates_its_extra_states() -> None:
    space = get_space("nasnet", channels=32, cells=6, concat_normal=[0], concat_reduce=[3])
    architecture = architecture_from_genotype(space, NASNET_A)
    assert genotype_from_architecture(space, architecture) == NASNET_A
    assert params(space.meta(architecture)) == 3_346_538
    with pytest.raises(GenotypeError, match=r"nothing reads.*set its option concat_normal to \[0\]"):
        architecture_from_genotype(get_space("nasnet"), NASNET_A)


def test_genotypes_come_back_from_sampled_architectures() -> None:
    space = get_space("nasnet", cells=1, channels=4)
    for seed in range(20):
        architecture = space.sample(seed)
        genotype = genotype_from_architecture(space, architecture)
        others = {n: v for n, v in architecture.decisions if n.startswith("sparsity.")}
        assert architecture_from_genotype(space, genotype, others) == architecture
        if architecture["sparsity.density"] == 1:
            assert params(space.meta(architecture)) == params(meta(genotype, channels=4, cells=1))


def test_all_thirteen_operations_are_offered_and_build() -> None:
    for op in NASNET_PRIMITIVES:
        space = get_space(
            "nasnet", cells=1, channels=4, blocks=2, operations=[op], input_shape=(3, 8, 8), densities=[1]
        )
        assert space.build(space.sample(0)).eval()(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_closed_form_size_equals_enumeration_on_small_options() -> None:
    small = get_space(
        "nasnet", blocks=1, operations=["conv_1x1", "skip_connect"], densities=[1.0, 0.5], patterns=["2:4"]
    )
    assert small.size() == sum(1 for _ in small.enumerate()) == ((2 * 2) ** 2) ** 2 * 2
    assert get_space("nasnet", densities=[1.0]).size() == ((2 * 3 * 4 * 5 * 6) ** 2 * 13**10) ** 2


def test_digests_do_not_see_order_and_equal_ones_mean_equal_costs() -> None:
    options = {"blocks": 2, "cells": 1, "channels": 4, "input_shape": (3, 8, 8)}
    space = get_space(
        "nasnet", operations=["skip_connect", "conv_1x1"], densities=[0.5], patterns=["unstructured"], **options
    )
    rng = random.Random(0)
    groups: dict[str, set[Architecture]] = defaultdict(set)
    for _ in range(800):
        drawn = space.draw(lambda name, values: values[0] if name.startswith("reduce") else rng.choice(values))
        groups[drawn.digest].add(drawn)
    several = [sorted(g, key=str) for g in groups.values() if len(g) > 1]
    assert len(several) > 15
    for group in rng.sample(several, 8):
        costs = {(c.params, c.nnz, c.macs) for c in (count(space.meta(a), (3, 8, 8)) for a in group[:2])}
        assert len(costs) == 1


def test_an_identity_of_the_raw_first_input_is_a_convolution_and_is_counted_as_one() -> None:
    """Two identities of x add up to twice one of them, but in the first cell, where each has weights of its own."""
    space = get_space("nasnet", blocks=4, cells=1, channels=4, densities=[1.0], operations=["skip_connect"])
    reduce = (("skip_connect", 0), ("skip_connect", 1)) * 4

    def make(*reads: int) -> Architecture:
        normal = tuple(("skip_connect", j) for j in reads)
        concat = unread_states([normal[i : i + 2] for i in range(0, 8, 2)])
        return architecture_from_genotype(space, Genotype(normal, concat, reduce, (2, 3, 4, 5)))

    one = make(0, 1, 2, 2, 3, 1, 4, 1)  # x0 + x1, twice that, plus x1, plus x1: 2 x0 + 4 x1
    two = make(1, 1, 2, 2, 3, 0, 4, 0)  # 2 x1, twice that, plus x0, plus x0: 2 x0 + 4 x1
    assert params(space.meta(one)) != params(space.meta(two))
    assert one.digest != two.digest
    assert nx.is_isomorphic(space.graph(one), space.graph(two), edge_match=dict.__eq__)


def test_wrong_options_are_refused_when_the_space_is_made() -> None:
    for options, message in [
        ({"cells": 0}, "cells >= 1"),
        ({"blocks": 0}, "blocks >= 1"),
        ({"operations": ["none"]}, '"none" is not among the choices'),
        ({"operations": ["conv_9x9"]}, "unknown operation"),
        ({"concat_normal": [7]}, "concat_normal: expected states among 0 to 6, got 7"),
        ({"stem": "imagenet", "input_shape": (3, 2, 2)}, "at least 3x3"),
        ({"input_shape": (3, 2)}, "mlp space"),
        ({"drop_path": -0.1}, "drop_path in"),
    ]:
        with pytest.raises(SpaceError, match=message):
            get_space("nasnet", **options)
