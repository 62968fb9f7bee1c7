"""Trees as arrays answer what scikit-learn's answer."""

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor

from hw_models import trees
from hw_models.trees import BoostedTrees


def data(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (n, 5)) * [1, 1e-3, 1e6, 1, 1] + [0, 0, 0, 100, 0]
    return x, np.sin(3 * x[:, 0]) + (x[:, 2] > 0) + rng.normal(0, 0.05, n)


@pytest.mark.parametrize("weighted", [False, True])
def test_predictions_equal_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    x, y = data()
    fitted: list[GradientBoostingRegressor] = []

    class Kept(GradientBoostingRegressor):
        def fit(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            fitted.append(self)
            return super().fit(*args, **kwargs)

    monkeypatch.setattr("sklearn.ensemble.GradientBoostingRegressor", Kept)
    w = np.random.default_rng(1).uniform(0.1, 2, len(y)) if weighted else None
    ours = BoostedTrees.fit(x, y, w, trees=40)
    edges = np.repeat(x[:1], ours.feature.size, axis=0)  # just above a threshold in float64, at it or below in float32
    edges[np.arange(len(edges)), np.maximum(ours.feature.reshape(-1), 0)] = np.nextafter(
        ours.threshold.reshape(-1), np.inf
    )
    new = np.concatenate([x, x * 1.5, x.astype(np.float32), edges])
    np.testing.assert_allclose(ours.predict(new), fitted[0].predict(new), rtol=0, atol=1e-9)


def slow_predict(model: BoostedTrees, row: np.ndarray) -> float:
    """One row, walking down every tree."""
    total = model.start
    for i in range(len(model.feature)):
        at = 0
        while model.feature[i, at] >= 0:
            goes_left = float(np.float32(row[model.feature[i, at]])) <= model.threshold[i, at]
            at = model.left[i, at] if goes_left else model.right[i, at]
        total += model.value[i, at]
    return total


def test_vectorised_walk_equals_the_slow_walk() -> None:
    x, y = data(80)
    model = BoostedTrees.fit(x, y, trees=15, depth=5)
    np.testing.assert_allclose(model.predict(x), [slow_predict(model, row) for row in x], atol=1e-12)


def test_trees_learn_a_step() -> None:
    x, y = data(600)
    model = BoostedTrees.fit(x[:450], y[:450])
    assert np.sqrt(np.mean((model.predict(x[450:]) - y[450:]) ** 2)) < 0.4 * y.std()


def test_they_survive_arrays_and_are_the_same_for_the_same_seed() -> None:
    x, y = data(100)
    model = BoostedTrees.fit(x, y, trees=10, seed=4)
    np.testing.assert_array_equal(BoostedTrees.from_arrays(model.to_arrays()).predict(x), model.predict(x))
    np.testing.assert_array_equal(BoostedTrees.fit(x, y, trees=10, seed=4).predict(x), model.predict(x))
    assert trees.__doc__


@pytest.mark.parametrize("y", [[1.0], [np.nan] * 100, []])
def test_nonsense_is_refused(y: list) -> None:
    x, _ = data(100)
    with pytest.raises(ValueError, match=r"NaN|inconsistent|minimum"):
        BoostedTrees.fit(x[: len(y) or 0] if len(y) != 1 else x, y)
