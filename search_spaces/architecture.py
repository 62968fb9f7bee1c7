"""The value that names one network of a space: its decisions, in the order they were taken.

Start with `Architecture`. It holds no module and no weights; `Space` (space.py) makes and builds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool
"""What a decision can be: a JSON scalar."""


class SpaceError(ValueError):
    """A space, one of its options or a decision is not usable; says what was expected, found, where, and the cure."""


@dataclass(frozen=True)
class Architecture:
    """One point of a space, as a value: equal decisions are equal, hash equally and print readably.

    Made by `Space.sample`, `Space.architecture` and the like, never by hand, so that it is always valid.

    Attributes:
        space: name of the space.
        decisions: (name, value) in the order the space function asked.
        digest: 16 hex digits naming the *computation*: equal for architectures that compute the same network (space.py),
            the same in every process. Not part of equality.
    """

    space: str
    decisions: tuple[tuple[str, Value], ...]
    digest: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Value]:
        """The decisions as a dict, in order."""
        return dict(self.decisions)

    def __getitem__(self, name: str) -> Value:
        for known, value in self.decisions:
            if known == name:
                return value
        raise KeyError(f"{self.space} architecture {self.digest} has no decision {name!r}")

    def __contains__(self, name: object) -> bool:
        return any(known == name for known, _ in self.decisions)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal value back, in any process."""
        return json.dumps({"space": self.space, "digest": self.digest, "decisions": dict(self.decisions)})

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what `to_json` wrote. The decisions are checked when the architecture is used with its space.

        Raises:
            SpaceError: the text is not the JSON of an architecture.
        """
        try:
            raw: Any = json.loads(text)
            decisions = tuple((str(name), value) for name, value in raw["decisions"].items())
            result = cls(str(raw["space"]), decisions, str(raw["digest"]))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SpaceError(
                f'expected {{"space": ..., "digest": ..., "decisions": {{name: value}}}}, got {text[:80]!r} ({error})'
            ) from error
        for name, value in decisions:
            if not isinstance(value, str | int | float | bool):
                raise SpaceError(f"decision {name!r}: expected a JSON scalar, got {value!r}")
        return result

    def __str__(self) -> str:
        return f"{self.space}[{self.digest}] " + " ".join(f"{name}={value}" for name, value in self.decisions)
