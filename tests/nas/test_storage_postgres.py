"""A run whose database is on a PostgreSQL server: its schema, what is refused, outages, and one driver at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from nas import transactions
from nas.database import schema_name, server_engine
from nas.driver import search
from nas.errors import RunError
from nas.lease import Lease
from nas.run import load_run
from nas.server import without_passwords
from nas.storage import Storage, run_storage, write_storage
from nas.store import Store
from tests.nas.search_helpers import start_search, write_config
from tests.nas.test_loop import Script, done, loop
from tests.nas.test_store import propose, run_one
from tests.postgres_server import PostgresServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """A database of the test's own; the server runs again afterwards."""
    try:
        yield postgres.new_database()
    finally:
        postgres.start()


# -- schemas ------------------------------------------------------------------------------------------------------------------


def test_each_run_works_in_a_schema_of_its_own(url: str) -> None:
    for name in ("a", 'odd "name; $1 %s', "long " * 40):
        engine = server_engine(url, name)
        with engine.begin() as connection:
            assert connection.execute(text("SELECT current_schema()")).scalar() == schema_name(name)
            connection.execute(text("CREATE TABLE same (n int)"))
        engine.dispose()


def test_names_of_schemas_fit_and_differ() -> None:
    names = ["x", "x" * 44, "x" * 45, "x" * 60, "x" * 61, "ü" * 50, "ü" * 51]
    found = {schema_name(name) for name in names}
    assert len(found) == len(names)
    assert max(len(name.encode()) for name in found) <= 63


def test_two_runs_of_a_database_do_not_meet(url: str) -> None:
    with Store.create(url, "a") as a, Store.create(url, "b") as b:
        run_one(a)
        assert (len(a.trials()), len(b.trials())) == (1, 0)
    with pytest.raises(RunError, match="tables are there already"):
        Store.create(url, "a")
    with pytest.raises(RunError, match="not the database of a run"):
        Store.open(url, run="c")
    with pytest.raises(RunError, match="not the database of a run"):
        Store.open(url, read_only=True, run="c")
    with Store.open(url, read_only=True, run="a") as reader, pytest.raises(RunError, match="reading only"):
        propose(reader)


def test_a_run_of_the_same_name_from_another_folder_is_refused(url: str) -> None:
    with Store.serve(url, "mine", identity="1", place="here:/a/b") as store:
        for _ in range(2):  # while it runs, and afterwards
            with pytest.raises(
                RunError, match=r"name 'mine' is there already and belongs to another folder \(here:/a/b\)"
            ):
                Store.serve(url, "mine", identity="2")
            store.close()
    Store.serve(url, "mine", identity="1").close()


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_server_is_one_clear_line_and_no_password(postgres: PostgresServer, url: str) -> None:
    engine = server_engine(url, "x")
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE weak LOGIN PASSWORD 'sesame'"))
    engine.dispose()
    secret, database = postgres.password, url.rpartition("/")[2]
    with_query = postgres.url_of(database).replace(f":{secret}@", "@") + "?password=wrong-secret"
    for bad, message in (
        (postgres.url_of(database, port=1), "127.0.0.1:1/.*: cannot be reached .*refused.* Check that the server runs"),
        (url.replace("127.0.0.1", "no-such-host.invalid"), "cannot be reached"),
        (postgres.url_of(database, password="wrong-secret"), "refused .*password authentication.*PGPASSWORD"),
        (with_query, "refused .*password authentication"),
        (postgres.url_of("nowhere"), 'refused .*"nowhere" does not exist.*createdb'),
        (url.replace(f"nas:{secret}", "weak:sesame"), "permission denied for database.*GRANT CREATE ON DATABASE"),
        (f"postgresql://user:p@ss{secret}@host/db", 'write "@" in a password as "%40"'),
        (f"mysql://user:{secret}@host/db", "expected the URL of a PostgreSQL server, found 'mysql'"),
    ):
        begun = time.monotonic()
        with pytest.raises(RunError, match=message) as caught:
            Store.serve(bad, "run")
        assert time.monotonic() - begun < 10
        shown = str(caught.value)
        assert secret not in shown
        assert "wrong-secret" not in shown
        assert "sesame" not in shown
        assert "\n" not in shown


