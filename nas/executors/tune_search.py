"""Our searchers for people who write their own Ray Tune programs: `NasSearch` is a `ray.tune.search.Searcher`.

    search = NasSearch(space, "nsga2", metric=["accuracy", "latency_ms"], mode=["max", "min"])
    tune.Tuner(train, tune_config=tune.TuneConfig(search_alg=search, num_samples=100)).fit()

    def train(config):
        network = space.build(Architecture.from_json(config["architecture"]))

It stands where Tune's OptunaSearch stands, and takes the same `metric` and `mode`. It works with ConcurrencyLimiter, and with the
schedulers that only stop trials (ASHA, HyperBand, median stopping): a stopped trial counts with its last result, so that networks
that were stopped are known to be bad. Tune itself refuses every search algorithm beside PopulationBasedTraining and PB2
("Search algorithms cannot be used with ..."); for those give Tune a list of drawn architectures instead
(`tune.grid_search([space.sample(seed).to_json() for seed in range(8)])`). Mind that they copy a better trial's whole `config`,
its architecture too. A run file's own `--executor tune` needs none of this: see tune.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.tune.result import DEFAULT_METRIC
from ray.tune.search import Searcher as TuneSearcher

from nas.errors import ConfigError, RunError
from nas.objectives import feasible, number, parse_constraints, parse_objectives, violations
from nas.searchers import Searcher, SpaceExhausted, make_searcher
from search_spaces.architecture import Architecture
from search_spaces.space import Space

FORMAT = "sparse-nas tune searcher 1"


@dataclass
class _Trial:
    """What searchers read of a trial; see `nas.searchers.base.TrialLike`."""

    index: int
    tune_id: str
    state: str
    architecture: Architecture
    metrics: dict[str, float] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return self.architecture.digest


class NasSearch(TuneSearcher):
    """A searcher of `nas.searchers.SEARCHERS` as a search algorithm of Ray Tune.

    A trial's `config` gets "architecture" (JSON text, for `Architecture.from_json`) and "digest" (16 hex digits, equal for equal
    computations), beside the constants of the Tuner's `param_space`. No digest is proposed twice; a space with nothing left
    ends the experiment early.

    Args:
        space: where to search.
        searcher: a key of `nas.searchers.SEARCHERS`.
        metric: name of the reported metric, or a list of them for several objectives; nested ones as Tune flattens them,
            "accuracy/top1". Tune hands on the `metric` of its TuneConfig only if there is a `param_space`, so give it here.
        mode: "max" or "min", or a list of as many.
        constraints: limits on reported metrics, e.g. {"latency_ms": "<= 5"}; a trial that breaks one loses to all that do not.
        options: keyword arguments of the searcher, e.g. {"population": 20}.
        seed: of all its randomness.

    Raises:
        ConfigError: metric and mode do not fit, or an option is wrong.
        UnknownName: no such searcher.
    """

    CKPT_FILE_TMPL = "nas-search-{}.json"

    def __init__(
        self,
        space: Space,
        searcher: str = "tpe",
        metric: str | Sequence[str] | None = None,
        mode: str | Sequence[str] | None = None,
        *,
        constraints: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.space = space
        self.searcher_name = searcher
        self.options = dict(options or {})
        self.constraints = parse_constraints(constraints)
        self.seed = int(seed)
        self._trials: list[_Trial] = []
        self._by_id: dict[str, _Trial] = {}
        self._proposed: set[str] = set()
        self._engine: Searcher | None = None
        make_searcher(
            searcher, space, {"any": "max"}, self.seed, self.options
        )  # says at once what is wrong with a name or option
        if metric is None and isinstance(mode, str):
            metric = DEFAULT_METRIC
        super().__init__(*_same_kind(metric, mode))
        if metric and mode:
            self._make_engine()

    # -- what Tune calls --------------------------------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take metric and mode from the TuneConfig, unless they were given before.

        Returns:
            Whether they could be taken. `config` is for constants: what is searched is the space.
        """
        if not metric and not mode:
            return True
        if self._engine is not None:
            return (metric or self._metric, mode or self._mode) == (self._metric, self._mode)
        self._metric, self._mode = metric or self._metric or DEFAULT_METRIC, mode or self._mode
        if self._mode:
            self._make_engine()
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next architecture, or Searcher.FINISHED if the space has no other.

        Returns:
            {"architecture", "digest"}, or that text.

        Raises:
            ConfigError: metric or mode is not known.
        """
        engine = self._require_engine()
        try:
            proposal = engine.propose(self._trials, len(self._trials), self._proposed.__contains__)
        except SpaceExhausted:
            return str(self.FINISHED)
        self._add(_Trial(len(self._trials), trial_id, "running", proposal.architecture, sampler=dict(proposal.sampler)))
        return {"architecture": proposal.architecture.to_json(), "digest": proposal.architecture.digest}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a searcher learns from the last result of a trial."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what became of a trial; one without a finite value for every metric has failed."""
        trial = self._by_id.get(trial_id)
        if trial is not None:
            self._settle(trial, None if error else result)

    def add_evaluated_point(
        self,
        parameters: dict[str, Any],
        value: float | Sequence[float],
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """Learn from a network that was evaluated elsewhere; it is not proposed any more.

        Args:
            parameters: a trial's config: {"architecture": its JSON text}.
            value: of the metric; with several metrics one value each, in their order.
            error: it failed; the value is not looked at.
            pruned: it was stopped early; it counts with its value, like those stopped in this experiment.
            intermediate_values: not used.

        Raises:
            ConfigError: as many values as metrics were expected.
            SpaceError: that is no architecture of the space.
        """
        metrics = list(self._require_engine().objectives)
        values = list(value) if isinstance(value, Sequence) else [value]
        if len(values) != len(metrics) and not error:
            raise ConfigError(f"expected one value for each of {', '.join(metrics)}, got {value!r}")
        given = Architecture.from_json(parameters["architecture"])
        trial = _Trial(len(self._trials), "", "running", self.space.architecture(given.as_dict()))
        self._add(trial)
        self._settle(trial, None if error else dict(zip(metrics, values)))

    def save(self, checkpoint_path: str) -> None:
        """Write the history as JSON, whole or not at all. It holds no code: `restore` needs the same space and options.

        Raises:
            RunError: the file cannot be written.
        """
        path = Path(checkpoint_path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        trials = [asdict(trial) | {"architecture": trial.architecture.to_json()} for trial in self._trials]
        try:
            scratch.write_text(json.dumps(self._identity() | {"trials": trials}))
            os.replace(scratch, path)
        except OSError as failure:
            raise RunError(f"{path}: cannot be written: {failure.strerror or failure}") from failure

    def restore(self, checkpoint_path: str) -> None:
        """Go on as the searcher that wrote this file would have: the next proposals are the same.

        Raises:
            RunError: the file cannot be read, or is none of ours.
            ConfigError: it was written with another space, searcher, metric, option or seed.
        """
        path = Path(checkpoint_path)
        try:
            saved = json.loads(path.read_text())
            trials = [
                _Trial(**entry | {"architecture": Architecture.from_json(entry["architecture"])})
                for entry in saved["trials"]
            ]
        except OSError as failure:
            raise RunError(f"{path}: cannot be read: {failure.strerror or failure}") from failure
        except (ValueError, TypeError, KeyError) as failure:
            raise RunError(f"{path}: expected a file that NasSearch.save wrote ({FORMAT}): {failure}") from failure
        self._require_engine()
        for key, mine in self._identity().items():
            if saved.get(key) != mine:
                raise ConfigError(
                    f"{path}: written with {key} = {saved.get(key)!r}, this searcher has {mine!r}; use the same"
                )
        self._trials, self._by_id, self._proposed = [], {}, set()
        for trial in trials:
            self._add(trial)
        self._make_engine()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}  # made again from the rest; Tune pickles its searcher when it starts

    def _identity(self) -> dict[str, Any]:
        """What decides what is proposed, as JSON gives it back."""
        facts = {
            "format": FORMAT,
            "space": [self.space.name, self.space.options],
            "searcher": self.searcher_name,
            "objectives": _objectives(self._metric, self._mode),
            "constraints": [str(constraint) for constraint in self.constraints],
            "options": self.options,
            "seed": self.seed,
        }
        return dict(json.loads(json.dumps(facts, default=list)))

    def _make_engine(self) -> Searcher:
        objectives = _objectives(self._metric, self._mode)
        self._engine = make_searcher(self.searcher_name, self.space, objectives, self.seed, self.options)
        return self._engine

    def _require_engine(self) -> Searcher:
        if not self._metric or not self._mode:
            raise ConfigError(
                f"NasSearch: expected metric and mode, got metric = {self._metric!r}, mode = {self._mode!r}; write "
                'NasSearch(space, metric="accuracy", mode="max") (Tune hands on those of TuneConfig only with a param_space)'
            )
        return self._engine or self._make_engine()

    def _add(self, trial: _Trial) -> None:
        self._trials.append(trial)
        self._proposed.add(trial.digest)
        if trial.tune_id:
            self._by_id[trial.tune_id] = trial

    def _settle(self, trial: _Trial, result: Mapping[str, Any] | None) -> None:
        """Put a result into a trial. A new object, because searchers remember what an old one taught."""
        wanted = dict.fromkeys([*_objectives(self._metric, self._mode), *(c.metric for c in self.constraints)])
        metrics = {name: value for name in wanted if (value := number(result or {}, name)) is not None}
        found = violations(metrics, self.constraints, partial=True)
        if not feasible(found):
            state = "infeasible"
        else:
            state = "complete" if len(metrics) == len(wanted) else "failed"
        done = replace(trial, state=state, metrics=metrics, violations=found)
        self._trials[trial.index] = done
        if trial.tune_id:
            self._by_id[trial.tune_id] = done


def _same_kind(metric: str | Sequence[str] | None, mode: str | Sequence[str] | None) -> tuple[Any, Any]:
    """Metric and mode as Tune wants them: both text, or both lists of one length."""
    if metric is None or mode is None or (isinstance(metric, str) and isinstance(mode, str)):
        one, two = metric, mode
    elif isinstance(metric, str) or isinstance(mode, str) or len(metric) != len(mode):
        raise ConfigError(
            f"expected a metric and a mode, or lists of one length, got metric = {metric!r}, mode = {mode!r}"
        )
    else:
        one, two = list(metric), list(mode)
    return one, two


def _objectives(metric: Any, mode: Any) -> dict[str, str]:
    if not metric or not mode:
        return {}
    pairs = [(metric, mode)] if isinstance(metric, str) else list(zip(metric, mode))
    return parse_objectives(dict(pairs))
