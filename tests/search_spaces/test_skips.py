"""The share of skips and pools, on cells whose operations are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from search_spaces import Chooser, Space, SpaceError, get_space
from search_spaces.skips import is_skip_or_pool, skip_pool_share


@pytest.mark.parametrize(
    "name", ["none", "skip_connect", "identity", "max_pool_3x3", "avg_pool_3x3", "zero", "MaxPool"]
)
def test_names_that_skip_or_pool(name: str) -> None:
    assert is_skip_or_pool(name)


@pytest.mark.parametrize("name", ["sep_conv_3x3", "nor_conv_1x1", "mbconv", "conv_7x1_1x7", 3])
def test_names_that_do_not(name: str | int) -> None:
    assert not is_skip_or_pool(name)


def test_cells_count_as_often_as_the_network_has_them() -> None:
    """5 cells: normal ones 0, 2, 4 and reductions 1, 3. All 8 operations of a normal cell skip, none of a reduction."""
    space = get_space("darts", channels=4, cells=5, input_shape=(3, 8, 8))

    def decide(name: str, options: tuple) -> object:
        if name.endswith(".op"):
            return "skip_connect" if name.startswith("normal") else "sep_conv_3x3"
        return options[0]

    architecture = space.draw(decide)  # type: ignore[arg-type]
    assert skip_pool_share(space, architecture) == pytest.approx(3 * 8 / (5 * 8))


def test_an_edge_that_leads_nowhere_does_not_count() -> None:
    """NAS-Bench-201: node 1 is read by nobody, as both edges from it are "none"; so its convolution is no part of the network."""
    space = get_space("nasbench201", channels=4, cells=1, input_shape=(3, 8, 8))
    operations = {
        "node1.from0": "nor_conv_3x3",
        "node2.from0": "nor_conv_1x1",
        "node2.from1": "none",
        "node3.from0": "skip_connect",
        "node3.from1": "none",
        "node3.from2": "avg_pool_3x3",
    }
    architecture = space.draw(lambda name, options: operations.get(name, options[0]))
    assert skip_pool_share(space, architecture) == pytest.approx(4 / 5)


def own(c: Chooser) -> nn.Module:
    ops = {"skip": nn.Identity, "linear": lambda: nn.Linear(4, 4)}
    parts = [c.sparse(f"part{i}", c.op(f"op{i}", ops), [1.0, 0.5]) for i in range(3)]
    return nn.Sequential(*parts, nn.Linear(4, 2))


def test_operations_that_were_made_sparse_still_count() -> None:
    space = Space(own, "own")
    chosen = {"op0": "skip", "op1": "linear", "part1.density": 0.3, "part1.pattern": "unstructured"}
    architecture = space.architecture(chosen | {"op2": "linear", "part2.density": 1.0})
    assert skip_pool_share(space, architecture) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_a_space_without_such_operations_has_no_share(name: str, tmp_path: Path) -> None:
    space = get_space(name)
    assert skip_pool_share(space, space.sample(0)) is None


def test_an_architecture_of_another_space_is_an_error() -> None:
    with pytest.raises(SpaceError):
        skip_pool_share(get_space("darts", channels=4, cells=3), get_space("mlp").sample(0))
