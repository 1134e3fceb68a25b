"""The database of the fine-tuning service: opened, brought up to date, and changed in transactions.

SQLite in the home, or PostgreSQL by a URL. A `Store` is for any thread; each block of `begin` is one transaction, which
happens whole or not at all. SQLite has one writer at a time: such a block takes the lock at its start, so that what it
reads is still so when it writes.

    >>> store = open_store(Home.default())
    >>> with store.begin() as session:
    ...     session.add(Event(job_id=job.id, message="training begins"))
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from loraport.clients.errors import ConfigError, ResourceError
from loraport.clients.home import Home

DATABASE = "jobs.sqlite"
BUSY_MS = 30_000
CONNECTIONS = 20  # kept; as many more while they are needed
MIGRATING = 0x6C6F7261  # the advisory lock of who migrates a PostgreSQL
# libpq's, where the URL does not say otherwise: a PostgreSQL that is unplugged is found gone in half a minute.
WATCHED = {
    "connect_timeout": "10",  # seconds, as all but the last, which is in milliseconds
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}


class Store:
    """An open database. `begin` to change, `read` to look."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def url(self) -> URL:
        """Where it is; with the password, so it is for libraries and no message."""
        return self.engine.url

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """A transaction that writes. ResourceError where the database cannot: it is gone, locked, or its disk full."""
        with database_errors(self.engine.url), Session(self.engine, expire_on_commit=False) as session, session.begin():
            if self.engine.dialect.name == "sqlite":
                session.execute(text("BEGIN IMMEDIATE"))
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with database_errors(self.engine.url), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Close its connections."""
        self.engine.dispose()


def open_store(home: Home, url: str | None = None) -> Store:
    """The database at `url`, by default SQLite in the home; brought up to date.

    ConfigError for a URL that is none, for a database of a newer Loraport; ResourceError where it cannot be reached.
    """
    engine = connect(database_url(home, url))
    try:
        with database_errors(engine.url):
            migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine)


def database_url(home: Home, url: str | None) -> URL:
    """What SQLAlchemy is given: psycopg for PostgreSQL, a private file for SQLite."""
    if url is None:
        path = home.ensure(home.root) / DATABASE
        path.touch(mode=0o600)
        return URL.create("sqlite", database=str(path))
    try:
        made = make_url(url)
    except ArgumentError:
        raise ConfigError("the URL of the database is not one.", "postgresql://USER:PASSWORD@HOST/DATABASE") from None
    if made.drivername in ("postgres", "postgresql"):
        made = made.set(drivername="postgresql+psycopg")
    if made.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(f"jobs cannot be kept in {made.drivername}.", "use PostgreSQL, or leave it away for SQLite")
    return made if made.drivername == "sqlite" else made.set(query=WATCHED | dict(made.query))


def connect(url: URL) -> Engine:
    """An engine whose SQLite connections write ahead, wait for each other, and leave transactions to us."""
    engine = create_engine(url, pool_pre_ping=True, pool_size=CONNECTIONS, max_overflow=CONNECTIONS)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", prepare_sqlite)
    return engine


def prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    """Pragmas of each connection; `isolation_level` None because Python's driver would begin transactions too late."""
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",  # what was answered survives a power cut
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def migrate(engine: Engine) -> None:
    """Bring the tables up to date, one process at a time; ConfigError where they are newer than this Loraport."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        connection.execute(
            text("BEGIN IMMEDIATE")
            if engine.dialect.name == "sqlite"
            else text(f"SELECT pg_advisory_lock({MIGRATING})")
        )
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if found := revision(connection) - known:
            raise ConfigError(
                f"the database of jobs was made by a newer Loraport (revision {', '.join(sorted(found))}).",
                "upgrade Loraport here, or set LORAPORT_HOME elsewhere",
            )
        command.upgrade(config, "head")
        connection.commit()
        if engine.dialect.name != "sqlite":
            connection.execute(text(f"SELECT pg_advisory_unlock({MIGRATING})"))
            connection.commit()


def revision(connection: Any) -> set[str]:
    """The revisions that the tables are at; none in an empty database."""
    from alembic.migration import MigrationContext

    return set(MigrationContext.configure(connection).get_current_heads())


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turn errors of the driver into a ResourceError in words; mistakes in our statements stay what they are."""
    try:
        yield
    except PoolTimeout as error:
        raise ResourceError("the database of jobs has too much to do.", "try again") from error
    except DBAPIError as error:
        if not is_environment(error):
            raise
        reason = str(error.orig).strip().splitlines()[0].rstrip(".")
        where = url.database if url.drivername == "sqlite" else url.set(query={}).render_as_string(hide_password=True)
        raise ResourceError(
            f"the database of jobs at {where} cannot be used: {reason}.",
            "check that its disk has room and that it runs; nothing was changed",
        ) from error


def is_environment(error: DBAPIError) -> bool:
    """Whether the database is at fault, not the statement: gone, locked, full, damaged."""
    return error.connection_invalidated or type(error).__name__ in (
        *("OperationalError", "DatabaseError", "InternalError", "InterfaceError"),
    )
