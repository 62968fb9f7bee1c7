"""A predictor on disk: JSON for numbers and text, NPZ for arrays, nothing pickled. `save` and `load`.

A folder holds a file `current` with the name of the folder in it that holds `model.json` (runtime, corrections, intervals, how it
came about), `table.json` (measured steps and curves), `learned.npz` and `device.toml`. A new model is written whole before
`current` is replaced, so that there is always one that can be read, whenever its writer is killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hw_models.analytical import AnalyticalModel
from hw_models.conformal import Conformal
from hw_models.context import Context
from hw_models.descriptor import DeviceError, load_device, save_device
from hw_models.device import runtime_id
from hw_models.honesty import Spread
from hw_models.model import CalibrationError
from hw_models.network_model import NetworkModel
from hw_models.sqlite_file import cache_folder
from hw_models.step_model import StepModel
from hw_models.step_table import StepTable

if TYPE_CHECKING:
    from hw_models.predictor import Predictor

__all__ = ["FORMAT", "home", "load", "of_host", "save"]

FORMAT = 2
CURRENT = "current"
KEEP_S = 60.0
_RENEW = "run `nas calibrate` to make a new one (a minute is enough to begin with)"


def home(runtime: str) -> Path:
    """Where the predictor of a runtime is kept."""
    return cache_folder() / "predictors" / re.sub(r"[^A-Za-z0-9.-]+", "_", runtime)


def save(model: Predictor, folder: str | os.PathLike[str]) -> Path:
    """Write a predictor.

    Args:
        folder: made if it is not there; what it held of models is replaced.

    Returns:
        The folder.
    """
    folder = Path(folder)
    half = folder / f"{time.time_ns():x}-{os.getpid()}"
    half.mkdir(parents=True)
    content = {
        "format": FORMAT,
        "runtime": model.runtime,
        "threads": model.threads,
        "shifts": model.shifts,
        "context": model.context.to_dict(),
        "correction": model.correction.to_dict(),
        "spread": model.spread.to_dict(),
        "conformal": model.conformal.to_dict(),
        "learned": model.learned is not None,
        "facts": model.facts,
    }
    (half / "model.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (half / "table.json").write_text(json.dumps(model.table.to_dict()), encoding="utf-8")
    if model.learned is not None:
        np.savez_compressed(half / "learned.npz", **model.learned.to_arrays())  # type: ignore[arg-type]
    save_device(model.device, half / "device.toml")
    pointer = folder / f".{half.name}"
    pointer.write_text(half.name, encoding="utf-8")
    pointer.replace(folder / CURRENT)
    for path in folder.iterdir():  # but not what another process is writing or reading
        if path.is_dir() and path != half and time.time() - path.stat().st_mtime > KEEP_S:
            shutil.rmtree(path, ignore_errors=True)
    return folder


def load(folder: str | os.PathLike[str]) -> Predictor:
    """Read a predictor.

    Raises:
        CalibrationError: there is none, or it is damaged or of another format.
    """
    folder = Path(folder)
    for _ in range(5):
        try:
            name = (folder / CURRENT).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            break
        try:
            return _read(folder / name)
        except CalibrationError:
            if (folder / CURRENT).read_text(encoding="utf-8").strip() == name:  # it was not replaced meanwhile
                raise
    raise CalibrationError(f"there is no calibration in {folder}; {_RENEW}")


def _read(folder: Path) -> Predictor:
    from hw_models.predictor import Predictor

    try:
        content: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise CalibrationError(
                f"the calibration in {folder} has format {content.get('format')}, this version reads {FORMAT}; {_RENEW}"
            )
        table = StepTable.from_dict(json.loads((folder / "table.json").read_text(encoding="utf-8")))
        learned = None
        if content["learned"]:
            with np.load(folder / "learned.npz", allow_pickle=False) as arrays:
                learned = StepModel.from_arrays(dict(arrays))
        device = load_device(folder / "device.toml")
        return Predictor(
            device=device,
            runtime=content["runtime"],
            threads=int(content["threads"]),
            table=table,
            learned=learned,
            roofs=AnalyticalModel(device),
            shifts=content["shifts"],
            context=Context.from_dict(content["context"]),
            correction=NetworkModel.from_dict(content["correction"]),
            spread=Spread(**content["spread"]),
            conformal=Conformal.from_dict(content["conformal"]),
            facts=content["facts"],
        )
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        DeviceError,
        zipfile.BadZipFile,
    ) as error:
        raise CalibrationError(
            f"the calibration in {folder} is damaged ({type(error).__name__}: {error}); {_RENEW}. "
            "Measurements are kept apart from it and are not lost"
        ) from error


def of_host(threads: int = 1) -> Predictor | None:
    """The predictor `nas calibrate` made for this machine, these versions and so many threads; None if it made none.

    Raises:
        CalibrationError: there is one of this machine, but of other versions or threads, or it is damaged.
    """
    runtime = runtime_id(threads)
    if (home(runtime) / CURRENT).exists():
        return load(home(runtime))
    machine = runtime.split("/")[0]
    others = [path for path in home(f"{machine}/x").parent.glob(f"{machine}_*") if (path / CURRENT).exists()]
    if others:
        known = sorted(_runtime_of(path) for path in others)
        raise CalibrationError(
            f"this machine was calibrated for {'; '.join(known)}, but now runs {runtime}; times of other versions and numbers of "
            f"threads do not carry over: {_RENEW}"
        )
    return None


def _runtime_of(folder: Path) -> str:
    try:
        name = (folder / CURRENT).read_text(encoding="utf-8").strip()
        return str(json.loads((folder / name / "model.json").read_text(encoding="utf-8"))["runtime"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name
