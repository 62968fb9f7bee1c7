"""Compiled code shared by many processes: an empty cache, no cache, and code for other machines than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent

# Few kernels on purpose: each of them is compiled here, seconds at a time.
SCRIPT = """
import sys

import numba.core.caching
import torch
from torch import nn

from ops.plan import lower
from ops.runtime import Runtime

if sys.argv[2:] == ["no cache"]:
    numba.core.caching.CacheImpl._locator_classes = []
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
for layer in (net[0], net[2]):
    layer.weight.data[torch.rand_like(layer.weight) < 0.7] = 0
x = torch.randn(2, 3, 9, 11)
plan = lower(net, x, lambda op, kernels: kernels[-1])
with torch.no_grad():
    y, expected = Runtime(plan)(x), net(x)
assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()
torch.save([y, [op.kernel for op in plan.ops]], sys.argv[1])
"""


def _start(result: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(result), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str], result: Path) -> tuple[torch.Tensor, list[str]]:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    y, kernels = torch.load(result)
    return y, kernels


def _run(folder: Path, *arguments: str, **settings: str) -> tuple[torch.Tensor, list[str]]:
    return _finished(_start(folder / "y.pt", *arguments, **settings), folder / "y.pt")


def _compiled(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The result of the kernels this machine gets by itself."""
    return _run(tmp_path_factory.mktemp("usual"))[0]


@pytest.mark.slow
def test_four_processes_may_fill_an_empty_cache_at_once(tmp_path: Path, usual: torch.Tensor) -> None:
    cache, results = tmp_path / "cache", [tmp_path / f"{k}.pt" for k in range(4)]
    processes = [_start(result, NUMBA_CACHE_DIR=str(cache)) for result in results]
    found = [_finished(process, result) for process, result in zip(processes, results, strict=True)]
    for y, kernels in found:
        assert torch.equal(y, usual)
        assert kernels == found[0][1]
    filled = _compiled(cache)
    assert filled
    assert torch.equal(_run(tmp_path, NUMBA_CACHE_DIR=str(cache))[0], usual)
    assert _compiled(cache) == filled, "a fifth process compiled again"


def test_lesser_machines_and_the_portable_path_give_the_same(tmp_path: Path, usual: torch.Tensor) -> None:
    settings = [{"NAS_ISA": "avx2"}, {"NAS_ISA": "generic"}, {"NAS_SPECIALISED": "0"}]
    results = [tmp_path / f"{k}.pt" for k in range(3)]
    processes = [_start(result, **setting) for result, setting in zip(results, settings, strict=True)]
    for process, result in zip(processes, results, strict=True):
        y, kernels = _finished(process, result)
        assert set(kernels) == {"portable"}
        assert (y - usual).abs().max() <= 1e-4 * usual.abs().max()


def test_where_the_cache_cannot_be_the_next_best_place_is_taken(tmp_path: Path, usual: torch.Tensor) -> None:
    file = tmp_path / "file"
    file.write_text("no folder can be in here, not even for root")
    assert torch.equal(_run(tmp_path, NUMBA_CACHE_DIR=str(file / "cache"))[0], usual)


@pytest.mark.slow
def test_where_nothing_can_be_cached_everything_is_compiled_again(tmp_path: Path, usual: torch.Tensor) -> None:
    assert torch.equal(_run(tmp_path, "no cache")[0], usual)


FORKED = """
import os
import sys
import time

import torch
from torch import nn

from ops.plan import lower
from ops.runtime import Runtime

torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
x = torch.randn(1, 3, 9, 11)
run = Runtime(lower(net, x, lambda op, kernels: kernels[-1]), threads=2)
y = run(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(x), y) else 1)
deadline = time.time() + 3
while time.time() < deadline:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.01)
os.kill(child, 9)
os.waitpid(child, 0)
sys.exit("the child hangs")
"""


def test_a_runtime_with_threads_works_in_a_forked_child() -> None:
    found = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
