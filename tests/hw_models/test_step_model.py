"""The model of unseen shapes, on machines whose laws are known."""

import numpy as np
import pandas as pd
import pytest

from hw_models.step_features import SHAPE_FEATURES, WORK_FEATURES, shape, work
from hw_models.step_model import StepModel, shape_groups
from hw_models.workload import STEP_COLUMNS


def steps(n: int, seed: int = 0, family: str = "conv/specialised") -> pd.DataFrame:
    """Convolutions of random shapes and densities."""
    rng = np.random.default_rng(seed)
    cin, cout = (rng.choice([8, 16, 24, 32, 48, 64, 96, 128], n).astype(float) for _ in range(2))
    side, window = rng.choice([4, 8, 16, 32], n).astype(float), rng.choice([1.0, 9.0, 25.0], n)
    density = rng.choice([0.01, 0.05, 0.1, 0.2, 0.4], n)
    nnz = np.maximum(np.round(density * cin * cout * window), 1)
    tiles = np.ceil(side**2 / 16)
    kind, kernel = family.split("/")
    return pd.DataFrame(
        {
            "key": [f"{family}{a}" for a in zip(cin, cout, side, window, nnz, strict=True)],
            "curve": [f"{family}{a}" for a in zip(cin, cout, side, window, strict=True)],
            "family": family,
            "kind": kind,
            "kernel": kernel,
            "pattern": "unstructured",
            "density": nnz / (cin * cout * window),
            "nnz": nnz,
            "macs": nnz * tiles * 16,
            "dense_macs": cin * cout * window * side**2,
            "weight_bytes": 14 * nnz,
            "in_bytes": 64 * tiles * cin,
            "out_bytes": 64 * tiles * cout,
            "tiles": tiles,
            "channels_in": cin,
            "channels_out": cout,
            "positions": side**2,
            "window": window,
            "stride": 1.0,
            "groups": 1.0,
            "batch": 1.0,
        }
    )


def physics(frame: pd.DataFrame) -> np.ndarray:
    """A machine: 50 multiply-adds per ns, 20 bytes per ns, 100 ns a call."""
    moved = frame.in_bytes + frame.out_bytes + frame.weight_bytes
    return np.asarray(frame.macs / 50 + moved / 20 + 100) / 1e6


def caches(frame: pd.DataFrame) -> np.ndarray:
    """The same, slower where weights leave the cache and where output channels do not fill vectors."""
    smooth = 1 / (1 + np.exp(-2 * (np.log(frame.weight_bytes) - np.log(3e4))))
    return np.asarray(physics(frame) * (1 + 0.6 * smooth) * np.where(frame.channels_out % 16 == 0, 1, 1.15))


