"""Genotypes: the text form in which the field passes cells around, as a value.

`Genotype.parse` reads `Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), ...)` without running it,
`str` writes it; JSON too. `GENOTYPES` holds published ones by name. What a genotype builds is in darts.py and
nasnet.py.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ops.candidates import OPERATIONS
from search_spaces.architecture import SpaceError

Edge = tuple[str, int]
"""(operation, state it reads)."""

ALIASES = {
    "dil_sepc_3x3": "dil_conv_3x3",
    "dil_sepc_5x5": "dil_conv_5x5",
    "dua_sepc_3x3": "sep_conv_3x3",
    "dua_sepc_5x5": "sep_conv_5x5",
    "nor_conv_7x1": "conv_7x1_1x7",
    "identity": "skip_connect",
    "skip": "skip_connect",
}
"""Other names for our operations in published genotypes."""


class GenotypeError(SpaceError):
    """A text is no genotype, or a genotype cannot be what was asked of it."""


@dataclass(frozen=True)
class Genotype:
    """Two cells. State 0 is the output of the cell before the previous one, 1 that of the previous one, 2 + i node i.

    Attributes:
        normal, reduce: (operation, state read), two for each node, in the order of the nodes.
        normal_concat, reduce_concat: states whose concatenation is the cell's output.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in ("normal", "reduce"):
            edges = tuple((ALIASES.get(op, op), j) for op, j in getattr(self, kind))
            concat = tuple(getattr(self, f"{kind}_concat"))
            object.__setattr__(self, kind, edges)
            object.__setattr__(self, f"{kind}_concat", concat)
            _check_cell(kind, edges, concat)

    def nodes(self, kind: str) -> tuple[tuple[Edge, Edge], ...]:
        """The two (operation, state) pairs of each node of the "normal" or "reduce" cell."""
        edges: tuple[Edge, ...] = getattr(self, kind)
        return tuple((edges[i], edges[i + 1]) for i in range(0, len(edges), 2))

    def concat(self, kind: str) -> tuple[int, ...]:
        """The states concatenated by the "normal" or "reduce" cell."""
        result: tuple[int, ...] = getattr(self, f"{kind}_concat")
        return result

    def __str__(self) -> str:
        return (
            f"Genotype(normal={list(self.normal)}, normal_concat={list(self.normal_concat)}, "
            f"reduce={list(self.reduce)}, reduce_concat={list(self.reduce_concat)})"
        )

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """Read a genotype from the text that the field prints, from JSON, or by the name of a published one.

        `NAME = Genotype(...)`, positional arguments, `range(2, 6)`, pairs nested by node, and a third number per pair
        (an edge weight, dropped) are all read. Nothing is executed.

        Raises:
            GenotypeError: names line and column of what is wrong.
        """
        text = text.strip()
        if text.startswith("{"):
            return cls.from_json(text)
        if text.isidentifier():
            return get_genotype(text)
        return _read_python(text)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal value back."""
        return json.dumps(
            {
                "normal": self.normal,
                "normal_concat": self.normal_concat,
                "reduce": self.reduce,
                "reduce_concat": self.reduce_concat,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read what `to_json` wrote.

        Raises:
            GenotypeError: not JSON, or not a genotype; names the position.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise GenotypeError(f"genotype, line {error.lineno} column {error.colno}: no JSON, {error.msg}") from error
        return _from_fields(raw, lambda _: "genotype")


FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")


def _read_python(text: str) -> Genotype:
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise GenotypeError(f"genotype, line {error.lineno} column {error.offset}: {error.msg}") from error
    call: ast.AST | None = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr | ast.Assign) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        raise GenotypeError(
            "genotype, line 1 column 1: expected Genotype(normal=[...], normal_concat=[...], reduce=[...], reduce_concat=[...]), "
            f"got {text[:60]!r}"
        )
    if len(call.args) > len(FIELDS):
        raise GenotypeError(f"genotype, {_at(call.args[4])}: expected four fields, got {len(call.args)}")
    fields: dict[str, ast.expr] = dict(zip(FIELDS, call.args))
    for keyword in call.keywords:
        if keyword.arg not in FIELDS or keyword.arg in fields:
            problem = "field given twice:" if keyword.arg in fields else "unknown field"
            raise GenotypeError(f"genotype, {_at(keyword)}: {problem} {keyword.arg}; expected {', '.join(FIELDS)}")
        fields[keyword.arg] = keyword.value
    raw = {name: _literal(name, node) for name, node in fields.items()}
    return _from_fields(raw, lambda field: f"genotype, {_at(fields[field])}")


def _literal(name: str, node: ast.expr) -> Any:
    """The value of a literal, of range(...) or of list(range(...))."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id == "range" and 1 <= len(node.args) <= 3:
            bounds = [_literal(name, argument) for argument in node.args]
            if all(type(b) is int and abs(b) < 1000 for b in bounds) and (len(bounds) < 3 or bounds[2] != 0):
                return list(range(*bounds))
        elif node.func.id in ("list", "tuple") and len(node.args) == 1:
            return _literal(name, node.args[0])
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        inner = next((n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Call | ast.BinOp)), node)
        raise GenotypeError(
            f"genotype, {_at(inner)}, {name}: expected literals (text, numbers, lists, range), got {ast.unparse(inner)[:60]}"
        ) from error


