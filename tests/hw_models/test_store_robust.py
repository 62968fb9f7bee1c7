"""Measurements that were added are never lost: not to damage, locks, kills, forks, threads, full disks or files that move."""

import os
import signal
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hw_models import sqlite_file, store_salvage
from hw_models import store as store_module
from hw_models.sentinels import moved
from hw_models.store import FILE, MeasurementStore, StoreError
from tests.hw_models.test_store import measured, opened

RUNTIME = "cpu/t1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and warnings as in a new process."""
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sqlite_file, "_warned", set())
    return tmp_path


def names(store: MeasurementStore) -> set[str]:
    """Of all networks, after a look that each has all of its steps."""
    steps, networks = store.observations(RUNTIME, "all")
    assert set(steps.groupby("network").size()) <= {4}
    assert set(steps["network"]) == set(networks.index)
    return set(networks["name"])


def fill(store: MeasurementStore, count: int, start: int = 0) -> set[str]:
    """Add networks; their names."""
    store.add_networks(opened(store), *measured(count, start=start))
    return {f"network {label}" for label in range(start, start + count)}


def broken_pages(path: Path, first: int, last: int) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * first : 4096 * last] = b"\xff" * (4096 * (last - first))
    path.write_bytes(data)


def test_networks_outside_the_broken_pages_are_taken_over_and_measuring_goes_on(cache: Path) -> None:
    store = MeasurementStore()
    epoch = opened(store)
    all_names = fill(store, 60)
    store.close()
    pages = (cache / FILE).stat().st_size // 4096
    broken_pages(cache / FILE, pages // 2, pages // 2 + 3)
    with pytest.warns(
        RuntimeWarning, match=r"is damaged .* moved to .*\.damaged, and \d+ of the \d+ networks seen"
    ) as warned:
        kept = names(store)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert kept < all_names
    assert len(kept) > 20
    store.add_networks(epoch, *measured(2, start=100))
    assert names(store) == kept | {"network 100", "network 101"}
    assert len(store.epochs()) == 1
    store.close()
    assert names(MeasurementStore()) == kept | {"network 100", "network 101"}
    assert MeasurementStore().absorb(cache / f"{FILE}.damaged") == 0


@pytest.mark.parametrize("page", range(1, 16))
def test_whatever_page_is_broken_what_is_taken_over_is_whole(page: int, cache: Path) -> None:
    store = MeasurementStore()
    all_names = fill(store, 12)
    steps, networks = store.observations(RUNTIME)
    store.close()
    broken_pages(cache / FILE, page, page + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = names(store)
        again, nets = store.observations(RUNTIME)
    assert kept <= all_names
    for frame, before in (
        (again, steps.merge(networks["name"], left_on="network", right_index=True)),
        (nets, networks),
    ):
        now = frame.merge(nets["name"], left_on="network", right_index=True) if frame is again else frame
        before = before[before["name"].isin(kept)]
        drop = ["network", "epoch"] if frame is again else ["epoch"]
        assert now.drop(columns=drop).reset_index(drop=True).equals(before.drop(columns=drop).reset_index(drop=True))


@pytest.mark.parametrize("how", ["no database", "other tables", "other columns", "empty"])
def test_a_cache_of_which_nothing_can_be_read_is_moved_aside_and_begun_anew(how: str, cache: Path) -> None:
    path = cache / FILE
    if how == "no database":
        path.write_bytes(b"this is not a database " * 100)
    elif how == "other tables":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE network (a)")
        db.close()
    elif how == "other columns":
        with sqlite3.connect(path) as db:
            for name in ("epoch", "opening", "step", "network", "observation"):
                db.execute(f"CREATE TABLE {name} (a)")
        db.close()
    else:
        path.touch()

    def use() -> MeasurementStore:
        store = MeasurementStore()
        assert names(store) == set()
        assert fill(store, 2) == names(store)
        return store

    if how == "empty":
        use()  # a file that was begun and not yet written is no damage
    else:
        with pytest.warns(RuntimeWarning, match=r"none of its measurements could be taken over"):
            use()
        assert (cache / f"{FILE}.damaged").exists()


def test_damaged_files_are_kept_side_by_side(cache: Path) -> None:
    for number in range(2):
        (cache / FILE).write_bytes(b"no database %d" % number * 100)
        with pytest.warns(RuntimeWarning, match="is damaged"):
            MeasurementStore().close()
    assert (cache / f"{FILE}.damaged").read_bytes().startswith(b"no database 0")
    assert (cache / f"{FILE}.damaged.2").read_bytes().startswith(b"no database 1")


def test_a_damaged_cache_that_cannot_be_moved_lives_on_in_memory_with_what_can_be_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    store = MeasurementStore()
    fill(store, 60)
    store.close()
    pages = (cache / FILE).stat().st_size // 4096
    broken_pages(cache / FILE, pages // 2, pages // 2 + 3)
    monkeypatch.setattr(sqlite_file.os, "replace", refuse)
    with pytest.warns(RuntimeWarning, match="live in memory"):
        kept = names(store)
    assert len(kept) > 20
    assert fill(store, 1, 100) | kept == names(store)


def test_a_damaged_file_that_was_named_is_told_left_alone_and_can_be_absorbed(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    store = MeasurementStore(path)
    fill(store, 60)
    store.close()
    pages = path.stat().st_size // 4096
    broken_pages(path, pages // 2, pages // 2 + 3)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"mine\.sqlite cannot be used: .*malformed; name another file.*absorb"):
        names(store)
    store.close()
    other = MeasurementStore(tmp_path / "other.sqlite")
    count = other.absorb(path)
    assert len(names(other)) == count > 20
    assert path.read_bytes() == before
    for nothing in (b"this is not a database " * 100, b""):
        (tmp_path / "no.sqlite").write_bytes(nothing)
        with pytest.raises(StoreError, match=r"nothing can be read of .*no\.sqlite"):
            other.absorb(tmp_path / "no.sqlite")
    with pytest.raises(StoreError, match=r"nothing can be read of .*none\.sqlite"):
        other.absorb(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()


def test_a_named_file_with_tables_of_something_else_is_told_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE trial (a)")
    db.close()
    with pytest.raises(
        StoreError, match=r"run\.db cannot be used: .*tables of something else: trial; name another file"
    ):
        MeasurementStore(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("trial",)]
    db.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE step SET macs = macs + 1 WHERE id = 1",
        "UPDATE observation SET ms = -1 WHERE id = 1",
        "UPDATE observation SET quality = 'x' WHERE id = 1",
        "DELETE FROM observation WHERE id = 1",
        "UPDATE network SET ms = 'x' WHERE id = 1",
        "UPDATE network SET batch = 'x' WHERE id = 1",
        "UPDATE network SET name = 7.5e0 + x'00' WHERE id = 1",
        "UPDATE network SET rounds = x'0102' WHERE id = 1",
        "UPDATE network SET more = '{' WHERE id = 1",
        "UPDATE network SET epoch = 7 WHERE id = 1",
    ],
)
def test_a_network_whose_numbers_were_changed_is_not_taken_over(change: str, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "a.sqlite")
    epoch = opened(store)
    for label in range(3):
        steps, networks, rounds = measured(1, start=label)
        own = steps.iloc[::2]  # no steps in common
        store.add_networks(epoch, own, networks, rounds)
    store._do(lambda db: db.execute(change).connection.commit())
    if "name" in change:
        store._do(lambda db: db.execute("UPDATE network SET name = x'ff00' WHERE id = 1").connection.commit())
    store.close()
    found = store_salvage.readable(tmp_path / "a.sqlite")
    assert (len(found.networks), found.broken) == (2, 1)
    other = MeasurementStore(tmp_path / "b.sqlite")
    assert other.absorb(tmp_path / "a.sqlite") == 2


def test_openings_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "a.sqlite")
    fill(store, 1)
    store._do(lambda db: db.execute("UPDATE opening SET sentinels = '{\"dense\": 7}'").connection.commit())
    found = store_salvage.readable(tmp_path / "a.sqlite")
    assert (found.epochs, found.networks, found.broken) == ([], [], 1)


def held(path: Path) -> sqlite3.Connection:
    """The file, held by another writer."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


def test_a_locked_file_that_was_named_is_told_and_works_when_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    other = held(tmp_path / "m.sqlite")
    with pytest.raises(
        StoreError, match="locked; another process has held it for 0 s; end that process, or use another"
    ):
        store.add_networks(epoch, *measured(2))
    with pytest.raises(StoreError, match="locked"):
        MeasurementStore(tmp_path / "m.sqlite")
    other.rollback()
    other.close()
    assert names(store) == set()
    store.add_networks(epoch, *measured(2))
    assert len(names(store)) == 2


def test_a_cache_that_stays_locked_goes_on_in_memory_with_what_it_held(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    store = MeasurementStore()
    old = fill(store, 2)
    epoch = opened(store)
    other = held(cache / FILE)
    with pytest.warns(RuntimeWarning, match="locked.*live in memory"):
        store.add_networks(epoch, *measured(1, start=10))
    other.rollback()
    other.close()
    assert names(store) == {*old, "network 10"}
    assert opened(store).id == epoch.id
    store.close()
    assert names(store) == {*old, "network 10"}


def test_an_exclusively_locked_cache_is_not_waited_for_for_ever(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.1)
    MeasurementStore().close()
    other = sqlite3.connect(cache / FILE, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="live in memory"):
        store = MeasurementStore()
    other.rollback()
    other.close()
    assert len(fill(store, 1)) == len(names(store))


def full(store: MeasurementStore) -> None:
    """Let the file grow no further: SQLite says "database or disk is full"."""
    store._do(lambda db: db.execute("PRAGMA max_page_count=1"))


def test_a_full_disk_is_told_for_a_named_file_and_nothing_of_the_call_is_kept(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    old = fill(store, 2)
    epoch = opened(store)
    full(store)
    with pytest.raises(StoreError, match=r"m\.sqlite cannot be used: .*full; choose a folder that .* has room"):
        store.add_networks(epoch, *measured(50, start=10))
    assert names(store) == old


def test_a_full_disk_leaves_the_cache_in_memory_with_all_that_was_measured(cache: Path) -> None:
    store = MeasurementStore()
    old = fill(store, 2)
    epoch = opened(store)
    full(store)
    with pytest.warns(RuntimeWarning, match="full.*live in memory"):
        ids = store.add_networks(epoch, *measured(50, start=10))
    assert names(store) == {*old, *(f"network {label}" for label in range(10, 60))}
    assert set(ids) < set(store.observations(RUNTIME)[1].index)
    assert names(MeasurementStore()) == old


def test_a_file_that_may_not_be_written_is_told(cache: Path) -> None:
    store = MeasurementStore(cache / "m.sqlite")
    epoch = opened(store)
    store._do(lambda db: db.execute("PRAGMA query_only=1"))
    with pytest.raises(StoreError, match="readonly database; choose a folder that can be written"):
        store.add_networks(epoch, *measured(1))
    (cache / "folder").mkdir()
    with pytest.raises(StoreError, match="unable to open"):
        MeasurementStore(cache / "folder")
    (cache / FILE).mkdir()
    with pytest.warns(RuntimeWarning, match="unable to open.*live in memory"):
        store = MeasurementStore()
    assert fill(store, 1) == names(store)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("how", [os.remove, lambda path: os.replace(path, f"{path}.old")])
def test_a_file_that_is_deleted_or_moved_meanwhile_is_begun_anew_with_the_epoch(
    how: Callable[[Path], None], explicit: bool, cache: Path
) -> None:
    path = cache / FILE
    store = MeasurementStore(path if explicit else None)
    epoch = opened(store)
    fill(store, 1)
    how(path)
    store.add_networks(epoch, *measured(1, start=10))
    assert names(MeasurementStore(path)) == names(store) == {"network 10"}
    assert store.epochs()["sparse_ms"].tolist() == [0.2]


def in_child(work: Callable[[], Any]) -> int:
    """Fork; the child works and ends without any clean-up. Its process id."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process may have threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def ended_well(*children: int) -> bool:
    return all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@needs_fork
def test_forked_children_add_to_the_same_file(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    store.add_networks(epoch, *measured(1))

    def work(n: int) -> None:
        for label in range(10 * n, 10 * n + 5):
            store.add_networks(epoch, *measured(1, start=label))
        store.close()

    children = [in_child(lambda n=n: work(n)) for n in (1, 2, 3)]  # type: ignore[misc]
    mine = [store.add_networks(epoch, *measured(1, start=100 + label))[0] for label in range(5)]
    assert ended_well(*children)
    expected = {0, *(10 * n + i for n in (1, 2, 3) for i in range(5)), *range(100, 105)}
    assert names(store) == {f"network {label}" for label in expected}
    frame = store.observations(RUNTIME)[1]
    assert frame.loc[mine, "name"].tolist() == [f"network {label}" for label in range(100, 105)]
    assert MeasurementStore(tmp_path / "m.sqlite")._do(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == (
        "ok",
    )


@needs_fork
def test_a_forked_child_has_the_measurements_that_live_in_memory(cache: Path) -> None:
    (cache / FILE).mkdir()
    with pytest.warns(RuntimeWarning, match="live in memory"):
        store = MeasurementStore()
    old = fill(store, 2)

    def work() -> None:
        assert names(store) == old
        fill(store, 1, 10)
        assert len(names(store)) == 3

    assert ended_well(in_child(work))
    assert names(store) == old


@needs_fork
def test_processes_that_open_an_epoch_at_once_share_it(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"

    def work() -> None:
        store = MeasurementStore(path)
        for _ in range(15):
            opened(store)

    assert ended_well(*[in_child(work) for _ in range(4)])
    assert MeasurementStore(path).epochs()["openings"].tolist() == [60]


def test_nobody_can_open_an_epoch_while_another_decides_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.sqlite"
    store = MeasurementStore(path)
    opened(store)
    seen: list[str] = []

    def compare(*args: Any) -> dict[str, float]:
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            seen.append(str(error))
        other.close()
        return moved(*args)

    monkeypatch.setattr(store_module, "moved", compare)
    opened(store)
    assert seen == ["database is locked"]


@needs_fork
def test_a_forked_child_shares_neither_the_connection_nor_the_locks_of_its_parent(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    fill(store, 1)
    parents, taken, free = store._connection, threading.Event(), threading.Event()

    def hold() -> None:
        with store._lock:
            taken.set()
            free.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)

    def work() -> None:
        signal.alarm(20)  # ends a child that waits for a thread it does not have
        assert len(names(store)) == 1
        assert store._connection is not parents

    try:
        assert ended_well(in_child(work))
    finally:
        free.set()
        thread.join()


@needs_fork
def test_what_was_added_survives_a_writer_that_is_killed_and_half_a_call_is_never_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    acknowledged: list[str] = []
    for round in range(4):
        read, write = os.pipe()

        def work(round: int = round, write: int = write) -> None:
            store = MeasurementStore(path)
            epoch = opened(store)
            for label in range(1000 * round, 1000 * round + 900, 3):
                store.add_networks(epoch, *measured(3, start=label))
                os.write(write, f"{label}\n".encode())

        child = in_child(work)
        os.close(write)
        with os.fdopen(read) as lines:
            for _ in range(3 + round):
                acknowledged.append(lines.readline().strip())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged += [line.strip() for line in lines]
        store = MeasurementStore(path)
        found = {int(name.split()[1]) for name in names(store)}
        assert found >= {int(label) + i for label in acknowledged for i in range(3)}
        assert all({label - label % 1000 % 3 + i for i in range(3)} <= found for label in found)
        store.close()
    assert len(acknowledged) >= 3 + 4 + 5 + 6


def test_threads_may_share_a_store(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    failed: list[Exception] = []

    def work(n: int) -> None:
        try:
            for label in range(10 * n, 10 * n + 5):
                store.add_networks(epoch, *measured(1, start=label))
                store.observations(RUNTIME)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(names(store)) == 20