# -- the folder ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "hidden"),
    [
        ("postgresql+psycopg://u:se/cr:et@host:1/db", "postgresql+psycopg://u@host:1/db"),
        ("--storage=postgresql://u:se@cret@host/db", "--storage=postgresql://u@host/db"),
        (
            "postgresql://u@host/db?password=secret&sslmode=require",
            "postgresql://u@host/db?password=...&sslmode=require",
        ),
        ("ray://head:10001", "ray://head:10001"),
        ("run.name=a@b", "run.name=a@b"),
    ],
)
def test_passwords_in_arguments_are_hidden(word: str, hidden: str) -> None:
    assert without_passwords(word) == hidden


def test_no_file_of_a_run_holds_the_password_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: PostgresServer, url: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["nas", "search", "x.toml", "--storage", url])
    search(write_config(tmp_path, workers=0, trials=2), out=tmp_path / "run", storage=url, quiet=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"environment.json", "report.html", "storage.json"} <= {path.name for path in files}
    assert not [path.name for path in files if postgres.password.encode() in path.read_bytes()]


def test_a_run_of_another_user_of_the_database_is_named_as_such(postgres: PostgresServer, url: str) -> None:
    Store.create(url, "theirs").close()
    engine = server_engine(url, "theirs")
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE other LOGIN PASSWORD 'pw'"))
    engine.dispose()
    other = url.replace(f"nas:{postgres.password}", "other:pw")
    for read_only in (True, False):
        with pytest.raises(RunError, match="the run 'theirs' belongs to another user of the database"):
            Store.open(other, read_only=read_only, run="theirs")


def test_a_folder_keeps_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAS_STORAGE", raising=False)
    given = "postgresql+psycopg://me:secret@Host/db"
    assert run_storage(tmp_path, "r") == Storage("", "r")
    assert run_storage(tmp_path, "r", given) == Storage(given, "r")
    write_storage(tmp_path, Storage(given, "r"))
    assert "secret" not in (tmp_path / "storage.json").read_text()
    assert run_storage(tmp_path).url == "postgresql+psycopg://me@Host/db"
    assert run_storage(tmp_path, "other", "postgresql://me:s@host:5432/db") == Storage(
        "postgresql://me:s@host:5432/db", "r"
    )
    for other in (
        "postgresql://me:secret@host:5433/db",
        "postgresql://me@host/db2",
        "postgresql://me@elsewhere/db",
        "",
    ):
        with pytest.raises(
            RunError, match=r"database is postgresql\+psycopg://me@Host/db, and now .* is asked for"
        ) as caught:
            run_storage(tmp_path, "r", other)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("NAS_STORAGE", "postgresql://you:pass@host/db")
    assert run_storage(tmp_path) == Storage("postgresql://you:pass@host/db", "r")
    monkeypatch.setenv("NAS_STORAGE", "postgresql://you:pass@host/another")  # a default for new runs
    assert run_storage(tmp_path).url == "postgresql+psycopg://me@Host/db"
    assert run_storage(tmp_path / "new", "n") == Storage("postgresql://you:pass@host/another", "n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.db").touch()
    assert run_storage(tmp_path / "old", "n") == Storage("", "n")
    with pytest.raises(RunError, match=r"this run's database is .*run\.db; got postgresql\+psycopg://me@Host/db"):
        run_storage(tmp_path / "old", "n", given)
    (tmp_path / "storage.json").write_text("{}")
    with pytest.raises(RunError, match=r"storage\.json: damaged"):
        run_storage(tmp_path)


