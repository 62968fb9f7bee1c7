"""The latency of any plan on a calibrated machine, with an interval: `Predictor`.

Every step of a plan is answered by the surest that knows it:

    measured       the same step was measured in some network (`hw_models.step_table`)
    interpolated   steps of its shape were, at densities around its own
    learned        from steps of other shapes (`hw_models.step_model`), moved by what is known of its own shape at other densities
    analytical     from the device's roofs (`hw_models.analytical`), where no step of its family was ever measured

The sum is corrected to a whole network (`hw_models.network_model`), and the interval is as wide as errors on networks that were
left out ask for, source by source (`hw_models.honesty`, `hw_models.conformal`). On disk: `hw_models.predictor_files`.

Start with `load_predictor`, what `nas calibrate` left for this machine, or `Predictor.fit` for measurements of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from threadpoolctl import threadpool_limits

from hw_models.analytical import AnalyticalModel
from hw_models.choices import choose_kernels
from hw_models.conformal import Conformal
from hw_models.context import CLASSES, Context, class_of, surroundings
from hw_models.descriptor import DeviceDescriptor, DeviceError, load_device
from hw_models.honesty import WORTH_NAMING, Spread, left_out
from hw_models.model import PART_COLUMNS, SOURCES, CalibrationError, Estimate, LatencyModel
from hw_models.network_model import NetworkModel
from hw_models.step_model import StepModel
from hw_models.step_table import StepTable
from hw_models.workload import Workload, workload
from ops.plan import Plan

__all__ = ["CalibrationError", "Predictor", "choose_kernels", "load_predictor"]

Floats = npt.NDArray[np.float64]

MEASURED, INTERPOLATED, LEARNED, ANALYTICAL = range(4)
KNOWN_SHAPE = 0.7  # of the learned spread that is left where the step's shape is known at other densities


@dataclass(frozen=True, eq=False)
class Predictor(LatencyModel):
    """A calibrated latency model.

    Attributes:
        device: what it is of.
        runtime: `hw_models.device.runtime_id`: machine, versions, threads.
        threads: CPU threads.
        table, learned, roofs: what answers for steps.
        shifts: curve -> log(measured / learned), the mean over the curve's measurements, drawn to 0 where they are few.
        context: what networks of other sizes do to the time of a step; table, learned and shifts hold for its reference size.
        correction: from sums to wholes.
        spread, conformal: from what each part is unsure of to an interval.
        facts: how it came about: networks, steps, errors on networks left out.
    """

    device: DeviceDescriptor
    runtime: str
    threads: int
    table: StepTable
    learned: StepModel | None
    roofs: AnalyticalModel
    shifts: dict[str, float]
    context: Context
    correction: NetworkModel
    spread: Spread
    conformal: Conformal
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        observed: pd.DataFrame,
        networks: pd.DataFrame,
        *,
        device: DeviceDescriptor | None = None,
        runtime: str = "",
        threads: int = 1,
        seed: int = 0,
    ) -> Predictor:
        """Fit everything to measured networks.

        Args:
            observed: one row per distinct step and network: `hw_models.workload.STEP_COLUMNS`, ms (of one execution in place),
                network (index of `networks`), count (executions per network).
            networks: one row per network: ms, sum_ms, steps, calls, weight_bytes, arena_bytes, batch; `group` (what to leave
                out together when errors are estimated; default each network by itself).
            device: default the host.
            runtime, threads: what was measured on.
            seed: of folds and residuals.

        Returns:
            A predictor; with no rows at all one that answers from the device's roofs only.

        Raises:
            ValueError: a column is missing, a time is not positive, or a step belongs to no network.
        """
        device = device if device is not None else load_device("host")
        roofs = AnalyticalModel(device)
        observed, networks = _checked(observed, networks)
        if len(observed) == 0:
            nothing = NetworkModel.fit(networks)
            return cls(
                device,
                runtime,
                threads,
                StepTable.fit(observed),
                None,
                roofs,
                {},
                Context(),
                nothing,
                Spread(),
                Conformal.fit([], [], []),
            )
        with threadpool_limits(limits=1):  # small matrices: threads that wait for each other cost more than they bring
            correction = NetworkModel.fit(networks, seed)
            context = Context.fit(observed, networks)
            observed = context.detached(observed, networks)
            table = StepTable.fit(observed)
            learned = StepModel.fit(observed, seed=seed)
            shifts = _shifts(observed, learned.predict(observed)[0])
            judged = left_out(observed, networks, learned, context, correction, seed)
            spread, conformal = judged.fit()
        facts = {
            "networks": len(networks),
            "steps": len(table.exact),
            "curves": len(table.curves),
            **judged.facts(spread),
        }
        return cls(
            device, runtime, threads, table, learned, roofs, shifts, context, correction, spread, conformal, facts
        )

    def price(self, steps: pd.DataFrame) -> tuple[Floats, Floats, npt.NDArray[np.int8]]:
        """Times of single steps, in place.

        Args:
            steps: `hw_models.workload.STEP_COLUMNS`.

        Returns:
            ms float[n], sigma float[n] (log space), source int8[n] (index into `SOURCES`).
        """
        ms, sigma, source = self.table.price(steps)
        unknown = source < 0
        if unknown.any() and self.learned is not None:
            rows = np.flatnonzero(unknown & steps["family"].isin(list(self.learned.families)).to_numpy())
            if len(rows):
                part = steps.iloc[rows]
                ms[rows], sigma[rows] = self.learned.predict(part)
                shift = np.array([self.shifts.get(name, np.nan) for name in part["curve"]])
                known = ~np.isnan(shift)
                ms[rows] *= np.exp(np.where(known, shift, 0.0))
                sigma[rows] *= np.where(known, KNOWN_SHAPE, 1.0)
                source[rows] = LEARNED
        rows = np.flatnonzero(source < 0)
        if len(rows):
            ms[rows], sigma[rows] = self.roofs.step_ms(steps.iloc[rows])
            source[rows] = ANALYTICAL
        return ms, sigma, source

    def predict_many(
        self, plans: Sequence[Plan] | Workload, device: DeviceDescriptor | str | None = None
    ) -> pd.DataFrame:
        """See `LatencyModel.predict_many`. A `Workload` is priced at some hundred thousand networks a second and more."""
        self._check(device)
        work = plans if isinstance(plans, Workload) else workload(plans)
        ms, sigma, source = self.price(work.steps)
        return self._whole(work, ms, sigma, source)

    def predict(self, plan: Plan, device: DeviceDescriptor | str | None = None) -> Estimate:
        """See `LatencyModel.predict`."""
        self._check(device)
        work = workload([plan])
        ms, sigma, source = self.price(work.steps)
        row = self._whole(work, ms, sigma, source).iloc[0]
        parts = self._parts(plan, work, ms, sigma, source)
        strange = sorted({str(kind) for kind in work.steps["kind"].to_numpy()[source == ANALYTICAL]})
        note = ""
        if strange:
            note = f"never measured here, priced from the device's roofs: {', '.join(strange)}"
        return Estimate(float(row["ms"]), float(row["lo_ms"]), float(row["hi_ms"]), str(row["source"]), parts, note)

    def _whole(self, work: Workload, ms: Floats, sigma: Floats, source: npt.NDArray[np.int8]) -> pd.DataFrame:
        of, classes = class_of(work.steps), np.arange(len(CLASSES))
        spread = ms * sigma
        columns = [
            np.where(of[:, None] == classes, ms[:, None], 0.0),  # by class
            (of[:, None] == classes).astype(float),
            np.where(source[:, None] == np.arange(len(SOURCES)), ms[:, None], 0.0),  # by source
            np.column_stack(
                [spread**2, np.where(source >= LEARNED, spread, 0.0), np.where(source < LEARNED, spread, 0.0)]
            ),
        ]
        sums = work.sums(np.column_stack(columns))
        by_class, calls, by_source, spreads = np.split(
            sums, np.cumsum([part.shape[1] for part in columns])[:-1], axis=1
        )
        total = np.maximum(by_class.sum(axis=1), 1e-12)
        in_place = self.context.sums(by_class.T, calls.T, surroundings(work.networks))
        whole = self.correction.predict(work.networks.assign(sum_ms=in_place))
        worst = np.max(np.where(by_source >= WORTH_NAMING * total[:, None], np.arange(len(SOURCES)), 0), axis=1)
        names = np.asarray(SOURCES, object)[worst]
        alone, together, table = spreads[:, 0] / total**2, spreads[:, 1] / total, spreads[:, 2] / total
        lo, hi = self.conformal.interval(whole, self.spread(alone, together, table, self.correction.error), names)
        return pd.DataFrame({"ms": whole, "lo_ms": lo, "hi_ms": hi, "source": names.astype(str)})

    def _parts(
        self, plan: Plan, work: Workload, ms: Floats, sigma: Floats, source: npt.NDArray[np.int8]
    ) -> pd.DataFrame:
        n, ids = len(plan.ops), work.ids
        ms = self.context.attached(ms, class_of(work.steps), surroundings(work.networks)[0])
        total = np.bincount(work.ops, ms[ids], n)[:n]
        error = np.sqrt(np.bincount(work.ops, (ms * sigma)[ids] ** 2, n)[:n]) / np.maximum(total, 1e-12)
        worst = np.zeros(n, np.int64)
        np.maximum.at(worst, work.ops, source[ids])
        names = np.asarray(SOURCES, object)[worst]
        lo, hi = self.conformal.interval(total, np.maximum(error, 1e-3), names)
        columns = {
            **{name: [getattr(op, name if name != "op" else "name") for op in plan.ops] for name in PART_COLUMNS[:6]},
            "ms": total,
            "lo_ms": lo,
            "hi_ms": hi,
            "share": total / total.sum() if total.sum() > 0 else total,
            "source": names.astype(str),
        }
        return pd.DataFrame(columns)[list(PART_COLUMNS)]

    def _check(self, device: DeviceDescriptor | str | None) -> None:
        name = device.id if isinstance(device, DeviceDescriptor) else device
        if name not in (None, "host", self.device.id):
            raise DeviceError(
                f'this model was calibrated on "{self.device.id}" and cannot answer for "{name}"; '
                "hw_models.analytical.AnalyticalModel(device) answers for any device, from its data sheet"
            )


def _shifts(observed: pd.DataFrame, learned: Floats) -> dict[str, float]:
    log = np.log(observed["ms"].to_numpy(float) / learned)
    grouped = pd.Series(log).groupby(observed["curve"].to_numpy())
    count = grouped.count()
    mean = grouped.sum() / (count + 1.0)
    return {str(name): float(value) for name, value in mean.items()}


def _checked(observed: pd.DataFrame, networks: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    wanted = {"observed": ("key", "curve", "family", "density", "ms", "network"), "networks": ("ms", "steps", "calls")}
    for name, frame in (("observed", observed), ("networks", networks)):
        missing = [column for column in wanted[name] if column not in frame]
        if missing:
            raise ValueError(
                f"{name}: the columns {', '.join(missing)} are missing; see hw_models.predictor.Predictor.fit"
            )
        ms = frame["ms"].to_numpy(float)
        if not (np.isfinite(ms) & (ms > 0)).all():
            raise ValueError(f"{name}: every ms must be above 0 and finite; leave out what could not be measured")
    if not networks.index.is_unique:
        raise ValueError(
            f"networks: the index has {networks.index[networks.index.duplicated()][0]} twice; number the networks"
        )
    stray = set(observed["network"]) - set(networks.index)
    if stray:
        raise ValueError(f"observed: {len(stray)} networks, the first {min(stray)!r}, are not in the index of networks")
    observed = observed.reset_index(drop=True)
    if "count" not in observed:
        observed = observed.assign(count=1.0)
    observed = observed.fillna({"count": 1.0})
    if "sum_ms" not in networks or networks["sum_ms"].isna().any():
        sums = (observed["ms"] * observed["count"]).groupby(observed["network"]).sum()
        networks = networks.assign(sum_ms=sums.reindex(networks.index).fillna(networks["ms"]))
    if "moved_bytes" not in networks or networks["moved_bytes"].isna().any():  # measured before it was noted
        weights = observed["weight_bytes"] * (observed["kernel"] != "torch")
        moved = (observed["in_bytes"] + observed["out_bytes"] + weights) * observed["count"]
        networks = networks.assign(
            moved_bytes=moved.groupby(observed["network"]).sum().reindex(networks.index).fillna(0.0)
        )
    networks = _reached(networks)
    observed = observed[observed["network"].isin(networks.index)].reset_index(drop=True)
    if "group" not in networks:
        networks = networks.assign(group=[str(i) for i in networks.index])
    return observed, networks


def load_predictor(threads: int = 1) -> Predictor | None:
    """The predictor `nas calibrate` made for this machine, these versions and so many threads; None if it made none.

    Raises:
        CalibrationError: there is one of this machine, but of other versions or threads, or it is damaged.
    """
    from hw_models import predictor_files  # late: it imports this module

    return predictor_files.of_host(threads)


def _reached(networks: pd.DataFrame) -> pd.DataFrame:
    """Without those whose floor no second round confirmed, if enough others are left."""
    if "quality" not in networks:
        return networks
    reached = networks[networks["quality"] != "unreached"]
    return reached if len(reached) >= max(10, len(networks) // 2) else networks
