"""The table of layer times: what went in comes out, in every process, and a bad file is told clearly."""

import sqlite3
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from hw_models import sqlite_file, tables
from hw_models.measure import Measurement
from hw_models.tables import LayerTable, TableError, cache_folder

M = Measurement(0.1, 0.09, 0.123456789012345, 0.2, 0.3, "ok", (0.1, 0.12))


def test_what_went_in_comes_out_exactly(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.sqlite"
    LayerTable(path).add("cpu/t1", [("conv", "csr", M), ("conv", "torch", replace(M, floor_ms=1e-9))])
    table = LayerTable(path)
    assert len(table) == 2
    assert table.lookup("cpu/t1", "conv", "csr") == M
    assert table.lookup("cpu/t1", "conv", "torch") == replace(M, floor_ms=1e-9)
    for other in (("cpu/t2", "conv", "csr"), ("cpu/t1", "conv2", "csr"), ("cpu/t1", "conv", "block")):
        assert table.lookup(*other) is None


def test_the_best_confirmed_wins_then_the_latest_and_nothing_is_overwritten(tmp_path: Path) -> None:
    table = LayerTable(tmp_path / "t.sqlite")
    for floor, quality in ((1, "thin"), (2, "unreached")):
        table.add("r", [("op", "k", replace(M, floor_ms=floor, quality=quality))])
    found = table.lookup("r", "op", "k")
    assert found is not None
    assert found.floor_ms == 1
    table.add("r", [("op", "k", replace(M, floor_ms=3)), ("op", "k", replace(M, floor_ms=4))])
    table.add("r", [("op", "k", replace(M, floor_ms=5, quality="thin"))])
    found = table.lookup("r", "op", "k")
    assert found is not None
    assert found.floor_ms == 4
    assert len(table) == 5


def test_the_cache_folder_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "here"))
    LayerTable().add("r", [("op", "k", M)])
    assert cache_folder() == tmp_path / "here"
    assert [p.name for p in (tmp_path / "here").glob("*.sqlite")] == [tables.FILE]
    monkeypatch.delenv("NAS_CACHE_DIR")
    assert cache_folder().name == "sparse-nas"


def test_a_folder_that_cannot_be_written_warns_once_and_works_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    with pytest.warns(RuntimeWarning, match="NAS_CACHE_DIR"):
        table = LayerTable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerTable()
    table.add("r", [("op", "k", M)])
    assert table.lookup("r", "op", "k") == M
    with pytest.raises(TableError, match="choose a folder that can be written"):
        LayerTable(tmp_path / "file" / "folder" / "t.sqlite")


def test_a_disk_that_fills_up_later_warns_and_goes_on_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    table, explicit = LayerTable(), LayerTable(tmp_path / "mine.sqlite")
    for each in (table, explicit):
        assert each._connection is not None
        each._connection.execute("PRAGMA max_page_count=1")  # "database or disk is full"
    rows = [(f"op{i}" * 100, "k", M) for i in range(200)]
    with pytest.warns(RuntimeWarning, match="disk is full"):
        table.add("r", rows)
    assert len(table) == 200
    with pytest.raises(TableError, match=r"mine\.sqlite.*disk is full"):
        explicit.add("r", rows)
    assert len(explicit) == 0


def damage(path: Path, how: str) -> None:
    if how == "no database":
        path.write_bytes(b"this is not a database " * 100)
    elif how == "other tables":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE layer (a)")
        db.close()
    else:
        table = LayerTable(path)
        table.add("r", [(f"op{i}", "k", M) for i in range(500)])
        table.close()
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)  # the first page says what tables there are, and is kept
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["no database", "other tables", "broken pages"])
def test_a_damaged_cache_warns_once_in_one_line_is_moved_aside_and_begun_anew(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    path = tmp_path / tables.FILE
    damage(path, how)
    before = path.read_bytes()

    def use_anew() -> LayerTable:
        table = LayerTable()
        assert table.lookup("r", "op1", "k") is None
        table.add("r", [("op1", "k", M)])
        return table

    with pytest.warns(RuntimeWarning, match=r"is damaged .* moved to layers\.v1\.sqlite\.damaged") as warned:
        table = use_anew()
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert table.lookup("r", "op1", "k") == M
    assert (tmp_path / f"{tables.FILE}.damaged").read_bytes()[4096:] == before[4096:]
    table.close()
    assert LayerTable().lookup("r", "op1", "k") == M


def test_a_file_that_is_given_and_damaged_is_told_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    path.write_bytes(b"this is not a database " * 100)
    with pytest.raises(TableError, match=r"mine\.sqlite cannot be used: .*not a database; delete it to start afresh"):
        LayerTable(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.sqlite"]
    assert path.read_bytes().startswith(b"this is not")


def test_a_damaged_cache_that_cannot_be_moved_is_replaced_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    monkeypatch.setattr(sqlite_file.os, "replace", refuse)
    damage(tmp_path / tables.FILE, "no database")
    with pytest.warns(RuntimeWarning, match="live in memory"):
        table = LayerTable()
    table.add("r", [("op", "k", M)])
    assert table.lookup("r", "op", "k") == M


def test_a_new_file_of_another_process_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find the same damage; the first has begun a new file when the second comes to act."""
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    LayerTable().close()
    late = LayerTable()
    first = LayerTable()
    error = sqlite3.DatabaseError("database disk image is malformed")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert first._do_without(error)
    first.add("r", [("op", "k", M)])
    assert late._do_without(error)
    assert late.lookup("r", "op", "k") == M


def test_a_cache_that_stays_locked_warns_and_goes_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    LayerTable().close()
    other = sqlite3.connect(tmp_path / tables.FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(RuntimeWarning, match="locked.*live in memory"):
        table = LayerTable()
    other.rollback()
    other.close()
    table.add("r", [("op", "k", M)])
    assert table.lookup("r", "op", "k") == M


def test_a_row_that_makes_no_sense_is_measured_again(tmp_path: Path) -> None:
    table = LayerTable(tmp_path / "t.sqlite")
    table.add("r", [("op", "k", M)])
    table._do(lambda db: db.execute("UPDATE layer SET rounds_ms = 'x'"))
    assert table.lookup("r", "op", "k") is None
    table.add("r", [("op", "k", M)])
    assert table.lookup("r", "op", "k") == M


def test_a_file_held_by_another_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    LayerTable(tmp_path / "t.sqlite").close()
    other = sqlite3.connect(tmp_path / "t.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TableError, match="another process has held it"):
        LayerTable(tmp_path / "t.sqlite")
    other.rollback()
    other.close()
    assert len(LayerTable(tmp_path / "t.sqlite")) == 0


_WRITER = """
import sys
from hw_models.measure import Measurement
from hw_models.tables import LayerTable
for i in range(5):
    LayerTable(sys.argv[1]).add("r", [(f"{sys.argv[2]}-{i}", "k", Measurement(i, 0, 0, 0, 0, "ok", ()))])
"""


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(n)], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    table = LayerTable(path)
    assert len(table) == 15
    for n in range(3):
        for i in range(5):
            found = table.lookup("r", f"{n}-{i}", "k")
            assert found is not None
            assert found.floor_ms == i
