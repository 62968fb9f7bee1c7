"""The report: complete, self-contained, safe, and there at any moment of a run."""

from __future__ import annotations

import errno
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest

from nas.errors import RunError
from nas.frames import front_rows
from nas.report.html import MAX_FAILURES, MAX_NETWORKS, MAX_ROWS, render_report, write_report
from tests.nas.synthetic_run import OBJECTIVES, SyntheticRun, make_trial, sample, synthetic_run

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = '</script><script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


class Reader(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(synthetic_run(30, failed=0.15))


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


def test_the_page_asks_nothing_of_any_other_place(read, page):
    for name, value in read.attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert value.startswith(("#", "data:")), (name, value)
    assert not set(read.tags) & {"link", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in page
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(['\"]?([^)'\"]+)", page))


def test_ids_are_unique_and_every_anchor_leads_somewhere(read):
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    anchors = {value[1:] for name, value in read.attributes if name == "href" and value.startswith("#")}
    assert {"front", "searchers", "learning", "networks", "trials", "failures", "setting"} <= anchors <= set(ids)


def test_everything_a_reader_needs_is_there(read):
    run = synthetic_run(30, failed=0.15)
    text = read.text
    for wanted in (
        "Best validation accuracy: trial",
        "n = 1",
        "no claim",
        "Search",
        "shapes cannot be multiplied",
        "2.13.0",
    ):
        assert wanted.lower() in text.lower(), wanted
    for trial in front_rows(run.frame(), OBJECTIVES)["trial"]:
        assert f"{trial}*" in text
    assert "widths = [" in text  # the config
    assert read.tags.count("svg") >= 5


def test_the_same_run_gives_the_same_page_but_for_its_date(page):
    def dated(text):
        return re.sub(r"Written [^<.]*", "", text)

    assert dated(render_report(synthetic_run(30, failed=0.15))) == dated(page)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (synthetic_run(0, dense=0), "No trial has been proposed yet."),
        (synthetic_run(1, failed=0, infeasible=0, dense=0), "Best validation accuracy: trial 0"),
        (synthetic_run(6, failed=1, dense=0), "All 6 trials failed"),
        (synthetic_run(6, failed=0, infeasible=1, dense=0), "6 broke a constraint"),
        (synthetic_run(16, unfinished=8), "The search is not finished"),
    ],
    ids=["empty", "one", "all failed", "all infeasible", "running"],
)
def test_there_is_a_report_at_any_moment(run, says):
    assert says in Reader(render_report(run)).text


def test_more_trials_than_can_be_shown_give_a_page_of_bounded_size():
    run = synthetic_run(1000)
    text = render_report(run)
    assert len(text) < 4_000_000
    assert f"the last {MAX_ROWS} of 1002 trials" in text
    assert f"The last {MAX_FAILURES} of" in text
    assert text.count("<h3>What is executed</h3>") == MAX_NETWORKS


def evil_run() -> SyntheticRun:
    rng = random.Random(0)
    trials = [make_trial(i, "random", i, "complete", sample(rng), rng) for i in range(6)]
    for trial in trials:
        object.__setattr__(trial, "searcher", EVIL)
    failed = make_trial(6, "random", 6, "failed", sample(rng), rng)
    object.__setattr__(failed, "error", f"Traceback\n\x00\x1b[31m\ud800\n{EVIL}")
    run = SyntheticRun([*trials, failed])
    run.name = EVIL
    run.config["data"] = {"name": EVIL, EVIL: EVIL}
    run.environment = {EVIL: {EVIL: [EVIL, "\x00"]}}
    plan = run.plan_frame(0).assign(op=[EVIL] * len(run.plan_frame(0)), pattern=EVIL, kernel=EVIL)
    run.plan_frame = lambda trial: plan  # type: ignore[method-assign]
    run.space.name = EVIL
    graph = nx.DiGraph([("a", "b"), ("a", "c")])
    nx.set_node_attributes(graph, EVIL, "label")
    run.space.graph = lambda architecture: graph
    return run


def test_nothing_from_a_run_can_become_markup(tmp_path):
    path = write_report(evil_run(), tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    read = Reader(text)
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "\x00" not in text
    assert EVIL in read.text


def test_what_cannot_be_read_is_left_out_and_the_report_goes_on():
    run = synthetic_run(20)

    def broken(*_):
        raise RunError("gone")

    def buggy(*_):
        raise ZeroDivisionError

    run.plan_frame = broken  # type: ignore[method-assign]
    run.curve = broken  # type: ignore[method-assign]
    run.space.graph = buggy
    read = Reader(render_report(run))
    assert "cannot be read, so its layers are not shown" in read.text
    assert "Learning curves" not in read.text


def test_an_unwritable_place_is_one_clear_error_and_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="the report cannot be written"):
        write_report(synthetic_run(2), tmp_path / "missing" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunError, match="the report cannot be written"):
        write_report(synthetic_run(2), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_on_a_read_only_disk_the_report_still_fails_with_one_clear_error(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(RunError, match=r"report\.html: the report cannot be written: Read-only file system"):
        write_report(synthetic_run(2), tmp_path / "report.html")


def test_a_report_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(synthetic_run(2), path) == path
    assert path.read_text().startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
