"""The report's part about supernets: what is read of a search, what is drawn of it, and what `nas show` says of its trials."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nas.oneshot.darts import Darts, DartsOptions
from nas.oneshot.engine import RESULT, read_result, train_algorithm
from nas.report.alphas import (
    MAX_DECISIONS,
    MAX_REPLICATES,
    alphas_section,
    draw_probabilities,
    option_colours,
    searches_figure,
)
from nas.report.html import render_report
from nas.report.search_logs import SearchLog, decidedness, search_logs
from nas.report.show import oneshot_rows
from nas.report.style import GREY, svg_text
from tests.nas.oneshot_fakes import toy_data
from tests.nas.supernet_spaces import darts
from tests.nas.synthetic_run import synthetic_run
from tests.nas.test_report_html import EVIL, Reader

torch.set_num_threads(1)

OPTIONS = ["none", "skip_connect", "max_pool_3x3", "conv_3x3"]


def log_of(decisions: int = 3, epochs: int = 4, *, job: str = "darts-s0", taken: bool = True) -> SearchLog:
    """A search in two phases in which option number i of decision number i wins, the later ones less."""
    choices: dict[str, list[Any]] = {f"d{i}": OPTIONS for i in range(decisions)} | {"edge": [0, 1, 2], "width": [8, 16]}
    rows = []
    for epoch in range(epochs):
        alphas = {}
        for i in range(decisions):
            sure = (epoch + 1) / (epochs * (1 + i))
            row = [(1 - sure) / 4] * 4
            row[i % 4] += sure
            alphas[f"d{i}"] = row
        alphas["edge"] = [0.2, 0.3, 0.5]
        phase = "warm" if epoch < epochs // 2 else "search"
        rows.append(
            {"phase": phase, "epoch": epoch + 1, "train_loss": 2.0 - epoch * 0.1, "train_accuracy": 0.1 * epoch}
        )
        rows[-1] |= {"supernet_loss": 2.1 - epoch * 0.1, "supernet_accuracy": 0.2, "seconds": 1.0, "alphas": alphas}
    architecture = {"d0": "none", "d1": "conv_3x3", "edge": "0,2"}
    found = [{"decisions": architecture, "note": {"genotype": "Genotype(a)", "density": 0.1}}] if taken else []
    return SearchLog(job, taken, rows, choices, found, {"seconds": 61.0})


def write_log(folder: Path, log: SearchLog) -> None:
    """As the engine leaves it."""
    (folder / "oneshot" / log.job).mkdir(parents=True)
    found = [
        {
            "architecture": {"space": "s", "digest": "0", "decisions": one["decisions"]},
            "note": one["note"],
            "initial": None,
        }
        for one in log.found
    ]
    content = {"found": found, "facts": log.facts | {"choices": log.choices}, "log": log.rows}
    (folder / "oneshot" / log.job / RESULT).write_text(json.dumps(content))


def test_decidedness_is_0_for_equals_and_1_for_certainty() -> None:
    assert decidedness([0.25] * 4) == pytest.approx(0.0)
    assert decidedness([0.0, 1.0, 0.0]) == 1.0
    assert decidedness([1.0]) == 1.0
    assert decidedness([0.9, 0.1]) == pytest.approx(1 - 0.46899559)  # entropy of 0.9 is 0.469 bits


def test_the_most_decided_come_first_and_those_without_options_are_left_out() -> None:
    log = log_of()
    for row in log.rows:  # logged the other way round
        row["alphas"] = dict(sorted(row["alphas"].items(), reverse=True)) | {"a": [0.25] * 4}
    log.choices["a"] = OPTIONS
    assert log.decisions() == ["d0", "d1", "d2", "edge", "a"]
    assert log.probabilities("edge") == [[0.2, 0.3, 0.5]] * 4
    unknown = SearchLog("a-s0", True, log.rows, {"d1": OPTIONS})
    assert unknown.decisions() == ["d1"]


def test_what_was_taken_is_found_for_every_kind_of_choice() -> None:
    choices: dict[str, list[Any]] = {"op": OPTIONS, "edge": [0, 1, 2], "one": [0, 1], "width": [8, 16]}
    choices |= {"part": ["1", "0.25 unstructured", "0.5 2:4"], "gone": OPTIONS}
    decisions = {"op": "conv_3x3", "edge": "0,2", "one": "1", "width": 16, "part.density": 0.5, "part.pattern": "2:4"}
    log = SearchLog("a-s0", True, [], choices, [{"decisions": decisions, "note": {}}])
    taken = {name: log.taken(name) for name in choices}
    assert taken == {"op": (3,), "edge": (0, 2), "one": (1,), "width": (1,), "part": (2,), "gone": ()}
    dense = SearchLog("a-s0", True, [], choices, [{"decisions": {"part.density": 1.0}, "note": {}}])
    assert dense.taken("part") == (0,)
    assert SearchLog("a-s0", False, [], choices).taken("op") == ()


def test_the_share_of_skips_is_the_mean_probability_of_skip_pool_and_none() -> None:
    log = log_of(2, 1)
    d0, d1 = (log.rows[0]["alphas"][name] for name in ("d0", "d1"))
    assert log.skip_share() == [pytest.approx((sum(d0[:3]) + sum(d1[:3])) / 2)]
    plain = SearchLog("a-s0", True, [{"alphas": {"op": [0.5, 0.5]}}], {"op": ["conv_1x1", "conv_3x3"]})
    assert plain.skip_share() == []


def test_a_search_is_read_as_the_engine_leaves_it(tmp_path: Path) -> None:
    """Once under way, once finished: same log, same decisions, and what was found."""
    from nas.oneshot.algorithm import Setting

    space = darts(input_shape=(1, 2, 2), classes=3, channels=4, cells=2, operations=("skip_connect", "conv_1x1"))
    data = toy_data()
    setting = Setting(space, data.input_shape, data.classes, 0)
    looked: list[SearchLog] = []

    def look(info: dict[str, Any]) -> None:
        looked.extend(log for log in search_logs(tmp_path) if not log.finished)

    algorithm = Darts(setting, DartsOptions(epochs=2, batch_size=18, alpha_lr=0.1, checkpoint_s=0.0))
    train_algorithm(algorithm, data, tmp_path / "oneshot" / "darts-s0", seed=0, report=look)
    (log,) = search_logs(tmp_path)
    assert log.finished
    assert len(log.rows) == 2
    assert looked[-1].rows == log.rows
    assert looked[-1].choices == log.choices
    assert len(log.decisions()) == 14  # a cell of every kind that there is, two operations each
    assert log.choices["reduce.node0.from0.op"] == ["skip_connect", "conv_1x1"]
    architecture = read_result(tmp_path / "oneshot" / "darts-s0").found[0]["architecture"]["decisions"]
    kept = [name for name in log.decisions() if name in architecture]
    assert len(kept) == 8
    for name in kept:
        (i,) = log.taken(name)
        assert log.choices[name][i] == architecture[name]
        assert log.probabilities(name)[-1][i] == max(log.probabilities(name)[-1])


def test_replicates_are_in_order_and_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    for job in ("b-s10", "b-s9", "a-s0"):
        write_log(tmp_path, log_of(job=job))
    (tmp_path / "oneshot" / "c-s0").mkdir()
    (tmp_path / "oneshot" / "d-s0").mkdir()
    (tmp_path / "oneshot" / "d-s0" / RESULT).write_text("{")
    assert [log.job for log in search_logs(tmp_path)] == ["a-s0", "b-s9", "b-s10"]
    assert search_logs(tmp_path / "nowhere") == []


def test_options_have_the_colour_of_their_kind() -> None:
    colours = option_colours(["none", "skip_connect", "max_pool_3x3", "avg_pool_3x3", "conv_3x3", "sep_conv_5x5"])
    assert colours["none"] == GREY
    assert len(set(colours.values())) == 6
    assert option_colours(["conv_1x1", "conv_3x3"])["conv_1x1"] == colours["conv_3x3"]


def test_layers_add_up_to_the_height_and_what_was_taken_lies_below_in_full_colour() -> None:
    log = log_of(1)
    svg = draw_probabilities(log, ["d0"]).svg("x")
    titles = re.findall(r"<g><title>d0: (.*?)</title><path d=\"(.*?)\" fill=\"(.*?)\"(.*?)/>", svg)
    assert [title.split()[0] for title, *_ in titles] == ["none", "skip_connect", "max_pool_3x3", "conv_3x3"]
    assert titles[0][0] == "none 0.438 to 1.000, taken"
    assert ["opacity" in more for *_, more in titles] == [False, True, True, True]
    heights = [[float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)] for _, path, *_ in titles]
    assert max(heights[0]) - min(heights[-1]) == pytest.approx(44)
    assert heights[0][0] == max(heights[0])  # it begins at the bottom
    other = draw_probabilities(log_of(2), ["d1"]).svg("x")
    assert re.findall("<title>d1: (.*?) ", other) == ["conv_3x3", "none", "skip_connect", "max_pool_3x3"]


def test_a_panel_names_what_was_taken_or_the_favourite_of_a_decision_that_was_not() -> None:
    svg = draw_probabilities(log_of(3), ["d1", "d2", "edge"]).svg("x")
    assert ">conv_3x3 0.12</text>" in svg  # taken, though skip_connect has more
    assert ">max_pool_3x3 0.50</text>" in svg  # not in the architecture
    assert ">0, 2 0.70</text>" in svg


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_short_and_long_searches_are_drawn(epochs: int) -> None:
    log = log_of(2, epochs)
    svg = draw_probabilities(log, log.decisions()).svg("x")
    assert len(svg) < 60_000
    assert svg_text(searches_figure([log]), "x").startswith("<svg")


def test_phases_are_marked() -> None:
    text = svg_text(searches_figure([log_of()]), "x")
    assert text.count("warm") == text.count("search</text>") == 3
    plain = log_of()
    for row in plain.rows:
        row["phase"] = "only"
    assert "only" not in svg_text(searches_figure([plain]), "x")


def test_the_section_shows_every_search_once_with_what_it_found(tmp_path: Path) -> None:
    for job in ("dass-s0", "dass-s1", "darts-s0"):
        write_log(tmp_path, log_of(MAX_DECISIONS + 3, job=job))
    section = alphas_section(SimpleNamespace(folder=tmp_path))
    read = Reader(section)
    assert re.findall("<h3>(.*?)</h3>", section) == ["darts", "dass"]
    assert [w for w in read.words if re.fullmatch(r"(dass|darts)-s\d ", w)] == ["darts-s0 ", "dass-s0 ", "dass-s1 "]
    assert section.count("Genotype(a)") == 3
    assert "Found (density 0.1):" in section
    assert "4 more" in section  # the rest is folded
    assert "1 of 28 decisions give one option more than 90%" in section
    assert "4 epochs, 1 found, 1 min 01 s, supernet's accuracy 0.2000" in read.text


def test_a_search_under_way_or_without_parameters_says_so(tmp_path: Path) -> None:
    log = log_of(1)
    for row in log.rows:
        row["alphas"] = {}
    write_log(tmp_path, log)
    assert "no architecture parameters" in alphas_section(SimpleNamespace(folder=tmp_path))
    assert alphas_section(SimpleNamespace(folder=tmp_path / "none")) == ""


def test_many_replicates_are_counted(tmp_path: Path) -> None:
    for r in range(MAX_REPLICATES + 2):
        write_log(tmp_path, log_of(1, 2, job=f"darts-s{r}"))
    section = alphas_section(SimpleNamespace(folder=tmp_path))
    assert section.count("<details") == MAX_REPLICATES
    assert "2 more replicates are not drawn" in section


def test_the_report_has_the_section_where_there_are_supernets_and_is_safe(tmp_path: Path) -> None:
    run = synthetic_run(4)
    assert 'href="#supernets"' not in render_report(run)
    log = log_of(1)
    log.choices["d0"] = [EVIL, *OPTIONS[1:]]
    log.found[0]["note"]["genotype"] = EVIL
    write_log(tmp_path, log)
    run.folder = tmp_path
    page = render_report(run)
    assert 'href="#supernets"' in page
    read = Reader(page)
    assert "evil.example" in read.text
    assert not any("evil" in value for name, value in read.attributes if name in ("src", "href"))
    assert page.count("<script>") == 1


def test_a_trial_says_which_search_found_it() -> None:
    note = {
        "replicate": 1,
        "genotype": "Genotype(a)",
        "density": 0.1,
        "group": "0.1",
        "pattern": "2:4",
        "pairs": [1],
        "kept": None,
    }
    rows = dict(oneshot_rows(SimpleNamespace(sampler=note, searcher="dass", seed=8)))
    assert rows == {
        "found by": "search dass-s1 of replicate 1, seed 8",
        "what the search says": "density 0.1, pattern 2:4",
        "genotype": "Genotype(a)",
    }
    note = {"replicate": 0, "control_of": "dass", "found_index": 2, "kept_wanted": 12345}
    rows = dict(oneshot_rows(SimpleNamespace(sampler=note, searcher="dass/random", seed=8)))
    assert rows == {"control of": "dass-s0, its architecture 2, at 12,345 kept weights"}
    assert oneshot_rows(SimpleNamespace(sampler={}, searcher="random", seed=0)) == []