# -- outages ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage_s", [float(os.environ.get("NAS_TEST_OUTAGE_S", "3"))])
def test_a_search_outlives_its_server(postgres: PostgresServer, url: str, outage_s: float) -> None:
    starter = threading.Timer(outage_s, postgres.start)
    answered: list[int] = []

    def answer(job: Any) -> Any:
        answered.append(job.trial)
        if len(answered) == 4:
            postgres.stop(hard=True)
            starter.start()
        return done(job)

    with Store.serve(url, "run", lease_s=2.0) as store:
        search_loop, silent = loop(store, Script(answer), {"random": 8})
        store.on_message(silent.message)
        search_loop.run()
        starter.join()
        trials = store.trials()
    assert [(t.index, t.state, t.attempts) for t in trials] == [(i, "complete", 1) for i in range(8)]
    assert sorted(answered) == list(range(8))
    told = [message for message in silent.messages if "storage" in message]
    assert len(told) == 2
    assert "cannot be reached; trying again for 5 minutes" in told[0]
    assert "is back after" in told[1]
    assert postgres.password not in "".join(told)


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_is_lost_happens_once(url: str, monkeypatch: pytest.MonkeyPatch, committed: bool) -> None:
    commit = transactions.Connection.commit
    losses = iter([True])

    def losing(connection: Any) -> None:
        if next(losses, False):
            if committed:
                commit(connection)
            connection.invalidate()
            raise OperationalError("COMMIT", {}, _lost(), connection_invalidated=True)
        commit(connection)

    with Store.serve(url, "run") as store:
        with store.transaction():
            propose(store, 0)
            store.set_meta("k", 1)
        monkeypatch.setattr(transactions.Connection, "commit", losing)
        with store.transaction():
            first = propose(store, 1)
            assert store.start(first.trial).attempts == 1
            assert store.finish(first.trial, 1, "complete", curve=[{"epoch": 0}])
        assert next(losses, None) is None
        assert [(t.index, t.state, t.attempts) for t in store.trials()] == [(0, "proposed", 0), (1, "complete", 1)]
        assert store.curve(1) == [{"epoch": 0}]


def test_what_a_lost_connection_undid_within_a_transaction_is_done_again(url: str) -> None:
    with Store.serve(url, "run") as store:
        with store.transaction():
            propose(store, 0)
            _end_sessions(url)
            store.start(0)
            propose(store, 1)
        assert [(t.index, t.state) for t in store.trials()] == [(0, "running"), (1, "proposed")]


def test_after_its_patience_a_store_gives_up_and_says_so(postgres: PostgresServer, url: str) -> None:
    with Store.serve(url, "run") as store:
        propose(store)
        store._transactions.patience_s = 0.5
        postgres.stop()
        with pytest.raises(RunError, match=r"cannot be reached .* tried for 0 s\. Everything before is kept"):
            propose(store, 1)
        postgres.start()
        assert propose(store, 1).trial == 1


def test_other_errors_are_not_tried_again(url: str) -> None:
    with Store.serve(url, "run") as store:
        propose(store, 0)
        begun = time.monotonic()
        with pytest.raises(RunError, match="number 0 of 'random' is there already"):
            propose(store, 0)
        with pytest.raises(ValueError, match="no trial 7"):
            store.start(7)
        assert time.monotonic() - begun < 1
        assert propose(store, 1).trial == 1


# -- one driver ---------------------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_with_the_first_ones_pid_and_may_look(url: str) -> None:
    with Store.serve(url, "run", identity="1") as store:
        run_one(store)
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on "):
            Store.serve(url, "run", identity="1")
        with Store.open(url, read_only=True, run="run") as reader:
            assert len(reader.trials()) == 1
    Store.serve(url, "run", identity="1").close()


def test_a_lease_is_renewed_and_a_driver_that_is_only_slow_keeps_it(url: str) -> None:
    with Store.serve(url, "run", lease_s=0.6) as store:
        time.sleep(1.5)
        with pytest.raises(RunError, match="in use by"):
            Store.serve(url, "run")
        propose(store)


