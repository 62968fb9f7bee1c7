"""The commands about hardware: `nas profile`, `nas calibrate` and `nas devices`. `nas.cli` puts them among the others.

What the layers below raise about input (`hw_models`, `ops`, `search_spaces` know nothing of `nas`) becomes a `RunError` here, so
that it is one line on the screen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import NasError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hw_models.descriptor import DeviceDescriptor
    from hw_models.measure import Measurer
    from hw_models.model import LatencyModel
    from hw_models.profile import Profile

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

BUDGETS = (10, 60, 300)


def add_commands(add: Add) -> None:
    """Add the three commands.

    Args:
        add: makes a command's parser from its name, function and one line of help.
    """
    sub = add("profile", _profile, "Where a network's time goes: each layer dense and sparse, measured and predicted.")
    sub.add_argument("place", metavar="RUN|DIR", help="a run's folder (with TRIAL), or an exported network's")
    sub.add_argument("trial", metavar="TRIAL", type=int, nargs="?", help="number of the trial, as in nas results")
    sub.add_argument("--batch", metavar="N", type=_positive, help="inputs per call; default the run's, or 1")
    sub.add_argument("--threads", metavar="N", type=_positive, help="CPU threads; default the run's, or 1")
    sub.add_argument("--predict-only", action="store_true", help="measure nothing; kernels as the model would choose")
    sub.add_argument("--plot", metavar="FILE", help="also draw it: .png, .svg or .pdf")
    sub.add_argument("--format", choices=("table", "csv", "json"), default="table", help="table for people, or all")

    sub = add("calibrate", _calibrate, "Measure this machine, so that the latency of sparse networks can be predicted.")
    budgets = ", ".join(map(str, BUDGETS))
    sub.add_argument("--budget", metavar="S", type=_seconds, default=60.0, help=f"seconds, e.g. {budgets}; default 60")
    sub.add_argument(
        "--space", metavar="CONFIG", help="run file whose space is to be measured, for best predictions of it"
    )
    sub.add_argument("--threads", metavar="N", type=_positive, help="CPU threads; default the run file's, or 1")
    sub.add_argument("--batch", metavar="N", type=_positive, help="inputs per call; default the run file's, or 1")
    sub.add_argument("--quiet", action="store_true", help="no progress, only the summary")

    sub = add("devices", _devices, "The devices that latency can be predicted for, measured or from their data sheets.")
    sub.add_argument("device", metavar="DEVICE", nargs="?", help="every figure of one device, with its source")
    sub.add_argument("--format", choices=("table", "csv", "json"), default="table", help="table for people, or all")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"expected a number of seconds from 1 to 86400, got {text}")
    return value


@contextmanager
def plain_errors() -> Iterator[None]:
    """What the packages below raise as errors of their own is about input: raise it as a `RunError`."""
    try:
        yield
    except NasError:
        raise
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.partition(".")[0] not in ("hw_models", "ops", "search_spaces"):
            raise
        raise RunError(str(error)) from error


# -- profile ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """What is profiled: a network, the shape of one input, how it is called, and what the command line may leave out."""

    title: str
    network: nn.Module
    input_shape: tuple[int, ...]
    batch: int = 1
    threads: int = 1
    note: str = ""
    measurer: Measurer | None = None


def _profile(arguments: argparse.Namespace) -> None:
    import torch

    from hw_models.descriptor import load_device
    from hw_models.profile import profile
    from nas.report.profile_picture import check_suffix, save_profile

    if arguments.plot:
        check_suffix(arguments.plot)  # before measuring
    with plain_errors():
        subject = _subject(Path(arguments.place), arguments.trial)
        batch, threads = arguments.batch or subject.batch, arguments.threads or subject.threads
        model, model_name, notes = latency_model(threads)
        example: Tensor = torch.randn((batch, *subject.input_shape), generator=torch.Generator().manual_seed(0))
        if not arguments.predict_only and sys.stderr.isatty():
            print("measuring, some ten seconds ...", file=sys.stderr)
        found = profile(
            subject.network,
            example,
            threads=threads,
            model=model,
            model_name=model_name,
            measure=not arguments.predict_only,
            device=load_device("host", threads),
            measurer=subject.measurer,
            notes=(*notes, *((subject.note,) if subject.note else ())),
        )
    _write_profile(found, subject.title, arguments.format)
    if arguments.plot:
        print(f"picture: {save_profile(found, Path(arguments.plot), subject.title)}", file=sys.stderr)


def _subject(place: Path, trial: int | None) -> _Subject:
    """The network that RUN TRIAL or DIR names."""
    from nas.deploy import exported_shape, load_network

    if trial is not None:
        return _of_trial(place, trial)
    if (place / "run.db").is_file() or (place / "storage.json").is_file():
        raise RunError(
            f"{place} is a run's folder: say which trial, e.g. nas profile {place} 0 (see nas results {place})"
        )
    return _Subject(place.resolve().name, load_network(place), exported_shape(place))


def _of_trial(place: Path, number: int) -> _Subject:
    import torch

    from nas.artifacts import trial_folder
    from nas.latency import make_measurer
    from nas.run import load_run
    from ops.layers import draw_masks_

    run = load_run(place)
    trial = run.trial(number)
    original = number if trial.copy_of is None else trial.copy_of
    note = ""
    if (trial_folder(run.folder, original) / "weights.safetensors").is_file():
        network = run.build(number)
    else:
        network = run.space.build(trial.architecture).eval()
        draw_masks_(network, torch.Generator().manual_seed(trial.seed))
        note = f"trial {number} was not trained: its masks were drawn at random, at the densities it was to have"
    shape = tuple(run.meta("data")["input_shape"])
    latency = run.config.latency
    title = f"{run.name}, trial {number}"
    return _Subject(title, network, shape, latency.batch, latency.threads, note, make_measurer(run.config))


def latency_model(threads: int) -> tuple[LatencyModel, str, tuple[str, ...]]:
    """(the best model there is of this machine, what it is in words, what to know about that)."""
    from hw_models.descriptor import load_device
    from hw_models.predictor import CalibrationError, load_predictor

    try:
        predictor = load_predictor(threads)
        if predictor is not None:
            known = (
                f"{predictor.facts.get('networks', 0):,} networks, {predictor.facts.get('steps', 0):,} distinct steps"
            )
            return predictor, f"the model calibrated on this machine ({known})", ()
        why = f"this machine is not calibrated for {threads} thread{'s' if threads > 1 else ''}: nas calibrate does it"
    except CalibrationError as error:
        why = str(error)
    host = load_device("host", threads)
    figures = "measured roofs" if host.measured else "own account of itself"
    return _uncalibrated(host, threads), f"the machine's {figures}", (f"predictions are coarse; {why}",)


def _uncalibrated(device: DeviceDescriptor, threads: int) -> LatencyModel:
    """A model that was told no measurement: it answers from the device's roofs."""
    import pandas as pd

    from hw_models.predictor import Predictor
    from hw_models.workload import NETWORK_COLUMNS, STEP_COLUMNS

    no_steps = pd.DataFrame(columns=[*STEP_COLUMNS, "ms", "network", "count"])
    no_networks = pd.DataFrame(columns=[*NETWORK_COLUMNS, "ms", "sum_ms"])
    return Predictor.fit(no_steps, no_networks, device=device, threads=threads)


