"""A space: one function that takes a `Chooser` and returns a module. `Space` does everything else with it.

Draw, mutate, cross over, enumerate, count, compare and build: the same function serves all of them (chooser.py). Start with
`Space` and, for the shipped ones, `search_spaces.get_space`.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import networkx as nx
import torch
from torch import nn

from ops.layers import SparseLayer
from search_spaces.architecture import Architecture, SpaceError, Value
from search_spaces.chooser import Chooser, Decide

SpaceFunction = Callable[..., nn.Module]
MAX_ENUMERATED_SIZE = 1_000_000


class Space:
    """A space function with its options: everything a search needs to know of it.

    Args:
        function: `fn(c: Chooser, **options) -> nn.Module`.
        name: how the space is called in architectures, tables and files.
        options: keyword arguments of the function, JSON-able; part of every digest.
        canonical: `canonical(decisions, options)` -> a JSON-able value that is equal exactly for decisions that compute the same
            network. Default: the decisions themselves (decisions that are never asked do not count).
        graph: `graph(decisions, options) -> networkx.DiGraph` of the computation, nodes with attribute "label".
            Default: the traced module.
        size: `size(options)` -> exact number of decision sequences. Default: by enumeration.
    """

    def __init__(
        self,
        function: SpaceFunction,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        canonical: Callable[[Mapping[str, Value], Mapping[str, Any]], Any] | None = None,
        graph: Callable[[Mapping[str, Value], Mapping[str, Any]], nx.DiGraph] | None = None,
        size: Callable[[Mapping[str, Any]], int] | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.options = dict(options or {})
        self._canonical = canonical
        self._graph = graph
        self._size = size
        self._prefix = json.dumps([name, self.options], sort_keys=True, default=list)
        _check_signature(function, name, self.options)

    def __repr__(self) -> str:
        return f"Space({self.name!r}, {self.options})"

    # -- making architectures -------------------------------------------------------------------------------------------

    def draw(self, decide: Decide, given: Mapping[str, Value] | None = None) -> Architecture:
        """Take every decision through `decide(name, options)` and return the architecture. Allocates no weights.

        Args:
            decide: returns one of the options.
            given: densities that are taken where they are not offered but possible, by the name of their decision (see `Chooser`).
        """
        return self._finish(self._run(decide, given))

    def sample(self, rng: random.Random | int) -> Architecture:
        """Draw every decision uniformly (so not every architecture is equally likely).

        Args:
            rng: a generator, or a seed for one.
        """
        generator = random.Random(rng) if isinstance(rng, int) else rng
        return self.draw(lambda _, options: options[int(generator.random() * len(options))])

    def architecture(self, decisions: Mapping[str, Value]) -> Architecture:
        """Check decisions and make them an architecture.

        A density may be any in (0, 1] where a pattern of free density is legal; searchers only draw those that are offered.

        Raises:
            SpaceError: a decision is missing, unknown, or not among the values offered.
        """
        return self._finish(self._run(_replay(self.name, decisions), decisions), exactly=decisions)

    def mutate(self, architecture: Architecture, rng: random.Random) -> Architecture:
        """Change one decision to another value; decisions that follow from it are kept where they are still offered.

        So a density that was given and is not offered is drawn again.

        Returns an architecture with another digest wherever one is found in 64 tries, else one with other decisions.

        Raises:
            SpaceError: the space holds a single architecture.
        """
        decisions = architecture.as_dict()
        parent = self._run(_replay(self.name, decisions), decisions)
        open_names = [name for name, options in parent.offered.items() if any(v != parent.made[name] for v in options)]
        if not open_names:
            raise SpaceError(f"{self.name}: nothing to mutate, every decision has a single option")
        for _ in range(64):
            target = rng.choice(open_names)
            other = rng.choice([v for v in parent.offered[target] if v != parent.made[target]])
            child = self._inherit(parent.made | {target: other}, rng)
            if child.digest != architecture.digest:
                break
        return child

    def crossover(self, one: Architecture, two: Architecture, rng: random.Random) -> Architecture:
        """Take each decision from either parent (uniform crossover); where neither fits, draw it."""
        a, b = one.as_dict(), two.as_dict()
        mixed = {name: (a if rng.random() < 0.5 else b).get(name, a.get(name, b.get(name))) for name in {**a, **b}}
        return self._inherit({name: value for name, value in mixed.items() if value is not None}, rng)

    def enumerate(self) -> Iterator[Architecture]:
        """Every decision sequence, once, in lexicographic order of the options. Lazy: fine on huge spaces."""
        path: list[int] = []
        while True:
            sizes: list[int] = []

            def follow(_: str, options: tuple[Value, ...], sizes: list[int] = sizes, path: list[int] = path) -> Value:
                sizes.append(len(options))
                depth = len(sizes) - 1
                return options[path[depth] if depth < len(path) else 0]

            yield self.draw(follow)
            path = path[: len(sizes)] + [0] * (len(sizes) - len(path))
            while path and path[-1] + 1 == sizes[len(path) - 1]:
                path.pop()
            if not path:
                return
            path[-1] += 1

    def size(self) -> int:
        """Exact number of decision sequences (architectures before merging equal computations).

        Raises:
            SpaceError: the space gives no closed form and has more than a million sequences; `estimate_size` still answers.
        """
        if self._size is not None:
            return self._size(self.options)
        count = 0
        for _ in self.enumerate():
            count += 1
            if count > MAX_ENUMERATED_SIZE:
                raise SpaceError(
                    f"{self.name} has more than {MAX_ENUMERATED_SIZE:,} decision sequences and no closed form for its size; "
                    "use estimate_size(), or pass size= when making the Space"
                )
        return count

    def estimate_size(self, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Unbiased estimate of `size()` and its standard error, from random walks down the decision tree.

        Source: D. E. Knuth, Estimating the efficiency of backtrack programs, Math. Comp. 29 (1975), section 2.
        """
        generator = random.Random(seed)
        products = []
        for _ in range(samples):
            product = 1.0

            def walk(_: str, options: tuple[Value, ...]) -> Value:
                nonlocal product
                product *= len(options)
                return generator.choice(options)

            self._run(walk)
            products.append(product)
        mean = sum(products) / samples
        spread = (sum((p - mean) ** 2 for p in products) / max(1, samples - 1)) ** 0.5
        return mean, spread / samples**0.5

    # -- using architectures --------------------------------------------------------------------------------------------

    def offers(self, architecture: Architecture) -> dict[str, tuple[Value, ...]]:
        """For each decision of `architecture`, the values it was chosen from."""
        decisions = architecture.as_dict()
        return dict(self._run(_replay(self.name, decisions), decisions).offered)

    def build(self, architecture: Architecture) -> nn.Module:
        """The network, with freshly initialised weights from torch's global generator. Sparse layers know their target density;
        masks are drawn by the training method.

        Raises:
            SpaceError: the architecture does not belong to this space.
        """
        return self._module(architecture)

    def meta(self, architecture: Architecture) -> nn.Module:
        """The network on the meta device: shapes without weights, for counting."""
        with torch.device("meta"):
            return self._module(architecture)

    def graph(self, architecture: Architecture) -> nx.DiGraph:
        """The computation as a directed graph: nodes carry "label", edges "weight" (how often the value is used)."""
        if self._graph is not None:
            return self._graph(architecture.as_dict(), self.options)
        return _traced_graph(self.meta(architecture))

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _run(self, decide: Decide, given: Mapping[str, Value] | None = None) -> Chooser:
        chooser = Chooser(decide, building=False, given=given)
        with torch.device("meta"):
            self._call(chooser)
        return chooser

    def _module(self, architecture: Architecture) -> nn.Module:
        if architecture.space != self.name:
            raise SpaceError(f"expected an architecture of space {self.name!r}, got one of {architecture.space!r}")
        decisions = architecture.as_dict()
        chooser = Chooser(_replay(self.name, decisions), building=True, given=decisions)
        module = self._call(chooser)
        _check_all_used(self.name, decisions, chooser.made)
        return module

    def _call(self, chooser: Chooser) -> nn.Module:
        try:
            module = self.function(chooser, **self.options)
        except SpaceError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's function does; the decisions say when
            taken = ", ".join(f"{name}={value}" for name, value in chooser.made.items()) or "none yet"
            raise SpaceError(
                f"space {self.name!r}: its function raised {type(error).__name__}: {error} (decisions: {taken})"
            ) from error
        if not isinstance(module, nn.Module):
            raise SpaceError(
                f"space {self.name!r}: its function must return a torch.nn.Module, got {type(module).__name__}; "
                "return the network it built"
            )
        return module

    def _finish(self, chooser: Chooser, exactly: Mapping[str, Value] | None = None) -> Architecture:
        if exactly is not None:
            _check_all_used(self.name, exactly, chooser.made)
        decisions = chooser.made
        value = self._canonical(decisions, self.options) if self._canonical else list(decisions.items())
        text = self._prefix + json.dumps(value, sort_keys=True, default=list)
        return Architecture(self.name, tuple(decisions.items()), hashlib.sha256(text.encode()).hexdigest()[:16])

    def _inherit(self, decisions: Mapping[str, Value], rng: random.Random) -> Architecture:
        def decide(name: str, options: tuple[Value, ...]) -> Value:
            value = decisions.get(name)
            return value if value is not None and value in options else rng.choice(options)

        return self.draw(decide)


