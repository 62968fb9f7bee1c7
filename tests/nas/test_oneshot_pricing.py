"""Pricing of candidates: shapes, sums by hand, densities, inclusion of edges, and that equal ones are priced once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hw_models.relaxation import choice_probabilities
from nas.oneshot.algorithm import Setting
from nas.oneshot.lone import build_whole, candidate_places, signature
from nas.oneshot.pricing import Prices, path_probabilities, price_choices
from nas.oneshot.supernet import Supernet
from ops.candidates import OPERATIONS
from ops.layers import sparse_layers
from ops.plan import lower
from search_spaces import Space
from tests.nas.oneshot_tiny import CLASSES, SHAPE, ByWork, tiny_space

torch.set_num_threads(1)


def setting(space: Space, latency: Any = None) -> Setting:
    return Setting(space, SHAPE, CLASSES, 0, latency=latency or ByWork())


def ms_of(module: nn.Module, *shape: int) -> float:
    return ByWork().predict(lower(module.eval(), torch.zeros(1, *shape))).ms


def one_hot(n: int, i: int) -> torch.Tensor:
    return torch.eye(n)[i]


def test_tables_hold_the_sum_over_all_places_of_a_choice() -> None:
    """nasbench201 with one cell per stage: 4 channels at 8x8, 8 at 4x4, 16 at 2x2."""
    priced, rest = price_choices(Supernet(tiny_space("nasbench201")), setting(tiny_space("nasbench201")))
    assert list(priced.grids) == [f"node{i}.from{j}" for i in (1, 2, 3) for j in range(i)]
    for grid in priced.grids.values():
        for c, name in enumerate(grid.candidates):
            by_hand = 0.0
            if name not in ("none", "skip_connect"):
                by_hand = sum(ms_of(OPERATIONS[name](w, w), w, s, s) for w, s in ((4, 8), (8, 4), (16, 2)))
            assert grid.dense_ms[c] == pytest.approx(by_hand)
    assert rest > 0


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
def test_the_expectation_of_a_path_is_the_sum_of_its_parts_and_near_the_whole_network(density: float) -> None:
    space = tiny_space("nasbench201")
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space), (0.5, 0.25))
    for seed in range(4):
        decisions = {n: v for n, v in space.sample(seed).as_dict().items() if n in priced.grids}
        decisions = {n: "nor_conv_3x3" if v == "none" else v for n, v in decisions.items()}  # so that nothing is dead
        by_hand = float(priced.rest.predict(density)[0])
        by_hand += sum(
            float(priced.grids[n].predict(density)[priced.grids[n].candidates.index(str(v))])
            for n, v in decisions.items()
        )
        found = float(priced.of_path(supernet.gates_of(decisions), density))
        assert found == pytest.approx(by_hand, rel=1e-6)
        whole = build_whole(setting(space), decisions, density, "unstructured")
        # fusions of a whole network and the sums of its cells are what the parts do not know of
        assert found == pytest.approx(ms_of(whole.module, *SHAPE), rel=0.25)


def test_the_whole_network_of_the_cheapest_candidates_costs_exactly_what_is_expected() -> None:
    space = tiny_space("darts")
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space), (0.25,))
    decisions: dict[str, Any] = dict.fromkeys(priced.grids, "skip_connect")
    for name, grid in priced.grids.items():
        if grid.dense_ms[grid.candidates.index("skip_connect")] > grid.dense_ms[grid.candidates.index("sep_conv_3x3")]:
            decisions[name] = "sep_conv_3x3"
    decisions |= {name: "0,1" for name in supernet.choices if name.endswith("inputs")}
    for density in (1.0, 0.25):
        whole = build_whole(setting(space), decisions, density, "unstructured")
        assert float(priced.of_path(supernet.gates_of(decisions), density)) == pytest.approx(
            ms_of(whole.module, *SHAPE), rel=1e-5
        )


@pytest.mark.parametrize("name", ["darts", "nasbench201", "convnet", "nasnet"])
def test_latency_never_falls_with_density(name: str) -> None:
    space = tiny_space(name)
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space), (0.5, 0.25))
    uniform = {n: torch.full((len(c.options),), 1 / len(c.options)) for n, c in supernet.choices.items()}
    times = [float(priced(uniform, d)) for d in (0.1, 0.25, 0.4, 0.5, 0.8, 1.0)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_sparse_times_come_from_the_model_not_from_the_share_of_kept_weights() -> None:
    class Stairs(ByWork):
        """A mask saves nothing until a quarter is left."""

        def predict(self, plan: Any, device: object = None) -> Any:
            factor = 0.5 if min((op.density for op in plan.ops), default=1.0) <= 0.25 else 1.0
            made = super().predict(plan)
            full = sum(0.01 + op.dense_macs / 1e4 for op in plan.ops)
            return type(made)(factor * full, full, full, "analytical", made.parts)

    space = tiny_space("nasbench201")
    priced, _ = price_choices(Supernet(space), setting(space, Stairs()), (0.5, 0.25))
    grid = priced.grids["node1.from0"]
    conv = grid.candidates.index("nor_conv_3x3")
    relu = 3 * 0.01  # in three places, done by the layer before it
    assert grid.predict(0.5)[conv] == pytest.approx(grid.predict(1.0)[conv] - relu)
    assert grid.predict(0.25)[conv] == pytest.approx(0.5 * (grid.predict(1.0)[conv] - relu))


def test_an_input_counts_as_often_as_it_is_kept() -> None:
    space = tiny_space("darts")
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space))
    uniform = {n: torch.full((3,), 1 / 3) for n in priced.grids}
    entry = {e.name: e for e in priced.entries}["normal.node2.from3.op"]
    assert priced.share(entry, uniform).tolist() == pytest.approx([0.5 / 3] * 3)  # two of four
    beta = torch.tensor([0.7, 0.1, 0.1, 0.1])
    weighted = uniform | {"normal.node2.inputs": beta}
    assert priced.share(entry, weighted).tolist() == pytest.approx([0.2 / 3] * 3)
    first = {e.name: e for e in priced.entries}["normal.node2.from0.op"]
    assert priced.share(first, weighted).tolist() == pytest.approx([1 / 3] * 3)  # 1.4 is 1


def test_an_operation_that_several_inputs_share_has_a_table_for_each() -> None:
    space = tiny_space("nasnet")
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space))
    assert {"reduce.block1.op1@0", "reduce.block1.op1@1", "reduce.block1.op1@2"} <= set(priced.grids)
    p = {n: torch.full((len(c.options),), 1 / len(c.options)) for n, c in supernet.choices.items()}
    base = float(priced(p))
    p["reduce.block1.input1"] = one_hot(3, 2)
    by_hand = base
    for j in range(3):
        grid = priced.grids[f"reduce.block1.op1@{j}"]
        by_hand += (float(j == 2) - 1 / 3) * float(grid.dense_ms.mean())
    assert float(priced(p)) == pytest.approx(by_hand, rel=1e-5)


def test_it_is_differentiable_in_operations_and_edges() -> None:
    space = tiny_space("darts")
    supernet = Supernet(space)
    priced, _ = price_choices(supernet, setting(space), (0.25,))
    alphas = {n: torch.zeros(len(c.options), requires_grad=True) for n, c in supernet.choices.items()}
    ms = priced({n: choice_probabilities(a) for n, a in alphas.items()}, 0.25)
    gradients = dict(zip(alphas, torch.autograd.grad(ms, list(alphas.values()), allow_unused=True)))
    conv = gradients["normal.node1.from0.op"]
    assert conv is not None
    assert conv[2] > 0 > conv[1]  # a separable convolution costs more than an identity
    assert gradients["normal.node2.inputs"] is not None


def test_candidates_are_as_in_a_found_network() -> None:
    choices, places = candidate_places(setting(tiny_space("darts")), {}, (0.25,), "unstructured")
    assert all(choice in choices for choice in {p.decision for p in places})
    assert len(places) == 3 * 14  # cells times edges
    for place in places:
        pool_free = place.candidates["sep_conv_3x3"]
        norms = [m for m in pool_free[1.0].module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(norm.affine and norm.running_mean is not None for norm in norms)
        assert set(pool_free) == {1.0, 0.25}
        layers = sparse_layers(pool_free[0.25].module)
        assert len(layers) == 2 + len(sparse_layers(pool_free[1.0].module))  # one on either side
        for _, layer in layers:
            assert float(layer.mask.float().mean()) == pytest.approx(0.25, abs=1 / layer.mask.numel() + 1e-6)
        assert place.candidates["none"][1.0].free


def test_equal_candidates_are_priced_once() -> None:
    asked: list[int] = []

    class Counting(ByWork):
        def predict_many(self, plans: Any, device: object = None) -> Any:  # type: ignore[override]
            asked.append(len(plans))
            return super().predict_many(plans)

    space = tiny_space("nasbench201")
    prices = Prices(setting(space, Counting()))
    assert prices.of() is prices.of({})
    # three shapes of two convolutions and a pool, and the whole network
    assert asked == [9, 1]
    assert len(prices.known) == 10


def test_modules_that_differ_have_different_signatures() -> None:
    made = [
        OPERATIONS[name](4, 4, stride) for name in ("sep_conv_3x3", "sep_conv_5x5", "skip_connect") for stride in (1, 2)
    ]
    assert len({signature(module) for module in made}) == 6
    assert signature(OPERATIONS["sep_conv_3x3"](4, 4)) == signature(OPERATIONS["sep_conv_3x3"](4, 4))


def test_without_a_model_candidates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from hw_models import latency

    asked: dict[str, Any] = {}

    def fake(networks: Any, **how: Any) -> Any:
        asked.update(networks)
        assert how["threads"] == 2
        kinds = {key: ms_of(module, *example.shape[1:]) for key, (module, example) in networks.items()}
        return {key: type("L", (), {"ms": ms})() for key, ms in kinds.items()}

    monkeypatch.setattr(latency, "measure_many", fake)
    space = tiny_space("nasbench201")
    bare = Setting(space, SHAPE, CLASSES, 0)
    measured = Prices(bare, (0.25,), threads=2).of()
    modelled = Prices(setting(space), (0.25,)).of()
    # at three shapes: two convolutions and a pool, dense and between sparse neighbours, these neighbours; two whole networks
    assert len(asked) == 3 * (3 + 3 + 1) + 2
    for name, grid in measured.grids.items():
        assert grid.to_dict() == modelled.grids[name].to_dict()


def test_a_path_has_the_probabilities_that_make_it_certain() -> None:
    space = tiny_space("darts")
    supernet = Supernet(space)
    path = path_probabilities(supernet.choices, supernet.gates_of(space.sample(0)))
    assert all(float(p.sum()) == pytest.approx(1) for p in path.values())
    assert sorted(path["normal.node3.inputs"].tolist()) == [0, 0, 0, 0.5, 0.5]


def test_a_pool_between_sparse_layers_costs_what_it_costs_there() -> None:
    """Where pools are slow on their own and fast in the layout of sparse kernels, that is seen."""

    class Layouts(ByWork):
        def predict(self, plan: Any, device: object = None) -> Any:
            made = super().predict(plan)
            sparse = any(op.density < 1 for op in plan.ops)
            pools = sum("pool" in op.kind for op in plan.ops)
            return type(made)(made.ms + (0.0 if sparse else 5.0) * pools, 0, 0, "analytical", made.parts)

    space = tiny_space("nasbench201")
    priced, _ = price_choices(Supernet(space), setting(space, Layouts()), (0.25,))
    grid = priced.grids["node1.from0"]
    pool = grid.candidates.index("avg_pool_3x3")
    assert grid.predict(1.0)[pool] == pytest.approx(3 * 5.01)
    assert grid.predict(0.25)[pool] == pytest.approx(3 * 0.01)