def observed(n: int, law, noise: float, seed: int = 0, family: str = "conv/specialised") -> pd.DataFrame:  # type: ignore[no-untyped-def]
    frame = steps(n, seed, family)
    rng = np.random.default_rng(seed + 1)
    return frame.assign(ms=law(frame) * rng.lognormal(0, noise, n), network=np.arange(n) // 20, count=1)


def test_features_are_finite_numbers_of_the_promised_number() -> None:
    frame = steps(50)
    frame.loc[0, ["nnz", "macs", "tiles", "weight_bytes", "channels_in", "positions", "density"]] = 0.0
    assert set(STEP_COLUMNS) == set(frame.columns)
    for values, names in ((work(frame), WORK_FEATURES), (shape(frame), SHAPE_FEATURES)):
        assert values.shape == (50, len(names))
        assert np.isfinite(values).all()
    assert (work(frame) >= 0).all()


def test_pure_physics_is_found_on_unseen_shapes() -> None:
    model = StepModel.fit(observed(120, physics, 0.0))
    new = steps(200, seed=9)
    ms, sigma = model.predict(new)
    np.testing.assert_allclose(ms, physics(new), rtol=0.02)
    assert sigma.max() < 0.05


def test_what_physics_leaves_is_learned_and_sums_come_within_a_few_percent() -> None:
    seen = observed(400, caches, 0.02)
    new = steps(400, seed=9)
    ms, sigma = StepModel.fit(seen).predict(new)
    errors = np.log(ms / caches(new))
    plain = StepModel.fit(seen.assign(ms=physics(seen))).predict(new)[0]
    assert np.sqrt(np.mean(errors**2)) < 0.5 * np.sqrt(np.mean(np.log(plain / caches(new)) ** 2))
    sums = ms.reshape(20, 20).sum(1) / caches(new).reshape(20, 20).sum(1)
    assert np.abs(sums - 1).max() < 0.08
    assert 0.8 < np.mean(np.abs(errors) < 1.645 * sigma) <= 1.0


def test_a_learned_model_is_less_sure_of_shapes_far_from_what_it_saw() -> None:
    near, far = steps(50, seed=9), steps(50, seed=9)
    sizes = ["nnz", "macs", "dense_macs", "weight_bytes", "in_bytes", "channels_in"]
    far[sizes] = far[sizes] * 60
    model = StepModel.fit(observed(300, caches, 0.02))
    assert np.median(model.predict(far)[1]) > 1.5 * np.median(model.predict(near)[1])


def test_what_is_said_without_a_shape_is_not_better_than_what_is_said_of_new_shapes() -> None:
    frame, new = observed(240, caches, 0.02), steps(240, seed=31)
    model = StepModel.fit(frame)
    without = np.log(model.without_shape(frame)[0] / frame["ms"])
    unseen = np.log(model.predict(new)[0] / caches(new))
    seen = np.log(model.predict(frame)[0] / frame["ms"])
    assert np.std(seen) < np.std(without)
    assert 0.5 < np.std(without) / np.std(unseen) < 2.0


def test_a_row_that_is_told_apart_by_its_shape_is_answered_without_it() -> None:
    frame = observed(80, physics, 0.0)
    dear = shape_groups(frame) == shape_groups(frame)[0]
    odd = frame.assign(ms=np.where(dear, 5.0, 1.0) * frame["ms"])
    ms, _ = StepModel.fit(odd).without_shape(odd)
    assert np.median(ms[dear] / odd["ms"][dear]) < 0.5


def test_only_a_fitted_model_knows_what_it_says_without_a_shape() -> None:
    frame = observed(60, physics, 0.0)
    model = StepModel.fit(frame)
    with pytest.raises(ValueError, match="fitted to other rows"):
        model.without_shape(steps(10, seed=77).assign(key="new"))
    with pytest.raises(ValueError, match="just fitted"):
        StepModel.from_arrays(model.to_arrays()).without_shape(frame)


def test_shapes_are_groups_whatever_their_density_and_kernel() -> None:
    frame = steps(2)
    other = frame.assign(density=0.5, nnz=7.0, kernel="portable", pattern="2:4", key="k", curve="c")
    assert (shape_groups(frame) == shape_groups(other)).all()
    assert (shape_groups(frame) != shape_groups(frame.assign(channels_out=3.0))).all()


def test_families_seen_once_take_their_prices_from_their_kernel() -> None:
    many = observed(100, physics, 0.0)
    few = observed(1, physics, 0.0, seed=5, family="pair/specialised")
    model = StepModel.fit(pd.concat([many, few]))
    new = steps(50, seed=6, family="pair/specialised")
    np.testing.assert_allclose(model.predict(new)[0], physics(new), rtol=0.1)


def test_an_unknown_family_is_priced_like_its_kernel_and_an_unknown_kernel_like_everything_both_unsure() -> None:
    model = StepModel.fit(observed(100, physics, 0.0))
    for family, least in (("other/specialised", 0.6), ("torch.fft/torch", 1.0)):
        new = steps(20, seed=6, family=family)
        ms, sigma = model.predict(new)
        assert (sigma >= least).all()
        np.testing.assert_allclose(ms, physics(new), rtol=0.1)


def test_time_not_rows_decides_a_compromise() -> None:
    """A machine of two speeds that no feature tells apart: the slow half of the time wins, not the many small rows."""
    frame = pd.concat([steps(30)] * 2, ignore_index=True)
    frame["key"] = [str(i) for i in range(60)]
    ms = physics(frame) * np.repeat([1.0, 2.0], 30)
    by_time = frame.assign(ms=ms, network=0, count=np.repeat([1, 1000], 30))
    by_rows = frame.assign(ms=ms)
    ratios = [np.median(StepModel.fit(f).predict(frame)[0] / physics(frame)) for f in (by_time, by_rows)]
    assert ratios[0] > 1.8 > ratios[1]


def test_a_model_survives_arrays() -> None:
    frame = pd.concat([observed(200, caches, 0.02), observed(20, physics, 0.1, 3, "halo/lanes")])
    model = StepModel.fit(frame)
    back = StepModel.from_arrays(model.to_arrays())
    new = pd.concat([steps(30, seed=4), steps(9, 5, "halo/lanes"), steps(3, 5, "x/lanes"), steps(3, 5, "x/y")])
    for a, b in zip(back.predict(new), model.predict(new), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_and_nonsense_are_refused() -> None:
    frame = observed(5, physics, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        StepModel.fit(frame[:0])
    with pytest.raises(ValueError, match="positive"):
        StepModel.fit(frame.assign(ms=0.0))
    assert len(StepModel.fit(frame).predict(frame[:0])[0]) == 0