def _replay(space: str, decisions: Mapping[str, Value]) -> Decide:
    def decide(name: str, options: tuple[Value, ...]) -> Value:
        if name not in decisions:
            raise SpaceError(f"{space}: decision {name!r} is missing; options: {list(options)}")
        if decisions[name] not in options:
            raise SpaceError(f"{space}: decision {name!r}: expected one of {list(options)}, got {decisions[name]!r}")
        return decisions[name]

    return decide


def _check_all_used(space: str, given: Mapping[str, Value], made: Mapping[str, Value]) -> None:
    for name, value in given.items():
        if name not in made:
            raise SpaceError(f"{space}: unknown decision {name!r}; this architecture decides: {', '.join(made)}")
        if made[name] != value:
            raise SpaceError(f"{space}: decision {name!r}: expected {made[name]!r} (its only option), got {value!r}")


def _check_signature(function: SpaceFunction, name: str, options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise SpaceError(f"space {name!r}: expected a Python function of a chooser, got {function!r}") from error
    if not parameters:
        raise SpaceError(
            f"space {name!r}: its function takes no argument; it must take the chooser, def {name}(c): ..."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = list(parameters)[1:]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise SpaceError(f'space "{name}" has no option "{option}"{hint}; it has: {", ".join(known) or "none"}')


class _LayerTracer(torch.fx.Tracer):
    """Records layers as they were written: a sparse layer is one operation, not a mask, a product and a convolution."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLayer) or super().is_leaf_module(m, module_qualified_name)


def _traced_graph(module: nn.Module) -> nx.DiGraph:
    """Operations as nodes, tensors as edges, from a torch.fx trace; one node per child module where tracing fails."""
    graph: nx.DiGraph = nx.DiGraph()
    try:
        traced = torch.fx.GraphModule(module, _LayerTracer().trace(module))
    except Exception:  # whatever a user's forward does that fx cannot follow; the drawing is then coarser
        previous = "input"
        graph.add_node(previous, label="input")
        for name, child in module.named_children():
            graph.add_node(name, label=type(child).__name__)
            graph.add_edge(previous, name, weight=1)
            previous = name
        return graph
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        label = type(modules[node.target]).__name__ if node.op == "call_module" else _function_name(node.target)
        graph.add_node(node.name, label=label)
        for source in node.all_input_nodes:
            repeated = graph.get_edge_data(source.name, node.name, {"weight": 0})["weight"]
            graph.add_edge(source.name, node.name, weight=repeated + 1)
    return graph


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
