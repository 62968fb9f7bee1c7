"""Where the time of a network goes: every operation measured and predicted, dense beside sparse.

Measured: the kernels are chosen by `hw_models.latency`; then the network, the same all dense (every layer on torch's dense
kernel) and the same all sparse run against each other, every step timed in its place (`hw_models.insitu`). Predicted: any
`LatencyModel` prices the same three plans. Start with `profile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from hw_models.crossover import crossovers
from hw_models.insitu import InPlace, measure_in_place
from hw_models.latency import measure_latency
from hw_models.measure import Measurement, Measurer
from hw_models.model import Estimate, LatencyModel
from hw_models.tables import LayerTable
from ops.plan import Plan, legal_kernels, lower
from ops.runtime import Runtime

if TYPE_CHECKING:
    from hw_models.descriptor import DeviceDescriptor
    from hw_models.energy import Energy

__all__ = ["NEVER", "Profile", "profile"]

NEVER = 1.0
"""Crossover of a layer whose sparse kernels are faster at every density."""

_ALONE = ("torch_ms", "portable_ms", "specialised_ms")
_NUMBERS = ("ms", "share", "dense_ms", "sparse_ms", *_ALONE, "predicted_ms", "predicted_lo_ms", "predicted_hi_ms")
_MORE = ("predicted_dense_ms", "predicted_sparse_ms", "crossover_density", "energy_mj")


@dataclass(frozen=True, eq=False)
class Profile:
    """What is known of a network's latency on this machine, for one batch size.

    Attributes:
        table: one row per operation of the plan, in order: the columns of `Plan.frame()`, and
            ms: measured in its place in the running network, conversions of layout that the operation asks for included;
            share: of the whole network's time (what is left to 1 is the call itself); of the sum of predicted_ms where nothing
            was measured;
            dense_ms, sparse_ms: likewise in the same network all dense, all sparse (NaN where there is no choice);
            torch_ms, portable_ms, specialised_ms: alone, caches warm, on each kernel that was tried when kernels were chosen;
            predicted_ms, predicted_lo_ms, predicted_hi_ms, predicted_source: of the operation as planned;
            predicted_dense_ms, predicted_sparse_ms: as dense_ms, sparse_ms;
            crossover_density: above it the dense kernel is faster, says the model (`hw_models.crossover`); `NEVER` if it is at
            no density, 0.0 if at every, NaN without a model or a choice;
            energy_mj: the operation's share of the energy.
        batch, threads: what the times are of.
        measured, dense: of the whole network and of the same all dense, in one measuring run; None if not measured. Where every
            layer is dense they are the same measurement.
        predicted, predicted_dense: likewise from the model; None without one.
        model: what predicted, in words.
        energy: of one call; None if the machine's power is not known.
        notes: what a reader should know.
    """

    table: pd.DataFrame = field(repr=False)
    batch: int
    threads: int
    measured: Measurement | None = None
    dense: Measurement | None = None
    predicted: Estimate | None = None
    predicted_dense: Estimate | None = None
    model: str = ""
    energy: Energy | None = None
    notes: tuple[str, ...] = ()

    @property
    def ms(self) -> float:
        """Of the whole network: measured if it was, else predicted; NaN with neither."""
        if self.measured is not None:
            return self.measured.floor_ms
        return self.predicted.ms if self.predicted is not None else float("nan")

    @property
    def gain(self) -> float:
        """How many times as fast as its dense twin; measured if it was, else predicted; NaN with neither."""
        if self.measured is not None and self.dense is not None:
            return self.dense.floor_ms / self.measured.floor_ms
        if self.predicted is not None and self.predicted_dense is not None:
            return self.predicted_dense.ms / self.predicted.ms
        return float("nan")


def profile(
    module: nn.Module,
    example_input: torch.Tensor,
    *,
    threads: int = 1,
    model: LatencyModel | None = None,
    model_name: str = "",
    measure: bool = True,
    device: DeviceDescriptor | None = None,
    table: LayerTable | None = None,
    measurer: Measurer | None = None,
    notes: Sequence[str] = (),
) -> Profile:
    """Profile a network on this CPU.

    Takes about 6 s with the default measurer, and some 20 ms for every operation and kernel that the table does not know.

    Args:
        module: takes one tensor; copied, never changed.
        example_input: float[batch, ...].
        threads: CPU threads, for torch and for our kernels.
        model: predicts; None for no prediction.
        model_name: what the model is, for people.
        measure: False only predicts, on the kernels that a `Predictor` says are the fastest; on those of the rule of thumb
            with another model.
        device: this machine's descriptor, for the energy; None for none.
        table, measurer: as for `measure_latency`.
        notes: what the caller knows that a reader should, put before what the model says.

    Raises:
        ValueError: neither a model nor a measurement was asked for.
        PlanError: the network fails on the input.
        MeasurementError: an operation failed while it was timed.
        TableError: the table's file is damaged or locked.
    """
    if not measure and model is None:
        raise ValueError("profile needs a model or measure=True: there would be nothing to say")
    measurer = replace(measurer or Measurer(), threads=threads)
    parts: pd.DataFrame | None = None
    if measure:
        # Quick, as it only chooses kernels here: the whole is measured below, beside the others.
        latency = measure_latency(module, example_input, threads=threads, table=table, measurer=measurer.quick())
        plan, parts = latency.plan, latency.parts
    else:
        assert model is not None
        plan = _fastest_by(lower(module, example_input), model)
    rows = plan.frame().assign(predicted_source="", **dict.fromkeys((*_NUMBERS, *_MORE), np.nan))
    measured = dense = None
    if parts is not None:
        for name in _ALONE:
            rows[name] = parts[name].to_numpy()
        measured, dense = _add_measured(rows, plan, example_input, measurer)
    predicted = predicted_dense = None
    said = list(notes)
    if model is not None:
        predicted, predicted_dense = _add_predicted(rows, plan, model)
        said += [predicted.note] if predicted.note else []
    energy = None
    total = measured.floor_ms if measured is not None else predicted.ms if predicted is not None else float("nan")
    if device is not None:
        from hw_models.energy import energy_of

        energy = energy_of(total, device)
        rows["energy_mj"] = rows["share"] * energy.mj
    batch = int(example_input.shape[0]) if example_input.ndim else 1
    return Profile(rows, batch, threads, measured, dense, predicted, predicted_dense, model_name, energy, tuple(said))


def _fastest_by(plan: Plan, model: LatencyModel) -> Plan:
    from hw_models.predictor import Predictor, choose_kernels

    return choose_kernels(plan, model) if isinstance(model, Predictor) else plan


def _all(plan: Plan, *, sparse: bool) -> Plan:
    """The plan with every layer on torch, or each that is not on a sparse kernel yet on the most specialised one."""
    if not sparse:
        return plan.with_kernels(lambda op, legal: "torch")
    return plan.with_kernels(lambda op, legal: op.kernel if op.kernel != "torch" else legal[-1])


def _add_measured(
    rows: pd.DataFrame, plan: Plan, example: torch.Tensor, measurer: Measurer
) -> tuple[Measurement, Measurement]:
    """Fill the columns measured in place; returns (the network, the same all dense)."""
    plans = {"network": plan, "dense": _all(plan, sparse=False), "sparse": _all(plan, sparse=True)}
    runtimes: dict[tuple[str, ...], Runtime] = {}  # equal ones are measured once
    of = {name: tuple(op.kernel for op in each.ops) for name, each in plans.items()}
    for name, each in plans.items():
        if of[name] not in runtimes:
            runtimes[of[name]] = Runtime(each, measurer.threads)
    names = {kernels: name for name, kernels in reversed(of.items())}
    found = measure_in_place({names[k]: (runtime, example) for k, runtime in runtimes.items()}, measurer)
    times = {name: _by_op(runtimes[k], found[names[k]]) for name, k in of.items()}
    choice = _choice(plan)
    rows["ms"] = times["network"]
    whole = found[names[of["network"]]].whole
    rows["share"] = times["network"] / max(whole.floor_ms, float(times["network"].sum()), 1e-12)
    rows["dense_ms"] = np.where(choice, times["dense"], np.nan)
    rows["sparse_ms"] = np.where(choice, times["sparse"], np.nan)
    return whole, found[names[of["dense"]]].whole


def _by_op(runtime: Runtime, measured: InPlace) -> npt.NDArray[np.float64]:
    """float[operations of the plan]: ms of each, the sum of its steps."""
    total = np.zeros(len(runtime.plan.ops))
    if len(total):
        ops = [
            min(step.op, len(total) - 1) for step in runtime.schedule.steps
        ]  # the last conversion belongs to no operation
        np.add.at(total, ops, measured.step_ms)
    return total


def _choice(plan: Plan) -> npt.NDArray[np.bool_]:
    """bool[operations]: whether it has more than one kernel."""
    return np.array([len(legal_kernels(op)) > 1 for op in plan.ops], dtype=bool)


def _add_predicted(rows: pd.DataFrame, plan: Plan, model: LatencyModel) -> tuple[Estimate, Estimate]:
    """Fill the predicted columns; returns (the network, its dense twin)."""
    estimate = model.predict(plan)
    for name in ("ms", "lo_ms", "hi_ms", "source"):
        rows[f"predicted_{name}"] = estimate.parts[name].to_numpy()
    if rows["ms"].isna().all():
        rows["share"] = estimate.parts["share"].to_numpy()
    choice = _choice(plan)
    dense = model.predict(_all(plan, sparse=False))
    sparse = model.predict(_all(plan, sparse=True))
    rows["predicted_dense_ms"] = np.where(choice, dense.parts["ms"].to_numpy(dtype=float), np.nan)
    rows["predicted_sparse_ms"] = np.where(choice, sparse.parts["ms"].to_numpy(dtype=float), np.nan)
    crossing = crossovers(plan, model)
    for i, op in enumerate(plan.ops):
        if op.name in crossing:
            at = crossing[op.name]
            rows.loc[i, "crossover_density"] = NEVER if at is None else min(at, NEVER)
    return estimate, dense
