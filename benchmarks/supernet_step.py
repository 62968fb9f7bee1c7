"""What a step of a supernet search costs, against the plain textbook form in which each candidate is called in turn.

    python -m benchmarks.supernet_step [--quick] [--space darts] [--cases darts ...] [--device cuda] [--publish]

A step is what the searchers do with two batches: one move of the architecture parameters on held-out data and one of the weights
(first order). Both forms are the same searcher with the same seed, in one process; only `GateBoard.fast` differs, and that the
plain form lets weights require gradients in the architecture step. They take turns, in an order that changes every round; the
time of a part is a low percentile over rounds. Where the machine is busy with other things, look at the CPU time.

First it is checked that both compute the same: loss and all gradients, in double precision on a small batch, and in the precision
of the search on the whole batch. The batches are noise: a step costs the same on images.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hw_models.measure import no_garbage_collection
from nas.oneshot.algorithm import At, Setting
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.gradient import GradientSearch
from search_spaces import get_space

PUBLISHED = Path(__file__).resolve().parent.parent / "runs/published/supernet_step.csv"
AIM = {"cpu": 1.5, "cuda": 4.0}
PERCENTILE = 10
DOUBLE, SINGLE = 1e-9, 0.02
"""Largest relative difference of all gradients together: in double precision; in that of the search, where batch norms of small
variance make much of rounding."""


@dataclass(frozen=True)
class Case:
    """A search.

    Attributes:
        space, arguments: what is searched.
        searcher, options: by what; options are those of its class.
        batch: images in each of the two batches.
    """

    space: str
    arguments: Mapping[str, Any]
    batch: int
    searcher: str = "darts"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.arguments["input_shape"]
        return shape


_CIFAR: dict[str, Any] = {"input_shape": (3, 32, 32), "classes": 10, "channels": 16}
_SMALL: dict[str, Any] = {"input_shape": (1, 14, 14), "classes": 10, "channels": 8, "cells": 5}
CASES: dict[str, Case] = {
    "darts": Case("darts", {**_CIFAR, "cells": 8}, 16),
    "darts, small": Case("darts", _SMALL, 64),
    "pcdarts, K=4": Case("darts", {**_CIFAR, "cells": 8}, 16, "pcdarts", {"k": 4}),
    "dass, masks and weights": Case("darts", _SMALL, 64, "dass", {"order": 1, "one_step": True, "density": 0.1}),
    "nasbench201": Case("nasbench201", {**_CIFAR, "cells": 5}, 16),
    "nasnet": Case("nasnet", {"input_shape": (3, 16, 16), "classes": 10, "channels": 16, "cells": 1}, 16),
}
"""The published setting of DARTS with a batch for a CPU; one for small images; relatives; other spaces."""


def tiny(case: Case) -> Case:
    """The same with few, small images and cells, for tests."""
    planes = case.shape[0]
    given = {**case.arguments, "input_shape": (planes, 8, 8), "channels": 8, "cells": 3 if case.space == "darts" else 1}
    return Case(case.space, given, 4, case.searcher, case.options)


class Step:
    """A searcher of a case, and two batches for it.

    Args:
        case: what to search.
        fast: or plain.
        device: where.
    """

    def __init__(self, case: Case, fast: bool, device: torch.device) -> None:
        space = get_space(case.space, **case.arguments)
        setting = Setting(space, case.shape, case.arguments["classes"], 0, device)
        kind = ALGORITHMS[case.searcher]
        search = kind(setting, kind.Options(**case.options))
        assert isinstance(search, GradientSearch)
        self.search = search
        search.supernet.board.fast = fast
        if not fast:
            search.without_weight_gradients = contextlib.nullcontext  # type: ignore[method-assign]
        search.begin_phase(0, 1)
        generator = torch.Generator().manual_seed(1)
        draw = lambda: torch.randn(case.batch, *case.shape, generator=generator).to(device)  # noqa: E731
        label = lambda: torch.randint(case.arguments["classes"], (case.batch,), generator=generator).to(device)  # noqa: E731
        self.x, self.held_x, self.y, self.held_y = draw(), draw(), label(), label()
        self.at = At(phase=0, epoch=0, epochs=1, step=0, steps=1)

    def architecture(self) -> None:
        """One move of the architecture parameters."""
        self.search.architecture_step(self.x, self.y, self.held_x, self.held_y, self.at)

    def weights(self) -> None:
        """One move of the weights."""
        self.search.weight_step(self.x, self.y, self.at)

    def gradients(self, double: bool = False, images: int | None = None) -> tuple[float, Tensor]:
        """Loss, and one vector of its gradients in architecture parameters, weights and scores, on the first images."""
        supernet, alphas = self.search.supernet, self.search.alphas
        kind = torch.float64 if double else torch.float32
        supernet.to(kind)
        for alpha in alphas.tensors():
            alpha.data = alpha.data.to(kind)
        trained = [p for p in supernet.by_key().values() if p.requires_grad]
        loss = self.search.loss(self.x[:images].to(kind), self.y[:images])[0]
        found = torch.autograd.grad(loss, [*alphas.tensors(), *trained], allow_unused=True)
        supernet.float()
        for alpha in alphas.tensors():
            alpha.data = alpha.data.float()
        return float(loss.detach()), torch.cat([g.flatten().double() for g in found if g is not None])


def differences(plain: Step, fast: Step) -> tuple[float, float]:
    """Relative difference of all gradients: in double precision on a few images, and as searched on the whole batch.

    Raises:
        AssertionError: losses or gradients differ by more than rounding.
    """
    found = []
    for double, bound in ((True, DOUBLE), (False, SINGLE)):
        (loss, expected), (other, got) = (step.gradients(double, 4 if double else None) for step in (plain, fast))
        difference = float((got - expected).norm() / expected.norm())
        precision = "double" if double else "single"
        assert abs(loss - other) <= bound * (1 + abs(loss)), (
            f"losses in {precision} precision: {loss} plain, {other} fast"
        )
        assert difference <= bound, (
            f"gradients in {precision} precision differ by {difference:.1e}, expected <= {bound:.0e}"
        )
        found.append(difference)
    return found[0], found[1]


def timed(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Milliseconds of wall and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def measure(name: str, case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each part of the step, and one for the whole.

    Raises:
        AssertionError: the two forms do not compute the same.
    """
    forms = {"plain": Step(case, False, device), "fast": Step(case, True, device)}
    exact, rounded = differences(forms["plain"], forms["fast"])
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with no_garbage_collection():
        for number in range(rounds + 1):
            for form in sorted(forms, reverse=bool(number % 2)):
                for part, call in (("architecture", forms[form].architecture), ("weights", forms[form].weights)):
                    spent = timed(call, device)
                    if number:  # the first one warms up
                        times.setdefault((form, part), []).append(spent)
    for form in forms:
        times[form, "both"] = [
            (a[0] + b[0], a[1] + b[1]) for a, b in zip(times[form, "architecture"], times[form, "weights"], strict=True)
        ]
    rows = []
    for part in ("architecture", "weights", "both"):
        low = {form: np.percentile(np.array(times[form, part]), PERCENTILE, axis=0) for form in forms}
        row = {"case": name, "searcher": case.searcher, "batch": case.batch, "device": device.type, "part": part}
        for i, clock in enumerate(("", "cpu_")):
            plain, fast = (float(low[form][i]) for form in ("plain", "fast"))
            row |= {f"plain_{clock}ms": plain, f"fast_{clock}ms": fast, f"{clock}ratio": plain / fast}
        rows.append(row | {"difference_double": exact, "difference": rounded, "rounds": rounds})
    return rows