def _at(node: ast.expr | ast.keyword) -> str:
    return f"line {node.lineno} column {node.col_offset + 1}"


def _from_fields(raw: Any, where: Any) -> Genotype:
    if not isinstance(raw, Mapping) or set(raw) - set(FIELDS):
        raise GenotypeError(f"genotype: expected the fields {', '.join(FIELDS)}, got {str(raw)[:80]}")
    missing = [name for name in FIELDS if name not in raw]
    if missing:
        raise GenotypeError(f"genotype: missing {', '.join(missing)}; expected the fields {', '.join(FIELDS)}")
    values: dict[str, Any] = {}
    for name in FIELDS:
        try:
            if name.endswith("concat"):
                values[name] = tuple(_index(i) for i in raw[name])
            else:
                values[name] = tuple(edge for item in raw[name] for edge in _edges(item))
        except (GenotypeError, TypeError) as error:
            raise GenotypeError(f"{where(name)}, {name}: {error}") from error
        try:
            kind, part = name.removesuffix("_concat"), name.endswith("concat")
            edges = tuple((ALIASES.get(op, op), j) for op, j in values[kind])
            _check_cell(kind, edges, values[name] if part else None)
        except GenotypeError as error:
            raise GenotypeError(f"{where(name)}: {error}") from error
    return Genotype(**values)


def _edges(item: Any) -> list[Edge]:
    """One ("op", state), or a node's several of them nested."""
    if isinstance(item, list | tuple) and item and all(isinstance(part, list | tuple) for part in item):
        return [edge for part in item for edge in _edges(part)]
    if isinstance(item, list | tuple) and len(item) in (2, 3) and isinstance(item[0], str):
        return [(item[0], _index(item[1]))]
    raise GenotypeError(f"expected (operation, state) pairs such as ('sep_conv_3x3', 0), got {item!r}")


def _index(value: Any) -> int:
    if type(value) is not int:
        raise GenotypeError(f"expected the number of a state, got {value!r}")
    return value


