"""The run file: TOML in, a checked `RunConfig` out, and back to TOML as resolved.

Every value has a default, a type and a range; what is wrong is said with the file, the section and the key. Start with
`load_config`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from nas.datasets.raw import MAX_IMAGE_SIZE
from nas.errors import ConfigError, NasError
from nas.objectives import parse_constraints, parse_objectives
from nas.searchers import check_options
from nas.training import TrainConfig
from nas.typed import typed

METRICS = (
    "val_accuracy", "val_loss", "latency_ms", "latency_lo_ms", "latency_hi_ms", "params", "nnz", "kept_weights", "density",
    "weight_bytes", "dense_macs", "macs", "energy_mj",
)  # fmt: skip
"""What a trial measures: all that can be an objective or be constrained."""

MAX_PROCESSES = 1024
"""Of workers, and of threads each: more than any machine has, few enough to be started by mistake."""
MAX_TRIALS = 10_000_000
MAX_NAME = 200
"""Characters of run.name; file systems allow 255 bytes."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class RunSection:
    """`[run]`: where and on how many processes. All but name, seed and threads may differ when a run is continued.

    Attributes:
        name: the folder under runs/; default the config's file name.
        seed: of everything random: data split, proposals, initial weights, masks, training.
        workers: processes of executor "local" that train trials, at most 1024; 0 trains in the main process.
        executor: "local" (processes), "inline" (this process), "ray" (tasks of a Ray cluster), "tune" (Ray Tune), "workers" (`nas
            worker` processes anywhere that take trials from the run's PostgreSQL database), "nni" (an NNI experiment).
        address: of the Ray cluster: "auto" (the one this machine belongs to), "HOST:6379", "ray://HOST:10001"; "" starts one on
            this machine and ends it with the search.
        max_concurrent: trials at a time on a cluster; 0 for as many as there is room for.
        cpus_per_trial: CPUs that a trial occupies on a cluster.
        gpus_per_trial: GPUs that a trial occupies on a cluster; 0.25 puts four on one.
        trial_timeout_s: a trial that takes longer is a failed row; 0 for no limit. Needs at least one worker. With a stopping
            rule each part of a training between two pauses has this time; after the death of its process the time begins anew.
        threads: CPU threads of each worker, at most 1024.
        checkpoint_s: seconds between two checkpoints of a training, written at the ends of epochs: what is lost at most when a
            process dies.
        keep_weights: "all" keeps the trained weights of every trial; "front" only of those on the front and of one-shot searches.
        tensorboard: write learning curves for TensorBoard to RUN/tensorboard, too.
    """

    name: str = ""
    seed: int = 0
    workers: int = 1
    executor: str = "local"
    address: str = ""
    max_concurrent: int = 0
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    trial_timeout_s: float = 0.0
    threads: int = 1
    checkpoint_s: float = 60.0
    keep_weights: Literal["all", "front"] = "all"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, f"seed: expected 0 <= seed < 2**31, got {self.seed}")
        _require(0 <= self.workers <= MAX_PROCESSES, f"workers: expected 0 to {MAX_PROCESSES}, got {self.workers}")
        _require(1 <= self.threads <= MAX_PROCESSES, f"threads: expected 1 to {MAX_PROCESSES}, got {self.threads}")
        _require(
            0 <= self.max_concurrent <= MAX_TRIALS,
            f"max_concurrent: expected 0 (as many as there is room for) to {MAX_TRIALS}, got {self.max_concurrent}",
        )
        for name, value, least in (
            ("cpus_per_trial", self.cpus_per_trial, "0"),
            ("gpus_per_trial", self.gpus_per_trial, "0"),
            ("checkpoint_s", self.checkpoint_s, "0"),
        ):
            _require(0 <= value < math.inf, f"{name}: expected a finite number >= {least}, got {value}")
        _require(
            self.cpus_per_trial > 0 or self.gpus_per_trial > 0,
            "cpus_per_trial: expected a number above 0 where gpus_per_trial is 0: a trial must occupy something",
        )
        _require(
            0 <= self.trial_timeout_s < math.inf,
            f"trial_timeout_s: expected a finite number of seconds >= 0 (0 for no limit), got {self.trial_timeout_s}",
        )
        _require(
            self.workers > 0 or self.executor != "local" or self.trial_timeout_s == 0,
            f"trial_timeout_s: a limit of {self.trial_timeout_s:g} s cannot be enforced without worker processes "
            "(workers = 0); set workers to 1 or more, or trial_timeout_s to 0",
        )
        _require(
            self.name not in (".", "..")
            and self.name.isprintable()
            and not set("/\\") & set(self.name)
            and len(self.name) <= MAX_NAME,
            f"name: expected the name of a folder: printable, without slashes, at most {MAX_NAME} characters, not . or .., "
            f"got {self.name!r}",
        )


