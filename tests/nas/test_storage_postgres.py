"""A run whose database is on a PostgreSQL server."""

from __future__ import annotations

from sqlalchemy import text

from nas.database import schema_name, server_engine
from tests.postgres_server import PostgresServer


def test_each_run_works_in_a_schema_of_its_own(postgres: PostgresServer) -> None:
    url = postgres.new_database()
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
