"""Choosers that remember which module belongs to which decision: one that keeps every candidate, one that builds one architecture.

Modules get a *tag* that is the same in the supernet and in a network of one architecture: the decision's name, which occurrence of
it, and the candidate. `parameter_keys` turns tags into a key for every parameter, and by these keys weights are shared.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from nas.oneshot.choices import Choices, EdgeChoice, OpChoice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.mixed import Edge, GateBoard, MixedOp, PartialMixedOp
from ops.candidates import Zero
from ops.layers import is_depthwise
from ops.patterns import parse_pattern
from search_spaces.architecture import SpaceError, Value
from search_spaces.chooser import Chooser, Decide, sparsity_offers, weights_of


class Tagging(Chooser):
    """Builds, and tags every module that comes from a decision.

    Args:
        decide: takes each decision that is not kept open.
        given: as of `Chooser`.
    """

    def __init__(self, decide: Decide, given: Mapping[str, Value] | None = None) -> None:
        super().__init__(decide, building=True, given=given)
        self.tags: dict[int, str] = {}
        self._edge: list[int] = []
        self._met: Counter[str] = Counter()
        self._alive: list[nn.Module] = []  # a tag is by identity, which must not be given to another module

    def op(self, name: str, candidates: Mapping[str, Callable[..., nn.Module]], **arguments: Any) -> nn.Module:
        place = self._place(name)
        module = super().op(name, candidates, **arguments)
        return self._tag(module, f"{place}.{self.made[name]}")

    def edges(self, name: str, n: int, k: int, make: Callable[[int], nn.Module]) -> list[tuple[int, nn.Module]]:
        return [(j, self._on_edge(j, make)) for j in self.subset(name, n, k)]

    def build(self, factory: Callable[[], nn.Module]) -> nn.Module:
        place = self._place("build")
        return self._tag(super().build(factory), place)

    def sparse(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        made = self._keeping_tags(module, lambda: super(Tagging, self).sparse(name, module, *args, **kwargs))
        return self._tag(made, self._place(f"{name}.sparse"))

    def allocate(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self._keeping_tags(module, lambda: super(Tagging, self).allocate(name, module, *args, **kwargs))

    def _keeping_tags(self, module: nn.Module, make_sparse: Callable[[], nn.Module]) -> nn.Module:
        """The sparse twin of a tagged layer gets its tag."""
        tags = {path: self.tags[id(part)] for path, part in module.named_modules() if id(part) in self.tags}
        made = make_sparse()
        for path, tag in tags.items():
            self._tag(made.get_submodule(path), tag)
        return made

    def _place(self, name: str) -> str:
        """The decision's name, the edge it is on, and how often it was met there."""
        place = f"{name}@{self._edge[-1]}" if self._edge else name
        self._met[place] += 1
        return f"{place}#{self._met[place] - 1}"

    def _tag(self, module: nn.Module, tag: str) -> nn.Module:
        if id(module) not in self.tags:
            self.tags[id(module)] = tag
            self._alive.append(module)
        return module

    def _on_edge(self, j: int, make: Callable[[int], nn.Module]) -> nn.Module:
        self._edge.append(j)
        try:
            return make(j)
        finally:
            self._edge.pop()


