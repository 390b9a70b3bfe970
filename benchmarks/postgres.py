"""A PostgreSQL server of its own on loopback, for as long as it is needed, from Debian's package."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def installed() -> Path | None:
    """The folder of its programs; None where the package is missing, or this user may not become `postgres`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").exists() else []
    return found[-1] if found and os.getuid() == 0 else None


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of an empty database whose files lie in the folder."""
    programs = installed()
    if programs is None:
        raise SystemExit("error: needs Debian's package postgresql, and root, who starts it as the user postgres")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in (folder, *folder.parents):  # the user postgres has to come by
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    shutil.chown(folder, "postgres")
    as_user = ["runuser", "-u", "postgres", "--"]
    command = [*as_user, str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust"]
    subprocess.run(command, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    run = subprocess.Popen(
        [*as_user, str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port), *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        for _ in range(200):
            if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        run.terminate()
        run.wait()