def facts(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "machine": name,
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "load_average_before": load,
        "times": f"percentile {PERCENTILE} over rounds",
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.supernet_step", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--cases", nargs="+", choices=list(CASES), help="default all")
    p.add_argument("--space", choices=sorted({case.space for case in CASES.values()}), help="only cases of this space")
    p.add_argument("--rounds", type=int, help="default 10; 3 with --quick")
    p.add_argument("--quick", action="store_true", help="few rounds")
    p.add_argument("--tiny", action="store_true", help="few, small images: to see that it works, not to measure")
    p.add_argument("--device", default="cpu", choices=sorted(AIM))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--publish", nargs="?", type=Path, const=PUBLISHED, metavar="FILE.csv", help="default %(const)s")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 if a whole step missed its aim, or 2 for wrong arguments."""
    p = parser()
    chosen = p.parse_args(arguments)
    rounds = chosen.rounds if chosen.rounds is not None else 3 if chosen.quick else 10
    names = [n for n in chosen.cases or CASES if chosen.space in (None, CASES[n].space)]
    if min(rounds, chosen.threads) < 1:
        p.error("--rounds and --threads must be at least 1")
    if not names:
        p.error(f"no case of space {chosen.space} among {', '.join(chosen.cases)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    device, before = torch.device(chosen.device), torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    rows: list[dict[str, Any]] = []
    try:
        known = facts(device)
        print(", ".join(f"{key} {value}" for key, value in known.items()))
        for name in names:
            rows += measure(name, tiny(CASES[name]) if chosen.tiny else CASES[name], rounds, device)
            print(f"{name}: {rows[-1]['ratio']:.2f} times as fast, {rows[-1]['cpu_ratio']:.2f} by CPU time", flush=True)
    finally:
        torch.set_num_threads(before)
    table = pd.DataFrame(rows)
    print()
    shown = table.assign(**{c: table[c].map("{:.0e}".format) for c in ("difference_double", "difference")})
    print(shown.to_string(index=False, float_format="%.2f"))
    aim = AIM[device.type]
    missed = [str(row["case"]) for row in rows if row["part"] == "both" and row["ratio"] < aim]
    print(f"aim {aim:g} times as fast: {'MISSED by ' + '; '.join(missed) if missed else 'met'}")
    if chosen.publish:
        with chosen.publish.open("w", encoding="utf-8") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in known.items())
            table.to_csv(file, index=False, float_format="%.4g", lineterminator="\n")
        print(f"written: {chosen.publish}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
