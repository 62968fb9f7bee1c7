"""Networks of a run file's space, untrained, masks drawn, for `nas calibrate --space CONFIG`. Start with `SpaceNetworks`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from nas.config import RunConfig
from nas.setup import make_data, make_space
from ops.layers import draw_masks_

REPEATS = 20
"""So many equal networks in a row mean that the space has no others to speak of."""


class SpaceNetworks:
    """Iterates over (name, network, example input) drawn from the space of a run file, each architecture once.

    A network is built when it is asked for. Every iteration gives the same networks.

    Args:
        config: the run file; its data set is read for its shapes.
        folder: where a space file named in it is looked for.
        count: networks at most.
        batch: inputs of an example.

    Raises:
        DataError: the data set cannot be had.
        ConfigError: unknown space or option.
    """

    def __init__(self, config: RunConfig, folder: Path, count: int, batch: int = 1) -> None:
        data = make_data(config)
        self.count = count
        self._seed = config.run.seed
        self._space = make_space(config, data.input_shape, data.classes, folder)
        self._example = torch.randn(
            (batch, *data.input_shape), generator=torch.Generator().manual_seed(config.run.seed)
        )

    @property
    def name(self) -> str:
        """The space's name."""
        return self._space.name

    def __iter__(self) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
        rng, seen, repeats = random.Random(self._seed), set[str](), 0
        while len(seen) < self.count and repeats < REPEATS:
            architecture = self._space.sample(rng)
            if architecture.digest in seen:
                repeats += 1
                continue
            repeats = 0
            seen.add(architecture.digest)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed + len(seen))
                network = self._space.build(architecture).eval()
            draw_masks_(network, torch.Generator().manual_seed(self._seed + len(seen)))
            yield f"{self.name} {architecture.digest}", network, self._example
