"""Small dense networks: the baseline sparse networks have to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nas.errors import ConfigError
from nas.searchers.base import Avoid, Proposal, Searcher, SpaceExhausted, TrialLike, check_option, rng
from search_spaces.architecture import Architecture
from search_spaces.space import Space

MAX_BATCHES = 20


class DenseBaseline(Searcher):
    """Architectures without sparsity, spread over the sizes there are, the smallest first.

    Takes density 1.0 wherever a density is decided (a decision called "density" or "<something>.density", as
    `Chooser.sparse` and `Chooser.allocate` make them) and draws all else uniformly. `draws` such networks are ordered
    by their parameters; proposal k is the one at the quantile v(k) of 0, 1/2, 1/4, 3/4, 1/8, ... (van der Corput's
    sequence), so any number of proposals covers the sizes evenly. Where that one is to be avoided the next larger is
    taken, then the next smaller; then `draws` more are drawn.

    Args:
        draws: how many networks the quantiles are taken from.
    """

    name = "dense"

    def __init__(self, space: Space, objectives: Mapping[str, str], seed: int = 0, *, draws: int = 128) -> None:
        super().__init__(space, objectives, seed)
        check_option(self.name, "draws", draws, 1)
        self.draws = draws
        self._drawn: dict[int, dict[str, Architecture]] = {}
        self._by_size: dict[int, list[Architecture]] = {}

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        for batch in range(MAX_BATCHES):
            if all(avoid(digest) for digest in self._draw(batch)):
                continue
            ordered = self._ordered(batch)
            start = int(van_der_corput(index) * len(ordered))
            for architecture in ordered[start:] + ordered[:start][::-1]:
                if not avoid(architecture.digest):
                    return Proposal(architecture)
        raise SpaceExhausted(
            f"space {self.space.name!r}: {MAX_BATCHES * self.draws} draws gave no dense network that was not proposed already; "
            "lower the number of dense trials, or offer more choices"
        )

    def _draw(self, batch: int) -> dict[str, Architecture]:
        """The different architectures of one batch of draws, by digest."""
        if batch not in self._drawn:
            generator = rng(self.seed, self.name, batch)
            drawn: dict[str, Architecture] = {}
            for _ in range(self.draws):
                architecture = self.space.draw(
                    lambda name, options: 1.0 if is_density(name) and 1.0 in options else generator.choice(options)
                )
                self._check_dense(architecture)
                drawn.setdefault(architecture.digest, architecture)
            self._drawn[batch] = drawn
        return self._drawn[batch]

    def _ordered(self, batch: int) -> list[Architecture]:
        """The same, by number of parameters. Costs a network on the meta device each, so only done when needed."""
        if batch not in self._by_size:
            self._by_size[batch] = sorted(self._draw(batch).values(), key=lambda a: (self._parameters(a), a.digest))
        return self._by_size[batch]

    def _check_dense(self, architecture: Architecture) -> None:
        for name, value in architecture.decisions:
            if is_density(name) and value != 1.0:
                raise ConfigError(
                    f"space {self.space.name!r} has no dense network: its decision {name!r} does not offer density 1.0; "
                    "offer 1.0 there, or search without the dense baseline"
                )

    def _parameters(self, architecture: Architecture) -> int:
        return sum(parameter.numel() for parameter in self.space.meta(architecture).parameters())


def is_density(name: str) -> bool:
    """True for the decisions by which `Chooser.sparse` and `Chooser.allocate` choose a density."""
    return name.rpartition(".")[2] == "density"


def van_der_corput(index: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, 5/8, ...: the bits of `index` mirrored at the point; any first n of them cover [0, 1) evenly."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight /= 2
    return value
