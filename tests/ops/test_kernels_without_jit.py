"""With NUMBA_DISABLE_JIT set: the reference suite passes, and networks run through torch, because no kernel is offered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE_SUITE = ("test_reference.py", "test_formats.py", "test_packed.py", "test_lanes.py")

SCRIPT = """
import torch
from torch import nn

from ops.plan import legal_kernels, lower
from ops.runtime import Runtime

torch.set_num_threads(1)
net = nn.Sequential(
    *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2), nn.BatchNorm2d(8)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
).eval()
for layer in (net[0], net[2], net[7]):
    layer.weight.data[torch.rand_like(layer.weight) < 0.8] = 0
x = torch.randn(2, 3, 9, 9)
plan = lower(net, x)
assert all(legal_kernels(op) == ["torch"] for op in plan.ops)
assert {op.kernel for op in plan.ops} == {"torch"}
with torch.no_grad():
    torch.testing.assert_close(Runtime(plan, threads=2)(x), net(x))
assert {op.kernel for op in plan.with_kernels(lambda op, kernels: kernels[-1]).ops} == {"torch"}
"""


def _without_jit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_reference_suite_passes_without_compilation() -> None:
    files = [f"tests/ops/{name}" for name in REFERENCE_SUITE]
    found = _without_jit("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *files)
    assert found.returncode == 0, found.stdout[-3000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout


def test_no_kernel_is_offered_without_compilation_and_networks_run_through_torch() -> None:
    found = _without_jit("-W", "error", "-c", SCRIPT)
    assert found.returncode == 0, found.stderr[-3000:]
