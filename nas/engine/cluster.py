"""A Ray cluster to run on: started here and closed to others, or joined; watched while it is used, and left when it is dead."""

from __future__ import annotations

import _thread
import atexit
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nas.base.failures import AGAIN
from nas.base.files import first_line
from nas.contracts import UserError
from nas.recipes import recipe

# Read by Ray when it is imported. No usage reports.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray on Linux listens on the machine's outer address; told that there is no cluster, on loopback alone. A token keeps other users of
# this machine out. Who joins a cluster says so by RAY_ADDRESS before this module is imported (`--ray-address` does); who has imported
# Ray before has settled it.
if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray

log = logging.getLogger("nas")

CLOSED = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0" and os.environ.get("RAY_AUTH_MODE") == "token"
"""Whether a cluster that is started here is closed to others."""


@recipe
class Workers:
    """`count` workers of one CPU each and `gpus` GPUs each (a fraction shares one), on this machine or on the cluster at
    `address`. With GPUs the workers' device is "cuda", else `device`."""

    count: int = 2
    gpus: float = 0.0
    address: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.count < 1 or self.gpus < 0:
            raise UserError(
                f"{self.count} workers with {self.gpus:g} GPUs each cannot run; use at least 1 worker and no negative share"
            )
        if self.device.startswith("cuda") and not self.gpus:
            raise UserError(
                f"{self.count} workers on {self.device} must say how much of a GPU each takes; give --gpus-per-worker, 1 for one each, 0.5 for two on one "
                "(Workers(count, gpus) in Python)"
            )


@contextmanager
def cluster(workers: Workers) -> Iterator[None]:
    """A cluster to run on: the one already joined by this process, the one at the address, or a local one. Whoever runs several things holds
    it around all of them.

    Raises UserError where it cannot be used, and where it dies meanwhile.
    """
    if ray.is_initialized():
        yield
        return
    check_workers(workers)
    if workers.address:
        with _Watch(
            f"what listens at {workers.address} is no Ray cluster that answers; mend --ray-address", STARTS_WITHIN
        ):
            _join(workers)
    else:
        _join(workers)
    mine = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    places = (ray.get_runtime_context().gcs_address, f"{mine['NodeManagerAddress']}:{mine['NodeManagerPort']}")
    try:
        with _Watch(f"the Ray cluster at {places[0]} died; {AGAIN}", None, places) as watch, _witness(watch):
            yield
    finally:
        _leave(dead=watch.died.is_set())


class _Watch:
    """Interrupts the main thread, and raises UserError in its stead, when nobody answers any more at one of the places, or `seconds` have
    passed. Ray's calls wait for a dead head for a minute, deaf to interrupts: where the main thread does not hear, the process is ended here.
    The ledger needs no goodbye."""

    EVERY, PATIENCE = 0.2, 3

    def __init__(self, message: str, seconds: float | None, places: Sequence[str] = ()) -> None:
        self.died = threading.Event()
        self.message = message
        self.places = places
        self._until = math.inf if seconds is None else time.monotonic() + seconds
        self._ended = threading.Event()

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        if self.died.is_set() and isinstance(error, KeyboardInterrupt | ray.exceptions.RayError):
            raise UserError(self.message) from None
        if isinstance(error, ray.exceptions.RayError):
            raise UserError(f"Ray failed ({first_line(error)}); {AGAIN}") from error

    def _look(self) -> None:
        missed = 0
        while not self._ended.wait(self.EVERY):
            missed = 0 if all(map(_listens, self.places)) else missed + 1
            if missed < self.PATIENCE and time.monotonic() < self._until:
                continue
            self.died.set()
            _thread.interrupt_main()
            if not self._ended.wait(2.0):
                if not self.places:  # else its witness says why
                    sys.stderr.write(f"error: {self.message}\n")
                    sys.stderr.flush()
                _leave(dead=True)
                os._exit(1)
            return


WITNESS = """
import socket, sys
message, *places = sys.argv[1:]
def listens(place):
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True
if not sys.stdin.buffer.read() and not all(map(listens, places)):
    sys.stderr.write(f"error: {message}\\n")
"""
"""Run beside this process: Ray ends a process that touches a dead node's memory without a word, so somebody else has to say it."""


@contextmanager
def _witness(watch: _Watch) -> Iterator[None]:
    command = [sys.executable, "-I", "-c", WITNESS, watch.message, *watch.places]
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with suppress(OSError):
            witness.communicate(b"the end was seen here")


def _listens(place: str) -> bool:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def _end_at_once() -> None:
    """Before Ray's own handlers, which wait a minute for the dead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _leave(dead: bool) -> None:
    """Ends a local cluster, or leaves one that was joined. Who waits for a dead one to say goodbye waits for ever."""
    if not dead:
        ray.shutdown()
        return
    atexit.register(_end_at_once)
    node = ray._private.worker._global_node
    if node is not None and node.head:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


STARTS_WITHIN = 24.0
"""Seconds within which a cluster answers that is there at all."""

LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket."""


def check_workers(workers: Workers) -> None:
    """Raises UserError where it can be told beforehand that the cluster cannot be used: nobody listens at its address, or the folder for its
    sockets has too long a path."""
    if workers.address:
        _check_listening(workers.address)
    else:
        folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        longest = folder / "ray" / "session_2026-01-01_00-00-00_000000_0000000" / "sockets" / "plasma_store"
        if len(os.fsencode(longest)) > LONGEST_SOCKET:
            raise UserError(
                f"temporary folder {folder} has too long a path for Ray's sockets, which may have {LONGEST_SOCKET} bytes; set RAY_TMPDIR to a "
                "short one, such as /tmp"
            )


def _check_listening(address: str) -> None:
    bare = address.partition("://")[2] or address
    host, _, port = bare.rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"Ray address {address!r} is not HOST:PORT, such as 10.0.0.5:6379, nor auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except OSError as error:
        raise UserError(
            f"nobody listens at the Ray address {address} ({first_line(error)}); start the cluster, or mend --ray-address"
        ) from None


def _join(workers: Workers) -> None:
    # What goes wrong is told once, by an error of ours.
    quiet = {"log_to_driver": False, "logging_level": "critical"}
    try:
        if workers.address:
            ray.init(address=workers.address, **quiet)
        else:
            memory = 200 * 2**20
            if not CLOSED:
                log.warning(
                    "this machine's Ray cluster may be reached by others: ray was imported before nas.engine.cluster, or RAY_ADDRESS, RAY_AUTH_MODE or "
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER say something else than it does"
                )
            ray.init(
                "local",
                num_cpus=workers.count,
                object_store_memory=memory,
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                **quiet,
            )
        # Ray prints what happens to its processes whatever the settings, a log's last lines included.
        ray._private.worker.print_to_stdstream = lambda *given, **settings: None
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"Ray at {workers.address or 'this machine'} cannot be used ({first_line(error)})") from error


def room_for(resources: Mapping[str, float]) -> int:
    """How many workers the cluster holds at once. A request that no node can ever meet would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Sums of fractions of a GPU fall short of 1 by rounding.
    room = sum(
        int(min(node.get(name.upper(), 0) / amount + 1e-9 for name, amount in resources.items())) for node in nodes
    )
    if not room:
        raise UserError(
            f"no node of the Ray cluster has room for a worker with {resources}; lower --gpus-per-worker or add nodes"
        )
    return room
