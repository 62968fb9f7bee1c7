"""The expected latency of a supernet: against every architecture priced one by one, and against finite differences."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hw_models.expected import ExpectedLatency, choice_probabilities, expected_latency, fbnet_loss, proxyless_loss
from hw_models.latency_grid import LatencyGrid
from tests.hw_models.test_latency_grid import random_grid

NAN = math.nan
F64 = torch.float64


def brute_force(
    grids: list[LatencyGrid], probabilities: list[np.ndarray], densities: list[np.ndarray], constant_ms: float
) -> float:
    """The sum over all architectures of their probability times their latency. O(C ** G)."""
    total = 0.0
    for choice in itertools.product(*(range(len(grid.candidates)) for grid in grids)):
        probability, latency = 1.0, constant_ms
        for grid, p, d, c in zip(grids, probabilities, densities, choice):
            probability *= p[c]
            latency += grid.predict(d[c])[c]
        total += probability * latency
    return total


def draw(seed: int, sizes: tuple[int, ...] = (3, 2, 4)) -> tuple[list[LatencyGrid], list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    grids = [
        random_grid(rng, candidates=c, points=int(rng.integers(1, 6)), allowed=bool(rng.random() < 0.7)) for c in sizes
    ]
    return grids, [rng.dirichlet(np.ones(c)) for c in sizes], [rng.uniform(0.01, 1, c) for c in sizes]


@pytest.mark.parametrize("seed", range(8))
def test_the_expectation_of_a_sum_is_the_mean_over_all_architectures(seed: int) -> None:
    grids, p, d = draw(seed)
    if seed % 2:  # some exactly dense, some exactly on a knot
        d[0][:], d[1][0] = 1.0, grids[1].densities[0]
    found = expected_latency(grids, [torch.tensor(x) for x in p], [torch.tensor(x) for x in d], constant_ms=1.25)
    assert found.shape == ()
    assert found.item() == pytest.approx(brute_force(grids, p, d, 1.25), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_candidates_and_densities_chosen_together_are_candidates_of_a_longer_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = random_grid(rng, candidates=3)
    choices = np.array([1.0, 0.2, 0.1, 0.05])
    p = rng.dirichlet(np.ones(12)).reshape(3, 4)
    wanted = sum(p[c, k] * grid.predict(choices[k])[c] for c in range(3) for k in range(4))
    assert expected_latency(grid, torch.tensor(p), choices.tolist()).item() == pytest.approx(wanted, rel=1e-12)
    # several, with different numbers of densities, by name
    two = {"one": grid, "two": grid}
    wanted2 = wanted + sum(p[c, k] * grid.predict(choices[k])[c] for c in range(3) for k in range(2))
    found = expected_latency(
        two,
        {"two": torch.tensor(p[:, :2]), "one": torch.tensor(p)},
        {"one": choices.tolist(), "two": choices[:2].tolist()},
    )
    assert found.item() == pytest.approx(wanted2, rel=1e-12)


def test_a_certain_choice_costs_what_that_architecture_costs_and_nothing_else_counts() -> None:
    grids, _, d = draw(3)
    for choice in itertools.product(range(3), range(2), range(4)):
        one_hot = [torch.eye(len(g.candidates), dtype=F64)[c] for g, c in zip(grids, choice)]
        wanted = sum(g.predict(x[c])[c] for g, x, c in zip(grids, d, choice))
        found = expected_latency(grids, one_hot, [torch.tensor(x) for x in d])
        assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_everything_is_dense_where_no_densities_are_given() -> None:
    grid = LatencyGrid.from_arrays(["a", "b"], [0.1, 0.5], [[1.0, 2.0], [NAN, NAN]], [3.0, 5.0])
    assert expected_latency(grid, [0.5, 0.5]).item() == 4.0
    assert expected_latency(grid, [[0.25, 0.25], [0.5, 0.0]], [1.0, 0.1]).item() == pytest.approx(
        0.25 * 3 + 0.25 * 1 + 0.5 * 5
    )
    priced_sparse = LatencyGrid.from_arrays(["a", "2:4"], [0.5], [[1.0], [2.0]], [3.0, NAN])
    with pytest.raises(ValueError, match=r"2:4 was priced at densities 0\.5 but never dense; pass densities"):
        expected_latency(priced_sparse, [0.5, 0.5])
    assert expected_latency(priced_sparse, [0.5, 0.5], 0.5).item() == 1.5


@pytest.mark.parametrize("seed", range(4))
def test_gradients_by_alphas_and_densities_are_those_of_finite_differences(seed: int) -> None:
    grids, p, _ = draw(seed)
    rng = np.random.default_rng(seed + 100)
    densities = []
    for grid in grids:  # away from kinks: knots, crossovers, floors
        while True:
            d = rng.uniform(0.02, 0.97, len(grid.candidates))
            slopes = [(grid.predict(d + h) - grid.predict(d + h - 1e-4)).diagonal() for h in (-2e-4, 3e-4)]
            if np.allclose(slopes[0], slopes[1], rtol=1e-6, atol=1e-12):
                break
        densities.append(torch.tensor(d, requires_grad=True))
    alphas = [torch.tensor(np.log(x), requires_grad=True) for x in p]

    def latency(*values: Tensor) -> Tensor:
        return expected_latency(grids, alphas=list(values[:3]), densities=list(values[3:]), constant_ms=2.0)

    assert torch.autograd.gradcheck(latency, (*alphas, *densities), eps=1e-5, atol=1e-7)


def test_the_gradient_by_density_is_the_slope_of_the_line_it_is_on() -> None:
    # 10 ms per unit of density up to 0.3, then 20; dense from 0.5 on
    grid = LatencyGrid.from_arrays(["conv"], [0.1, 0.3, 0.6], [[1.0, 3.0, 9.0]], [7.0])
    wanted = {0.02: 10, 0.2: 10, 0.3: 20, 0.45: 20, 0.55: 0, 1.0: 0}
    assert grid.crossover("conv") == pytest.approx(0.5)
    for density, slope in wanted.items():
        d = torch.tensor(density, requires_grad=True)
        expected_latency(grid, [0.5], d).backward()
        assert d.grad is not None
        assert d.grad.item() == pytest.approx(0.5 * slope, rel=1e-5), density


def test_the_gradient_by_probability_is_the_price_of_the_candidate() -> None:
    grids, p, d = draw(5)
    tensors = [torch.tensor(x, requires_grad=True) for x in p]
    expected_latency(grids, tensors, [torch.tensor(x) for x in d]).backward()
    for grid, tensor, x in zip(grids, tensors, d):
        torch.testing.assert_close(tensor.grad, torch.tensor(grid.predict(x).diagonal()))


def test_never_priced_dense_the_slope_at_one_is_that_of_the_last_line() -> None:
    grid = LatencyGrid.from_arrays(["conv"], [0.5, 0.8, 1.0], [[1.0, 2.0, 6.0]])
    longer = LatencyGrid.from_arrays(["conv"], [0.1, 0.2, 0.3, 0.4, 0.5], [[1.0, 2.0, 3.0, 4.0, 5.0]])
    d = torch.tensor(1.0, dtype=F64, requires_grad=True)
    found = ExpectedLatency([grid, longer], dtype=F64).per_operation([[1.0], [1.0]], [d, 0.1])
    found[0].backward()
    assert found[0].item() == 6.0
    assert d.grad is not None
    assert d.grad.item() == pytest.approx(20.0)


def test_below_the_floor_nothing_is_gained() -> None:
    grid = LatencyGrid.from_arrays(["conv"], [0.1, 0.3], [[1.0, 3.0]], floor_ms=0.5)
    d = torch.tensor(0.01, requires_grad=True)
    found = expected_latency(grid, [1.0], d)
    found.backward()
    assert (found.item(), d.grad) == (0.5, torch.tensor(0.0))


def test_gradient_descent_on_latency_finds_the_fastest_candidate_and_a_smaller_density() -> None:
    grid = LatencyGrid.from_arrays(["slow", "fast"], [0.1, 0.9], [[2.0, 9.0], [1.0, 5.0]], [12.0, 8.0])
    alphas = torch.zeros(2, requires_grad=True)
    density = torch.tensor(0.5, requires_grad=True)
    model = ExpectedLatency(grid, constant_ms=1.0)
    optimizer = torch.optim.SGD([alphas, density], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        model(alphas.softmax(0), density.clamp(0.01, 1)).backward()
        optimizer.step()
    assert alphas.argmax() == 1
    assert density.item() < 0.2


def test_one_tensor_for_all_lists_and_names_say_the_same() -> None:
    rng = np.random.default_rng(0)
    grids = [random_grid(rng, 3) for _ in range(5)]
    p = torch.tensor(rng.dirichlet(np.ones(3), 5))
    d = torch.tensor(rng.uniform(0.05, 1, (5, 3)))
    names = [f"cell{i}" for i in range(5)]
    named = dict(zip(names, grids))
    wanted = expected_latency(grids, p, d).item()
    assert expected_latency(grids, list(p), list(d)).item() == wanted
    assert expected_latency(named, dict(zip(names, p)), dict(zip(names, d))).item() == wanted
    assert expected_latency(
        named, alphas={n: row.log() for n, row in zip(names, p)}, densities=dict(zip(names, d))
    ).item() == (pytest.approx(wanted))
    assert expected_latency(grids, p, 0.3).item() == pytest.approx(
        expected_latency(grids, p, torch.full((5, 3), 0.3, dtype=F64)).item()
    )
    assert ExpectedLatency(grids).per_operation(p, d).sum().item() == pytest.approx(wanted, rel=1e-6)
    joint = torch.tensor(rng.dirichlet(np.ones(6), 5)).reshape(5, 3, 2)
    at = torch.tensor(rng.uniform(0.05, 1, (5, 3, 2)))
    assert expected_latency(grids, joint, at).item() == expected_latency(grids, list(joint), list(at)).item()


def test_the_same_parameters_may_stand_for_many_operations() -> None:
    rng = np.random.default_rng(1)
    grids = [random_grid(rng, 3) for _ in range(4)]
    shared = torch.tensor(rng.normal(size=3), requires_grad=True)
    expected_latency(grids, alphas=[shared] * 4, densities=0.3).backward()
    apart = torch.tensor(np.tile(shared.detach().numpy(), (4, 1)), requires_grad=True)
    expected_latency(grids, alphas=apart, densities=0.3).backward()
    torch.testing.assert_close(shared.grad, apart.grad.sum(0))  # type: ignore[union-attr]


def test_a_density_that_is_not_a_number_is_not_hidden() -> None:
    grid = LatencyGrid.from_arrays(["conv"], [0.1, 0.3], [[1.0, 3.0]], [2.0])
    assert expected_latency(grid, [1.0], torch.tensor(NAN)).isnan()


@pytest.mark.parametrize(
    ("grids", "given", "message"),
    [
        ("list", {"probabilities": [[0.5, 0.5]]}, "expected one entry for each of 2 mixed operations, got 1"),
        (
            "list",
            {"probabilities": [[0.5, 0.5], [1.0]]},
            r"mixed operation 1: expected shape \[2\] or \[2, K\].*got \[1\]",
        ),
        ("list", {"probabilities": [[0.5, 0.5], [[0.5], [0.5]]]}, "for all, got both"),
        ("list", {}, "either probabilities or alphas"),
        ("list", {"probabilities": [[0.5, 0.5]] * 2, "alphas": [[0, 0]] * 2}, "either probabilities or alphas"),
        (
            "list",
            {"probabilities": [[0.5, 0.5]] * 2, "densities": [0.1] * 3},
            "densities: expected one entry for each of 2",
        ),
        (
            "list",
            {"probabilities": [[0.5, 0.5]] * 2, "densities": [[0.1] * 3] * 2},
            "broadcasts against its probabilities",
        ),
        ("list", {"probabilities": [[0.5, 0.5]] * 2, "densities": 0.0}, r"kept fractions in \(0, 1\], got 0"),
        ("list", {"probabilities": [[0.5, 0.5]] * 2, "densities": [[1, 5], 1]}, "kept fractions.*got 5"),
        ("names", {"probabilities": {"a": [0.5, 0.5]}}, "expected a mapping of a, b, got a"),
        ("names", {"probabilities": [[0.5, 0.5]] * 2}, "expected a mapping of a, b, got list"),
        ("names", {"probabilities": {"a": [1.0, 0.0], "b": [1.0]}}, 'mixed operation "b": expected shape'),
        ("none", {"probabilities": []}, "at least one grid"),
    ],
)
def test_what_does_not_fit_is_refused(grids: str, given: dict[str, Any], message: str) -> None:
    grid = LatencyGrid.from_arrays(["x", "y"], [0.1], [[1.0], [2.0]], [3.0, 4.0])
    tables: dict[str, Any] = {"list": [grid, grid], "names": {"a": grid, "b": grid}, "none": []}
    with pytest.raises(ValueError, match=message):
        expected_latency(tables[grids], **given)


# --- probabilities and losses ---


@pytest.mark.parametrize("how", ["softmax", "gumbel", "one-hot"])
@pytest.mark.parametrize("dim", [-1, 0, (-2, -1), (0, 2)])
def test_probabilities_sum_to_one_over_what_makes_a_choice(how: str, dim: int | tuple[int, ...]) -> None:
    alphas = torch.randn(3, 4, 5, dtype=F64)
    p = choice_probabilities(alphas, how, dim=dim, generator=torch.Generator().manual_seed(0))
    assert p.shape == alphas.shape
    torch.testing.assert_close(p.sum(dim), torch.ones_like(p.sum(dim)))
    assert (p >= -1e-12).all()
    if how == "one-hot":
        assert ((p - p.round()).abs() < 1e-12).all()


def test_softmax_over_several_axes_is_that_of_the_flat_list() -> None:
    alphas = torch.randn(3, 4, 5)
    found = choice_probabilities(alphas, dim=(0, 2), temperature=2.0)
    for j in range(4):
        torch.testing.assert_close(found[:, j].flatten(), (alphas[:, j].flatten() / 2).softmax(0))


def test_gumbel_choices_follow_the_softmax_and_come_from_the_generator() -> None:
    alphas = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3)
    p = choice_probabilities(alphas, "one-hot", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(p.mean(0), alphas[0].softmax(0), atol=0.015, rtol=0)
    again = choice_probabilities(alphas, "one-hot", generator=torch.Generator().manual_seed(0))
    assert torch.equal(p, again)


def test_a_hard_choice_costs_one_architecture_and_still_teaches_all_alphas() -> None:
    grid = LatencyGrid.from_arrays(["a", "b", "c"], dense_ms=[1.0, 2.0, 4.0])
    for seed in range(10):
        alphas = torch.zeros(3, dtype=F64, requires_grad=True)
        p = choice_probabilities(alphas, "one-hot", generator=torch.Generator().manual_seed(seed))
        relaxed = choice_probabilities(alphas, "gumbel", generator=torch.Generator().manual_seed(seed))
        cost = expected_latency(grid, p)
        assert cost.item() in (1.0, 2.0, 4.0)
        assert p.argmax() == relaxed.argmax()
        (gradient,) = torch.autograd.grad(cost, alphas)
        (wanted,) = torch.autograd.grad(expected_latency(grid, relaxed), alphas)
        torch.testing.assert_close(gradient, wanted)
        assert (gradient != 0).all()


def test_a_low_temperature_is_a_hard_choice() -> None:
    p = choice_probabilities(torch.tensor([1.0, 1.2, 0.9]), temperature=0.01)
    torch.testing.assert_close(p, torch.tensor([0.0, 1.0, 0.0]))


def test_probabilities_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match='one of softmax, gumbel, one-hot, got "sigmoid"'):
        choice_probabilities(torch.zeros(2), "sigmoid")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        choice_probabilities(torch.zeros(2), temperature=0)


def test_losses_by_hand() -> None:
    task, latency = torch.tensor(2.0), torch.tensor(math.e**3 / 1000)  # e^3 microseconds
    assert fbnet_loss(task, latency, alpha=0.5, beta=2.0).item() == pytest.approx(2.0 * 0.5 * 9)
    assert fbnet_loss(task, latency).item() == pytest.approx(2.0 * 0.2 * 3**0.6)
    assert proxyless_loss(task, torch.tensor(3.0), lambda2=0.1).item() == pytest.approx(2.3)


@pytest.mark.parametrize("latency", [0.001, 0.0, -1.0, NAN])
def test_fbnet_loss_refuses_latencies_whose_logarithm_is_not_positive(latency: float) -> None:
    with pytest.raises(ValueError, match="logarithm of microseconds"):
        fbnet_loss(torch.tensor(1.0), torch.tensor(latency, dtype=F64))


def test_losses_pass_gradients_to_task_and_latency() -> None:
    for loss in (fbnet_loss, lambda t, l: proxyless_loss(t, l, 0.3)):
        values = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (1.3, 2.7)]
        assert torch.autograd.gradcheck(loss, values)
