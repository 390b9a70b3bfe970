"""Where ledgers are kept: the run folder's journal, or any database that Optuna knows; who holds the folder; and what is shown of a URL."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages import BaseStorage, JournalStorage

from nas.base.files import first_line
from nas.contracts import UserError
from nas.engine.journal import JOURNAL, CheckedJournal, prepare, verify

OPEN_TO_SEE = {
    "application_name", "channel_binding", "charset", "client_encoding", "connect_timeout", "dbname", "gssencmode", "host", "hostaddr",
    "keepalives", "keepalives_idle", "port", "sslcert", "sslmode", "sslrootcert", "target_session_attrs", "timeout", "user",
}  # fmt: skip
"""What a URL's query may say to everybody; the value of anything else is a secret."""


TRIES = 6


def lock_run(folder: Path) -> filelock.BaseFileLock:
    """Holds the run folder until released or until this process ends, however it ends.

    Raises UserError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "lock.pid"
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        holder = owner.read_text() if owner.exists() else "unknown"
        raise UserError(
            f"run folder {folder} is in use by process {holder}; wait for it, stop it, or use another --out"
        ) from None
    owner.write_text(f"{os.getpid()} on {socket.gethostname()}")
    return lock


def open_storage(folder: Path, url: str | None = None, writing: bool = False) -> BaseStorage:
    """The run's Optuna storage: `url`, or the journal file in the run folder.

    `writing`, for the holder of the run lock alone, drops what a killed run left: a torn last line, a stale file lock.
    Raises UserError where the storage cannot be opened, naming the line where the journal is damaged.
    """
    if url is None:
        path = folder.resolve() / JOURNAL
        if writing:
            prepare(path)
        elif not path.exists():
            raise UserError(f"{path} does not exist; `nas run` writes it")
        else:
            verify(path)
        try:
            return JournalStorage(CheckedJournal(path))
        except OSError:
            raise
        except Exception as error:  # records that were never Optuna's
            raise UserError(
                f"{path} cannot be read ({first_line(error)}); `nas repair {folder}` keeps every whole trial"
            ) from error
    check_url(url)
    parts = _parts(url)
    if not writing and parts.drivername.startswith("sqlite") and parts.database not in (None, "", ":memory:"):
        file = Path(parts.database)
        if "uri" not in parts.query and not file.exists():  # or it would be made, by who looks alone
            raise UserError(f"storage {shown_url(url)} cannot be opened: there is no file {file}; check --storage")
    for attempt in range(TRIES):
        try:
            return optuna.storages.get_storage(url)
        except (
            Exception
        ) as error:  # each backend has exceptions of its own, from drivers that may not even be installed
            # Two who open a new database at once both make its tables, and one fails.
            if attempt + 1 < TRIES and any(
                words in str(error).lower() for words in ("unique", "already exists", "locked")
            ):
                time.sleep(0.2 * (attempt + 1))
                continue
            reason = without_secrets(first_line(error), url)
            raise UserError(f"storage {shown_url(url)} cannot be opened ({reason}); check --storage") from None
    raise AssertionError


def close_storage(storage: BaseStorage) -> None:
    """Lets go of a database's connections; a journal has none."""
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    if engine is not None:
        engine.dispose()


def check_url(url: str) -> None:
    """Raises UserError, without the URL, where it cannot be taken apart."""
    if _parts(url) is None:
        raise UserError(
            f"storage {shown_url(url)} is no database URL, such as postgresql+psycopg://user@host:5432/name or sqlite:///file.db; characters such "
            "as '@', ':' and '/' in a password are percent-encoded"
        )
    if (database := _parts(url).database) and database.startswith("~"):
        raise UserError(
            f"storage {shown_url(url)}: its path begins with ~, which no database takes for the home folder; write it out"
        )


def check_answers(url: str) -> None:
    """Raises UserError where there is no such database, or it does not answer. Makes nothing."""
    import sqlalchemy

    check_url(url)
    parts = _parts(url)
    try:
        if parts.drivername.startswith("sqlite"):
            if parts.database and not Path(parts.database).resolve().parent.is_dir():
                raise FileNotFoundError(f"folder {Path(parts.database).parent} does not exist")
            return
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool)
        engine.connect().close()
    except Exception as error:  # each driver has exceptions of its own, and may not even be installed
        reason = without_secrets(first_line(error), url)
        raise UserError(f"storage {shown_url(url)} cannot be opened ({reason}); check --storage") from None


def shown_url(url: str) -> str:
    """For messages: without the password and whatever else may be secret."""
    parts = _parts(url)
    if parts is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
        return f"{scheme[0]}://..." if scheme else "..."
    return _rendered(parts, lambda key: "***")


def kept_url(url: str) -> str:
    """For files: without secrets, which are given anew by --storage or by the database's own environment; a file of SQLite's wherever a command is typed."""
    parts = _parts(url)
    if parts is not None and parts.drivername.startswith("sqlite") and parts.database not in (None, "", ":memory:"):
        parts = parts.set(database=str(Path(parts.database).resolve()))
    return shown_url(url) if parts is None else _rendered(parts, lambda key: None)


def without_secrets(text: str, url: str) -> str:
    """A message of a driver's, with nothing of the URL that is not shown."""
    parts = _parts(url)
    secrets = {url} if parts is None else {url, parts.password, *(v for k, v in _query(parts) if k not in OPEN_TO_SEE)}
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _parts(url: str) -> Any:
    """The URL taken apart, or None. What stands after an '@' that should have been encoded would count as the host."""
    import sqlalchemy

    try:
        parts = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return None
    bare = url.partition("?")[0].partition("://")[2]
    sqlite = parts.drivername.startswith("sqlite")
    return parts if sqlite or bare.count("@") <= 1 else None


def _query(parts: Any) -> list[tuple[str, str]]:
    pairs = ((key, value if isinstance(value, tuple) else (value,)) for key, value in parts.query.items())
    return [(key, value) for key, values in pairs for value in values]


def _rendered(parts: Any, secret: Any) -> str:
    import sqlalchemy

    query = {key: value if key in OPEN_TO_SEE else secret(key) for key, value in parts.query.items()}
    bare = sqlalchemy.engine.URL.create(
        parts.drivername,
        parts.username,
        None,
        parts.host,
        parts.port,
        parts.database,
        {key: value for key, value in query.items() if value is not None},
    )
    rendered: str = bare.render_as_string(hide_password=False)
    return rendered.replace("%2A%2A%2A", "***")
