"""What must hold of a finished run, whatever was killed during it: found again from its files, not from what the search says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nas import load_run
from nas.run import Run
from nas.setup import make_data
from nas.training import evaluate
from ops.counting import count


def check_run(folder: Path, trials: dict[str, int]) -> Run:
    """Exactly `trials` per searcher, none twice, none open; numbers and front equal those made again from the artifacts."""
    run = load_run(folder)
    assert run.finished
    rows = run.trials
    assert Counter(row.searcher for row in rows) == trials
    assert len({(row.searcher, row.index) for row in rows}) == len(rows)
    assert [row.trial for row in rows] == list(range(len(rows)))
    assert all(row.finished for row in rows)
    originals = [row for row in rows if row.copy_of is None]
    works = Counter((row.digest, row.seed, row.sampler.get("initial")) for row in originals if row.state != "failed")
    assert max(works.values()) == 1, "the same work was done twice"
    assert not list((folder / "checkpoints").glob("*")), "checkpoints of finished trials are still there"
    _check_numbers(run)
    _check_front(run)
    return run


def _check_numbers(run: Run) -> None:
    data = make_data(run.config)
    for row in run.trials:
        if row.state not in ("complete", "stopped"):
            continue
        network = run.build(row.trial)
        assert evaluate(network, data.val).accuracy == pytest.approx(row.metrics["val_accuracy"], abs=1e-12), row.trial
        assert count(network, data.input_shape).nnz == row.metrics["nnz"], row.trial
        assert len(run.curve(row.trial)) == row.metrics.get("trained_epochs", row.epochs), row.trial


def _check_front(run: Run) -> None:
    """The slow obvious front: a row stays unless another is at least as good in everything and better in something."""
    signs = [-1.0 if direction == "max" else 1.0 for direction in run.objectives.values()]
    points = {
        row.trial: tuple(sign * float(row.metrics[name] or 0) for sign, name in zip(signs, run.objectives, strict=True))
        for row in run.trials
        if row.state == "complete" and row.copy_of is None
    }
    front = {
        trial
        for trial, mine in points.items()
        if not any(all(a <= b for a, b in zip(other, mine)) and other != mine for other in points.values())
    }
    assert {points[trial] for trial in front} == {points[int(trial)] for trial in run.pareto()["trial"]}
