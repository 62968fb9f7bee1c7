"""Gradient-boosted trees kept as arrays: `BoostedTrees.fit(x, y)`.

Fitted with scikit-learn, asked with numpy: a model that was saved stays readable whatever version is installed later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BoostedTrees"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BoostedTrees:
    """A constant plus a sum of trees.

    Attributes:
        start: what is predicted without trees.
        feature: int64[trees, nodes], -1 at leaves; nodes of smaller trees are filled up with leaves of 0.
        threshold: float64[trees, nodes]; left where the feature, rounded to float32, is at most this.
        left, right: int64[trees, nodes], children; a leaf is its own child.
        value: float64[trees, nodes], learning rate included.
        depth: of the deepest tree.
    """

    start: float
    feature: NDArray[np.int64]
    threshold: Floats
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Floats
    depth: int

    @classmethod
    def fit(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        trees: int = 120,
        depth: int = 4,
        rate: float = 0.12,
        leaf: int = 5,
        seed: int = 0,
    ) -> BoostedTrees:
        """Least squares, on half of the rows (2,000 at most) and a third of the features at a time.

        Args:
            x: float[n, features], finite.
            y: float[n].
            weights: float[n], positive; default 1.
            trees, depth, rate, leaf: number of trees, their depth, learning rate, fewest rows in a leaf.
            seed: of the rows and features drawn.

        Raises:
            ValueError: unequal lengths, no rows or values that are not finite.

        Source: stochastic gradient boosting, Friedman 2002 (doi:10.1016/S0167-9473(01)00065-2).
        """
        from sklearn.ensemble import GradientBoostingRegressor

        model = GradientBoostingRegressor(
            n_estimators=trees,
            max_depth=depth,
            learning_rate=rate,
            min_samples_leaf=min(leaf, max(len(np.asarray(y)) // 4, 1)),
            subsample=min(0.5, 2000 / max(len(np.asarray(y)), 1)),
            max_features=0.34,
            random_state=seed,
        )
        model.fit(np.asarray(x, dtype=float), np.asarray(y, dtype=float), sample_weight=weights)
        grown = [estimator.tree_ for estimator in model.estimators_[:, 0]]
        nodes = max(tree.node_count for tree in grown)
        shape = (len(grown), nodes)
        feature, threshold, value = np.full(shape, -1), np.zeros(shape), np.zeros(shape)
        left, right = np.tile(np.arange(nodes), (len(grown), 1)), np.tile(np.arange(nodes), (len(grown), 1))
        for i, tree in enumerate(grown):
            inner = np.flatnonzero(tree.children_left >= 0)
            feature[i, inner], threshold[i, inner] = tree.feature[inner], tree.threshold[inner]
            left[i, inner], right[i, inner] = tree.children_left[inner], tree.children_right[inner]
            value[i, : tree.node_count] = rate * tree.value[:, 0, 0]
        start = float(model.init_.constant_[0, 0])
        return cls(start, feature, threshold, left, right, value, max(tree.max_depth for tree in grown))

    def predict(self, x: ArrayLike) -> Floats:
        """float[n] of float[n, features]."""
        data = np.asarray(x, dtype=np.float32).astype(float)
        rows = np.arange(len(data))
        total = np.full(len(data), self.start)
        for feature, threshold, left, right, value in zip(
            self.feature, self.threshold, self.left, self.right, self.value, strict=True
        ):
            at = np.zeros(len(data), np.int64)
            for _ in range(self.depth):
                goes_left = data[rows, feature[at]] <= threshold[at]
                at = np.where(goes_left, left[at], right[at])
            total += value[at]
        return total

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For an NPZ file."""
        names = ("feature", "threshold", "left", "right", "value")
        return {**{n: getattr(self, n) for n in names}, "start": np.array([self.start, self.depth])}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> BoostedTrees:
        """The model `to_arrays` was called on; KeyError if an array is missing."""
        feature, left, right = (np.asarray(arrays[n], dtype=np.int64) for n in ("feature", "left", "right"))
        threshold, value = (np.asarray(arrays[n], dtype=float) for n in ("threshold", "value"))
        start, depth = arrays["start"]
        return cls(float(start), feature, threshold, left, right, value, int(depth))
