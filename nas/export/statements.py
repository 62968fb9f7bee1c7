"""The forward method: a recorded computation as ordinary Python statements.

Names of values follow the module a value was computed in ("x" in the network itself, "stage1_0" in a block of that name, "body"
in the block's own module of that name) and are used again as soon as their value is not needed any more, so that a chain of
layers reads `x = self.conv(x)`. Sizes are written where they are used.

What it does not do: simplify the computation; every statement is one recorded operation, in the recorded order.

Start with `forward_lines`.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import textwrap
from typing import Any

from torch.fx import Node

from nas.export.errors import ExportError
from nas.export.literals import defaults_of, function_name, literal
from nas.export.members import Members, member_path
from nas.export.trace import Recording, Scope, changes_its_input

WIDTH = 120
INDENT = " " * 8

_BINARY = {
    **{getattr(operator, name): sign for name, sign in {
        "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
        "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
        "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    }.items()},
}  # fmt: skip
_UNARY = {operator.neg: "-", operator.pos: "+", operator.invert: "~"}
_AUGMENTED = {
    operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/=", operator.ifloordiv: "//=",
    operator.imod: "%=", operator.ipow: "**=", operator.iand: "&=", operator.ior: "|=", operator.ixor: "^=",
    operator.imatmul: "@=",
}  # fmt: skip
_SIZE_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_RESERVED = frozenset({"self", "torch", "nn", "F", "math", *dir(builtins), *keyword.kwlist})


def forward_lines(recording: Recording, members: Members) -> tuple[list[str], list[str]]:
    """The argument names of the forward method, and the lines of its body, indented for a method of a class.

    Raises:
        ExportError: an operation that plain torch source cannot express.
    """
    writer = _Writer(recording, members)
    return writer.arguments, writer.lines


def group_of(scopes: tuple[Scope, ...]) -> Scope | None:
    """The outermost module of the user's own that a statement belongs to; containers do not count."""
    return next((scope for scope in scopes if scope.kind not in ("Sequential", "ModuleList", "ModuleDict")), None)


