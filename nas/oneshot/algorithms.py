"""The one-shot searchers by name. To add one: a subclass of `nas.oneshot.algorithm.Algorithm`, a line here and one in
`tests/conformance/test_oneshot_algorithms.py`."""

from __future__ import annotations

from nas.oneshot.algorithm import Algorithm
from nas.oneshot.darts import Darts
from nas.oneshot.node_masks import NodeMasks

ALGORITHMS: dict[str, type[Algorithm]] = {
    "darts": Darts,
    "node_masks": NodeMasks,
}