class SupernetChooser(Tagging):
    """Keeps every candidate of every operation and every input of every sum.

    Args:
        values: of the decisions that cannot be mixed; default the largest number, or the first word.
        choices: where the choices that are met are put.
        board: where mixed operations read their gates.
        partial: mixed operations see 1 / `partial` of the channels (PC-DARTS).
        pool_norm: a batch norm without parameters after each pooling, as DARTS has it during search.
        affine: batch norms inside candidates have parameters.
    """

    def __init__(
        self,
        values: Mapping[str, Value],
        choices: Choices,
        board: GateBoard,
        *,
        partial: int = 1,
        pool_norm: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__(lambda name, options: values.get(name, default_value(options)))
        self.affine = affine
        self.found = choices
        self.board = board
        self.partial = partial
        self.pool_norm = pool_norm
        self.values: dict[str, Value] = {}
        self.sparse_parts: list[tuple[SparsityChoice | OverallChoice, nn.Module, Callable[[str, nn.Module], bool]]] = []
        self._operations: list[list[str]] = []

    def choice(self, name: str, options: Sequence[Value]) -> Any:
        value = super().choice(name, options)
        if len(self.offered[name]) > 1:
            self.found.add(ValueChoice(name, self.offered[name]))
            self.values[name] = value
        return value

    def op(self, name: str, candidates: Mapping[str, Callable[..., nn.Module]], **arguments: Any) -> nn.Module:
        if not candidates:
            raise SpaceError(f"decision {name!r}: no options")
        self.found.add(OpChoice(name, tuple(candidates)))
        if self._operations:
            self._operations[-1].append(name)
        place = self._place(name)
        width = arguments.get("in_channels", 0)
        partial = self.partial if isinstance(width, int) and 0 < width == arguments.get("out_channels") else 1
        if partial > 1:
            if width % partial:
                raise SpaceError(
                    f"decision {name!r}: {width} channels cannot be split by {partial}; take other channels or another K"
                )
            arguments = arguments | {"in_channels": width // partial, "out_channels": width // partial}
        made: dict[str, nn.Module] = {}
        for candidate, factory in candidates.items():
            extra = {"affine": self.affine} if takes_affine(factory) and "affine" not in arguments else {}
            module = self._tag(factory(**arguments, **extra), f"{place}.{candidate}")
            if self.pool_norm and isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
                channels = arguments.get("out_channels", arguments.get("channels"))
                if isinstance(channels, int):
                    module = nn.Sequential(module, nn.BatchNorm2d(channels, affine=False))
            made[candidate] = module
        if partial > 1:
            return PartialMixedOp(name, made, self.board, partial, int(arguments.get("stride", 1)))
        return MixedOp(name, made, self.board)

    def edges(self, name: str, n: int, k: int, make: Callable[[int], nn.Module]) -> list[tuple[int, nn.Module]]:
        if not 0 < k <= n:
            raise SpaceError(f"decision {name!r}: expected 0 < k <= n, got k={k}, n={n}")
        made: list[tuple[int, nn.Module]] = []
        names: list[tuple[str, ...]] = []
        for j in range(n):
            self._operations.append([])
            made.append((j, self._on_edge(j, make)))
            names.append(tuple(self._operations.pop()))
        if n > 1:
            self.found.add(EdgeChoice(name, tuple(range(n)), k, tuple(names)))
        return [(j, Edge(name, j, module, self.board)) for j, module in made]

    def sparse(
        self,
        name: str,
        module: nn.Module,
        densities: Sequence[float],
        patterns: Sequence[str] = ("unstructured",),
        *,
        depthwise: bool = False,
    ) -> nn.Module:
        layers = [w for w in weights_of(module) if depthwise or not w.depthwise]
        self._tag(module, self._place(f"{name}.sparse"))
        if not layers:
            return module
        offers = sparsity_offers(name, layers, densities, patterns)
        targets = tuple((d, p) for d, fits in offers.items() for p in (fits or ("",)))
        choice = SparsityChoice.of(name, targets)
        self.found.add(choice)
        self.sparse_parts.append((choice, module, lambda _, layer: depthwise or not is_depthwise(layer)))
        return module

    def allocate(
        self,
        name: str,
        module: nn.Module,
        densities: Sequence[float],
        rules: Sequence[str] = ("erk",),
        patterns: Sequence[str] = ("unstructured",),
        *,
        skip: Callable[[str, nn.Module], bool] = lambda _name, _layer: False,
        depthwise: bool = False,
    ) -> nn.Module:
        offers = tuple(
            (float(d), tuple(p for p in patterns if parse_pattern(p).fixed_density in (None, d))) for d in densities
        )
        choice = OverallChoice(name, tuple(densities), offers, tuple(rules))
        self.found.add(choice)
        self.sparse_parts.append(
            (choice, module, lambda path, layer: not skip(path, layer) and (depthwise or not is_depthwise(layer)))
        )
        return module


def default_value(options: Sequence[Value]) -> Value:
    """The largest number, or the first option where there are words."""
    return max(options) if all(isinstance(v, int | float) for v in options) else options[0]


@lru_cache(maxsize=1024)
def takes_affine(factory: Callable[..., nn.Module]) -> bool:
    """Whether a candidate's factory can be told to leave the scale and shift out of its batch norms."""
    try:
        return "affine" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def parameter_keys(network: nn.Module, tags: Mapping[int, str]) -> dict[str, str]:
    """Path of every parameter -> its key: the tag of the nearest tagged module around it and the path from there.

    Parameters under no tag are named by the type of their module and how many of these came before.
    """
    keys: dict[str, str] = {}
    ordinals: Counter[str] = Counter()
    seen: set[int] = set()

    def walk(module: nn.Module, path: str, base: str | None, inner: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        tag = tags.get(id(module))
        if tag is not None:
            base, inner = tag, ""
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        if own:
            kind = type(module).__name__
            prefix = f"{base}/{inner}" if base is not None else f"{kind}#{ordinals[kind]}"
            ordinals[kind] += base is None
            for name in own:
                keys[f"{path}{name}"] = f"{prefix}.{name}"
        for name, child in module.named_children():
            walk(child, f"{path}{name}.", base, f"{inner}.{name}" if inner else name)

    walk(network, "", None, "")
    return keys


def is_none(module: nn.Module) -> bool:
    """Whether a candidate is "none"."""
    return isinstance(module, Zero)
