"""Every key of a run file with its meaning and default, as a commented TOML file: `nas config` prints it, docs/config.md holds it.

Made from the section classes and their docstrings, so it cannot say anything else than the code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

import tomli_w

from nas.config import METRICS, RunConfig

SECTIONS = tuple(section.name for section in fields(RunConfig))
_HEADINGS = {
    "space": "`[space]`: name is mlp, convnet, darts, nasnet, nasbench201, or your own: file.py:function or module:function. "
    "All other keys are options of that space.",
    "objectives": "`[objectives]`: metric = max or min; the first one picks the exported network. "
    f"Metrics: {', '.join(METRICS)}.",
    "constraints": '`[constraints]`: hard limits on the same metrics, e.g. latency_ms = "<= 5" or val_accuracy = ">= 0.9". '
    "A network that breaks one on its cost is not trained; it is kept and marked infeasible.",
}


def reference() -> str:
    """The commented TOML text; reading it back gives the default config."""
    parts = ["# Every key of a run file with its default. All are optional."]
    for section in SECTIONS:
        found = next(f for f in fields(RunConfig) if f.name == section)
        default = _default(found)
        if isinstance(default, dict):
            body = tomli_w.dumps(default) if default else ""
            more = _space_options() if section == "space" else ""
            parts.append(_comment(_HEADINGS[section]) + f"[{section}]\n{body}{more}".rstrip())
            continue
        summary, meanings = _documented(type(default))
        lines = [_comment(f"`[{section}]`: " + re.sub(r"^`\[\w+\]`: ", "", summary)) + f"[{section}]"]
        for key in fields(type(default)):
            value = _default(key)
            text = meanings.get(key.name, "")
            if value is None:
                lines.append(_comment(text) + f"# {key.name} =")
            elif isinstance(value, dict):
                more = _oneshot_options() if (section, key.name) == ("search", "options") else ""
                lines.append(_comment(text) + more + f"{key.name} = {{}}")
            else:
                shown = json.dumps(value) if isinstance(value, tuple) else tomli_w.dumps({"v": value}).strip()[4:]
                lines.append(_comment(text) + f"{key.name} = {shown}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _space_options() -> str:
    """The options of every shipped space with their defaults, as comments."""
    from search_spaces import SPACES

    lines = []
    for name, where in SPACES.items():
        function = getattr(importlib.import_module(where.partition(":")[0]), name)
        options = [
            f"{p.name} = {json.dumps(p.default)}"
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in ("input_shape", "classes")
        ]
        lines.append(_comment(f"{name}: " + "; ".join(options)))
    return "".join(lines)


def _oneshot_options() -> str:
    """The options of one-shot searchers: those that all have with their meanings, then what each has beside or otherwise."""
    from nas.oneshot.algorithm import Options
    from nas.oneshot.algorithms import ALGORITHMS

    lines = ["One-shot searchers all have the options:"]
    meanings = _documented(Options)[1]
    by_meaning: dict[str, list[str]] = {}
    for option in fields(Options):
        by_meaning.setdefault(meanings.get(option.name, ""), []).append(f"{option.name} = {_shown(option)}")
    lines += [f"  {', '.join(names)}: {meaning}" for meaning, names in by_meaning.items()]
    shared = {option.name: _shown(option) for option in fields(Options)}
    for name, algorithm in ALGORITHMS.items():
        meanings = _documented(algorithm.Options)[1]
        own = [option for option in fields(algorithm.Options) if shared.get(option.name) != _shown(option)]
        texts = [
            f"{option.name} = {_shown(option)}"
            + (f" ({meanings[option.name].rstrip('.')})" if option.name in meanings else "")
            for option in own
        ]
        lines.append(f"{name}, beside these: " + ("; ".join(texts) or "nothing"))
    return _comment("\n".join(lines))


def _shown(option: Field[Any]) -> str:
    value = _default(option)
    return "none" if value is None else json.dumps(value)


def _default(found: Field[Any]) -> Any:
    return found.default_factory() if found.default_factory is not MISSING else found.default


def _documented(cls: type) -> tuple[str, dict[str, str]]:
    """First paragraph of a class docstring, and its "Attributes:" by name."""
    text = inspect.getdoc(cls) or ""
    head, _, tail = text.partition("Attributes:")
    tail = textwrap.dedent(tail.strip("\n"))
    tail = re.split(r"\n\n|\n(?=\S[^:\n]*:\s*$)", tail)[0]
    meanings: dict[str, str] = {}
    for match in re.finditer(r"^(\w+(?:, \w+)*): (.*(?:\n[ \t]+.*)*)", tail, re.MULTILINE):
        for name in match.group(1).split(", "):
            meanings[name] = " ".join(match.group(2).split())
    return " ".join(head.split("\n\n")[0].split()), meanings


def _comment(text: str) -> str:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 116)]
    return "".join(f"# {line}\n" for line in lines)
