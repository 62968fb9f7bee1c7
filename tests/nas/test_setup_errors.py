"""What the user reads when an executor's task cannot be set up."""

from __future__ import annotations

import pytest

from nas.errors import DataError, EvaluationFailed
from nas.executors.base import Job
from nas.executors.inline import InlineExecutor
from nas.executors.local import LocalExecutor
from nas.executors.task import describe, setup_error

TASK = "tests.nas.executor_tasks"


def run_one(kind: type[InlineExecutor] | type[LocalExecutor]) -> None:
    with kind(f"{TASK}:setup_raises", {}) as executor:
        executor.submit(Job(0, 1, {}))
        for _ in range(40):
            executor.poll(0.5)


@pytest.mark.parametrize("kind", [InlineExecutor, LocalExecutor])
def test_a_setup_that_raises_is_told_by_its_own_last_line_and_no_traceback(kind) -> None:
    with pytest.raises(EvaluationFailed) as caught:
        run_one(kind)
    text = str(caught.value)
    assert text.endswith("no trial was run: ValueError: no such thing as luck")
    assert "Traceback" not in text


def test_our_own_kinds_of_error_stay_as_they_were() -> None:
    error = setup_error(describe(DataError("digits.csv: expected 64 columns, found 63")), "m:f")
    assert (type(error), str(error)) == (DataError, "digits.csv: expected 64 columns, found 63")
