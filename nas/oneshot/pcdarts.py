"""PC-DARTS: DARTS on a part of the channels, with weights for the edges of each node.

Every mixed operation sees the first 1 / K of its channels, so larger batches fit; the node's inputs are weighted by softmax(beta),
which steadies the choice of edges that partial channels make noisy.

Source: Xu et al. 2020, PC-DARTS (arXiv:1907.05737), sections 3.2 and 3.3, and its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nas.errors import ConfigError
from nas.oneshot import algorithm
from nas.oneshot.algorithm import check_number, check_whole
from nas.oneshot.choices import EdgeChoice
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.mixed import Gate, Gates
from nas.oneshot.supernet import Supernet
from search_spaces.architecture import SpaceError


@dataclass(frozen=True)
class PCDartsOptions(algorithm.Options):
    """Options of PC-DARTS; defaults are those of its search on CIFAR-10.

    Attributes:
        k: mixed operations see 1 / k of the channels; 1 for all.
        warmup_share: of the epochs, in which alphas and betas rest; the longer of this and `warmup_epochs` counts.
    """

    batch_size: int = 256
    lr: float = 0.1
    lr_min: float = 0.0
    alpha_lr: float = 6e-4
    k: int = 4
    warmup_share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("k", self.k, 1)
        check_number("warmup_share", self.warmup_share, 0.0, 1.0)


class PCDarts(GradientSearch):
    """PC-DARTS (first order)."""

    name = "pcdarts"
    Options: ClassVar[type[algorithm.Options]] = PCDartsOptions

    def make_supernet(self) -> Supernet:
        try:
            return Supernet(
                self.setting.space,
                seed=self.setting.seed,
                partial=self.options.k,
                learned=self.learned,
                checkpointing=self.options.checkpointing,
                device=self.setting.device,
            )
        except SpaceError as error:
            raise ConfigError(f'searcher "{self.name}", option k = {self.options.k}: {error}') from error

    def searches(self, name: str) -> bool:
        return isinstance(self.supernet.choices[name], EdgeChoice) or super().searches(name)

    def gates(self) -> Gates:
        """As for DARTS; inputs of a node are weighted by softmax(beta), which sums to 1 whatever is kept in the end."""
        made = super().gates()
        for name in self.alphas:
            if isinstance(self.alphas.choices[name], EdgeChoice):
                made[name] = Gate(self.alphas.probabilities(name))
        return made

    def warmup(self, epochs: int) -> int:
        return max(super().warmup(epochs), warmup_of(self.options.warmup_share, epochs))


def warmup_of(share: float, epochs: int) -> int:
    """The epochs nearest to a share of them, but not all."""
    return min(epochs - 1, round(share * epochs))
