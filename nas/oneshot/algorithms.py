"""The one-shot searchers by name. To add one: a subclass of `nas.oneshot.algorithm.Algorithm`, a line here and one in
`tests/conformance/test_oneshot_algorithms.py`."""

from __future__ import annotations

from nas.oneshot.algorithm import Algorithm
from nas.oneshot.darts import Darts
from nas.oneshot.dass import Dass
from nas.oneshot.dass2 import Dass2
from nas.oneshot.fbnet import FBNet
from nas.oneshot.gdas import Gdas
from nas.oneshot.node_masks import NodeMasks
from nas.oneshot.pcdarts import PCDarts
from nas.oneshot.random_shared import RandomShared

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dass2": Dass2,
    "darts": Darts,
    "dass": Dass,
    "fbnet": FBNet,
    "gdas": Gdas,
    "node_masks": NodeMasks,
    "pcdarts": PCDarts,
    "random_shared": RandomShared,
}
