"""docs/oneshot.md says what is there: its table, its Python, its names."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nas.oneshot.algorithm import Options
from nas.oneshot.algorithms import ALGORITHMS

torch.set_num_threads(1)

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "oneshot.md").read_text()
COMMON = {field.name for field in fields(Options)}


def test_the_table_has_every_searcher_and_options_that_these_have_of_their_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", TEXT, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(ALGORITHMS)
    for name, _, listed in rows:
        own = {field.name for field in fields(ALGORITHMS[name].Options)} - COMMON
        named = set(re.findall(r"`(\w+)`", listed))
        assert named, name
        assert named <= own, name


def test_the_options_that_all_are_said_to_have_are_common() -> None:
    (sentence,) = re.findall(r"All of them have (.+?) and a few more", TEXT, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) <= COMMON


def test_modules_that_are_named_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    architecture = (root / "docs" / "architecture.md").read_text()
    (section,) = re.findall(r"## The way of a one-shot search\n(.*?)\n## ", architecture, re.DOTALL)
    for name in re.findall(r"`(\w+\.py)`", section):
        assert (root / "nas" / "oneshot" / name).is_file(), name
    for name in re.findall(r"`(nas\.[\w.]+)\.\w+`", TEXT):
        assert (root / f"{name.replace('.', '/')}.py").is_file(), name


def test_the_supernet_runs_as_printed() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, scope)
    assert all(alpha.grad is not None for alpha in scope["alphas"].tensors())
    network = scope["network"].train()
    torch.testing.assert_close(scope["logits"], network(scope["x"]), rtol=1e-4, atol=1e-5)