@dataclass(frozen=True)
class DataSection:
    """`[data]`: see `nas.data.load_data`.

    Attributes:
        name: "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", or a path to a folder of images, .npz, CSV or TSV.
        path: folder that holds the files of a known set (not of digits, which needs none), or where `name` is looked for.
        validation: share of the training part that is held out to choose by; the test part is never used for that.
        image_size: resize images to this height and width, at most 4096; 0 leaves them.
        limit: use only this many training rows, stratified; 0 for all.
        label: name of the label column of a table; default its last.
        test: path of a separate test file or folder, of the same kind as `name`.
    """

    name: str = "digits"
    path: str = ""
    validation: float = 0.15
    image_size: int = 0
    limit: int = 0
    label: str = ""
    test: str = ""

    def __post_init__(self) -> None:
        _require(0 < self.validation < 1, f"validation: expected a share in (0, 1), got {self.validation}")
        _require(
            0 <= self.image_size <= MAX_IMAGE_SIZE,
            f"image_size: expected 0 to {MAX_IMAGE_SIZE} pixels, got {self.image_size}",
        )
        _require(self.limit >= 0, f"limit: expected rows >= 0, got {self.limit}")


@dataclass(frozen=True)
class SearchSection:
    """`[search]`: who proposes, and how often.

    Attributes:
        searchers: of random, regularized_evolution, tpe, nsga2, which get the same number of trials each, random search always
            being among them; and of the one-shot searchers, which train supernets first and then have one trial per
            architecture that they found.
        trials: per searcher, at most 10 million; not of one-shot searchers.
        dense_baselines: dense networks of the space trained beside them: the smallest, then by quantiles of size; 0 for none.
        options: per searcher, e.g. options.nsga2.population = 16; the defaults of population and startup are fitted to
            `trials`. nsga2: population, crossover, asks. regularized_evolution: population, tournament, crossover. tpe:
            startup, candidates, asks. dense: draws. One-shot searchers: see the list.
    """

    searchers: tuple[str, ...] = ("random", "nsga2")
    trials: int = 16
    dense_baselines: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(len(self.searchers) > 0, "searchers: expected at least one name, got none")
        _require(len(set(self.searchers)) == len(self.searchers), f"searchers: a name repeats: {list(self.searchers)}")
        _require(1 <= self.trials <= MAX_TRIALS, f"trials: expected 1 to {MAX_TRIALS}, got {self.trials}")
        _require(
            0 <= self.dense_baselines <= MAX_TRIALS,
            f"dense_baselines: expected 0 to {MAX_TRIALS}, got {self.dense_baselines}",
        )
        for searcher, options in self.options.items():
            _require(
                isinstance(options, Mapping),
                f"options.{searcher}: expected a table of options, e.g. options.nsga2.population = 16, got {options!r}",
            )
            try:
                check_options(searcher, options)
            except NasError as error:
                raise ConfigError(f"options.{searcher}: {error}") from error


