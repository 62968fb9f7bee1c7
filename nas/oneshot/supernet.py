"""The supernet of a space: one network that holds all of its architectures. Start with `Supernet`.

It is made by running the space function with a chooser that keeps every candidate (`nas.oneshot.chooser`). Where the space also
decides numbers that shape the network (widths, depths), there is one network per structure, with shared weights
(`nas.oneshot.shared`).

Batch norms use the statistics of the batch, always. Architecture parameters are not in here: a forward pass is told by *gates* how
much each option counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nas.errors import ConfigError
from nas.oneshot.choices import (
    Choice,
    Choices,
    EdgeChoice,
    OpChoice,
    OverallChoice,
    SparsityChoice,
    ValueChoice,
)
from nas.oneshot.chooser import SupernetChooser, Tagging, default_value, parameter_keys
from nas.oneshot.mixed import Gate, GateBoard, Gates
from nas.oneshot.shared import SharedWeights, Source
from search_spaces import Architecture, Space
from search_spaces.architecture import SpaceError, Value

if TYPE_CHECKING:
    from nas.oneshot.sparse_parts import SparseParts

MAX_STRUCTURES = 256
"""Structures kept at once; the one that was used longest ago is made anew when it is needed again."""

LOOKED_AT = 64
"""Structures that are drawn when a supernet is made, to meet all its decisions and find the largest shapes."""


@dataclass(frozen=True)
class Structure:
    """One network of a supernet.

    Attributes:
        network: the module.
        keys: path of a parameter -> its key.
        sources: path -> where its values are, if weights are shared between structures; else {}.
        parts: its sparse layers, if masks are learned.
    """

    network: nn.Module
    keys: dict[str, str]
    sources: dict[str, Source]
    parts: SparseParts | None


@dataclass(frozen=True)
class PathGates:
    """What makes a supernet compute one architecture.

    Attributes:
        gates: one-hot, of everything that is mixed.
        values: of what is drawn.
        overall: (density, pattern, rule) of the whole network, if the space decides them.
    """

    gates: Gates = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    overall: dict[str, tuple[float, str, str]] = field(default_factory=dict)


class Supernet(nn.Module):
    """All architectures of a space.

    Args:
        space: what to hold.
        seed: of the initial weights.
        partial: mixed operations see 1 / `partial` of the channels.
        pool_norm: batch norm after pooling candidates.
        affine: batch norms inside candidates and cells have parameters.
        learned: layers that the space may make sparse get scores (`ops.learned`).
        fast: run candidates together where that gives the same numbers.
        checkpointing: forget activations inside mixed operations.
        device: where the weights are.

    Attributes:
        choices: decision -> choice, in the order the space asks.

    Raises:
        ConfigError: the space decides nothing, or its function did what a supernet cannot follow.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        partial: int = 1,
        pool_norm: bool = True,
        affine: bool = False,
        learned: bool = False,
        fast: bool = True,
        checkpointing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.space = space
        self.learned = learned
        self.device = torch.device(device)
        self.board = GateBoard(fast=fast, checkpointing=checkpointing)
        self._seed = seed
        self._how: dict[str, Any] = {"partial": partial, "pool_norm": pool_norm, "affine": affine}
        self._choices = Choices()
        self._structures: dict[tuple[tuple[str, Value], ...], Structure] = {}
        self._shared: SharedWeights | None = None
        network, keys, parts, values = self._build({})
        if not self._choices.by_name:
            raise ConfigError(f"space {space.name!r} takes no decision: there is nothing to search")
        if values:
            self._shared = SharedWeights(self.device)
            self._add(network, keys, parts, values)
            generator = random.Random(seed)
            for _ in range(LOOKED_AT):
                self.structure(self.draw_values(generator))
            self.structure({})
        else:
            self.network = network.to(self.device)
            self._structures[()] = Structure(network, keys, {}, parts)

    @property
    def shares_weights(self) -> bool:
        """Whether the space decides numbers that shape the network, so that there are several with shared weights."""
        return self._shared is not None

    @property
    def choices(self) -> dict[str, Choice]:
        return self._choices.by_name

    def of_kind(self, kind: type) -> dict[str, Any]:
        """The choices of one class."""
        return {name: choice for name, choice in self.choices.items() if isinstance(choice, kind)}

    # -- running --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, gates: Gates | None = None, values: Mapping[str, Value] | None = None) -> Tensor:
        """Logits float[n, classes].

        Args:
            x: float[n, *input_shape].
            gates: of all op choices; of other mixed choices where they count.
            values: of the choices that cannot be mixed; default the largest.
        """
        structure = self.structure(values or {})
        self.board.gates = gates or {}
        self.board.memo.clear()
        if structure.parts is not None:
            structure.parts.apply(self.board.gates, self.choices)
        if self.board.fast:
            from nas.oneshot.fast import laid_out  # not above: it takes Numba, which takes a second

            x = laid_out(structure.network, x)
        try:
            if self._shared is None:
                output = structure.network(x)
            else:
                views = self._shared.views(structure.sources)
                output = torch.func.functional_call(structure.network, views, (x,))
        finally:
            self.board.memo.clear()
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def gates_of(self, architecture: Architecture | Mapping[str, Value]) -> PathGates:
        """What makes the supernet compute `architecture`."""
        decisions = architecture.as_dict() if isinstance(architecture, Architecture) else dict(architecture)
        path = PathGates()
        for name, choice in self.choices.items():
            if isinstance(choice, OpChoice):  # one that is not decided is on an edge that is not kept
                path.gates[name] = Gate(None, (choice.options.index(decisions[name]) if name in decisions else 0,))
            elif isinstance(choice, EdgeChoice) and name in decisions:
                path.gates[name] = Gate(None, tuple(int(j) for j in str(decisions[name]).split(",")))
            elif isinstance(choice, ValueChoice) and name in decisions:
                path.values[name] = decisions[name]
            elif isinstance(choice, SparsityChoice) and f"{name}.density" in decisions:
                target = (float(decisions[f"{name}.density"]), str(decisions.get(f"{name}.pattern", "")))
                if target in choice.targets:
                    path.gates[name] = Gate(None, (choice.targets.index(target),))
            elif isinstance(choice, OverallChoice) and f"{name}.density" in decisions:
                density = float(decisions[f"{name}.density"])
                pattern = str(decisions.get(f"{name}.pattern", "unstructured"))
                path.overall[name] = (density, pattern, str(decisions.get(f"{name}.rule", "uniform")))
        return path

    # -- weights --------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, nn.Parameter]:
        """key -> parameter, without scores."""
        return {key: p for key, p in self.by_key().items() if not is_score(key)}

    def scores(self) -> dict[str, nn.Parameter]:
        """key -> score of the layers that learn a mask."""
        return {key: p for key, p in self.by_key().items() if is_score(key)}

    def by_key(self) -> dict[str, nn.Parameter]:
        """key -> every parameter. Grows when a structure is met that has layers nobody had."""
        if self._shared is not None:
            return self._shared.tensors
        only = self._structures[()]
        return {only.keys[path]: p for path, p in only.network.named_parameters()}

    def extract(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture with the supernet's weights, on its device. Its masks are not drawn.

        Batch norms that have no parameters in the supernet keep scale 1 and shift 0; running statistics are fresh.

        Raises:
            SpaceError: the architecture does not belong to the space.
            ConfigError: the supernet has no weight for a layer, or one of another shape.
        """
        if architecture.space != self.space.name:
            raise SpaceError(
                f"expected an architecture of space {self.space.name!r}, got one of {architecture.space!r}"
            )
        decisions = architecture.as_dict()
        chooser = Tagging(lambda name, _: decisions[name], decisions)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            network = self.space._call(chooser)
        keys = parameter_keys(network, chooser.tags)
        structure = self.structure(self.gates_of(architecture).values)
        held: Mapping[str, Tensor] = dict(structure.network.named_parameters())
        if self._shared is not None:
            held = self._shared.views(structure.sources)
        store = {structure.keys[path]: values for path, values in held.items()}
        read = _read_channels(network)
        norms = {
            path for path, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        with torch.no_grad():
            for path, parameter in network.named_parameters():
                source = store.get(keys[path])
                if source is None and path.rpartition(".")[0] in norms:
                    continue
                if source is not None and source.shape != parameter.shape and path in read:
                    source = source.index_select(1, torch.tensor(read[path], device=source.device))
                if source is None or source.shape != parameter.shape:
                    has = f"has one of shape {list(source.shape)}" if source is not None else "has none"
                    raise ConfigError(
                        f"{path}: the architecture's weight has shape {list(parameter.shape)}, the supernet {has}; the function of "
                        f"space {self.space.name!r} must make the same layers in the same order, whatever is decided elsewhere"
                    )
                parameter.copy_(source)
        return network.to(self.device)

    # -- structures -----------------------------------------------------------------------------------------------------

    def draw_values(self, generator: random.Random) -> dict[str, Value]:
        """A value for each choice that cannot be mixed, uniform; {} where the space has none."""
        return {
            name: choice.options[int(generator.random() * len(choice.options))]
            for name, choice in self.of_kind(ValueChoice).items()
        }

    def structure(self, values: Mapping[str, Value]) -> Structure:
        """The network for some values of the choices that cannot be mixed; those left out are the largest."""
        key = self._key(values)
        known = self._structures.pop(key, None)
        if known is None:
            network, keys, parts, _ = self._build(dict(key))
            known = self._add(network, keys, parts, dict(key))
        self._structures[self._key(values)] = known  # the latest is last
        return known

    def _key(self, values: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
        if self._shared is None:
            return ()
        return tuple(
            (name, values.get(name, default_value(choice.options)))
            for name, choice in self.of_kind(ValueChoice).items()
        )

    def _add(
        self, network: nn.Module, keys: dict[str, str], parts: SparseParts | None, values: Mapping[str, Value]
    ) -> Structure:
        assert self._shared is not None
        sources = self._shared.adopt(network, keys)
        for module in network.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        made = Structure(network, keys, sources, parts)
        self._structures[self._key(values)] = made
        if len(self._structures) > MAX_STRUCTURES:
            self._structures.pop(next(iter(self._structures)))
        return made

    def _build(
        self, values: Mapping[str, Value]
    ) -> tuple[nn.Module, dict[str, str], SparseParts | None, dict[str, Value]]:
        chooser = SupernetChooser(values, self._choices, self.board, **self._how)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            network = self.space._call(chooser)
            keys = parameter_keys(network, chooser.tags)
            parts = None
            if self.learned and chooser.sparse_parts:
                from nas.oneshot.sparse_parts import SparseParts

                parts = SparseParts(network, chooser.sparse_parts)
                for path, _ in network.named_parameters():
                    if path not in keys:
                        keys[path] = keys[path.removesuffix("score") + "weight"].removesuffix("weight") + "score"
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return network, keys, parts, chooser.values


def _read_channels(network: nn.Module) -> dict[str, list[int]]:
    """path of a weight -> the input channels it has, of those it has in a supernet; where parts of the network say so."""
    found: dict[str, list[int]] = {}
    for path, module in network.named_modules():
        if callable(say := getattr(module, "read_channels", None)):
            found |= {f"{path}.{name}" if path else name: channels for name, channels in say().items()}
    return found


def is_score(key: str) -> bool:
    """Whether a parameter with this key is a score; `nas.oneshot.shared` writes the shape behind keys of what does not fit."""
    return key.endswith(".score") or key.rpartition(" ")[0].endswith(".score")
