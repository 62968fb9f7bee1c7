"""A network as a tree for terminals: modules as branches, operations as leaves, repeated branches once. See `network_tree`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

from rich.text import Text
from rich.tree import Tree

from nas.report.plans import Operation, shape_text, shares
from nas.report.repeats import signature
from nas.report.units import compact

_Item = tuple[tuple[str, ...], Operation, float]  # what is left of the name, the operation, its share


def network_tree(operations: Sequence[Operation], title: str) -> Tree:
    """The operations of a network as a rich tree; branches that do the same one after the other are shown once.

    Args:
        operations: as from `nas.report.plans.read_plan`.
        title: the root, e.g. "trial 7".
    """
    tree = Tree(Text(title, style="bold"), guide_style="dim")
    items = [
        (tuple(op.name.replace("/", ".").split(".")), op, part)
        for op, part in zip(operations, shares(operations), strict=True)
    ]
    _grow(tree, items)
    return tree


def _grow(tree: Tree, items: Sequence[_Item]) -> None:
    branches = [(name, list(inside)) for name, inside in groupby(items, key=lambda item: item[0][0])]
    for _, same in groupby(branches, key=lambda branch: _sign(branch[1])):
        run = list(same)
        name, inside = run[0]
        share = sum(item[2] for _, members in run for item in members)
        label = Text(name)
        if len(run) > 1:
            label.append(f" … {run[-1][0]}")
            label.append(f"  {len(run)}×", style="bold cyan")
        if len(inside) == 1:
            label.append("".join(f".{part}" for part in inside[0][0][1:]))
            tree.add(_leaf(label, inside[0][1], share))
            continue
        label.append(f"  {share:.1%}", style="dim")
        _grow(tree.add(label), [(names[1:] or names, op, part) for names, op, part in inside])


def _leaf(label: Text, op: Operation, share: float) -> Text:
    """name  what → output  how  non-zeros  share"""
    label.append("  " + " + ".join((op.what, *op.after)), style="bold" if op.density is not None else "")
    if op.output:
        label.append(f" → {shape_text(op.output)}", style="dim")
    if op.density is not None:
        label.append(f"  {op.how}", style="yellow" if op.is_sparse else "")
        label.append(f"  {compact(op.nnz)}", style="dim")
    label.append(f"  {share:.1%}", style="dim")
    return label


def _sign(items: Sequence[_Item]) -> Hashable:
    return tuple((item[0][1:], signature(item[1])) for item in items)
