"""Who runs the queue of a PostgreSQL: one server at a time has its advisory lock, and looks every second that it does.

The lock belongs to a connection. With the connection it is lost, without a word: PostgreSQL started again, a network
gave up, somebody ended the session. Whoever has it therefore begins nothing once the last look is FRESH_S ago, and who
takes it begins after SETTLE_S. A pooler in transaction mode gives the lock to nobody in particular: `holds` says so.

SQLite is of one home, whose lock file decides; there all of this is always so.

    >>> ownership = Ownership(store)
    >>> if ownership.take():
    ...     while ownership.holds(): time.sleep(LOOK_S)
"""

import secrets
import time
from contextlib import suppress

from sqlalchemy import Connection, delete, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from loraport.clients.errors import ResourceError
from loraport.serve.store.store import Store, database_errors
from loraport.serve.store.tables import Owner

QUEUE = 0x71756575  # the advisory lock
LOOK_S = 1.0  # between two looks
FRESH_S = 4.0  # for which a look counts
SETTLE_S = 5.0  # before a new owner begins: the one before has noticed by then
HELD = text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid() "
    f"AND classid = 0 AND objid = {QUEUE} AND objsubid = 1"
)


class Ownership:
    """The lock, and since when this server has it. For one thread but `is_sure`, which is for any."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.is_needed = store.url.drivername != "sqlite"
        self.token = secrets.token_hex(16)
        self.connection: Connection | None = None
        self.taken_at = self.seen_at = 0.0  # on the monotonic clock

    def take(self) -> bool:
        """Have the lock; False where another server has it. ResourceError where the database cannot be asked."""
        self.drop()
        if not self.is_needed:
            return True
        with database_errors(self.store.url):
            connection = self.store.engine.connect()
            try:
                connection.detach()  # it is kept for as long as this server lives, and is none of the pool's
                asked_at = time.monotonic()
                is_ours = bool(connection.execute(text(f"SELECT pg_try_advisory_lock({QUEUE})")).scalar_one())
                connection.commit()
            except BaseException:
                connection.close()
                raise
        if not is_ours:
            connection.close()
            return False
        self.connection, self.taken_at, self.seen_at = connection, asked_at, asked_at
        return True

    def holds(self) -> bool:
        """Ask whether the lock is still ours; where that cannot be asked, it is not."""
        if not self.is_needed:
            return True
        if self.connection is None:
            return False
        asked_at = time.monotonic()
        try:
            is_ours: bool = self.connection.execute(HELD).scalar_one() == 1
            self.connection.commit()
        except SQLAlchemyError:
            return False
        if is_ours:
            self.seen_at = asked_at
        return is_ours

    def sign(self) -> None:
        """Write down that this server begins: whoever had the lock before finds out by that."""
        if self.is_needed:
            with self.store.begin() as session:
                session.execute(delete(Owner))
                session.execute(insert(Owner).values(token=self.token))

    def take_again(self) -> bool | None:
        """After it was lost: whether what was begun may go on; None while the database cannot be asked.

        It may where the lock is ours again and nobody else has begun meanwhile, however long that was.
        """
        try:
            if not self.take():
                return False
            with self.store.read() as session:
                is_same = session.scalars(select(Owner.token)).all() == [self.token]
        except ResourceError:
            self.drop()
            return None
        if not is_same:
            self.seen_at = -FRESH_S  # nothing is begun before what was begun has ended
        return is_same

    @property
    def is_sure(self) -> bool:
        """Whether it was ours a moment ago: else nothing new is to be begun."""
        return not self.is_needed or time.monotonic() - self.seen_at < FRESH_S

    @property
    def wait_s(self) -> float:
        """How long a new owner has to wait still before it begins."""
        return max(0.0, self.taken_at + SETTLE_S - time.monotonic()) if self.is_needed else 0.0

    def drop(self) -> None:
        """Give it back, if it is ours."""
        connection, self.connection = self.connection, None
        self.seen_at = -FRESH_S
        if connection is not None:
            with suppress(Exception):  # it may be gone
                connection.close()
