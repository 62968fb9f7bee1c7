"""A real PostgreSQL server for tests: one per test process, in a scratch folder, reached over the loopback only.

Fixtures (session scope): `postgres`, a `PostgresServer` that can be stopped and started again, and `postgres_url`, its URL. Both
skip where there is no server binary or no psycopg. Tests share the server: stop it only if you start it again, and take
`postgres.new_database()` where names could meet.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

USER = "nas"
_WATCHED = '"$@" & server=$!; read -r _; kill -INT $server; wait $server'
"""The server ends with the test process, however that ends: then the shell's standard input closes."""


class PostgresServer:
    """A server that runs from construction until `close`.

    Args:
        binaries: folder of `initdb` and `postgres`.

    Attributes:
        url: SQLAlchemy URL, with the password.
        port: TCP port on 127.0.0.1; the same after a restart.
        password: of the only role, which is a superuser.
    """

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._account = _account()
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._shell: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self.password = secrets.token_hex(12)
        self.port = _free_port()
        self.url = self.url_of("postgres")
        try:
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise

    def url_of(self, database: str, *, password: str | None = None, port: int | None = None) -> str:
        """A URL of this server, or one that is wrong on purpose."""
        return f"postgresql+psycopg://{USER}:{password or self.password}@127.0.0.1:{port or self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; returns its URL."""
        import psycopg

        self._databases += 1
        name = f"test{self._databases}"
        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url_of(name)

    def start(self) -> None:
        """Start, and wait until connections are taken; nothing if it runs."""
        if self._shell is not None:
            return
        with open(self._folder / "log", "ab") as log:
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "sh", self._binaries / "postgres", "-D", self._folder / "data"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                **self._account,
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._shell.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, *, hard: bool = False) -> None:
        """Stop; its clients lose their connections.

        Args:
            hard: as in a crash, without a word to the clients.
        """
        if self._shell is None:
            return
        shell, self._shell = self._shell, None
        if hard:
            pid = int((self._folder / "data" / "postmaster.pid").read_text().splitlines()[0])
            os.kill(pid, signal.SIGQUIT)
        assert shell.stdin is not None
        shell.stdin.close()
        try:
            shell.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()

    def close(self) -> None:
        """Stop for good and remove everything."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _initialise(self) -> None:
        secret = self._folder / "password"
        secret.write_text(self.password)
        if self._account:
            user = pwd.getpwnam(str(self._account["user"]))
            for path in (self._folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        done = subprocess.run(
            [
                *(self._binaries / "initdb", "-D", self._folder / "data", "-U", USER, f"--pwfile={secret}"),
                *("-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            cwd=self._folder,
            **self._account,
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": str(self._folder),
            "fsync": "off",
            "shared_buffers": "16MB",
            "max_connections": 40,
        }
        with open(self._folder / "data" / "postgresql.conf", "a") as file:
            file.writelines(f"{key} = '{value}'\n" for key, value in settings.items())

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def find_binaries() -> Path | None:
    """The folder of the newest PostgreSQL server of this machine, or None."""
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres")
    folders = [*([Path(on_path).resolve().parent] if on_path else []), *packaged]
    return next(
        (folder for folder in folders if all((folder / name).exists() for name in ("initdb", "postgres"))), None
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'sparse-nas[postgres]'")
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server on this machine (neither on PATH nor below /usr/lib/postgresql)")
    server = PostgresServer(binaries)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_url(postgres: PostgresServer) -> str:
    """The URL of a running server's database."""
    return postgres.url


def _account() -> dict[str, Any]:
    """Arguments of `subprocess` that make the server no process of root's, which it refuses to be."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name for entry in pwd.getpwall()}
    name = "postgres" if "postgres" in known else "nobody"
    return {"user": name, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
