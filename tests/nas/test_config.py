"""Run files: what they accept, what they say of mistakes, and that nothing is lost on the way to TOML and back."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from nas.config import METRICS, RunConfig, StoppingSection, differing_keys, load_config, parse_override
from nas.config_reference import reference
from nas.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_resolved_config_reads_back_to_an_equal_value(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "[search]\nsearchers = ['tpe']\noptions.tpe.startup = 3\n[train]\nlr = 1\naugment=['flip']\n"),
        {"train.epochs": 3},
    )
    assert load_config(write(tmp_path, config.to_toml())) == config


def test_random_search_is_always_there_and_the_name_is_the_files() -> None:
    config = load_config({"search": {"searchers": ["tpe"]}}, name="mine")
    assert config.search.searchers == ("random", "tpe")
    assert config.run.name == "mine"


@pytest.mark.parametrize("path", sorted((ROOT / "runs" / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_run_files_are_valid(path: Path) -> None:
    assert load_config(path).run.name == path.stem


def test_the_reference_is_the_default_config_and_stands_in_the_docs() -> None:
    read = tomllib.loads(reference())
    assert load_config(read, name="run") == load_config({}, name="run")
    assert set(read) == {section.name for section in fields(RunConfig)}, "a section is missing"
    assert set(read["stopping"]) == {key.name for key in fields(StoppingSection)}
    assert reference() in (ROOT / "docs" / "config.md").read_text(), (
        "docs/config.md is out of date: put the output of `nas config` into its code block"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nepocs = 3", r'\[train\] unknown key "epocs"; did you mean "epochs"'),
        ("[trian]\n", r'unknown section "trian"; did you mean "train"'),
        ("[train]\nepochs = 'ten'", r"\[train\] epochs: expected int, got 'ten'"),
        ("[train]\nepochs = 0", r"\[train\].*epochs"),
        ("[train]\nepochs = true", r"epochs: expected int, got True"),
        ("[run]\nworkers = -1", r"\[run\] workers: expected 0 to 1024, got -1"),
        ("[data]\nvalidation = 1.0", r"\[data\] validation: .*\(0, 1\)"),
        ("[search]\nsearchers = 'random'", r"searchers: expected a list"),
        ("[search]\nsearchers = []", r"searchers"),
        ("[search]\ntrials = 0", r"\[search\] trials"),
        ("[objectives]\nval_accuracy = 'up'", r"val_accuracy.*max"),
        ("[objectives]\ntest_accuracy = 'max'", r"never sees the test set"),
        ("[constraints]\nlatency_ms = '< 5'", r"latency_ms.*<="),
        ("[space]\nchannels = 3", r"\[space\] name"),
        ("[objectives]\nval_acuracy = 'max'", r'unknown metric "val_acuracy"; did you mean "val_accuracy"'),
        ("[objectives]\nlatency_source = 'min'", r'objectives: unknown metric "latency_source"'),
        ("[constraints]\nlatncy_ms = '<= 5'", r'constraints: unknown metric "latncy_ms"; did you mean "latency_ms"'),
        ("[constraints]\nlatency_quality = '<= 5'", r'constraints: unknown metric "latency_quality"'),
        ("[run]\nthreads = 1025", r"\[run\] threads: expected 1 to 1024"),
        ("[run]\nworkers = 1025", r"\[run\] workers: expected 0 to 1024"),
        ("[run]\ntrial_timeout_s = inf", r"trial_timeout_s: expected a finite"),
        ("[run]\ntrial_timeout_s = nan", r"trial_timeout_s: expected a finite"),
        (f"[run]\ntrial_timeout_s = 1{'0' * 400}", r"trial_timeout_s: expected float"),
        ("[run]\nworkers = 0\ntrial_timeout_s = 5", r"limit of 5 s cannot be enforced without worker processes"),
        ("[run]\nname = '.'", r"\[run\] name"),
        ("[run]\nname = '..'", r"\[run\] name"),
        ("[run]\nname = 'a/b'", r"\[run\] name"),
        ('[run]\nname = "a\\nb"', r"\[run\] name: .*'a\\nb'"),
        (f"[run]\nname = '{'x' * 201}'", r"\[run\] name"),
        ("[latency]\nthreads = 1025", r"\[latency\] threads: expected 1 to 1024"),
        ("[latency]\nrounds = 1001", r"\[latency\] rounds: expected 3 to 1000"),
        ("[latency]\nspacing_s = inf", r"spacing_s: expected 0 to 60"),
        ("[latency]\nspacing_s = nan", r"spacing_s: expected 0 to 60"),
        ("[latency]\nspacing_s = 60.5", r"spacing_s: expected 0 to 60"),
        ("[search]\ntrials = 10000001", r"\[search\] trials: expected 1 to 10000000"),
        ("[search]\ndense_baselines = 10000001", r"\[search\] dense_baselines"),
        ("[data]\nimage_size = 100000", r"\[data\] image_size: expected 0 to 4096"),
        ("[search]\noptions = {nsga2 = 3}", r"\[search\] options.nsga2: expected a table"),
        ("[search]\noptions.nsga3.population = 3", r'options.nsga3: unknown searcher "nsga3"; did you mean "nsga2"'),
        ("[search]\noptions.random.population = 3", r"options.random: .*has no option"),
        *(
            (f"[search]\nsearchers = ['random']\noptions.{option}", message)  # of searchers that are not used
            for option, message in (
                ("nsga2.populaton = 3", r'options.nsga2: .*did you mean "population"'),
                ("nsga2.population = 1", r"options.nsga2: .*population must be a whole number >= 2, got 1"),
                ("tpe.startup = 'few'", r"options.tpe: .*startup must be a whole number"),
                ("regularized_evolution.crossover = 2", r"crossover must be a number >= 0 and <= 1"),
                ("dense.draws = 0", r"options.dense: .*draws must be"),
            )
        ),
        ("train = 3", r"\[train\] expected a table"),
        ("[train", r"not valid TOML"),
    ],
)
def test_mistakes_name_file_section_and_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(write(tmp_path, text))
    assert "mine.toml" in str(caught.value)


def test_a_missing_file_and_a_folder_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file: .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="got a folder"):
        load_config(tmp_path)


def test_overrides_are_typed_like_the_file() -> None:
    overrides = dict(
        parse_override(text) for text in ("train.epochs=7", "space.name=darts", "train.augment=['flip']", "run.seed=3")
    )
    config = load_config({}, overrides)
    assert (config.train.epochs, config.space["name"], config.train.augment, config.run.seed) == (
        7,
        "darts",
        ("flip",),
        3,
    )
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_override("train.epochs")
    with pytest.raises(ConfigError, match="epochs"):
        load_config({}, {"train.epochs.more": 3})


def test_differing_keys_are_dotted_and_complete() -> None:
    one, two = (
        RunConfig().as_dict(),
        load_config({}, {"train.epochs": 11, "space.name": "mlp", "space.widths": [1]}).as_dict(),
    )
    two["run"]["name"] = ""
    assert differing_keys(one, two) == ["space.widths", "train.epochs"]
    assert differing_keys(one, one) == []


def test_the_limits_themselves_are_accepted() -> None:
    limits = {
        "run.threads": 1024, "run.workers": 1024, "run.name": "x" * 200, "latency.threads": 1024, "latency.rounds": 1000,
        "latency.spacing_s": 60, "search.trials": 10_000_000, "data.image_size": 4096,
    }  # fmt: skip
    config = load_config(
        {"search": {"options": {"nsga2": {"population": 2}, "dense": {"draws": 1}, "random": {}}}}, limits
    )
    assert config.latency.spacing_s == 60.0
    assert load_config({"run": {"workers": 0}}).run.workers == 0


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_aimed_at_and_constrained(metric: str) -> None:
    config = load_config({"objectives": {metric: "min"}, "constraints": {metric: "<= 3"}})
    assert config.objectives == {metric: "min"}
    assert metric in reference()
