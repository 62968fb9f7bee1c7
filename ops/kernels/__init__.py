"""CPU kernels, one file per family; the slow obvious twin of each is in `ops.reference`; start with `docs/kernels.md`.

`KERNELS_VERSION` names the state of all kernels together. Measured latencies are remembered under it, so raise it whenever
a kernel's speed or result may have changed.
"""

from __future__ import annotations

__all__ = ["KERNELS_VERSION"]

KERNELS_VERSION = "3"
