"""The benchmark of supernet steps: that it compares equal things, sees unequal ones, and writes what it measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import supernet_step
from benchmarks.supernet_step import CASES, Case, Step, differences, measure, tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def little(name: str) -> Case:
    """A case so small that its step takes milliseconds."""
    case = tiny(CASES[name])
    few = {"operations": ("skip_connect", "max_pool_3x3", "dil_conv_5x5")} if case.space == "darts" else {}
    return Case(case.space, {**case.arguments, **few}, case.batch, case.searcher, case.options)


@pytest.mark.parametrize("name", ["darts, small", "pcdarts, K=4", "dass, masks and weights", "nasbench201"])
def test_both_forms_start_equal_and_stay_so_when_both_have_moved(name: str) -> None:
    plain, fast = (Step(little(name), form, CPU) for form in (False, True))
    assert plain.search.supernet.board.fast is False
    assert fast.search.supernet.board.fast is True
    assert differences(plain, fast)[0] < 1e-9
    for step in (plain, fast):
        step.architecture()
        step.weights()
    for a, b in zip(plain.search.alphas.tensors(), fast.search.alphas.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    one, other = plain.search.supernet.by_key(), fast.search.supernet.by_key()
    for key, weight in one.items():
        torch.testing.assert_close(other[key], weight, rtol=1e-3, atol=1e-3)


def test_the_plain_form_calls_every_candidate_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = (Step(little("darts, small"), form, CPU) for form in (False, True))
    calls: list[str] = []
    real = supernet_step.torch.nn.functional.max_pool2d

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append("pool")
        return real(*arguments, **named)

    monkeypatch.setattr("torch.nn.functional.max_pool2d", counted)
    counts = []
    for step in (plain, fast):
        calls.clear()
        step.weights()
        counts.append(len(calls))
    mixed = [m for m in plain.search.supernet.modules() if type(m).__name__ == "MixedOp"]
    assert counts[0] == len(mixed)
    assert 0 < counts[1] < counts[0]


def test_forms_that_differ_are_an_error_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.oneshot import fast

    real = fast.weighted_sum
    monkeypatch.setattr(fast, "weighted_sum", lambda *arguments: 1.01 * real(*arguments))
    with pytest.raises(AssertionError, match="double precision"):
        measure("darts", little("darts"), 1, CPU)


def test_a_row_for_each_part_and_their_sum() -> None:
    rows = measure("nasbench201", little("nasbench201"), 2, CPU)
    assert [row["part"] for row in rows] == ["architecture", "weights", "both"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["fast_ms"])
        assert row["plain_ms"] > 0
        assert row["rounds"] == 2
    assert rows[2]["plain_ms"] >= 0.99 * (rows[0]["plain_ms"] + rows[1]["plain_ms"])


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "nasbench201", little("nasbench201"))
    path, arguments = tmp_path / "t.csv", ["--space", "nasbench201", "--rounds", "1", "--publish"]
    code = supernet_step.main([*arguments, str(path)])
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == bool(code)
    written = pd.read_csv(path, comment="#")
    assert list(written.part) == ["architecture", "weights", "both"]
    assert set(written.case) == {"nasbench201"}
    assert path.read_text().startswith("# machine: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--cases", "darts", "--space", "nasnet"], "no case of space nasnet"),
        (["--space", "mlp"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        supernet_step.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        supernet_step.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err
