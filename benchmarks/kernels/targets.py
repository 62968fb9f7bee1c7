"""What the kernels are to reach, as numbers the report can hold a table against.

All are speed-ups over the best dense engine of a row unless they say otherwise, for float32. Start with `row_target`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GEOMEAN", "GEOMEAN_OVER_DEEPSPARSE", "GROUPS", "NETWORKS", "Group", "row_target"]

GEOMEAN: dict[str, dict[float, float]] = {
    "portable": {0.5: 1.15, 0.3: 1.8, 0.2: 2.5, 0.1: 3.8, 0.05: 6.0, 0.02: 10.0, 0.01: 13.0},
    "specialised": {0.5: 1.6, 0.3: 2.6, 0.2: 3.5, 0.1: 5.5, 0.05: 8.0, 0.02: 13.0, 0.01: 17.0},
}
"""Geometric mean over the 20 main layers, batch 1, by path and density."""

GEOMEAN_OVER_DEEPSPARSE = {0.1: 2.0}
"""The same over DeepSparse instead of the dense engines."""


@dataclass(frozen=True)
class Group:
    """A target for the geometric mean of some rows: those of a family or layer, and of a pattern, batch and density."""

    rows: str
    density: float
    target: float
    pattern: str = "unstructured"
    batch: int = 1


GROUPS = (
    Group("fused pairs", 0.1, 6.5),
    Group("fused pairs", 0.05, 9.0),
    Group("inverted residual", 0.1, 4.0),
    Group("c1_256_16", 0.1, 7.5, pattern="4x1"),
    Group("c1_256_16", 0.1, 9.0, pattern="16x1"),
    Group("c1_256_16", 0.5, 1.9, pattern="2:4"),
    *(
        Group(name, 0.1, target, batch=batch)
        for suffix in ("", "_alone")
        for name, targets in {
            f"linear_1024_1000{suffix}": {1: 10.0, 8: 5.0, 64: 6.5},
            f"linear_4096_4096{suffix}": {1: 5.0, 64: 5.0},
        }.items()
        for batch, target in targets.items()
    ),
)

NETWORKS = {"resnet18": 3.0, "resnet50": 3.0, "resnet20": 4.0, "mobilenetv1": 3.0, "mobilenetv2": 3.5, "darts": 3.0}
"""Whole networks at density 0.1, one thread."""

NEVER_SLOWER_UP_TO = 0.4  # density
EVERY_LAYER = {0.1: 3.5}
NEVER_BELOW_DEEPSPARSE_UP_TO, NOISE = 0.3, 0.95


def row_target(density: float, main: bool) -> float:
    """The speed-up over the best dense engine that every single row of a density is to have; 0 if none."""
    if main and density in EVERY_LAYER:
        return EVERY_LAYER[density]
    return 1.0 if density <= NEVER_SLOWER_UP_TO else 0.0
