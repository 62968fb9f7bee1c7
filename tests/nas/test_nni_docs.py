"""docs/nni.md says what is there: its Python runs as printed, its commands and names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.executors import EXECUTORS
from nas.oneshot.algorithms import ALGORITHMS
from nas.searchers import SEARCHERS

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "nni.md").read_text()


def test_the_python_runs_as_printed() -> None:
    pytest.importorskip("nni", reason="nni is not installed: pip install 'sparse-nas[nni]'")
    from ops.counting import count
    from search_spaces.genotypes import GENOTYPES

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["network"](torch.ones(2, 8, 8)).shape == (2, 10)
    assert count(scope["network"], (8, 8)).density < 0.6
    assert scope["mlp"].build(scope["architecture"])(torch.ones(2, 64)).shape == (2, 10)
    assert scope["genotype"] == GENOTYPES["DARTS_V2"]
    for label, value in re.findall(r'"(normal/\w+)": ("\w+"|\[\d\])', code):
        assert scope["cells"][label] == eval(value), label


def test_what_is_to_be_used_instead_exists() -> None:
    rows = re.findall(r"^\| .+ \| .+ \| (.*)\|$", TEXT, re.MULTILINE)
    assert len(rows) >= 8
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"space_from_nni"}
    assert named <= SEARCHERS.keys() | ALGORITHMS.keys()
    (command,) = re.findall(r"```bash\nnas search (\S+) --executor (\w+)", TEXT)
    assert (ROOT / command[0]).is_file()
    assert command[1] in EXECUTORS
