"""What two reviewers broke, mended: each test is one of their finds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hw_models.calibrate import calibrate
from hw_models.foreign import fit_table
from hw_models.importers import read
from hw_models.model import CalibrationError
from hw_models.shared_tables import read_table, write_table
from hw_models.store import MeasurementStore
from hw_models.workload import workload
from ops.plan import lower
from tests.hw_models.synthetic_machine import observed, some_work

FACTS = {"source": "tests", "licence": "none", "method": "simulated", "device": "synthetic", "runtime": "r"}


def test_what_the_store_gives_can_be_shared_and_shared_again(tmp_path: Path) -> None:
    from hw_models.measure import Measurement

    store = MeasurementStore(tmp_path / "s.sqlite")
    epoch = store.open_epoch("r", {}, {"sentinel": Measurement(1.0, 1.0, 1.0, 1.0, 1.0, "ok", (1.0,))})
    store.add_networks(epoch, *observed(some_work(2)))
    write_table(tmp_path / "a.parquet", *store.observations("r"), FACTS)
    first = read_table(tmp_path / "a.parquet", allow_other_runtime=True)
    write_table(tmp_path / "b.parquet", first.steps, first.networks, FACTS)
    again = read_table(tmp_path / "b.parquet", allow_other_runtime=True)
    pd.testing.assert_frame_equal(first.networks, again.networks)


@pytest.mark.parametrize("kind", ["file", "device file"])
def test_a_cache_that_cannot_be_written_is_refused_before_the_work(kind: str, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "cache"
    if kind == "file":
        place.touch()
    else:
        place.mkdir()
        (place / "devices").touch()
    monkeypatch.setenv("NAS_CACHE_DIR", str(place))
    with pytest.raises(CalibrationError, match=r"cannot be kept in .* NAS_CACHE_DIR"):
        calibrate(5)


def test_more_threads_than_cores_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    with pytest.raises(CalibrationError, match="4096 threads"):
        calibrate(5, threads=4096)


def test_an_operation_with_weights_inside_is_not_free() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.LSTM(64, 64, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inside(x)[0]
            return out

    net = Recurrent()
    steps = workload([lower(net.eval(), torch.zeros(1, 20, 64))]).steps
    weights = sum(p.numel() for p in net.parameters())
    assert steps["weight_bytes"].max() == 4 * weights
    assert steps["macs"].max() == 20 * weights
    norm = workload([lower(nn.LayerNorm(64).eval(), torch.zeros(1, 20, 64))]).steps
    assert norm["macs"].max() == 0


def test_the_unit_of_a_list_counts_and_that_of_others_is_their_own(tmp_path: Path) -> None:
    (tmp_path / "sec.json").write_text("[0.001, 0.002, null]")
    found = read(tmp_path / "sec.json", unit="s").networks
    assert found is not None
    np.testing.assert_allclose(found["ms"], [1.0, 2.0, np.nan])
    with pytest.raises(ValueError, match="unit of their own"):
        read(tmp_path / "sec.json", "timm", unit="s")


def test_lists_by_number_or_by_operations_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text('{"7": 1.0, "3": 2.0}')
    found = read(tmp_path / "numbers.json").networks
    assert found is not None
    assert found.index.tolist() == [3, 7]


def test_files_of_one_name_are_devices_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1.5\n2.5\n")
    (tmp_path / "x.json").write_text("[3.5, 4.5]")
    found = read(tmp_path).networks
    assert found is not None
    assert len(found.columns) == 2


def test_text_is_not_taken_for_true() -> None:
    rows = [
        {"network": n, "kind": k, "count": c, "live": v}
        for n in range(12)
        for k, c, v in (("a", n % 4 + 1, True), ("b", 3, False))
    ]
    operations, ms = pd.DataFrame(rows), {n: 1.0 + n % 4 for n in range(12)}
    as_text = operations.assign(live=operations["live"].astype(str))
    same = [fit_table(frame, ms).predict_many(operations)["ms"] for frame in (operations, as_text)]
    np.testing.assert_allclose(*same)
    with pytest.raises(ValueError, match="live: expected true or false, got 'perhaps'"):
        fit_table(operations.assign(live="perhaps"), ms)
