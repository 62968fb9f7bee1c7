"""PostgreSQL servers: URLs, an engine with a schema per run, and what their errors mean.

Knows nothing of trials. Imports psycopg only when an engine is made. Start with `server_engine`; `explain_server` and `lost` judge
what it raises.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from nas.errors import RunError

DRIVER = "postgresql+psycopg"
_SECRETS = ("password", "sslpassword")
_CONNECTION_LOST = ("08", "25006", "25P03", "53300", "57P01", "57P02", "57P03")
"""SQLSTATEs (or their first two characters) after which the same transaction may succeed on a new connection: the server stops,
starts, is a replica for now, is full, or has ended an idle session."""


def parse_url(text: str) -> URL:
    """The URL of some database.

    Raises:
        RunError: it is none; nothing behind "://" is shown, as a password may be in it.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        scheme = text.split("://", 1)[0]
        raise RunError(
            f'expected a file or a database URL, found "{scheme}://...", which is no URL of a database'
        ) from error
    if "@" in (url.host or ""):
        raise RunError(
            f'{url.drivername}://...: expected one "@" in the URL, found several; write "@" in a password as "%40", or leave the '
            "password to ~/.pgpass or PGPASSWORD"
        )
    return url


def server_url(text: str) -> URL:
    """The URL of a PostgreSQL database, with our driver for it, and its password (if any) where `shown` hides it.

    Raises:
        RunError: it is no URL, or one of another kind of database.
    """
    url = parse_url(text)
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername=DRIVER)
    if url.drivername != DRIVER:
        raise RunError(
            f"{shown(url)}: expected the URL of a PostgreSQL server, found {url.drivername!r}, no such kind; write "
            f"{DRIVER}://user@host/database, or leave it out for a file in the run's folder"
        )
    password = url.query.get("password")
    if isinstance(password, str):
        url = url.set(password=password).difference_update_query(["password"])
    return url


def shown(url: URL) -> str:
    """A URL for people and files: without any password."""
    bare = url.difference_update_query(_SECRETS)
    return URL.create(
        bare.drivername, bare.username, None, bare.host, bare.port, bare.database, bare.query
    ).render_as_string()


def without_passwords(text: str) -> str:
    """Any one word, such as an argument of a command, without the password of a URL in it, be the URL right or wrong."""
    text = re.sub(r"(://[^:/@?]*):.*@", r"\1@", text, flags=re.DOTALL)
    return re.sub(rf"\b({'|'.join(_SECRETS)})=[^&]*", r"\1=...", text)


def schema_name(run: str) -> str:
    """The schema in which a run of that name lives: "run <name>"; a long name is cut and ends with a digest of all of it."""
    whole = f"run {run}".encode()
    if len(whole) <= 48:
        return whole.decode()
    return f"{whole[:48].decode(errors='ignore')} {hashlib.sha256(whole).hexdigest()[:10]}"


def server_engine(url: str, run: str, *, create: bool = True) -> Engine:
    """An engine whose connections work in the run's own schema of a PostgreSQL database. Nothing is connected yet.

    A connection that died is noticed when it is taken (one question more per transaction), within about 15 s when it dies in
    use; one that cannot be made fails within 5 s per address of the host. The server forgets a session whose client went away,
    or that leaves a transaction open and idle, within about a minute.

    Args:
        url: of the database; without a password, libpq looks into PGPASSWORD and ~/.pgpass.
        run: the run's name.
        create: make the schema where it is missing.

    Raises:
        RunError: no URL of a PostgreSQL server, or psycopg is missing; when connecting: the schema is another user's.
    """
    parsed, schema = server_url(url), schema_name(run)
    quoted = '"' + schema.replace('"', '""') + '"'
    settings: dict[str, str | int] = {
        "connect_timeout": 5,
        "application_name": f"nas {run}".encode("ascii", "replace").decode()[:63],
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 4,
        "tcp_user_timeout": 15_000,
    }
    try:
        engine = create_engine(
            parsed,
            pool_pre_ping=True,
            connect_args={key: value for key, value in settings.items() if key not in parsed.query},
        )
    except ModuleNotFoundError as error:
        raise RunError(
            f"{shown(parsed)}: needs the Python package {error.name}; install it with `pip install 'sparse-nas[postgres]'`"
        ) from error

    @event.listens_for(engine, "connect")
    def _enter_schema(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = %s", (schema,))
            found = cursor.fetchone()
            if found == (False,):  # its tables would seem not to be there
                connection.close()
                raise RunError(
                    f"{shown(parsed)}: the run {run!r} belongs to another user of the database; use that user, or rename the run"
                )
            if create and found is None:
                cursor.execute("SELECT pg_advisory_xact_lock(7268, hashtext(%s))", (schema,))  # two may come at once
                cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted}")
            cursor.execute(f"SET search_path TO {quoted}")
            cursor.execute("SET tcp_keepalives_idle = 10")
            cursor.execute("SET tcp_keepalives_interval = 5")
            cursor.execute("SET tcp_keepalives_count = 4")
            cursor.execute("SET idle_in_transaction_session_timeout = '60s'")
        connection.commit()

    return engine


def lost(error: Exception) -> bool:
    """Whether the same transaction may succeed later: the server could not be reached, or the connection broke."""
    if not _of_server(error):
        return False
    assert isinstance(error, DBAPIError)
    code = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated or str(code).startswith(_CONNECTION_LOST):
        return True
    return code is None and isinstance(error, OperationalError) and _refused(str(error.orig)) is None


def explain_server(error: Exception, where: str) -> RunError | None:
    """The `RunError` for what a server or the way to it raised; None for what is not special to servers."""
    if not _of_server(error):
        return None
    assert isinstance(error, DBAPIError)
    cause = " ".join(str(error.orig).split())
    cure = _refused(cause)
    if cure is not None:
        return RunError(f"{where}: the server refused ({cause}). {cure}")
    if lost(error):
        return RunError(
            f"{where}: cannot be reached ({cause}). Check that the server runs, and host and port in the URL"
        )
    return None


def _of_server(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and type(error.orig).__module__.partition(".")[0] == "psycopg"


def _refused(cause: str) -> str | None:
    """What to do about a server that answered and said no; None for anything else. Failed connections carry no SQLSTATE."""
    low = cause.lower()
    if "password authentication failed" in low or "no password supplied" in low or "authentication failed" in low:
        return "Put user and password right: ~/.pgpass or PGPASSWORD, or the URL"
    if 'database "' in low and "does not exist" in low:
        return "Make the database (createdb), or correct its name in the URL"
    if 'role "' in low and "does not exist" in low:
        return "Correct the user in the URL"
    if "pg_hba.conf" in low:
        return "The server's pg_hba.conf must let this user in from this machine"
    if "permission denied for database" in low:
        return "Each run needs a schema of its own: GRANT CREATE ON DATABASE ... TO this user"
    if "permission denied" in low:
        return "The run's schema belongs to another user of the database; continue it as that user, or rename the run"
    return None
