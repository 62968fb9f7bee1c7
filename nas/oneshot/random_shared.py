"""Random search with weight sharing: the baseline that one-shot searches have to beat.

Every step trains the shared weights on one uniformly drawn architecture. At the end random architectures are judged with the shared
weights on held-out rows, and the best are handed out. There are no architecture parameters.

Weights are dense while they are shared: where the space decides densities, the best architecture is handed out at each of them.

Source: Li and Talwalkar 2019, Random search and reproducibility for neural architecture search (arXiv:1902.07638), section 3.2.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.errors import EvaluationFailed
from nas.oneshot import algorithm
from nas.oneshot.algorithm import At, Batch, Found, Setting, check_whole
from nas.oneshot.choices import OverallChoice, SparsityChoice
from nas.oneshot.decode import architecture_of
from nas.oneshot.gradient import GradientSearch
from nas.oneshot.halves import derive
from nas.oneshot.mixed import Gates
from nas.oneshot.supernet import PathGates
from search_spaces.architecture import Value

Decisions = dict[str, Value]


@dataclass(frozen=True)
class RandomSharedOptions(algorithm.Options):
    """Options of random_shared; those about architecture parameters mean nothing here.

    Attributes:
        candidates: random architectures that are judged at the end.
        keep: how many of them are handed out, per density.
        rows: of the held-out half that they are judged on, at most.
    """

    candidates: int = 200
    keep: int = 1
    rows: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("candidates", 1), ("keep", 1), ("rows", 2)):
            check_whole(name, getattr(self, name), low)
        check_whole("keep", self.keep, 1, self.candidates)


class RandomShared(GradientSearch):
    """Random search with weight sharing."""

    name = "random_shared"
    Options: ClassVar[type[algorithm.Options]] = RandomSharedOptions
    alpha_scale = 0.0

    def __init__(self, setting: Setting, options: RandomSharedOptions) -> None:
        super().__init__(setting, options)
        self.path = self.supernet.gates_of(self.candidate(0))
        self.judged_on: list[Batch] = []

    def trains_alphas(self, at: At) -> bool:
        return False

    def draw_values(self) -> dict[str, Value]:
        """Draw the architecture of this step; its values."""
        self.path = self.supernet.gates_of(self.decisions_of(self.setting.space.sample(self.drawing)))
        return self.path.values

    def gates(self) -> Gates:
        return self.path.gates

    def candidate(self, number: int) -> Decisions:
        """Random architecture `number` of those that are judged, without its sparsity: a function of the seed."""
        seed = derive(self.setting.seed, f"shared candidate {number}")
        return self.decisions_of(self.setting.space.sample(random.Random(seed)))

    def decisions_of(self, architecture: Any) -> Decisions:
        """What an architecture decides but its sparsity."""
        sparse = [name for name, c in self.supernet.choices.items() if isinstance(c, SparsityChoice | OverallChoice)]
        ends = {f"{name}.{end}" for name in sparse for end in ("density", "pattern", "rule")}
        return {name: value for name, value in architecture.as_dict().items() if name not in ends}

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the first candidate, so that the log shows one architecture throughout."""
        return self._run(self.supernet.gates_of(self.candidate(0)), x)

    def log_row(self) -> dict[str, Any]:
        return {"alphas": {}}

    @property
    def compared_rows(self) -> int:
        return int(self.options.rows)

    def compare_on(self, batches: list[Batch]) -> None:
        self.judged_on = batches

    @torch.no_grad()
    def judge(self, decisions: Decisions) -> tuple[float, float]:
        """Accuracy and mean loss of an architecture with the shared weights on the rows of `compare_on`."""
        if not self.judged_on:
            raise RuntimeError("no rows to judge architectures on: call compare_on first")
        path = self.supernet.gates_of(decisions)
        hits, losses, rows = [], [], 0
        for x, y in self.judged_on:
            logits = self._run(path, x)
            hits.append((logits.argmax(1) == y).sum())
            losses.append(F.cross_entropy(logits, y, reduction="sum").double())
            rows += len(y)
        return int(torch.stack(hits).sum()) / rows, float(torch.stack(losses).sum()) / rows

    def found(self) -> list[Found]:
        """The `keep` best of the candidates, at each density; the first of equals.

        Raises:
            EvaluationFailed: no candidate has a finite loss.
        """
        distinct: dict[tuple[tuple[str, Value], ...], Decisions] = {}
        for number in range(self.options.candidates):
            decisions = self.candidate(number)
            distinct.setdefault(tuple(decisions.items()), decisions)
        judged = [(*self.judge(decisions), decisions) for decisions in distinct.values()]
        ranked = sorted((j for j in judged if j[1] == j[1]), key=lambda j: (-j[0], j[1]))
        if not ranked:
            raise EvaluationFailed(
                f"random_shared: the loss is finite for none of {len(judged)} candidates; lower lr or set grad_clip"
            )
        space, result = self.setting.space, []
        for sparsity in self.sparsities():
            for rank, (accuracy, loss, decisions) in enumerate(ranked[: self.options.keep]):
                architecture = architecture_of(space, decisions | self.parts_at(sparsity), sparsity)
                note = {"rank": rank, "judged": len(judged), "shared_accuracy": accuracy, "shared_loss": loss}
                result.append(Found(architecture, self.note(architecture, sparsity) | note))
        return result

    def _run(self, path: PathGates, x: Tensor) -> Tensor:
        before, self.path = self.path, path
        values, self.values = self.values, path.values
        if path.values:
            self.meet(path.values)
        try:
            return self.forward(x).float()
        finally:
            self.path, self.values = before, values
