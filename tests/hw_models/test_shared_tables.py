"""Shared tables: one file says everything, and what does not fit is told, not guessed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hw_models import shared_tables
from hw_models.device import runtime_id
from hw_models.shared_tables import OtherRuntimeError, SharedTableError, read_table, write_table
from hw_models.workload import STEP_NUMBERS, STEP_TEXTS

FROM = {"source": "us", "licence": "MIT", "method": "measured", "device": "host", "runtime": runtime_id(2), "note": "é"}


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Networks 7, 9 and 11; the second has no steps."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {
            **{name: f"{name} {i}" for name in STEP_TEXTS},
            **{name: rng.random() for name in STEP_NUMBERS},
            **{name: rng.random() for name in ("ms", "lo_ms", "hi_ms")},
            "network": network,
            "quality": "ok",
        }
        for network in (11, 7)
        for i in range(3)
    ]
    networks = pd.DataFrame(
        {"name": ["a", "b", "c"], "ms": [1.5, 2.5, 3.5], "sum_ms": [1.0, math.nan, 3.0], "calls": [1, 2, 3]},
        index=[7, 9, 11],
    )
    return pd.DataFrame(rows), networks


def test_what_was_written_is_read_networks_numbered_in_order(tmp_path: Path) -> None:
    steps, networks = frames()
    path = tmp_path / "t.parquet"
    write_table(path, steps, networks, FROM)
    table = read_table(path)
    assert table.provenance == FROM
    assert table.created_at.endswith("+00:00")
    pd.testing.assert_frame_equal(table.networks.set_axis(networks.index), networks)
    back = table.steps.assign(network=table.steps["network"].map(dict(enumerate(networks.index))))
    expected = pd.concat([steps[steps["network"] == 7], steps[steps["network"] == 11]], ignore_index=True)
    pd.testing.assert_frame_equal(back[steps.columns], expected, check_dtype=False)
    assert str(table.steps["network"].dtype) == "int64"
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_table_without_networks_is_a_table(tmp_path: Path) -> None:
    steps, networks = frames()
    write_table(tmp_path / "t.parquet", steps.iloc[:0], networks.iloc[:0], FROM)
    table = read_table(tmp_path / "t.parquet")
    assert table.steps.empty
    assert table.networks.empty
    write_table(tmp_path / "t.parquet", steps.iloc[:0], networks, FROM)
    assert read_table(tmp_path / "t.parquet").networks["ms"].tolist() == [1.5, 2.5, 3.5]


def test_any_tool_that_reads_parquet_sees_one_row_per_step_with_its_network(tmp_path: Path) -> None:
    from pyarrow import parquet

    write_table(tmp_path / "t.parquet", *frames(), FROM)
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert frame["network.name"].tolist() == ["a"] * 3 + ["b"] + ["c"] * 3
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    described = json.loads(file.schema_arrow.metadata[shared_tables.METADATA])
    assert described["units"]["network.ms"] == described["units"]["hi_ms"] == "ms"
    assert described["units"]["weight_bytes"] == "bytes"
    assert "name" not in described["units"]
    file.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, n, p: (s.rename(columns={"ms": "us"}), n, p),
            r"steps: the columns \['ms'\] are missing; of another unit: 'us'",
        ),
        (
            lambda s, n, p: (s, n.rename(columns={"ms": "latency_s"}), p),
            r"\['ms'\] are missing; of another unit: 'latency_s'",
        ),
        (
            lambda s, n, p: (s, n.assign(p99_us=1.0), p),
            "column 'p99_us' says another unit than 'ms'.* end its name in _ms",
        ),
        (lambda s, n, p: (s, n.assign(energy_j=1.0), p), "column 'energy_j' says another unit than 'mj'"),
        (lambda s, n, p: (s.assign(peak_kb=1.0), n, p), "column 'peak_kb' says another unit than 'bytes'"),
        (lambda s, n, p: (s.assign(network=1), n, p), "steps.network must be the index of networks"),
        (lambda s, n, p: (s, n.set_axis([7, 7, 11]), p), "each network once"),
        (lambda s, n, p: (s, n, {**p, "licence": " "}), "missing: licence"),
        (lambda s, n, p: (s, n, {}), "missing: source, licence, method, device, runtime"),
        (lambda s, n, p: (s, n, {**p, "method": "guessed"}), "method must be one of .* got 'guessed'"),
    ],
)
def test_a_table_that_does_not_say_what_it_is_is_not_written(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"the older one")
    with pytest.raises(SharedTableError, match=message):
        write_table(path, *change(*frames(), FROM))
    assert path.read_bytes() == b"the older one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, *frames(), FROM)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shared_tables.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_table(path, *frames(), FROM)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def with_metadata(path: Path, change: Any) -> None:
    """Change what a file says of itself."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    described = change(json.loads(table.schema.metadata[shared_tables.METADATA]))
    parquet.write_table(table.replace_schema_metadata({shared_tables.METADATA: json.dumps(described).encode()}), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "version": 2}, "has schema version 2, and this release reads version 1"),
        (
            lambda d: {**d, "units": {**d["units"], "network.ms": "s"}},
            "'network.ms' is said to be in 's', but its name says 'ms'",
        ),
        (lambda d: {**d, "units": {}}, "is said to be in None, but its name says"),
        (lambda d: {**d, "provenance": {}}, r"t\.parquet: the provenance needs"),
        (lambda d: [], "no table of this project"),
    ],
)
def test_another_version_or_unit_is_told(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, *frames(), FROM)
    with_metadata(path, change)
    with pytest.raises(SharedTableError, match=message):
        read_table(path)


def test_files_of_others_are_told(tmp_path: Path) -> None:
    frames()[1].to_parquet(tmp_path / "other.parquet")
    with pytest.raises(SharedTableError, match=r"no table of this project.*hw_models\.importers"):
        read_table(tmp_path / "other.parquet")
    (tmp_path / "no.parquet").write_bytes(b"name,ms\n")
    with pytest.raises(SharedTableError, match=r"no\.parquet cannot be read as parquet"):
        read_table(tmp_path / "no.parquet")
    write_table(tmp_path / "half.parquet", *frames(), FROM)
    data = (tmp_path / "half.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(SharedTableError, match=r"half\.parquet cannot be read as parquet"):
        read_table(tmp_path / "half.parquet")
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.parquet")


def test_a_table_of_another_runtime_says_in_what_it_differs_and_is_read_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    mine = runtime_id(1).split("/")
    other = "/".join([*mine[:2], "torch2.2.1", *mine[3:]])
    write_table(path, *frames(), {**FROM, "runtime": other})
    with pytest.raises(
        OtherRuntimeError,
        match=rf"another runtime: {mine[2].replace('+', '.')} here, torch2\.2\.1 there\. .*nas calibrate",
    ):
        read_table(path)
    assert read_table(path, allow_other_runtime=True).provenance["runtime"] == other
    assert len(read_table(path, runtime=other).networks) == 3
    write_table(path, *frames(), {**FROM, "runtime": "a phone"})
    with pytest.raises(OtherRuntimeError, match=f"{'/'.join(mine).replace('+', '.')} here, a phone there"):
        read_table(path)
