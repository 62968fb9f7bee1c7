"""Random search over node masks at initialisation: the baseline that a search for sparse networks has to beat.

    draw weights theta once; for each node sparsity and t = 1 .. draws: drop random nodes of the dense parent, and look at the loss
    of what is left on one fixed batch, at theta; keep the best.

What is found is trained from theta like any other trial, and beside it, from the same theta: random masks of the same sparsity that
nobody searched, and the dense parent. There is no supernet and no gradient; a step evaluates its share of the draws.
`nas.report.node_masks` compares them.

The protocol is ours; it follows the abstracts of R. Farahani, "Random Search as a Baseline for Sparse Neural Network Architecture
Search" (arXiv:2403.08265). Start with `NodeMasks`; nodes are in `nas.oneshot.nodes`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import ConfigError, EvaluationFailed
from nas.oneshot.algorithm import Algorithm, At, Batch, Found, Options, Phase, Setting, StepReport
from nas.oneshot.algorithm import check_number as _number
from nas.oneshot.algorithm import check_whole as _whole
from nas.oneshot.halves import derive
from nas.oneshot.node_parent import dense_parent, masked_architecture, sparse_parts
from nas.oneshot.nodes import (
    NodeError,
    NodeMask,
    apply_node_mask_,
    draw_node_mask,
    kept_weights,
    layer_masks,
    node_sets,
    without_nodes,
)

SEARCHED, RANDOM, DENSE = "searched", "random", "dense"
"""What a trial of this searcher is, under "role" in its note."""


@dataclass(frozen=True)
class NodeMaskOptions(Options):
    """Options of `node_masks`; those about weights, architecture parameters and their optimizers mean nothing here.

    Attributes:
        seeds: replicates: each has weights and masks of its own, and is one pair of the comparison.
        epochs: passes over the training half between which the draws are spread (one is enough; draws cost what they cost).
        batch_size: rows of one step.
        draws: masks that are tried per node sparsity.
        node_sparsities: shares of the nodes to drop, each in (0, 1).
        random_masks: masks per node sparsity and replicate that are trained without having been searched.
        criterion_rows: rows of the fixed batch, from the training half; it is the first rows the search sees.
        parent: decisions of the dense parent; those not given are the largest (see `nas.oneshot.node_parent`).
    """

    seeds: int = 5
    epochs: int = 1
    batch_size: int = 256
    draws: int = 200
    node_sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)
    random_masks: int = 1
    criterion_rows: int = 256
    parent: dict[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("draws", self.draws, 1)
        _whole("random_masks", self.random_masks, 0)
        _whole("criterion_rows", self.criterion_rows, 2)
        if not self.node_sparsities:
            raise ConfigError("node_sparsities: expected at least one share in (0, 1), e.g. [0.5, 0.8, 0.9], got none")
        for sparsity in self.node_sparsities:
            _number("node_sparsities", sparsity, 0.0, 1.0, above=True)
        if len(set(self.node_sparsities)) != len(self.node_sparsities):
            raise ConfigError(f"node_sparsities: a value repeats: {list(self.node_sparsities)}")
        object.__setattr__(self, "node_sparsities", tuple(float(s) for s in self.node_sparsities))


class NodeMasks(Algorithm):
    """The searcher `node_masks`.

    A draw is a function of (seed, node sparsity, its number), so what was drawn need not be kept, only how good it was. The
    criterion is the mean cross-entropy of the smaller network that the mask leaves, batch norm using the batch's own statistics,
    dropout off.

    Args:
        setting, options: as of any algorithm.

    Raises:
        ConfigError: the network has no hidden nodes, it cannot be decided which they are, or the space has no unstructured
            sparsity.
    """

    name: ClassVar[str] = "node_masks"
    Options: ClassVar[type[Options]] = NodeMaskOptions

    def __init__(self, setting: Setting, options: NodeMaskOptions) -> None:
        super().__init__(setting, options)
        space = setting.space
        self.parent = dense_parent(space, self.options.parent)
        sparse_parts(space, self.parent)  # says now, not at the end, if the space cannot hold such masks
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(setting.seed)  # as for a trial of this seed that starts from scratch
            self.network = space.build(self.parent)
        try:
            self.sets = node_sets(self.network, setting.input_shape)
        except NodeError as error:
            raise ConfigError(f"node_masks on space {space.name!r}: {error}") from error
        if not self.sets:
            raise ConfigError(
                f"node_masks on space {space.name!r}: {self.parent} has no hidden nodes that could be dropped; "
                "use a space with hidden layers"
            )
        self.network.to(setting.device)
        self._judged = _as_judged(self.network)
        shape = (len(self.options.node_sparsities), self.options.draws)
        self.criteria = torch.full(shape, math.inf, dtype=torch.float64)
        self.done = 0
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("draws", self.options.epochs),)

    def begin_phase(self, index: int, steps: int) -> None:
        """Nothing to make: draws start when the fixed batch is complete."""

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        """Take rows into the fixed batch until it is complete; from then on evaluate an equal share of the draws per step.

        Reports loss and hits of the best mask so far (of the first node sparsity) on the rows of this step.
        """
        wanted = min(self.options.criterion_rows, at.steps * len(x))
        last_row = -(-wanted // len(x)) - 1  # the step that completes the batch
        number, steps = at.epoch * at.steps + at.step, at.epochs * at.steps
        if number <= last_row:
            rows = slice(0, wanted - number * len(x))
            self.x = x[rows].clone() if self.x is None else torch.cat([self.x, x[rows]])
            self.y = y[rows].clone() if self.y is None else torch.cat([self.y, y[rows]])
        if number >= last_row:
            until = self.options.draws * (number - last_row + 1) // (steps - last_row)
            for draw in range(self.done, until):
                for row, sparsity in enumerate(self.options.node_sparsities):
                    self.criteria[row, draw] = self.criterion(self.drawn(sparsity, draw))
            self.done = until
        logits = self.logits(x)
        return StepReport(F.cross_entropy(logits, y), (logits.argmax(1) == y).sum())

    @torch.no_grad()
    def criterion(self, mask: NodeMask | None) -> float:
        """Loss of the masked network (None: the dense one) on the fixed batch at theta, in nats; infinite if not finite."""
        assert self.x is not None  # draws begin when the batch is complete
        assert self.y is not None
        network = self._judged if mask is None else without_nodes(self._judged, mask)
        loss = float(F.cross_entropy(_logits(network, self.x), self.y))
        return loss if math.isfinite(loss) else math.inf

    def drawn(self, sparsity: float, number: int) -> NodeMask:
        """Draw `number`, from 0."""
        return self._mask(sparsity, f"draw {number}")

    def control(self, sparsity: float, number: int) -> NodeMask:
        """Random mask `number`, from 0, of those that nobody searched."""
        return self._mask(sparsity, f"control {number}")

    def best(self, sparsity: float) -> int | None:
        """Number of the draw with the least criterion so far, the first of equals; None before the first draw.

        Raises:
            EvaluationFailed: the criterion was finite for none.
        """
        if not self.done:
            return None
        row = self.criteria[self.options.node_sparsities.index(sparsity), : self.done]
        if not bool(torch.isfinite(row).any()):
            raise EvaluationFailed(
                f"node_masks: the loss at initialisation is finite for none of {self.done} masks of node sparsity {sparsity:g}; "
                "look at the data and at the network's initial weights"
            )
        return int(torch.sort(row, stable=True).indices[0])

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the best mask so far at the first node sparsity, at initialisation; of the dense parent before the first draw."""
        first = self.options.node_sparsities[0]
        best = self.best(first)
        network = self._judged if best is None else without_nodes(self._judged, self.drawn(first, best))
        return _logits(network, x)

    def log_row(self) -> dict[str, Any]:
        rows = {}
        for i, sparsity in enumerate(self.options.node_sparsities):
            row = self.criteria[i, : self.done]
            rows[f"{sparsity:g}"] = {
                "best": float(row.min()) if self.done else None,
                "median": float(row.median()) if self.done else None,
            }
        return {"alphas": {}, "draws": self.done, "criterion": rows}

    def found(self) -> list[Found]:
        """The dense parent, then per node sparsity the searched mask and the random ones, all from the same weights."""
        seed = self.setting.seed
        whole = draw_node_mask(self.sets, 0.0, torch.Generator())
        found = [self._found(whole, DENSE, 0.0, {"criterion": self.criterion(None), "replicate_seed": seed})]
        for row, sparsity in enumerate(self.options.node_sparsities):
            best = self.best(sparsity)
            if best is None:
                raise EvaluationFailed("node_masks: no mask was drawn; the search was not run to its end")
            spread = {"draws": self.options.draws, "criterion_median": float(self.criteria[row].median())}
            chosen = [(SEARCHED, self.drawn(sparsity, best), {**spread, "draw": best})]
            chosen += [(RANDOM, self.control(sparsity, i), {"control": i}) for i in range(self.options.random_masks)]
            for role, mask, more in chosen:
                note = {"criterion": self.criterion(mask), "replicate_seed": seed, **more}
                found.append(self._found(mask, role, sparsity, note))
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"theta.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors["criteria"] = self.criteria
        if self.x is not None and self.y is not None:
            tensors |= {"x": self.x, "y": self.y}
        return tensors, {"done": self.done}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        theta = {name.removeprefix("theta."): value for name, value in tensors.items() if name.startswith("theta.")}
        self.network.load_state_dict(theta)
        self._judged = _as_judged(self.network)
        self.criteria.copy_(tensors["criteria"])
        device = self.setting.device
        self.x, self.y = (tensors[name].to(device) if name in tensors else None for name in ("x", "y"))
        self.done = int(facts["done"])

    def _mask(self, sparsity: float, stream: str) -> NodeMask:
        chance = torch.Generator().manual_seed(derive(self.setting.seed, f"node mask {sparsity!r} {stream}"))
        return draw_node_mask(self.sets, sparsity, chance)

    def _found(self, mask: NodeMask, role: str, sparsity: float, note: dict[str, Any]) -> Found:
        """The network that starts from theta with this mask: its architecture, its weights, and what to know of it."""
        space = self.setting.space
        masks = layer_masks(self.network, mask)
        architecture = masked_architecture(space, self.parent, masks) if role != DENSE else self.parent
        with torch.random.fork_rng(devices=[]):
            network = space.build(architecture)
        missing, unexpected = network.load_state_dict(self.network.state_dict(), strict=False)
        if unexpected or any(not name.endswith(".mask") for name in missing):
            raise ConfigError(
                f"node_masks on space {space.name!r}: {architecture} has other weights than the dense parent: "
                f"{', '.join([*missing, *unexpected][:4])}; a density must not change the network's parts"
            )
        apply_node_mask_(network, mask)
        kept, weights = kept_weights(network, mask)
        said = {
            "role": role,
            "group": "dense parent" if role == DENSE else f"node sparsity {sparsity:g}",
            "node_sparsity": sparsity,
            "weight_sparsity": 1 - kept / weights,
            "kept_weights": kept,
            "weights": weights,
            "nodes": {nodes.name: int(k.sum()) for nodes, k in zip(mask.sets, mask.kept)},
        }
        initial = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        return Found(architecture, said | note, initial)


def _as_judged(network: nn.Module) -> nn.Module:
    """A copy in the mode of the criterion: batch norm uses the batch, all else (dropout) is as in evaluation."""
    judged = copy.deepcopy(network).eval()
    for module in judged.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return judged


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    output = network(x)
    return (output[0] if isinstance(output, tuple) else output).float()
