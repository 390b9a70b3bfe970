"""One writer for each ledger, wherever it lies: a run folder has a lock, but a database is shared by folders and machines.

PostgreSQL holds an advisory lock for as long as the connection lives. Other databases have a table with a row for each ledger, which
its writer renews; a row that was not renewed for a while, or whose process is gone, is free.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

import sqlalchemy
from sqlalchemy import text

from nas.base.files import is_alive
from nas.contracts import UserError
from nas.engine.storage import check_url

RENEWED, STALE = 5.0, 30.0
"""Seconds between two renewals of a row, and after how many without one it is free."""

Wait = Callable[[str], None]
"""Told who holds a ledger that is waited for, now and then."""


@contextmanager
def only_writer(url: str | None, ledger: str, wait: Wait | None = None) -> Iterator[Callable[[], None]]:
    """Holds a ledger until left, or until this process ends, however it ends. Yields what raises UserError where it is held no longer.

    Held by another writer, it is waited for where `wait` is given. Otherwise UserError names who holds it. A journal file lies in the run
    folder, whose lock is enough.
    """
    if url is None:
        yield lambda: None
        return
    check_url(url)
    engine = sqlalchemy.create_engine(
        url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT", connect_args=_named(url)
    )
    kind = _Advisory if engine.dialect.name == "postgresql" else _Row
    with engine.connect() as connection:
        writer = kind(engine, connection, ledger)
        while (holder := writer.take()) is not None:
            if wait is None:
                raise UserError(
                    f"ledger {ledger} is being written by {holder}; wait for it, stop it, or use another --seed"
                )
            wait(holder)
            time.sleep(1.0)
        try:
            yield writer.check
        finally:
            with suppress(sqlalchemy.exc.SQLAlchemyError):  # a connection that broke holds nothing any more
                writer.release()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _named(url: str) -> dict[str, Any]:
    return {"application_name": f"nas, {_who()}"[:63]} if url.startswith("postgres") else {}


class _Advisory:
    """PostgreSQL's lock of a session, by two numbers."""

    def __init__(self, engine: Any, connection: Any, ledger: str) -> None:
        self._connection = connection
        self._ledger = ledger
        digest = sha256(f"nas ledger {ledger}".encode()).digest()
        self._keys = {name: int.from_bytes(digest[i : i + 4], "big", signed=True) for name, i in (("a", 0), ("b", 4))}

    def take(self) -> str | None:
        """None where it is ours now, else who has it."""
        if self._connection.execute(text("SELECT pg_try_advisory_lock(:a, :b)"), self._keys).scalar():
            return None
        found = self._connection.execute(
            text(
                "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted "
                "AND classid = CAST(CAST(:a AS bigint) & 4294967295 AS oid) AND objid = CAST(CAST(:b AS bigint) & 4294967295 AS oid)"
            ),
            self._keys,
        ).scalar()
        return str(found or "another writer").removeprefix("nas, ")

    def check(self) -> None:
        try:
            self._connection.execute(text("SELECT 1"))
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise UserError(
                f"the connection that held ledger {self._ledger} broke; the same command goes on once the database answers"
            ) from error

    def release(self) -> None:
        self._connection.execute(text("SELECT pg_advisory_unlock(:a, :b)"), self._keys)


class _Row:
    """A row of a table, taken and renewed by conditional updates."""

    def __init__(self, engine: Any, connection: Any, ledger: str) -> None:
        self._engine = engine
        self._connection = connection
        self._ledger = ledger
        self._me = f"{_who()}, {os.urandom(4).hex()}{_namespace()}"
        self._ended = threading.Event()
        self._lost = False
        self._renewed = time.monotonic()
        connection.execute(
            text(
                "CREATE TABLE IF NOT EXISTS nas_writers (ledger VARCHAR(255) PRIMARY KEY, holder VARCHAR(255), renewed DOUBLE PRECISION)"
            )
        )

    def take(self) -> str | None:
        row = self._connection.execute(
            text("SELECT holder, renewed FROM nas_writers WHERE ledger = :ledger"), {"ledger": self._ledger}
        ).first()
        now = {"ledger": self._ledger, "me": self._me, "now": time.time()}
        if row is None:
            with suppress(sqlalchemy.exc.IntegrityError):  # somebody was faster
                self._connection.execute(text("INSERT INTO nas_writers VALUES (:ledger, :me, :now)"), now)
                return self._begin()
            return "another writer"
        if time.time() - row.renewed < STALE and not _gone(row.holder):
            return str(row.holder).rpartition(",")[0]
        won = self._connection.execute(
            text(
                "UPDATE nas_writers SET holder = :me, renewed = :now WHERE ledger = :ledger AND holder = :was AND renewed = :then"
            ),
            {**now, "was": row.holder, "then": row.renewed},
        )
        return self._begin() if won.rowcount == 1 else "another writer"

    def check(self) -> None:
        if self._lost or time.monotonic() - self._renewed > STALE:
            raise UserError(
                f"ledger {self._ledger} could not be held; the same command goes on once the database answers"
            )

    def release(self) -> None:
        self._ended.set()
        self._connection.execute(
            text("DELETE FROM nas_writers WHERE ledger = :ledger AND holder = :me"),
            {"ledger": self._ledger, "me": self._me},
        )

    def _begin(self) -> str | None:
        self._renewed = time.monotonic()
        threading.Thread(target=self._renew, daemon=True).start()
        return None

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with suppress(sqlalchemy.exc.SQLAlchemyError), self._engine.connect() as connection:
                done = connection.execute(
                    text("UPDATE nas_writers SET renewed = :now WHERE ledger = :ledger AND holder = :me"),
                    {"ledger": self._ledger, "me": self._me, "now": time.time()},
                )
                if done.rowcount == 1:
                    self._renewed = time.monotonic()
                else:  # another writer has the row
                    self._lost = True


def _gone(holder: str) -> bool:
    """Whether the process was one of this machine and has ended."""
    process, _, rest = holder.removeprefix("process ").partition(" on ")
    machine, _, own = rest.rpartition(", ")
    if machine != socket.gethostname() or not process.isdigit():
        return False
    # Two containers may share a name, but not the numbers of their processes.
    elsewhere = ":" in own and own.partition(":")[2] != _namespace().removeprefix(":")
    return not elsewhere and not is_alive(int(process))


def _namespace() -> str:
    """In which this process has its number, where the system tells, behind a colon."""
    try:
        return ":" + "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    except OSError:
        return ""
