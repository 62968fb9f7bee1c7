"""Which vector instructions the kernels may use, found at run time.

`NAS_ISA` overrides it, downwards only: "avx2" or "generic" make Numba compile for a CPU without AVX-512, as if the machine had
none. It has to be set before the first kernel is compiled; setting it in the environment of the process is the sure way.

Start with `isa`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
import numba

__all__ = ["LEVELS", "compiles", "isa"]

config: Any = numba.config

LEVELS = ("generic", "avx2", "avx512")
# What LLVM is told to compile for when a level below the machine's is asked for: the plainest CPU that has it.
_CPU_OF = {"generic": "x86-64", "avx2": "haswell"}


@lru_cache(maxsize=1)
def isa() -> str:
    """ "avx512" (AVX-512 F, BW, DQ and VL), "avx2" (with FMA) or "generic": what Numba compiles for in this process.

    Raises:
        ValueError: `NAS_ISA` is none of the three, or more than this machine has.
    """
    found = _compiled_for()
    wanted = os.environ.get("NAS_ISA", "")
    if not wanted:
        return found
    if wanted not in LEVELS:
        raise ValueError(f"NAS_ISA must be one of {', '.join(LEVELS)}, got {wanted!r}")
    if LEVELS.index(wanted) > LEVELS.index(found):
        raise ValueError(f"NAS_ISA={wanted} asks for more than this machine has ({found}); unset it")
    if wanted != found:
        config.CPU_NAME, config.CPU_FEATURES = _CPU_OF[wanted], ""
    return wanted


def compiles() -> bool:
    """Whether kernels can be compiled at all: not with Numba's NUMBA_DISABLE_JIT set."""
    return not config.DISABLE_JIT


def _compiled_for() -> str:
    """The level of the CPU and features Numba is configured for, the machine's own unless its settings say otherwise."""
    features = set()
    if config.CPU_NAME is None:
        features = {name for name, there in llvm.get_host_cpu_features().items() if there}
    elif config.CPU_NAME in ("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"):
        features = {"avx2", "fma"}
    for entry in (config.CPU_FEATURES or "").split(","):
        if entry.startswith("+"):
            features.add(entry[1:])
        elif entry.startswith("-"):
            features.discard(entry[1:])
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= features else "generic"


isa()  # before anything is compiled
