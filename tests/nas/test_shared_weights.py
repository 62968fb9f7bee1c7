"""Weights that structures of a supernet share: what training one does to another, what fits, what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.oneshot import supernet as supernet_module
from nas.oneshot.shared import SharedWeights, fits, slices
from nas.oneshot.supernet import Supernet
from search_spaces import Space, get_space
from tests.nas.supernet_spaces import SPACES, batch

torch.set_num_threads(1)


def named(**shapes: tuple[int, ...]) -> nn.Module:
    """A module with these parameters, all different numbers."""
    module = nn.Module()
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        setattr(module, name, nn.Parameter(torch.arange(float(count)).reshape(shape)))
    return module


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((4, 2), (4, 2), None),
        ((2, 3), (4, 3), (slice(0, 2), slice(0, 3))),
        ((2, 1, 3, 3), (4, 3, 5, 7), (slice(0, 2), slice(0, 1), slice(1, 4), slice(2, 5))),
        ((1,), (9,), (slice(0, 1),)),
    ],
)
def test_a_small_weight_is_the_leading_channels_and_the_middle_of_the_kernel(small, large, expected) -> None:
    assert fits(small, large)
    assert slices(small, large) == expected


def test_what_is_larger_or_of_another_rank_does_not_fit() -> None:
    assert not fits((5, 2), (4, 9))
    assert not fits((2, 2), (4, 4, 3, 3))


def test_a_key_is_one_tensor_and_what_does_not_fit_gets_its_own() -> None:
    shared = SharedWeights()
    keys = {"w": "block/w"}
    large, small, other = named(w=(4, 3)), named(w=(2, 3)), named(w=(6, 1))
    values = large.w.detach().clone()
    assert shared.adopt(large, keys) == {"w": ("block/w", None)}
    source = shared.adopt(small, keys)
    assert source == {"w": ("block/w", (slice(0, 2), slice(0, 3)))}
    assert torch.equal(shared.views(source)["w"], values[:2])
    assert shared.adopt(other, keys) == {"w": ("block/w 6x1", None)}
    assert shared.adopt(named(w=(6, 1)), keys) == {"w": ("block/w 6x1", None)}  # and the next of its kind shares that
    assert {key: tuple(tensor.shape) for key, tensor in shared.tensors.items()} == {
        "block/w": (4, 3),
        "block/w 6x1": (6, 1),
    }
    assert {large.w.device.type, small.w.device.type, other.w.device.type} == {"meta"}


def test_a_gradient_goes_through_a_view_into_its_slice_alone() -> None:
    shared = SharedWeights()
    shared.adopt(named(w=(4, 4, 5, 5)), {"w": "w"})
    view = shared.views(shared.adopt(named(w=(2, 3, 3, 3)), {"w": "w"}))["w"]
    view.sum().backward()
    expected = torch.zeros(4, 4, 5, 5)
    expected[:2, :3, 1:4, 1:4] = 1.0
    assert torch.equal(shared.tensors["w"].grad, expected)


@pytest.mark.parametrize("name", ["convnet", "mlp", "tiny"])
def test_training_one_width_moves_the_slice_that_another_has(name: str) -> None:
    space = SPACES[name]()
    net = Supernet(space)
    width = {"convnet": "stage0.width", "mlp": "layer0.width", "tiny": "width"}[name]
    depth = {"convnet": "stage0.depth", "mlp": "depth", "tiny": "depth"}[name]
    options = net.choices[width].options
    narrow, wide = ({width: w, depth: 1} for w in (min(options), max(options)))
    gates = net.gates_of(space.sample(0)).gates
    x = batch(space)
    with torch.no_grad():
        before = net(x, gates, narrow), net(x, gates, wide)
    weights = net.by_key()
    old = {key: p.detach().clone() for key, p in weights.items()}
    (net(x, gates, narrow) * torch.arange(4.0)).sum().backward()
    with torch.no_grad():
        for p in weights.values():
            if p.grad is not None:
                p -= 0.1 * p.grad
        after = net(x, gates, narrow), net(x, gates, wide)
    assert not torch.allclose(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    sliced = [(key, part) for key, part in net.structure(narrow).sources.values() if part is not None]
    assert sliced
    for key, part in sliced:
        assert torch.equal(
            torch.where(weights[key] != old[key], 1, 0).sum(), (weights[key][part] != old[key][part]).sum()
        )


def test_depths_share_the_blocks_they_have_in_common() -> None:
    space = get_space("mlp", classes=4, input_shape=(12,), widths=(8,), max_depth=3)
    net = Supernet(space)
    one, three = ({key for key, _ in net.structure({"depth": depth}).sources.values()} for depth in (1, 3))
    assert {"layer0.sparse#0/.weight"} == {key for key in one & three if key.startswith("layer")}
    assert {key for key in three if key.startswith("layer")} == {f"layer{i}.sparse#0/.weight" for i in range(3)}


def test_more_structures_than_are_kept_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernet_module, "MAX_STRUCTURES", 3)
    space = SPACES["convnet"]()
    net = Supernet(space)
    architectures = [space.sample(seed) for seed in range(8)]
    assert len({net._key(net.gates_of(a).values) for a in architectures}) > 3
    known = list(net.by_key())
    outputs = []
    for _ in range(2):
        for architecture in architectures:
            path = net.gates_of(architecture)
            with torch.no_grad():
                outputs.append(net(batch(space), path.gates, path.values))
            assert len(net._structures) <= 3
    assert all(torch.equal(a, b) for a, b in zip(outputs[:8], outputs[8:], strict=True))
    assert list(net.by_key())[: len(known)] == known


def test_a_structure_is_the_same_whoever_was_made_before_it() -> None:
    """Of the tensors that the first network allocates; those of rare structures belong to the first that has them."""
    space = SPACES["mlp"]()
    nets = [Supernet(space), Supernet(space)]
    values = [nets[0].gates_of(space.sample(seed)).values for seed in range(6)]
    for v in values:
        nets[0].structure(v)
    for v in reversed(values):
        nets[1].structure(v)
    a, b = (net.by_key() for net in nets)
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_decisions_that_only_some_structures_meet_are_known_from_the_start() -> None:
    def branching(c) -> nn.Module:
        if c.choice("kind", ["plain", "rich"]) == "plain":
            return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        return nn.Sequential(nn.Flatten(), c.op("inner", {"a": lambda: nn.Linear(4, 2), "b": lambda: nn.Linear(4, 2)}))

    net = Supernet(Space(branching, "branching"))
    assert net.choices["inner"].options == ("a", "b")
    path = net.gates_of({"kind": "rich", "inner": "b"})
    x = torch.randn(3, 4)
    with torch.no_grad():
        rich, plain = net(x, path.gates, path.values), net(x, {}, {"kind": "plain"})
    assert rich.shape == plain.shape == (3, 2)
    assert not torch.allclose(rich, plain)
