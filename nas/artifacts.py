"""Files of one trial: `artifacts/<trial>/` with architecture.json, weights.safetensors, history.csv and plan.csv.

Written beside their place and renamed, so a killed process leaves either the whole folder or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from nas.errors import EvaluationFailed, RunError
from ops.layers import sparse_layers
from search_spaces import Architecture

WEIGHTS = "weights.safetensors"


def trial_folder(run_folder: Path, trial: int) -> Path:
    """Where a trial's files are, whether they exist or not."""
    return run_folder / "artifacts" / f"{trial:05d}"


def checkpoint_folder(run_folder: Path, trial: int) -> Path:
    """Where the checkpoints of a trial's training are while it is not finished."""
    return run_folder / "checkpoints" / f"{trial:05d}"


def write_artifacts(
    run_folder: Path,
    trial: int,
    architecture: Architecture,
    *,
    model: nn.Module | None,
    history: Sequence[dict[str, Any]],
    plan: pd.DataFrame | str,
) -> Path:
    """Write all files of a trial; an earlier attempt's are replaced as a whole.

    Args:
        run_folder: runs/<name>.
        trial: row number.
        architecture: what was built.
        model: trained network, weights and masks are kept; None for a trial that was never trained.
        history: one row per epoch.
        plan: one row per executed operation; or the text of plan.csv.

    Raises:
        RunError: the folder cannot be written (full disk, no rights).
    """
    target = trial_folder(run_folder, trial)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "architecture.json").write_text(architecture.to_json() + "\n")
        pd.DataFrame(list(history)).to_csv(scratch / "history.csv", index=False)
        (scratch / "plan.csv").write_text(plan if isinstance(plan, str) else plan_text(plan))
        if model is not None:
            save_model(model, str(scratch / WEIGHTS))
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{target}: cannot write the files of trial {trial}: {reason}; "
            "free some space or fix the rights, then start the same command again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def plan_text(plan: pd.DataFrame) -> str:
    """A plan as it stands in plan.csv."""
    return plan.to_csv(index=False)


def write_plan(run_folder: Path, trial: int, plan: pd.DataFrame) -> None:
    """Replace the plan of a trial, by one that was measured since, say; in one step.

    Raises:
        RunError: the folder cannot be written.
    """
    path = trial_folder(run_folder, trial) / "plan.csv"
    scratch = path.with_name(f".plan.csv.{os.getpid()}")
    try:
        plan.to_csv(scratch, index=False)
        os.replace(scratch, path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or fix the rights"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def load_weights(run_folder: Path, trial: int, model: nn.Module) -> None:
    """Load the trained weights and masks of a trial into a freshly built network, in place.

    Raises:
        RunError: the trial has no weights (never trained, failed, or not kept), or they do not fit.
    """
    path = trial_folder(run_folder, trial) / WEIGHTS
    if not path.is_file():
        if _was_trained(path.parent):
            raise RunError(
                f'trial {trial} was trained, but its weights were not kept ({path} is missing): run.keep_weights = "front" keeps '
                'those of the front and of one-shot searches only. Search with run.keep_weights = "all", or train it again in '
                "another run"
            )
        raise RunError(f"trial {trial} has no weights ({path} is missing): it failed or was never trained")
    try:
        load_model(model, str(path))
    except Exception as error:  # safetensors raises its own, torch RuntimeError: both mean a damaged or foreign file
        raise RunError(f"{path}: does not fit the network of trial {trial}: {error}") from error


def remove_weights(run_folder: Path, trial: int) -> None:
    """Remove the trained weights of a trial; its other files stay. Nothing happens if there are none, or they cannot be removed."""
    with suppress(OSError):
        (trial_folder(run_folder, trial) / WEIGHTS).unlink(missing_ok=True)


def _was_trained(folder: Path) -> bool:
    try:
        return len((folder / "history.csv").read_text().splitlines()) > 1
    except (OSError, UnicodeDecodeError):
        return False


def load_initial(path: Path, model: nn.Module) -> None:
    """Load the weights and masks that a trial must start from into a freshly built network, in place.

    Raises:
        EvaluationFailed: the file is missing or damaged, or a tensor of it has no place in the network.
    """
    try:
        tensors = load_file(path)
        _, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EvaluationFailed(
            f"{path}: expected weights and masks to start from, found none that fit ({error}); remove the folder "
            f"{path.parent}, and the search behind it is made again"
        ) from error
    if unexpected:
        raise EvaluationFailed(f"{path}: holds tensors that the network has not: {', '.join(unexpected[:5])}")
    for _, layer in sparse_layers(model):
        layer.apply_mask_()


def read_plan(run_folder: Path, trial: int) -> pd.DataFrame:
    """The operations of a trial as measured, one row each.

    Raises:
        RunError: the trial has no plan.
    """
    path = trial_folder(run_folder, trial) / "plan.csv"
    if not path.is_file():
        raise RunError(f"trial {trial} has no plan ({path} is missing): it failed before it was measured")
    try:
        frame = pd.read_csv(path, dtype={"op": str})  # an operation called 0 is no number
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors, undecodable bytes too
        raise RunError(f"{path}: damaged: {error}") from error
    if not {"op", "kind"} <= set(frame.columns):
        raise RunError(f"{path}: damaged: expected the columns op and kind, found {', '.join(map(str, frame.columns))}")
    return frame


def clean_scratch(run_folder: Path) -> None:
    """Remove what killed processes left half-written."""
    patterns = (
        "artifacts/.*",
        "artifacts/*/.plan.csv.*",
        "checkpoints/.*",
        "checkpoints/*/.*",
        "oneshot/.*",
        "oneshot/*/.*",
        ".exported.*",
        ".*.html.*",
        "run.db.new*",
    )
    for leftover in [path for pattern in patterns for path in run_folder.glob(pattern)]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