@dataclass(frozen=True)
class StoppingSection:
    """`[stopping]`: which trainings end early. Judged by val_accuracy at equal epochs, never by a cost; see `nas.stopping`.

    Attributes:
        rule: "none"; "asha" (of the trainings that reached a rung, the best 1/reduction go on); "median" (a training below the
            median of the others at its epoch ends); "pbt" (none ends, the worst go on with the training settings of the best).
        min_epochs: epochs before anything is judged. Masks have their final density by then, whatever the sparsity method.
        reduction: of asha: rungs at min_epochs x reduction^k epochs.
        interval: of median and pbt: epochs between two judgements.
        startup: results at a rung before any training there is stopped or changed.
    """

    rule: Literal["none", "asha", "median", "pbt"] = "none"
    min_epochs: int = 1
    reduction: float = 3.0
    interval: int = 1
    startup: int = 4

    def __post_init__(self) -> None:
        _require(self.min_epochs >= 1, f"min_epochs: expected >= 1, got {self.min_epochs}")
        _require(1 < self.reduction <= 1000, f"reduction: expected above 1, at most 1000, got {self.reduction}")
        _require(self.interval >= 1, f"interval: expected >= 1, got {self.interval}")
        _require(self.startup >= 1, f"startup: expected >= 1, got {self.startup}")


@dataclass(frozen=True)
class LatencySection:
    """`[latency]`: how the latency of a candidate on this CPU is found.

    Attributes:
        model: "measure" times every candidate, some seconds each (`hw_models.latency`). "predict" asks the model that
            `nas calibrate` made of this machine, some milliseconds each; a limit on latency_ms then holds for the upper end of the
            interval, and every network the run hands out is measured first.
        batch: inputs per call.
        threads: CPU threads of the measured network, at most 1024.
        rounds: interleaved rounds per network, 3 to 1000.
        spacing_s: least wall time between two rounds of one network, at most 60.
    """

    model: Literal["measure", "predict"] = "measure"
    batch: int = 1
    threads: int = 1
    rounds: int = 8
    spacing_s: float = 0.3

    def __post_init__(self) -> None:
        _require(self.batch >= 1, f"batch: expected >= 1, got {self.batch}")
        _require(1 <= self.threads <= MAX_PROCESSES, f"threads: expected 1 to {MAX_PROCESSES}, got {self.threads}")
        _require(3 <= self.rounds <= 1000, f"rounds: expected 3 to 1000, got {self.rounds}")
        _require(0 <= self.spacing_s <= 60, f"spacing_s: expected 0 to 60 seconds, got {self.spacing_s}")


@dataclass(frozen=True)
class FinalSection:
    """`[final]`: what is done with the front when all trials are in.

    Attributes:
        export: export the most accurate feasible network of the front.
        verify: measure the latency of the front once more, all networks interleaved and nothing else running. Must be true where
            latencies were predicted.
    """

    export: bool = True
    verify: bool = True


@dataclass(frozen=True)
class RunConfig:
    """A whole run file, checked. `space` holds the space's name and its options."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    space: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    search: SearchSection = field(default_factory=SearchSection)
    objectives: dict[str, str] = field(default_factory=lambda: {"val_accuracy": "max", "latency_ms": "min"})
    constraints: dict[str, str] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    stopping: StoppingSection = field(default_factory=StoppingSection)
    latency: LatencySection = field(default_factory=LatencySection)
    final: FinalSection = field(default_factory=FinalSection)

    def __post_init__(self) -> None:
        _require(
            self.final.verify or self.latency.model == "measure",
            '[final] verify: expected true, because [latency] model = "predict" and what a run hands out is measured first; '
            'leave it out, or set [latency] model = "measure"',
        )
        _require(
            self.train.method != "fixed",
            '[train] method: "fixed" is for masks that a search has found; expected static, gradual, rigl or hydra',
        )
        _require(
            self.stopping.rule == "none" or self.stopping.min_epochs < self.train.epochs,
            f"[stopping] min_epochs: expected less than train.epochs = {self.train.epochs}, got {self.stopping.min_epochs}: "
            "nothing could ever be stopped",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as they would stand in the TOML file."""
        return _plain(asdict(self))

    def to_toml(self) -> str:
        """The resolved config as TOML; `load_config` reads it back to an equal value."""
        return tomli_w.dumps(self.as_dict())


