"""What a supernet decides: one value per decision of a space, with its options in order.

`OpChoice` and `SparsityChoice` are mixed (all options run, or their masks are laid over each other), `EdgeChoice` says which inputs
of a sum count, `ValueChoice` (widths, depths) cannot be mixed and is drawn per step, `OverallChoice` is set by the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from search_spaces.architecture import Value


@dataclass(frozen=True)
class OpChoice:
    """Among candidate operations (`Chooser.op`).

    Attributes:
        name: of the decision.
        options: names of the candidates.
    """

    name: str
    options: tuple[Value, ...]


@dataclass(frozen=True)
class EdgeChoice:
    """Which `keep` of n inputs a sum reads (`Chooser.edges`).

    Attributes:
        name: of the decision.
        options: 0 .. n - 1.
        keep: how many of them an architecture keeps.
        operations: for each input, the names of the op choices on it.
        own: whether every input has op choices that no other input has, so that those can tell how strong it is.
    """

    name: str
    options: tuple[Value, ...]
    keep: int
    operations: tuple[tuple[str, ...], ...] = ()

    @property
    def own(self) -> bool:
        names = [name for names in self.operations for name in names]
        return all(self.operations) and len(set(names)) == len(names)

    def text(self, kept: tuple[int, ...]) -> str:
        """The value of the decision: "0,2"."""
        return ",".join(str(j) for j in sorted(kept))


@dataclass(frozen=True)
class ValueChoice:
    """A number or word that shapes the network (`Chooser.choice`): drawn, never mixed."""

    name: str
    options: tuple[Value, ...]


@dataclass(frozen=True)
class SparsityChoice:
    """How sparse one part is (`Chooser.sparse`), density and pattern together.

    Attributes:
        name: prefix of the decisions `name.density` and `name.pattern`.
        options: readable: "1", "0.25 unstructured".
        targets: the same as (density, pattern); pattern "" at density 1.
    """

    name: str
    options: tuple[Value, ...]
    targets: tuple[tuple[float, str], ...] = ()

    @classmethod
    def of(cls, name: str, targets: tuple[tuple[float, str], ...]) -> SparsityChoice:
        """With its options written out."""
        return cls(name, tuple(f"{density:g} {pattern}".strip() for density, pattern in targets), targets)


@dataclass(frozen=True)
class OverallChoice:
    """How sparse the whole network is (`Chooser.allocate`): `name.density`, `.pattern`, `.rule`.

    Attributes:
        offers: (density, patterns that can have it).
        rules: that spread the density.
    """

    name: str
    options: tuple[Value, ...]
    offers: tuple[tuple[float, tuple[str, ...]], ...] = ()
    rules: tuple[str, ...] = ("uniform",)


Choice = OpChoice | EdgeChoice | ValueChoice | SparsityChoice | OverallChoice


@dataclass
class Choices:
    """All choices of a space, in the order they were met, over every structure that was looked at."""

    by_name: dict[str, Choice] = field(default_factory=dict)

    def add(self, choice: Choice) -> None:
        """Remember a choice; a sparsity choice met again with other options gets the union."""
        known = self.by_name.get(choice.name)
        if isinstance(known, SparsityChoice) and isinstance(choice, SparsityChoice):
            merged = known.targets + tuple(t for t in choice.targets if t not in known.targets)
            choice = SparsityChoice.of(choice.name, merged)
        elif isinstance(known, EdgeChoice):
            return
        self.by_name[choice.name] = choice