def test_a_driver_cut_off_for_longer_than_its_lease_stops_and_does_no_harm(
    postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    first = Store.serve(url, "run", lease_s=0.5)
    propose(first, 0)
    first.start(0)
    told: list[str] = []
    with Store.serve(url, "run", standby=True, message=told.append) as second:
        assert len(told) == 1
        assert "standing by: the run is in use by process" in told[0]
        assert [t.trial for t in second.recover()] == [0]
        assert second.start(0).attempts == 2
        before = second.trials()
        for call in (
            lambda: first.finish(0, 1, "complete"),
            lambda: first.finish(0, 2, "complete"),
            lambda: propose(first, 1),
            lambda: first.start(0),
            lambda: first.set_meta("finished", True),
        ):
            with pytest.raises(RunError, match=r"no longer has the run: process \d+ on .* has taken it over"):
                call()
        first.close()
        assert second.trials() == before
        assert second.finish(0, 2, "complete")
        assert second.get_meta("finished") is None
    assert postgres.password not in "".join(told)


def test_the_server_being_away_does_not_end_a_lease(
    postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    with Store.serve(url, "run", lease_s=60.0) as store:
        propose(store)
        postgres.stop()
        postgres.start()
        engine = server_engine(url, "run")
        with engine.begin() as connection:  # as if it had been away for long
            connection.execute(text("UPDATE driver SET until = now() - interval '1 hour'"))
        engine.dispose()
        with pytest.raises(RunError, match="in use by"):
            Store.serve(url, "run")
        assert propose(store, 1).trial == 1


def test_kill_9_frees_a_run_at_once_on_the_same_machine(url: str) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from nas.store import Store; s = Store.serve(sys.argv[1], 'run'); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid} on "):
            Store.serve(url, "run")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    Store.serve(url, "run").close()


# -- whole searches -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_standby_finishes_the_search_of_a_killed_driver(url: str, tmp_path: Path, postgres: PostgresServer) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path, trials=2, workers=0)
    with _running(start_search(config, out, "--storage", url, "--quiet")) as first:
        deadline = time.monotonic() + 90
        while not _begun(out):
            assert time.monotonic() < deadline
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # it holds its lease for 30 s
        with _running(start_search(config, out, "--standby", "--storage", url)) as second:
            assert second.stderr is not None
            seen: list[str] = []
            while not any(f"standing by: the run is in use by process {first.pid} on " in line for line in seen):
                seen.append(second.stderr.readline())
                assert seen[-1], seen
            first.kill()
            first.communicate()
            output, errors = second.communicate(timeout=90)
        assert second.returncode == 0, errors
        assert postgres.password not in output + errors

    found = json.loads((out / "storage.json").read_text())
    assert found["run"] == "small"
    assert postgres.password not in (out / "storage.json").read_text()
    assert not (out / "run.db").exists()
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.delenv("NAS_STORAGE", raising=False)
        patch.setenv("PGPASSWORD", postgres.password)
        run = load_run(out)
        assert run.finished
        assert sorted((t.searcher, t.index) for t in run.trials) == sorted(
            [("dense", 0), *((name, i) for name in ("random", "nsga2") for i in range(2))]
        )
        assert {t.state for t in run.trials} <= {"complete", "infeasible"}
        assert postgres.password not in run.frame().to_csv()
        again = search(config, out=out, quiet=True)  # without --storage
        assert again.trials == run.trials
        with pytest.raises(RunError, match=r"now run\.db is asked for"):
            search(config, out=out, quiet=True, storage="")
        with pytest.raises(RunError, match="belongs to another folder"):
            search(config, out=tmp_path / "copy", quiet=True, storage=url)


@contextmanager
def _running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _begun(folder: Path) -> bool:
    return (folder / "storage.json").is_file() and any((folder / "artifacts").glob("[0-9]*/*"))


def _end_sessions(url: str) -> None:
    """End every session of the database but the one that does so."""
    engine = server_engine(url, "run")
    with engine.begin() as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
    engine.dispose()


def _lost() -> Exception:
    import psycopg

    return psycopg.OperationalError("server closed the connection unexpectedly")