CHANGEABLE = frozenset(
    f"run.{key}"
    for key in (
        "workers",
        "executor",
        "address",
        "max_concurrent",
        "cpus_per_trial",
        "gpus_per_trial",
        "trial_timeout_s",
        "checkpoint_s",
        "keep_weights",
        "tensorboard",
    )
)
"""Keys that may differ when a run is continued: they say where it runs, not what it computes."""


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, name: str | None = None
) -> RunConfig:
    """Read and check a run file.

    Args:
        source: a TOML file, or its content as nested dicts.
        overrides: dotted keys, e.g. {"train.epochs": 20}; a value given as text is read as TOML where that is possible.
        name: default for run.name; the file's stem if not given.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; names file, section and key.
    """
    if isinstance(source, Mapping):
        where, raw, stem = "config", _copied(source), name or "run"
    else:
        path = Path(source)
        where, raw, stem = str(path), _read_toml(path), name or path.stem
    for key, value in (overrides or {}).items():
        _set(raw, key, value)
    config = _section(RunConfig, raw, where, "")
    if "name" not in config.space or not isinstance(config.space["name"], str):
        raise ConfigError(
            f'{where}: [space] name: expected the name of a space, e.g. name = "convnet", got {config.space.get("name")!r}'
        )
    try:
        objectives = parse_objectives(config.objectives, METRICS)
        parse_constraints(config.constraints, METRICS)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    searchers = config.search.searchers if "random" in config.search.searchers else ("random", *config.search.searchers)
    run = config.run if config.run.name else replace(config.run, name=stem)
    return replace(config, run=run, objectives=dict(objectives), search=replace(config.search, searchers=searchers))


def differing_keys(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested dicts, in order."""
    found = []
    for key in dict.fromkeys([*one, *two]):
        a, b, dotted = one.get(key, MISSING), two.get(key, MISSING), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{dotted}.")
        elif a != b:
            found.append(dotted)
    return found


def parse_override(text: str) -> tuple[str, Any]:
    """Split "train.epochs=20" into key and value; the value is read as TOML, else taken as text.

    Raises:
        ConfigError: there is no "=".
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f'--set: expected KEY=VALUE such as train.epochs=20, got "{text}"')
    return key.strip(), value.strip()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"no such config file: {path}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: expected a TOML file, got a folder") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    if isinstance(value, str):
        with contextlib.suppress(tomllib.TOMLDecodeError):  # plain text such as a name is taken as it is
            value = tomllib.loads(f"v = {value}")["v"]
    *sections, key = dotted.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {dotted}: {section} is a value, not a section")
    raw[key] = value


def _section(cls: type, raw: Any, where: str, section: str) -> Any:
    """Make dataclass `cls` from a TOML table, every key and type checked."""
    label = f"{where}: [{section}]" if section else f"{where}:"
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{label} expected a table of keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            kind = "key" if section else "section"
            raise ConfigError(f'{label} unknown {kind} "{key}"{hint} known: {", ".join(sorted(known))}')
        if hasattr(hints[key], "__dataclass_fields__"):
            values[key] = _section(hints[key], value, where, f"{section}.{key}" if section else key)
        else:
            values[key] = typed(value, hints[key], f"{label} {key}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{label} {error}") from error
    except ValueError as error:
        raise ConfigError(f"{label} {error}") from error


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copied(v) for k, v in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """TOML has no None and no tuples: leave the one out, write the other as lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
