"""One command makes everything a latency model of this machine needs: `calibrate(budget_s)`, behind `nas calibrate`.

    1. the machine's roofs (`hw_models.roofs`) -> its device file
    2. the sentinels (`hw_models.sentinels`) -> the epoch that measurements belong to
    3. networks, a batch at a time, those first that teach most (`hw_models.active`); kept in the store as they are measured
    4. the predictor, fitted to the measurements of the epoch (`hw_models.teaching`) -> its files

Killed at any moment it loses the batch at hand; started again it goes on from the store. Start with `calibrate`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hw_models import environment, predictor_files
from hw_models.accuracy import noise_ceiling
from hw_models.active import Wanted
from hw_models.analytical import AnalyticalModel
from hw_models.calibration_report import CalibrationReport
from hw_models.descriptor import DeviceDescriptor, host_path, save_device
from hw_models.device import host_device, runtime_id
from hw_models.energy import calibrate_power
from hw_models.host import describe_host, with_roofs
from hw_models.measure import MeasurementError, Measurer
from hw_models.model import CalibrationError
from hw_models.observe import Observed, observe
from hw_models.probes import probes
from hw_models.roofs import measure_roofs
from hw_models.sentinels import sentinel_calls
from hw_models.store import Epoch, MeasurementStore
from hw_models.teaching import fit_from_store
from hw_models.workload import workload
from ops.plan import Choose, Plan, PlanError, lower, rule_of_thumb
from ops.runtime import Runtime
from ops.schedule import schedule

__all__ = ["Candidate", "calibrate"]

Candidate = tuple[str, nn.Module, torch.Tensor]  # name, network in eval mode with masks drawn, example input
Progress = Callable[[float, float, str], None]

BATCH = 16  # networks measured against each other
FIRST = 4  # ... of the first batch
POOL = 2.0  # candidates looked at for each one measured
AGAIN = 0.05  # share of measured networks that are measured once more, for the noise
PROBES = 0.25  # share of probe networks among the candidates of a space: for shapes the space's samples miss
ROOFS_S = 3.0
FIT_S, FIT_PER_NETWORK_S = 3.0, 0.04  # of the budget kept for fitting


# How candidates are planned: mostly as the runtime would, else all dense through torch or all portable, because those are asked
# for when kernels are chosen.
KERNELS: tuple[Choose, ...] = (
    rule_of_thumb,
    lambda op, legal: "torch",
    lambda op, legal: "portable" if "portable" in legal else legal[-1],
)
KERNEL_SHARES = (0.72, 0.16, 0.12)


@dataclass
class _Pool:
    """Candidates that were lowered but not measured."""

    source: Iterator[Candidate]
    rng: np.random.Generator
    waiting: list[tuple[Candidate, Plan]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def fill(self, count: int, deadline: float) -> None:
        """Lower candidates until there are `count`, none are left or time is up."""
        while len(self.waiting) < count and time.monotonic() < deadline:
            candidate = next(self.source, None)
            if candidate is None:
                return
            name, module, example = candidate
            try:
                choose = KERNELS[int(self.rng.choice(len(KERNELS), p=KERNEL_SHARES))]
                self.waiting.append((candidate, lower(module, example, choose)))
            except PlanError as error:
                self.failed.append(f"{name}: {error}")


def calibrate(
    budget_s: float,
    candidates: Iterable[Candidate] | None = None,
    threads: int = 1,
    batch: int = 1,
    store: MeasurementStore | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> CalibrationReport:
    """Calibrate this machine.

    Args:
        budget_s: seconds, about: 10 for the roofs and a few networks, 60 for a first model, 300 for a good one. Packing,
            compiling (some seconds more where a cache is empty) and fitting are in it.
        candidates: (name, network, example input), e.g. drawn from a search space; a quarter of probe networks is mixed in. May be
            endless. Default: probe networks alone.
        threads: CPU threads the networks run with.
        batch: of the probe networks; candidates bring their own.
        store: where measurements are kept. Default: the one in the user's cache folder.
        progress: called as progress(done_s, budget_s, text).
        seed: of the probes, the order and the folds.

    Returns:
        What was measured, what accuracy to expect, and where the files are.

    Raises:
        ValueError: a budget that is not positive, threads or batch below 1.
        CalibrationError: more threads than cores, or a cache folder that cannot be written.
        StoreError: the store cannot be used.
    """
    if not budget_s > 0 or threads < 1 or batch < 1:
        raise ValueError(
            f"calibrate needs budget_s > 0, threads >= 1 and batch >= 1, got {budget_s}, {threads}, {batch}"
        )
    if threads > host_device().cores:
        raise CalibrationError(
            f"{threads} threads cannot be calibrated: this process may use {host_device().cores} cores"
        )
    start = time.monotonic()
    tell = _Teller(start, budget_s, progress)
    runtime = runtime_id(threads)
    _can_be_kept(runtime, threads)
    store = store if store is not None else MeasurementStore()
    device = _roofs(threads, min(ROOFS_S, 0.2 * budget_s), tell)
    epoch = _epoch(store, runtime, threads, budget_s, tell)
    rng = np.random.default_rng([seed, len(store.observations(runtime)[1])])
    pool = _Pool(_mixed(candidates, seed, batch, rng), rng)
    wanted = Wanted()
    wanted.seen(store.observations(runtime)[0])
    measured = _measure(pool, wanted, store, epoch, device, start + budget_s, threads, rng, tell)
    tell("fitting the model")
    model = fit_from_store(store, device, threads, seed)
    folder = predictor_files.home(runtime)
    if model.facts.get("networks"):  # else a better one may be there
        predictor_files.save(model, folder)
    save_device(device, host_path(threads))
    pairs = store.noise(runtime)
    report = CalibrationReport(
        runtime=runtime,
        device=device,
        seconds=time.monotonic() - start,
        measured=measured,
        networks=int(model.facts.get("networks", 0)),
        steps=int(model.facts.get("steps", 0)),
        left_out=model.facts.get("left_out", {}),
        noise=noise_ceiling(pairs[["first_ms", "again_ms"]].to_numpy(float)) if len(pairs) >= 3 else {},
        epoch=epoch,
        failed=tuple(pool.failed),
        folder=Path(folder),
        device_file=host_path(threads),
        store=store.path,
    )
    tell("done")
    return report


def _can_be_kept(runtime: str, threads: int) -> None:
    """Refuse before the work is done, not after."""
    for folder in (predictor_files.home(runtime), host_path(threads).parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise CalibrationError(
                f"a calibration cannot be kept in {folder} ({error.strerror or error}); set NAS_CACHE_DIR to a folder that can be "
                "written"
            ) from error


@dataclass
class _Teller:
    start: float
    budget_s: float
    progress: Progress | None

    def __call__(self, text: str) -> None:
        if self.progress is not None:
            self.progress(min(time.monotonic() - self.start, self.budget_s), self.budget_s, text)


def _roofs(threads: int, budget_s: float, tell: _Teller) -> DeviceDescriptor:
    tell("peak and bandwidth")
    device = with_roofs(describe_host(threads), measure_roofs(threads, budget_s))
    sparse = list(sentinel_calls(threads).values())[-1]
    device = calibrate_power(device, sparse, seconds=min(2.0, 0.3 * budget_s))  # where a counter can be read
    save_device(device, host_path(threads))
    return device


def _epoch(store: MeasurementStore, runtime: str, threads: int, budget_s: float, tell: _Teller) -> Epoch:
    tell("sentinels")
    steal = environment.StealMeter()
    measurer = Measurer(threads=threads, rounds=8 if budget_s >= 30 else 5, spacing_s=0.1)
    found = measurer.measure(sentinel_calls(threads))
    return store.open_epoch(runtime, environment.describe(steal), found)


def _mixed(
    candidates: Iterable[Candidate] | None, seed: int, batch: int, rng: np.random.Generator
) -> Iterator[Candidate]:
    """The candidates with probes among them; probes alone where there are none."""
    own = probes(seed + int(rng.integers(1 << 30)), batch)
    if candidates is None:
        yield from own
        return
    given = iter(candidates)
    while True:
        candidate = next(given, None) if rng.random() >= PROBES else next(own)
        if candidate is None:  # the space has no more
            yield from own
            return
        yield candidate


def _measure(
    pool: _Pool,
    wanted: Wanted,
    store: MeasurementStore,
    epoch: Epoch,
    device: DeviceDescriptor,
    end: float,
    threads: int,
    rng: np.random.Generator,
    tell: _Teller,
) -> int:
    """Measure batches until time is up; returns how many networks."""
    roofs, measured, longest = AnalyticalModel(device), 0, 0.0
    again: list[tuple[Candidate, Plan]] = []
    for number in itertools.count():
        begun = time.monotonic()
        left = end - FIT_S - FIT_PER_NETWORK_S * measured - begun
        size = BATCH if left > 1.2 * longest else int(BATCH * left / (1.2 * longest + 1e-9))
        size = min(size, FIRST) if number == 0 else size  # kept soon, and tells how long a batch takes
        if left <= 2.0 or size < 2:
            return measured
        tell(f"{measured} networks measured, choosing the next")
        pool.fill(int(POOL * size) if number else size, begun + 0.5 * left)
        if not pool.waiting:
            return measured
        chosen = _choose(pool, wanted, roofs, size)
        if again and rng.random() < AGAIN * BATCH:
            chosen.append(again[int(rng.integers(len(again)))])
        networks = {}
        for k, ((name, _, example), plan) in enumerate(chosen):
            tell(f"{measured} networks measured, packing {name}")
            networks[f"{k}: {name}"] = (Runtime(plan, threads), example)
        tell(f"{measured} networks measured, timing {len(networks)} more")
        measurer = Measurer(threads=threads, rounds=8 if left > 20 else 4, cap_rounds=16)
        try:
            found = observe(networks, measurer)
        except MeasurementError as error:
            pool.failed.append(str(error))
            continue
        _keep(store, epoch, found)
        wanted.seen(found.steps)
        measured += len(networks)
        again += chosen[:2]
        again = again[-32:]
        longest = max(longest, (time.monotonic() - begun) * BATCH / max(len(networks), 1))
    return measured


def _choose(pool: _Pool, wanted: Wanted, roofs: AnalyticalModel, size: int) -> list[tuple[Candidate, Plan]]:
    """Take those that teach most out of the pool, one by one: what one teaches, the next need not."""
    schedules = [schedule(plan) for _, plan in pool.waiting]
    work = workload(schedules)
    ms, _ = roofs.step_ms(work.steps)
    wanted.ask(work, ms)
    scores = wanted.score(work, ms)
    order = np.argsort(-scores, kind="stable")[:size]
    taken = {int(k) for k in order}
    chosen = [pool.waiting[k] for k in order]
    pool.waiting = [entry for k, entry in enumerate(pool.waiting) if k not in taken]
    # What is passed over twice makes room for what was not seen yet.
    pool.waiting = pool.waiting[-BATCH // 2 :]
    return chosen


def _keep(store: MeasurementStore, epoch: Epoch, found: Observed) -> None:
    store.add_networks(epoch, found.steps, found.networks.assign(group=found.networks["digest"]), found.rounds)