def _check_cell(kind: str, edges: Sequence[Edge], concat: Sequence[int] | None) -> None:
    if not edges or len(edges) % 2:
        raise GenotypeError(f"{kind}: expected two (operation, state) pairs for each node, got {len(edges)} pairs")
    for number, (op, j) in enumerate(edges):
        node = number // 2
        if op not in OPERATIONS:
            near = difflib.get_close_matches(op, OPERATIONS, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise GenotypeError(
                f'{kind}, pair {number}: unknown operation "{op}"{hint} known: {", ".join(sorted(OPERATIONS))}'
            )
        if not 0 <= j < node + 2:
            raise GenotypeError(
                f"{kind}, pair {number} ({op!r}, {j}): node {node} can read the states 0 to {node + 1}, got {j}"
            )
    if concat is None:
        return
    states = len(edges) // 2 + 2
    if not concat or len(set(concat)) != len(concat) or not all(0 <= i < states for i in concat):
        raise GenotypeError(
            f"{kind}_concat: expected different states among 0 to {states - 1}, at least one, got {list(concat)}"
        )


def swap_inputs(genotype: Genotype) -> Genotype:
    """Exchange states 0 and 1: the NASNet code in TensorFlow numbers the current input 0 and the previous 1, we the reverse."""
    swap = {0: 1, 1: 0}

    def edges(given: Sequence[Edge]) -> tuple[Edge, ...]:
        return tuple((op, swap.get(j, j)) for op, j in given)

    def states(given: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(swap.get(j, j) for j in given))

    return Genotype(
        edges(genotype.normal),
        states(genotype.normal_concat),
        edges(genotype.reduce),
        states(genotype.reduce_concat),
    )


def get_genotype(name: str) -> Genotype:
    """The published genotype called `name`.

    Raises:
        GenotypeError: no such name; says the nearest one.
    """
    if name not in GENOTYPES:
        near = difflib.get_close_matches(name, GENOTYPES, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ";"
        raise GenotypeError(f'unknown genotype "{name}"{hint} known: {", ".join(sorted(GENOTYPES))}')
    return GENOTYPES[name]


_SHORT = {
    "max3": "max_pool_3x3",
    "avg3": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
    "pair7": "conv_7x1_1x7",
}


def _cells(
    normal: str, reduce: str, normal_concat: Sequence[int] = (2, 3, 4, 5), reduce_concat: Sequence[int] = (2, 3, 4, 5)
) -> Genotype:
    """From short text: "sep3.0 sep3.1 ..." is ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ..."""

    def edges(text: str) -> tuple[Edge, ...]:
        pairs = (word.split(".") for word in text.split())
        return tuple((_SHORT[op], int(j)) for op, j in pairs)

    return Genotype(edges(normal), tuple(normal_concat), edges(reduce), tuple(reduce_concat))


GENOTYPES: dict[str, Genotype] = {
    # Liu et al. 2019, DARTS (arXiv:1806.09055), its published code
    "DARTS_V1": _cells(
        "sep3.1 sep3.0 skip.0 sep3.1 skip.0 sep3.1 sep3.0 skip.2",
        "max3.0 max3.1 skip.2 max3.0 max3.0 skip.2 skip.2 avg3.0",
    ),
    "DARTS_V2": _cells(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.1 skip.0 skip.0 dil3.2",
        "max3.0 max3.1 skip.2 max3.1 max3.0 skip.2 skip.2 max3.1",
    ),
    # NASNet-A (arXiv:1707.07012) and AmoebaNet-A (arXiv:1802.01548) as the DARTS code has them; NASNet-A proper is nasnet.NASNET_A
    "NASNet": _cells(
        "sep5.1 sep3.0 sep5.0 sep3.0 avg3.1 skip.0 avg3.0 avg3.0 sep3.1 skip.1",
        "sep5.1 sep7.0 max3.1 sep7.0 avg3.1 sep5.0 skip.3 avg3.2 sep3.2 max3.1",
        (2, 3, 4, 5, 6),
        (4, 5, 6),
    ),
    "AmoebaNet": _cells(
        "avg3.0 max3.1 sep3.0 sep5.2 sep3.0 avg3.3 sep3.1 skip.1 skip.0 avg3.1",
        "avg3.0 sep3.1 max3.0 sep7.2 sep7.0 avg3.1 max3.0 max3.1 pair7.0 sep3.5",
        (4, 5, 6),
        (3, 4, 6),
    ),
    # Xu et al. 2020, PC-DARTS (arXiv:1907.05737), its published code
    "PC_DARTS_cifar": _cells(
        "sep3.1 skip.0 sep3.0 dil3.1 sep5.0 sep3.1 avg3.0 dil3.1",
        "sep5.1 max3.0 sep5.1 sep5.2 sep3.0 sep3.3 sep3.1 sep3.2",
    ),
    "PC_DARTS_image": _cells(
        "skip.1 sep3.0 sep3.0 skip.1 sep3.1 sep3.3 sep3.1 dil5.4",
        "sep3.0 skip.1 dil5.2 max3.1 sep3.2 sep3.1 sep5.0 sep3.3",
    ),
    # Dong and Yang 2019, GDAS (arXiv:1910.04465), its published code
    "GDAS_V1": _cells(
        "skip.0 skip.1 skip.0 sep5.2 sep3.3 skip.0 sep5.4 sep3.3",
        "sep5.0 sep3.1 sep5.2 sep5.1 dil5.2 sep3.1 sep5.0 sep5.1",
    ),
    # DASS (arXiv:2207.06968), its published code: found at 99, 95 and 90 % sparsity, by one formula, and the dense baseline
    "DASS_99": _cells(
        "avg3.0 skip.1 dil5.1 skip.2 avg3.2 skip.1 skip.4 skip.3",
        "max3.1 sep3.0 max3.1 dil3.2 skip.0 dil3.2 max3.1 skip.4",
    ),
    "DASS_95": _cells(
        "sep5.0 skip.1 dil5.1 sep3.2 dil3.2 sep3.0 sep3.2 sep3.0",
        "sep3.0 avg3.1 sep3.0 sep5.2 sep5.1 sep5.2 dil3.1 dil3.2",
    ),
    "DASS_90": _cells(
        "dil3.1 dil5.0 sep5.0 dil5.1 sep5.0 sep3.3 sep3.2 dil5.0",
        "skip.1 skip.0 dil5.1 dil5.2 dil5.2 dil5.3 dil5.3 skip.0",
    ),
    "DASS_ONE_FOR": _cells(
        "max3.0 dil3.1 dil5.1 skip.0 dil5.2 dil5.3 dil5.0 skip.4",
        "dil5.0 dil5.1 dil5.2 dil3.0 dil5.2 dil3.3 dil3.0 dil5.2",
    ),
    "DARTS_ORIG_120": _cells(
        "sep3.0 sep3.1 skip.0 skip.1 skip.0 skip.2 skip.0 skip.1",
        "avg3.0 dil3.1 skip.2 avg3.0 skip.2 avg3.0 avg3.0 skip.2",
    ),
}
"""Published genotypes by name."""
