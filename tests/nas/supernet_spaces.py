"""Small versions of every space that a supernet is made of, for tests of supernets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.oneshot.mixed import Gate, Gates
from nas.oneshot.supernet import Supernet
from search_spaces import Space, get_space

IMAGE = (3, 8, 8)
DARTS_OPERATIONS = ("none", "skip_connect", "max_pool_3x3", "dil_conv_3x3")
NASNET_OPERATIONS = ("skip_connect", "avg_pool_3x3", "conv_3x1_1x3")


def users_space() -> Space:
    """The space that the README writes out."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def tiny(" in text)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return Space(scope["tiny"], "tiny", {"input_shape": IMAGE, "classes": 4})


def darts(**options: Any) -> Space:
    given = {"channels": 4, "cells": 3, "classes": 4, "input_shape": IMAGE, "operations": DARTS_OPERATIONS} | options
    return get_space("darts", **given)


def nasnet(**options: Any) -> Space:
    given = {"channels": 4, "cells": 1, "classes": 4, "input_shape": IMAGE, "operations": NASNET_OPERATIONS}
    return get_space("nasnet", **given | {"blocks": 2} | options)


SPACES: dict[str, Callable[[], Space]] = {
    "darts": darts,
    "darts, all operations": lambda: get_space("darts", channels=4, cells=2, classes=4, input_shape=IMAGE),
    "nasnet": lambda: nasnet(blocks=5, operations=NASNET_OPERATIONS[:2]),
    "nasnet, all operations": lambda: get_space("nasnet", channels=4, cells=1, classes=4, input_shape=IMAGE, blocks=1),
    "nasnet, one block": lambda: nasnet(cells=3, blocks=1),
    "nasnet, extra states": lambda: nasnet(cells=2, concat_normal=(0,), concat_reduce=(1, 2)),
    "nasnet, skipping": lambda: nasnet(cells=2, skip_reduction=True, auxiliary=True),
    "nasnet, imagenet stem": lambda: nasnet(
        stem="imagenet", stem_channels=6, channels=8, input_shape=(3, 33, 29), dropout=0.0
    ),
    "nasnet, one pixel": lambda: nasnet(cells=2, blocks=3, input_shape=(3, 1, 1)),
    "nasbench201": lambda: get_space("nasbench201", channels=4, cells=1, classes=4, input_shape=IMAGE),
    "convnet": lambda: get_space("convnet", classes=4, input_shape=IMAGE, stages=2, widths=(8, 16), depths=(1, 2)),
    "mlp": lambda: get_space("mlp", classes=4, input_shape=(12,), widths=(8, 16)),
    "tiny": users_space,
}


def batch(space: Space, seed: int = 0, rows: int = 4) -> Tensor:
    """float[rows, *input_shape], standard normal."""
    return torch.randn(rows, *space.options["input_shape"], generator=torch.Generator().manual_seed(seed))


def first(output: Any) -> Tensor:
    """The logits, of networks with an auxiliary head too."""
    return output[0] if isinstance(output, tuple) else output


def soft_gates(net: Supernet, seed: int = 0) -> Gates:
    """Probabilities for everything that is mixed, leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    gates: Gates = {}
    for name, choice in net.choices.items():
        if type(choice).__name__ in ("OpChoice", "EdgeChoice"):
            values = torch.randn(len(choice.options), generator=generator).softmax(0)
            gates[name] = Gate(values.requires_grad_())
    return gates


def as_numbers(gates: Gates, net: Supernet, *, hard: bool = False) -> Gates:
    """The same gates as 0/1 weights of all options; `hard`: only what was chosen is run."""
    made: Gates = {}
    for name, gate in gates.items():
        weights = torch.zeros(len(net.choices[name].options))
        weights[list(gate.chosen or ())] = 1.0
        made[name] = Gate(weights.requires_grad_(), gate.chosen if hard else None)
    return made
