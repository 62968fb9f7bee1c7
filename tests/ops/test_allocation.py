"""Allocation: published and hand-computed vectors for every rule; totals, range and equivariance as laws; errors with cures."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor, fsum, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.allocation import RULES, AllocationError, allocate, lamp_scores
from ops.masks import kept_count

laws = settings(deadline=None, derandomize=True, max_examples=40)

TOY = {"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}
LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def resnet50() -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Weight shapes and numbers of output positions at 224 x 224; stride in the 3x3 convolutions. Shapes only."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    places = {"conv1": 112**2}
    width_in, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name, out = f"layer{stage}.{block}", size // stride
            layers = {
                "conv1": ((width, width_in, 1, 1), size**2),
                "conv2": ((width, width, 3, 3), out**2),
                "conv3": ((4 * width, width, 1, 1), out**2),
            }
            if block == 0:
                layers["downsample"] = ((4 * width, width_in, 1, 1), out**2)
            for layer, (shape, positions) in layers.items():
                shapes[f"{name}.{layer}"], places[f"{name}.{layer}"] = shape, positions
            width_in, size = 4 * width, out
    return {**shapes, "fc": (1000, 2048)}, {**places, "fc": 1}


RESNET, PLACES = resnet50()
SIZES = {name: prod(shape) for name, shape in RESNET.items()}


def sparsities(shapes, density, rule="erk", **options):
    return {name: 1 - d for name, d in allocate(shapes, density, rule, **options).items()}


def kept(shapes, densities):
    return sum(kept_count(shapes[name], d) for name, d in densities.items())


# --- the small vectors: sparsity per layer


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.5, {"a": 0, "b": 0.3095, "c": 0.6548}), (0.8, {"a": 0.5556, "b": 0.7037, "c": 0.8519})],
)
def test_erk_small_vectors(sparsity, expected):
    assert sparsities(TOY, 1 - sparsity) == pytest.approx(expected, abs=5e-5)


def test_erk_small_vectors_without_the_floor():
    assert sparsities(TOY, 0.2, floor=False) == pytest.approx({"a": 0.5889, "b": 0.7259, "c": 0.8630}, abs=5e-5)


def test_erk_of_power_two_small_vector():
    assert sparsities(TOY, 0.5, power=2) == pytest.approx({"a": 0, "b": 0.0333, "c": 0.7583}, abs=5e-5)


def test_erk_with_two_capped_layers_small_vector():
    shapes = {"a": (2, 4), "b.c": (3, 6, 7), "b.d": (7, 4)}
    assert sparsities(shapes, 0.5) == pytest.approx({"a": 0, "b.c": 0.6429, "b.d": 0}, abs=5e-5)


def test_er_small_vector():
    # The source's layout has the channels last; here they are the first two axes.
    shapes = {"a": (4, 2), "b": (6, 3), "c": (6, 4, 2)}
    assert sparsities(shapes, 0.5, "er") == pytest.approx({"a": 0.2071, "b": 0.4714, "c": 0.5595}, abs=5e-5)


def test_one_layer_gets_the_overall_density():
    for rule in ("uniform", "er", "erk", "igq"):
        assert allocate({"a": (10, 20)}, 0.3, rule) == pytest.approx({"a": 0.3})


@pytest.mark.parametrize(
    ("sparsity", "expected"), [(0.9, (0.079568, 0.230189, 1)), (0.95, (0.038484, 0.111334, 0.918507))]
)
def test_erk_lenet_vectors(sparsity, expected):
    result = allocate(LENET, 1 - sparsity, "erk")
    assert tuple(result.values()) == pytest.approx(expected, abs=5e-7)
    if sparsity == 0.9:
        assert result["fc1"] / (1084 / (300 * 784)) == pytest.approx(17.264151, abs=5e-7)  # eps


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, (0.451248, 0.865717, 0.994856)),
        (0.8, (0.148532, 0.577636, 0.976207)),
        (0.9, (0.064447, 0.350677, 0.941867)),
    ],
)
def test_igq_lenet_vectors(sparsity, expected):
    assert tuple(allocate(LENET, 1 - sparsity, "igq").values()) == pytest.approx(expected, abs=5e-7)


def test_igq_small_vector():
    result = allocate({"a": (10,), "b": (100,), "c": (1000,)}, 0.1, "igq")
    assert tuple(result.values()) == pytest.approx((0.869300, 0.399439, 0.062363), abs=5e-7)
    assert (1 / result["a"] - 1) / 10 == pytest.approx(0.01503512, abs=5e-9)  # F


# --- ResNet-50


def test_resnet50_is_the_one_of_the_published_numbers():
    assert len(RESNET) == 54
    assert sum(SIZES.values()) == 25_502_912
    assert sum(SIZES[name] * PLACES[name] for name in RESNET) == 4_089_184_256


ERK_80_90 = {
    (64, 3, 7, 7): (0.857191, 0.420033),
    (64, 64, 3, 3): (0.361903, 0.177337),
    (64, 256, 1, 1): (1, 0.958809),
    (256, 64, 1, 1): (1, 0.958809),
    (128, 256, 1, 1): (1, 0.57469),
    (128, 128, 3, 3): (0.1769, 0.086683),
    (512, 128, 1, 1): (0.975315, 0.477916),
    (128, 512, 1, 1): (0.975315, 0.477916),
    (512, 256, 1, 1): (0.584885, 0.2866),
    (256, 512, 1, 1): (0.584885, 0.2866),
    (256, 256, 3, 3): (0.087437, 0.042845),
    (1024, 256, 1, 1): (0.486898, 0.238586),
    (256, 1024, 1, 1): (0.486898, 0.238586),
    (1024, 512, 1, 1): (0.292063, 0.143114),
    (512, 1024, 1, 1): (0.292063, 0.143114),
    (512, 512, 3, 3): (0.043466, 0.021299),
    (2048, 512, 1, 1): (0.243259, 0.1192),
    (512, 2048, 1, 1): (0.243259, 0.1192),
    (2048, 1024, 1, 1): (0.145937, 0.071511),
    (1000, 2048): (0.148175, 0.072607),
    (64, 64, 1, 1): (1, 1),
}

DENSE_80 = {f"layer1.{block}.{conv}" for block in range(3) for conv in ("conv1", "conv3")} | {
    "layer1.0.downsample",
    "layer2.0.conv1",
}


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize(("column", "density"), [(0, 0.2), (1, 0.1)])
def test_erk_resnet50_densities(floored, column, density):
    result = allocate(RESNET, density, "erk", floor=floored)
    assert set(RESNET.values()) == set(ERK_80_90)
    for name, shape in RESNET.items():
        # The table is without the floor, to six decimals; the floor moves nothing by more than 1.1e-5.
        assert result[name] == pytest.approx(ERK_80_90[shape][column], abs=1.2e-5 if floored else 6e-7)


@pytest.mark.parametrize("floored", [False, True])
def test_erk_resnet50_dense_layers(floored):
    def dense(density):
        return {name for name, d in allocate(RESNET, density, "erk", floor=floored).items() if d == 1}

    assert dense(0.2) == DENSE_80
    assert len(DENSE_80) == 8
    assert dense(0.1) == {"layer1.0.conv1"}
    assert dense(0.05) == set()


@pytest.mark.parametrize(
    ("density", "exact", "floored"),
    [(0.2, 99.561173, 99.561667), (0.1, 48.786097, 48.786611), (0.05, 24.371583, 24.372126)],
)
def test_erk_resnet50_scale_in_both_floor_modes(density, exact, floored):
    score = (1000 + 2048) / (1000 * 2048)
    assert allocate(RESNET, density, "erk", floor=False)["fc"] / score == pytest.approx(exact, abs=5e-7)
    assert allocate(RESNET, density, "erk", floor=True)["fc"] / score == pytest.approx(floored, abs=5e-7)


@pytest.mark.parametrize(("density", "nnz"), [(0.2, 5_100_582), (0.1, 2_550_291), (0.05, 1_275_146)])
def test_erk_resnet50_totals(density, nnz):
    exact = allocate(RESNET, density, "erk", floor=False)
    assert round(fsum(SIZES[name] * d for name, d in exact.items())) == nnz
    floored = allocate(RESNET, density, "erk")
    more = sum(n - floor((1 - Fraction(str(density))) * n) for n in SIZES.values())  # exactly what the floors leave
    assert fsum(SIZES[name] * d for name, d in floored.items()) == pytest.approx(more, abs=1e-3)
    assert 0 <= more - nnz <= 30
    for result in (exact, floored):
        assert 0 <= kept(RESNET, result) - nnz <= 30 + len(RESNET)


@pytest.mark.parametrize(
    ("rule", "density", "ratio", "digits"),
    [
        ("erk", 0.2, 0.4138, 4),
        ("erk", 0.1, 0.2418, 4),
        ("erk", 0.05, 0.1217, 4),
        ("er", 0.2, 0.453, 3),
        ("er", 0.1, 0.2571, 4),
    ],
)
def test_resnet50_macs_against_dense(rule, density, ratio, digits):
    result = allocate(RESNET, density, rule, floor=False)
    macs = fsum(SIZES[name] * PLACES[name] * d for name, d in result.items())
    assert round(macs / sum(SIZES[name] * PLACES[name] for name in RESNET), digits) == ratio


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize(("density", "megabytes"), [(0.2, 23.683), (0.1, 13.499), (0.05, 8.399), (1.0, 102.122)])
def test_resnet50_sizes_are_the_published_ones(density, megabytes, floored):
    result = allocate(RESNET, density, "erk", floor=floored)
    bytes_ = 4 * (kept(RESNET, result) + 27_560)  # biases and norms
    bytes_ += sum(-(-SIZES[name] // 8) for name, d in result.items() if d < 1)
    assert bytes_ / 1e6 == pytest.approx(megabytes, abs=1.01e-3)


@pytest.mark.parametrize("density", [0.2, 0.1, 0.0805])
@pytest.mark.parametrize("floored", [False, True])
def test_erk_plus_has_the_total_of_erk_with_a_dense_classifier(density, floored):
    plus = allocate(RESNET, density, "erk+", floor=floored)
    assert plus["fc"] == 1
    assert abs(kept(RESNET, plus) - kept(RESNET, allocate(RESNET, density, "erk", floor=floored))) <= 2 * len(RESNET)
    others = {name: shape for name, shape in RESNET.items() if name != "fc"}
    rest = (density * 25_502_912 - 2_048_000) / (25_502_912 - 2_048_000)
    assert {n: d for n, d in plus.items() if n != "fc"} == allocate(others, rest, "erk", floor=floored)


def test_erk_plus_needs_a_density_above_the_classifiers_share():
    with pytest.raises(
        AllocationError, match=r'"erk\+" at density 0\.08: fc at density 1 leaves density -0\.0\d+ .* above 0\.0803'
    ):
        allocate(RESNET, 0.08, "erk+")
    assert allocate(RESNET, 0.08, "erk+", last_density=0.5)["fc"] == 0.5
    with pytest.raises(AllocationError, match="Give the classifier a higher density"):
        allocate({"a": (2, 2), "fc": (100, 100)}, 0.9, "erk+", last_density=0.1)
    with pytest.raises(AllocationError, match=r'only .*use "erk"'):
        allocate({"fc": (8, 8)}, 0.5, "erk+")


# --- uniform and uniform+


def test_uniform_is_the_same_everywhere():
    assert set(allocate(RESNET, 0.2, "uniform").values()) == {0.2}


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.02])
def test_uniform_plus_resnet50(density):
    result = allocate(RESNET, density, "uniform+")
    assert result["conv1"] == 1
    assert result["fc"] == max(density, 0.2)
    middle = {d for name, d in result.items() if name not in ("conv1", "fc")}
    assert len(middle) == 1
    assert fsum(SIZES[name] * d for name, d in result.items()) == pytest.approx(density * 25_502_912, rel=1e-12)


def test_uniform_plus_by_hand_and_with_other_ends():
    shapes = {"a": (10, 1), "b": (10, 4), "c": (10, 5)}
    assert allocate(shapes, 0.5, "uniform+") == pytest.approx({"a": 1, "b": (50 - 10 - 25) / 40, "c": 0.5})
    assert allocate(shapes, 0.5, "uniform+", first="b", last="a") == pytest.approx({"a": 0.5, "b": 1, "c": 5 / 50})
    assert allocate(shapes, 0.5, "uniform+", last_density=0.2) == pytest.approx({"a": 1, "b": 30 / 40, "c": 0.2})


def test_uniform_plus_says_what_would_do():
    shapes = {"a": (10, 1), "b": (10, 4), "c": (10, 5)}
    with pytest.raises(
        AllocationError, match=r"a \(dense\) and c \(density 0\.2\) leave density -.* above 0\.2,"
    ) as caught:
        allocate(shapes, 0.19, "uniform+")
    assert "expected (0, 1]" in str(caught.value)
    assert allocate(shapes, 0.201, "uniform+")["b"] > 0
    big_first = {"a": (10, 4), "b": (10, 1), "c": (10, 5)}
    with pytest.raises(AllocationError, match=r"above 0\.8,"):
        allocate(big_first, 0.5, "uniform+")
    assert allocate(big_first, 0.801, "uniform+")["b"] > 0
    with pytest.raises(AllocationError, match="a first layer, a last one and one between"):
        allocate({"a": (8, 8), "b": (8, 8)}, 0.5, "uniform+")
    with pytest.raises(AllocationError, match='"b" for both'):
        allocate(shapes, 0.5, "uniform+", first="b", last="b")


# --- LAMP


@pytest.mark.parametrize(
    ("weights", "scores"),
    [
        ((1, 2, 3), (0.0714286, 0.3076923, 1)),
        ((0.1, 0.2, 0.1, 0.4), (0.0454545, 0.2, 0.0476190, 1)),
        ((0, 0, 0), (0, 0, 1)),
        ((0, -5, 0), (0, 1, 0)),
        ((1e-200, 2e-200), (0.2, 1)),
    ],
)
def test_lamp_score_vectors(weights, scores):
    assert lamp_scores(torch.tensor(weights, dtype=torch.float64)).tolist() == pytest.approx(scores, abs=5e-8)


def lamp_by_loop(weight):
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: abs(flat[i]))
    scores = [0.0] * len(flat)
    for rank, i in enumerate(order):
        scores[i] = flat[i] ** 2 / sum(flat[j] ** 2 for j in order[rank:])
    return scores


def test_lamp_scores_equal_the_loop():
    weight = torch.randint(-5, 6, (6, 5, 3), dtype=torch.float64)
    weight[0, 0, 0] = 9.0
    scores = lamp_scores(weight)
    assert scores.shape == weight.shape
    assert scores.flatten().tolist() == pytest.approx(lamp_by_loop(weight))


def test_lamp_prunes_the_globally_smallest_scores():
    weights = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate(TOY.items())
    }
    for density in (1.0, 0.9, 0.5, 0.2, 0.05):
        result = allocate(TOY, density, "lamp", weights=weights)
        pool = sorted(((s, name) for name in TOY for s in lamp_by_loop(weights[name].double())), reverse=True)
        total = ceil(Fraction(str(density)) * 74)
        for name, shape in TOY.items():
            expected = sum(owner == name for _, owner in pool[:total])
            assert kept_count(shape, result[name]) == expected >= 1
        assert kept(TOY, result) == total


def test_lamp_of_equal_weights_keeps_the_earlier_layers():
    result = allocate({"a": (4, 1), "b": (4, 1)}, 0.375, "lamp", weights={"a": torch.ones(4, 1), "b": torch.ones(4, 1)})
    assert result == {"a": 0.5, "b": 0.25}  # scores 1/4, 1/3, 1/2, 1 in both: both ones, and one of the halves


def test_lamp_says_what_it_needs():
    weights = {name: torch.ones(shape) for name, shape in TOY.items()}
    with pytest.raises(AllocationError, match="needs weights="):
        allocate(TOY, 0.5, "lamp")
    with pytest.raises(AllocationError, match=r"weight of b, shape \[3, 6\], with values; got none"):
        allocate(TOY, 0.5, "lamp", weights={"a": weights["a"], "c": weights["c"]})
    with pytest.raises(AllocationError, match=r"got \[6, 3\] on cpu"):
        allocate(TOY, 0.5, "lamp", weights={**weights, "b": torch.ones(6, 3)})
    with pytest.raises(AllocationError, match="on meta"):
        allocate(TOY, 0.5, "lamp", weights={**weights, "b": torch.ones(3, 6, device="meta")})
    with pytest.raises(
        AllocationError, match=r"at least one weight in each of the 3 layers, but density 0\.02 keeps 2 of 74"
    ):
        allocate(TOY, 0.02, "lamp", weights=weights)
    with pytest.raises(ValueError, match="finite weights, got 1"):
        lamp_scores(torch.tensor([1.0, float("nan")]))


# --- laws

SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    min_size=3,
    max_size=6,
)
DENSITIES = st.one_of(st.floats(0.001, 1), st.sampled_from([1.0, 0.5, 0.2, 0.1, 0.05, 0.01]))


def asked(shapes, density, rule, **options):
    """The allocation, or None where the rule says that it is impossible (in words, not by a crash)."""
    if rule == "lamp":
        # One weight tensor per shape, so that the order of the layers does not matter.
        options["weights"] = {
            name: torch.from_numpy(np.random.default_rng([len(name), *name.encode()]).standard_normal(shape))
            for name, shape in shapes.items()
        }
    try:
        return allocate(shapes, density, rule, **options)
    except AllocationError as error:
        if rule not in ("uniform+", "erk+", "lamp"):
            raise AssertionError("ought to have an answer for every density") from error
        return None


@pytest.mark.parametrize("floored", [True, False])
@pytest.mark.parametrize("rule", RULES)
@laws
@given(shapes=SHAPES, density=DENSITIES)
def test_totals_are_exact_within_one_weight_per_layer_and_densities_in_range(rule, floored, shapes, density):
    result = asked(shapes, density, rule, floor=floored)
    if result is None:
        return
    assert list(result) == list(shapes)
    assert all(type(d) is float and 0 < d <= 1 for d in result.values())
    total = density * sum(prod(shape) for shape in shapes.values())
    rounded_twice = floored and rule in ("er", "erk", "erk+")
    assert -1e-6 <= kept(shapes, result) - total < (2 if rounded_twice else 1) * len(shapes) + 1e-6
    if not floored and rule != "lamp":
        assert fsum(prod(shapes[name]) * d for name, d in result.items()) == pytest.approx(total)


@pytest.mark.parametrize("rule", RULES)
@laws
@given(shapes=SHAPES, density=DENSITIES, data=st.data())
def test_the_order_of_the_layers_does_not_matter(rule, shapes, density, data):
    names = list(shapes)
    shuffled = {name: shapes[name] for name in data.draw(st.permutations(names))}
    ends = {"first": names[0], "last": names[-1]}
    a, b = asked(shapes, density, rule, **ends), asked(shuffled, density, rule, **ends)
    if a is None or b is None:
        assert a == b
    elif rule == "lamp":  # only ties between layers may differ
        assert all(abs(kept_count(shapes[n], a[n]) - kept_count(shapes[n], b[n])) <= len(names) for n in names)
    else:
        assert a == pytest.approx(b, rel=1e-12)
        assert list(b) == list(shuffled)


@pytest.mark.parametrize("rule", ["uniform", "er", "erk", "igq"])
@laws
@given(shapes=SHAPES, a=DENSITIES, b=DENSITIES)
def test_a_higher_overall_density_lowers_no_layers_density(rule, shapes, a, b):
    low, high = (allocate(shapes, d, rule, floor=False) for d in sorted((a, b)))
    assert all(low[name] <= high[name] + 1e-9 for name in shapes)


@pytest.mark.parametrize("rule", ["er", "erk"])
@laws
@given(shapes=SHAPES, density=DENSITIES, floored=st.booleans())
def test_densities_below_one_are_in_proportion_to_the_scores(rule, shapes, density, floored):
    result = allocate(shapes, density, rule, floor=floored)
    if density == 1:
        return
    axes = {name: shape if rule == "erk" else shape[:2] for name, shape in shapes.items()}
    score = {name: sum(shape) / prod(shape) for name, shape in axes.items()}
    scales = [result[name] / score[name] for name in shapes if result[name] < 1]
    assert scales == pytest.approx(scales[:1] * len(scales))
    if scales:
        assert all(scales[0] * score[name] >= 1 - 1e-9 for name in shapes if result[name] == 1)


def test_degenerate_rules_are_the_uniform_one():
    alike = {f"layer{i}": (16, 8, 3, 3) for i in range(5)}
    for rule in ("er", "erk", "igq"):
        assert allocate(alike, 0.25, rule) == pytest.approx(allocate(alike, 0.25, "uniform"))
    assert allocate(RESNET, 0.2, "erk", power=0, floor=False) == pytest.approx(allocate(RESNET, 0.2, "uniform"))
    linear = {"a": (30, 20), "b": (10, 30)}
    assert allocate(linear, 0.3, "er") == allocate(linear, 0.3, "erk")


@pytest.mark.parametrize("rule", RULES)
def test_density_one_is_dense_everywhere(rule):
    assert allocate(TOY, 1, rule) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_a_density_so_high_that_no_layer_can_spare_a_weight_is_dense():
    assert allocate({"a": (3, 3), "b": (4, 4)}, 0.99, "erk") == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_linear_layer_and_the_equal_convolution_score_differently():
    linear = allocate({"x": (64, 64), "rest": (256, 256, 3, 3)}, 0.01, "erk")["x"]
    conv = allocate({"x": (64, 64, 1, 1), "rest": (256, 256, 3, 3)}, 0.01, "erk")["x"]
    assert conv > linear


def test_depthwise_layers_become_dense_first():
    result = allocate({"depthwise": (64, 1, 3, 3), "pointwise": (128, 64, 1, 1)}, 0.3, "erk")
    assert result["depthwise"] == 1 > result["pointwise"]


# --- errors


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_a_density_out_of_range_is_an_error(rule, density):
    with pytest.raises(AllocationError, match=r"overall density in \(0, 1\]"):
        allocate(TOY, density, rule)


def test_a_density_that_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match="overall density as a number"):
        allocate(TOY, "0.5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "hint"), [("erk +", 'did you mean "erk+"'), ("uniformm", 'did you mean "uniform"'), ("x", "; known:")]
)
def test_an_unknown_rule_names_the_nearest_and_all_known(rule, hint):
    with pytest.raises(AllocationError) as caught:
        allocate(TOY, 0.5, rule)
    assert str(caught.value).startswith(f'unknown allocation rule "{rule}"')
    assert hint in str(caught.value)
    assert "known: er, erk, erk+, igq, lamp, uniform, uniform+" in str(caught.value)


def test_a_layer_that_would_get_no_weight_is_an_error():
    with pytest.raises(AllocationError, match=r'"erk" at density 0\.01: .* big would get none; use a lower power'):
        allocate({"small": (2, 2), "big": (300, 300)}, 0.01, "erk", power=400)
    with pytest.raises(AllocationError, match="power as a number >= 0, got -1"):
        allocate(TOY, 0.5, power=-1)


def test_shapes_and_names_that_do_not_fit_are_errors():
    with pytest.raises(AllocationError, match="at least one layer"):
        allocate({}, 0.5)
    with pytest.raises(AllocationError, match=r"b: expected a shape .* \[3, 0\]"):
        allocate({"a": (2, 2), "b": (3, 0)}, 0.5)
    with pytest.raises(AllocationError, match=r'"er" needs .* a of shape \[8\]; use "erk" or "igq"'):
        allocate({"a": (8,)}, 0.5, "er")
    with pytest.raises(
        AllocationError, match='last names layer "f", which is not among the 54 layers; did you mean "fc"'
    ):
        allocate(RESNET, 0.5, "erk+", last="f")
    with pytest.raises(AllocationError, match=r"last_density in \(0, 1\]"):
        allocate(RESNET, 0.5, "erk+", last_density=1.5)