class _Writer:
    def __init__(self, recording: Recording, members: Members) -> None:
        self.recording = recording
        self.members = members
        self.nodes = list(recording.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.impure = [i for i, node in enumerate(self.nodes) if changes_its_input(node, recording.module)]
        self.inlined: set[Node] = set()
        self.last_use: dict[Node, int] = {}
        self._find_inlined()
        self.names: dict[Node, str] = {}
        self.holders: dict[str, Node] = {}
        self.arguments: list[str] = []
        self.lines: list[str] = []
        self.group: Scope | None = None
        for index, node in enumerate(self.nodes):
            self._emit(node, index)

    # Which values are written where they are used, and when each value is used last.

    def _find_inlined(self) -> None:
        consumers: dict[Node, set[int]] = {}
        for node in reversed(self.nodes):
            positions: set[int] = set()
            for user in node.users:
                positions |= consumers[user] if user in self.inlined else {self.position[user]}
            consumers[node] = positions
            self.last_use[node] = max(positions, default=self.position[node])
            if node.op == "get_attr" or (positions and self._is_size(node) and self._may_move(node, positions)):
                self.inlined.add(node)

    def _is_size(self, node: Node) -> bool:
        """Whether a node is a size or computed from sizes only."""
        if node.op == "call_method":
            return node.target in ("size", "dim")
        if node.op != "call_function":
            return False
        if node.target is getattr:
            return node.args[1] in _SIZE_ATTRIBUTES
        arithmetic = node.target is operator.getitem or node.target in _BINARY or node.target in _UNARY
        if arithmetic or getattr(node.target, "__module__", "") == "math":
            return all(self._is_size(source) for source in node.all_input_nodes)
        return False

    def _may_move(self, node: Node, positions: set[int]) -> bool:
        """Whether a size may be written at its uses: its tensor lives there anyway, nothing is changed in place between."""
        shape = node.target is getattr
        if len(positions) > 1 and not shape:
            return False
        last = max(positions)
        if any(self.position[node] < i < last for i in self.impure):
            return False
        tensors: list[Node] = []
        pending = [node]
        while pending:
            current = pending.pop()
            sizes = [source for source in current.all_input_nodes if self._is_size(source)]
            pending += sizes
            tensors += [source for source in current.all_input_nodes if source not in sizes]
        return all(self._alive_until(tensor) >= last for tensor in tensors)

    def _alive_until(self, tensor: Node) -> int:
        """The last statement that uses a tensor for more than its size."""
        return max((self.position[user] for user in tensor.users if not self._is_size(user)), default=-1)

    # Statements.

    def _emit(self, node: Node, index: int) -> None:
        if node.op == "placeholder":
            wish = str(node.target).lstrip("*")
            name = self._free_name("x" if wish == "input" else wish, index)  # "input" is a function of Python's
            self._hold(node, name)
            self.arguments.append(name)
        elif node.op == "output":
            self._write(f"return {self._text(node.args[0], 'the output')}", ())
        elif node not in self.inlined:
            self._emit_statement(node, index)

    def _emit_statement(self, node: Node, index: int) -> None:
        scopes = self.recording.scopes.get(node, ())
        if node.target is operator.setitem:
            target, item, value = node.args
            self._write(f"{self._atom(target)}[{self._index(item)}] = {self._text(value, str(node))}", scopes)
            return
        if node.target in _AUGMENTED:
            left, right = node.args
            text, other = self._atom(left), self._text(right, str(node))
            dies = isinstance(left, Node) and left in self.names and self.last_use[left] <= index
            # A name that the right side still has must not be given to the left one first.
            name = text if dies else self._result_name(node, index - 1)
            if name != text:
                self._write(f"{name} = {text}", scopes)
            self._write(f"{name} {_AUGMENTED[node.target]} {other}", scopes)
            self._hold(node, name)
            return
        text = self._expression(node)
        if not node.users:
            self._write(text, scopes)
            return
        name = self._result_name(node, index)
        self._hold(node, name)
        self._write(f"{name} = {text}", scopes)

    def _write(self, statement: str, scopes: tuple[Scope, ...]) -> None:
        group = group_of(scopes)
        if group != self.group:
            self.lines.append("")
            if group is not None:
                self.lines.append(f"{INDENT}# {group.path}: {group.kind}")
            self.group = group
        self.lines += wrapped(statement, INDENT)

    # Names.

    def _result_name(self, node: Node, index: int) -> str:
        if self._is_size(node):
            return self._free_name("size", index)
        scopes = self.recording.scopes.get(node, ())
        if not scopes:
            return self._free_name("x", index)
        path, group = scopes[-1].path, group_of(scopes)
        if group is not None and path.startswith(f"{group.path}.") and self._stays_in(node, group):
            path = path[len(group.path) + 1 :]
        return self._free_name(path.replace(".", "_"), index)

    def _stays_in(self, node: Node, group: Scope) -> bool:
        return all(group_of(self.recording.scopes.get(user, ())) == group for user in node.users)

    def _free_name(self, wish: str, index: int) -> str:
        name = "".join(c if (c.isalnum() and c.isascii()) or c == "_" else "_" for c in wish)
        if not name or name[0].isdigit():
            name = f"x{name}"
        if name in _RESERVED:
            name += "_"
        candidate, number = name, 2
        while candidate in self.holders and self.last_use[self.holders[candidate]] > index:
            candidate, number = f"{name}_{number}", number + 1
        return candidate

    def _hold(self, node: Node, name: str) -> None:
        self.names[node] = name
        self.holders[name] = node

    # Expressions.

    def _expression(self, node: Node) -> str:
        where = f"{node} in {self.recording.scopes[node][-1].path}" if self.recording.scopes.get(node) else str(node)
        if node.op == "get_attr":
            name = self.members.name_of(str(node.target))
            if name is None:
                raise ExportError(
                    f"{where}: expected a parameter or buffer, found {node.target}; register it on its module"
                )
            return member_path(name)
        if node.op == "call_module":
            return self._call(f"self.{self.members.layers[str(node.target)].attribute}", node, where, {})
        if node.op == "call_method":
            receiver, *rest = node.args
            arguments = self._arguments(tuple(rest), dict(node.kwargs), where, {})
            return f"{self._atom(receiver)}.{node.target}({', '.join(arguments)})"
        function: Any = node.target
        if function is getattr and len(node.args) == 2:
            return f"{self._atom(node.args[0])}.{node.args[1]}"
        if function is operator.getitem:
            return f"{self._atom(node.args[0])}[{self._index(node.args[1])}]"
        if function in _BINARY:
            return f"{self._atom(node.args[0])} {_BINARY[function]} {self._atom(node.args[1])}"
        if function in _UNARY:
            return f"{_UNARY[function]}{self._atom(node.args[0])}"
        return self._call(function_name(function, where), node, where, defaults_of(function))

    def _call(self, name: str, node: Node, where: str, defaults: dict[str, Any]) -> str:
        return f"{name}({', '.join(self._arguments(node.args, dict(node.kwargs), where, defaults))})"

    def _arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str, defaults: dict[str, Any]
    ) -> list[str]:
        parts = [self._text(arg, where) for arg in args]
        for key, value in kwargs.items():
            if key in defaults and type(value) is type(defaults[key]) and value == defaults[key]:
                continue
            parts.append(f"{key}={self._text(value, where)}")
        return parts

    def _text(self, value: Any, where: str) -> str:
        if isinstance(value, Node):
            return self._expression(value) if value in self.inlined else self.names[value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise ExportError(
                f"{where}: expected a tensor, tuple, list or dict, found the named tuple {type(value).__name__}"
            )
        if isinstance(value, (tuple, list)) and _has_node(value):
            items = [self._text(item, where) for item in value]
            if isinstance(value, list):
                return f"[{', '.join(items)}]"
            return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
        if isinstance(value, dict) and _has_node(value):
            return "{" + ", ".join(f"{literal(k, where)}: {self._text(v, where)}" for k, v in value.items()) + "}"
        if isinstance(value, slice) and _has_node(value):
            return f"slice({', '.join(self._text(v, where) for v in (value.start, value.stop, value.step))})"
        return literal(value, where)

    def _atom(self, value: Any) -> str:
        """The text of a value, in brackets where an operator or a dot follows."""
        text = self._text(value, "an operand")
        simple = isinstance(value, Node) and (value not in self.inlined or value.target not in {**_BINARY, **_UNARY})
        if simple or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
            return text
        return f"({text})"

    def _index(self, index: Any) -> str:
        if isinstance(index, tuple) and len(index) > 0:
            parts = [self._index(item) if isinstance(item, slice) else self._text(item, "an index") for item in index]
            return parts[0] + "," if len(parts) == 1 else ", ".join(parts)
        if isinstance(index, slice):
            start, stop, step = (
                None if v is None else self._text(v, "an index") for v in (index.start, index.stop, index.step)
            )
            return f"{start or ''}:{stop or ''}" + (f":{step}" if step is not None else "")
        return self._text(index, "an index")


def _has_node(value: Any) -> bool:
    if isinstance(value, Node):
        return True
    if isinstance(value, slice):
        return any(_has_node(v) for v in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return any(_has_node(v) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_has_node(v) for v in value)


def wrapped(statement: str, indent: str) -> list[str]:
    """A statement as lines of at most `WIDTH` characters, broken inside its last call's brackets where that is possible."""
    if len(indent) + len(statement) <= WIDTH or not statement.endswith(")") or '"' in statement:
        return [indent + statement]
    depth = 0
    for start in range(len(statement) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(statement[start], 0)
        if depth == 0:
            break
    inner = textwrap.wrap(
        statement[start + 1 : -1], WIDTH - len(indent) - 4, break_long_words=False, break_on_hyphens=False
    )
    return [f"{indent}{statement[: start + 1]}", *(f"{indent}    {line}" for line in inner), f"{indent})"]
