"""The README and the docs: what they print works as printed, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nas import load_run
from nas.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def block(language: str, marker: str) -> str:
    found = [text for lang, text in BLOCKS if lang == language and marker in text]
    assert len(found) == 1, f"README: expected one {language} block with {marker!r}, found {len(found)}"
    return found[0]


def test_every_command_the_readme_names_parses() -> None:
    lines = [line.split("#")[0] for lang, text in BLOCKS if lang == "bash" for line in re.split(r"\n|&&", text)]
    commands = [line.split("nas ", 1)[1].split() for line in lines if re.search(r"(^|/|\s)nas [a-z]", line)]
    assert {command[0] for command in commands} >= {"search", "results", "pareto", "show", "report", "export"}
    for command in commands:
        _parser().parse_args(command)


def test_the_users_own_space_runs_as_printed(tmp_path: Path) -> None:
    (tmp_path / "my_space.py").write_text(block("python", "def tiny("))
    config = block("toml", "my_space.py:tiny")
    assert tomllib.loads(config)["search"]["trials"] == 8
    (tmp_path / "my_run.toml").write_text(config)
    shorter = ["search.trials=1", "train.epochs=1", "latency.rounds=3", "latency.spacing_s=0", "data.limit=200"]
    more = [part for text in [*shorter, "search.dense_baselines=0", "final.export=false"] for part in ("--set", text)]
    found = subprocess.run(
        [sys.executable, "-m", "nas.cli", "search", "my_run.toml", *more],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    run = load_run(tmp_path / "runs" / "my_run")
    assert len(run.frame()) == 2
    run.build(0)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_files_named_in_the_docs_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:ops|search_spaces|hw_models|nas|tests|runs/configs|docs|benchmarks)/[\w/.]+)`", path.read_text()
    ):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for target in re.findall(r"\]\((?!http)([\w/.]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_genotype_example_runs_as_printed() -> None:
    code = block("python", "network_from_genotype")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert sum(p.numel() for p in scope["network"].parameters()) == 3_349_342  # type: ignore[attr-defined]
