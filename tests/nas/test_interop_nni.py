"""NNI's spaces and hub cells, in and out. What needs nni runs where it is installed; the hub's cells need nothing."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import nn

from nas.interop.nni_hub import genotype_from_hub, genotype_to_hub
from search_spaces import SpaceError, get_space
from search_spaces.genotype_conversion import architecture_from_genotype, genotype_from_architecture
from search_spaces.genotypes import GENOTYPES, Genotype, GenotypeError

try:
    import nni.mutable as mutables
except ModuleNotFoundError:
    mutables = None

needs_nni = pytest.mark.skipif(mutables is None, reason="nni is not installed: pip install 'sparse-nas[nni]'")


class TestHubCells:
    def test_the_published_second_order_cells_are_the_hubs(self) -> None:
        sample = genotype_to_hub(GENOTYPES["DARTS_V2"])
        assert len(sample) == 32
        assert (sample["normal/op_5_1"], sample["normal/input_5_1"]) == ("dil_conv_3x3", [2])
        assert (sample["reduce/op_3_0"], sample["reduce/input_3_0"]) == ("skip_connect", [2])
        assert genotype_from_hub(sample) == GENOTYPES["DARTS_V2"]

    @pytest.mark.parametrize("seed", range(5))
    def test_an_architecture_survives_the_way_to_the_hub_and_back(self, seed: int) -> None:
        space = get_space("darts", input_shape=(3, 8, 8), classes=10, operations=["sep_conv_3x3", "skip_connect"])
        architecture = space.sample(seed)
        genotype = genotype_from_architecture(space, architecture)
        text = json.dumps(genotype_to_hub(genotype))
        assert genotype_from_architecture(space, architecture_from_genotype(space, genotype_from_hub(text))) == genotype

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"normal/op_2_0": None}, "normal/op_2_0: expected the name of an operation"),
            ({"normal/input_2_1": [2]}, "normal/input_2_1: expected one state from 0 to 1"),
            ({"normal/input_3_0": [0, 1]}, "normal/input_3_0: expected one state"),
            ({"normal/op_9_0": "skip_connect"}, "'normal/op_9_0'"),
            ({"reduce/op_2_0": ...}, "the label 'reduce/op_2_0', which is missing"),
        ],
    )
    def test_what_is_no_cell_is_refused_by_its_label(self, change: dict[str, Any], found: str) -> None:
        sample = genotype_to_hub(GENOTYPES["DARTS_V2"]) | change
        with pytest.raises(GenotypeError, match=found):
            genotype_from_hub({label: value for label, value in sample.items() if value is not ...})

    def test_what_the_hub_cannot_hold_is_refused(self) -> None:
        cell = (("none", 0), ("skip_connect", 1))
        with pytest.raises(GenotypeError, match="the hub has no operation 'none'"):
            genotype_to_hub(Genotype(cell, (2,), cell, (2,)))
        edges = (("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 0), ("skip_connect", 1))
        with pytest.raises(GenotypeError, match="give out all of their nodes"):
            genotype_to_hub(Genotype(edges, (3,), edges, (2, 3)))


@needs_nni
class TestSpaces:
    def foreign(self) -> Any:
        return mutables.MutableDict(
            {
                "width": mutables.Categorical([8, 16], label="width"),
                "skips": mutables.CategoricalMultiple([0, 1, 2], n_chosen=2, label="skips"),
                "slope": mutables.Numerical(0.0, 1.0, quantize=0.25, label="slope"),
            }
        )

    @staticmethod
    def build(frozen: dict[str, Any]) -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(6, frozen["width"]), nn.LeakyReLU(frozen["slope"])]
        return nn.Sequential(*layers, nn.Linear(frozen["width"], 1 + sum(frozen["skips"])))

    def test_every_choice_of_a_foreign_space_is_a_decision_with_all_of_its_values(self) -> None:
        from nas.interop.nni_spaces import space_from_nni

        space = space_from_nni(self.foreign(), "foreign", self.build)
        assert space.size() == 2 * 3 * 5
        architecture = space.architecture({"width": 16, "skips": "[0, 2]", "slope": 0.5})
        network = space.build(architecture)
        assert isinstance(network, nn.Sequential)
        assert network[2].negative_slope == 0.5
        assert network(torch.ones(1, 6)).shape == (1, 3)

    def test_a_foreign_space_is_searched_with_densities(self) -> None:
        from nas.interop.nni_spaces import space_from_nni
        from ops.counting import count

        space = space_from_nni(self.foreign(), "foreign", self.build, densities=[0.5])
        counts = count(space.build(space.sample(3)), (6,))
        assert counts.density < 0.6

    @pytest.mark.parametrize("name", ["mlp", "convnet", "nasbench201"])
    def test_a_space_of_ours_is_sampled_by_nni_and_comes_back(self, name: str) -> None:
        from nas.interop.nni_spaces import architecture_from_nni, sample_from_architecture, space_to_nni

        space = get_space(name, input_shape=(1, 8, 8), classes=10)
        exported = space_to_nni(space, draws=200)
        generator = random.Random(0)
        taken = 0
        for _ in range(20):
            sample = {label: generator.choice(symbol.values) for label, symbol in exported.simplify().items()}
            exported.validate(sample)
            try:
                architecture = architecture_from_nni(space, json.loads(json.dumps(sample)))
            except SpaceError:  # a value that only other decisions would offer
                continue
            taken += 1
            decided = {name: value for name, value in architecture.as_dict().items() if name in sample}
            assert decided
            assert decided.items() <= sample.items()
            assert architecture_from_nni(space, sample_from_architecture(architecture)) == architecture
        assert taken >= 5

    def test_too_many_combinations_are_refused_by_their_label(self) -> None:
        from nas.errors import ConfigError
        from nas.interop.nni_spaces import space_from_nni

        many = mutables.MutableDict({"x": mutables.CategoricalMultiple(range(30), label="many")})
        with pytest.raises(ConfigError, match=r"many: .* combinations of 30 values are too many"):
            space_from_nni(many, "many")