def _write_profile(found: Profile, title: str, how: str) -> None:
    from nas.report.profile_tables import profile_lines, profile_record, profile_sheet
    from nas.report.sheet import print_sheet

    if how == "csv":
        sys.stdout.write(found.table.to_csv(index=False))
    elif how == "json":
        sys.stdout.write(json.dumps(profile_record(found, title), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        about = f"{title}: batch {found.batch}, {found.threads} thread{'s' if found.threads > 1 else ''}"
        print("\n".join([about, *profile_lines(found), ""]))
        print_sheet(profile_sheet(found))


# -- calibrate ----------------------------------------------------------------------------------------------------------


def _calibrate(arguments: argparse.Namespace) -> None:
    from hw_models.calibrate import calibrate
    from nas.report.calibration_progress import CalibrationProgress

    with plain_errors():
        candidates, threads, batch = None, arguments.threads or 1, arguments.batch or 1
        if arguments.space:
            from nas.config import load_config
            from nas.space_networks import SpaceNetworks

            config = load_config(arguments.space)
            threads, batch = arguments.threads or config.latency.threads, arguments.batch or config.latency.batch
            count = 20 + round(arguments.budget)  # more than there is time for
            candidates = SpaceNetworks(config, Path(arguments.space).parent, count, batch)
        with CalibrationProgress(arguments.budget, quiet=arguments.quiet) as progress:
            report = calibrate(
                arguments.budget, candidates=candidates, threads=threads, batch=batch, progress=progress.update
            )
    print(report)


# -- devices ------------------------------------------------------------------------------------------------------------


def _devices(arguments: argparse.Namespace) -> None:
    from hw_models.descriptor import list_devices, load_device
    from nas.report.device_tables import device_sheet, devices_sheet
    from nas.report.sheet import print_sheet

    with plain_errors():
        names = [arguments.device] if arguments.device else list_devices()
        devices = [load_device(name) for name in names]
    if arguments.format == "table":
        print_sheet(device_sheet(devices[0]) if arguments.device else devices_sheet(devices))
        return
    records = [_record(device) for device in devices]
    if arguments.format == "json":
        sys.stdout.write(json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        import pandas as pd

        sys.stdout.write(pd.DataFrame(records).drop(columns="sources").to_csv(index=False))


def _record(device: DeviceDescriptor) -> dict[str, Any]:
    values = {field.name: getattr(device, field.name) for field in fields(device)}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
