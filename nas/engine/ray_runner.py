"""The conductor's verbs under Ray Tune: warm workers keep supernet and features loaded from one trial to the next.

Ray Tune schedules, places and restarts workers; what was tried and what came of it stands in the ledger alone, so Tune's
own results are thrown away and its `restore` is not used.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from nas.base.failures import AGAIN
from nas.base.files import first_line
from nas.contracts import DONE, Schedule, Score, Signal, Step, UserError
from nas.engine.runner import Conductor, attempt
from nas.recipes import recipe
from nas.study import Study

if TYPE_CHECKING:
    from nas.contracts import LoadedEvaluator

# Read by Ray when it is imported. No usage reports; no log files per trial, since the ledger is the log; one state file at
# the end rather than one every few seconds.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is the caller's: Tune's own handler would end the run as if it had finished.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Ray on Linux listens on the machine's outer address; told that there is no cluster, on loopback alone. A token keeps other users of
# this machine out. Who joins a cluster says so by RAY_ADDRESS before this module is imported (`--ray-address` does); who has imported
# Ray before has settled it.
if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
from ray import tune
from ray.tune.search import Searcher as TuneSearcher
from ray.util import ActorPool

T = TypeVar("T")
R = TypeVar("R")


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


def run_on_ray(conductors: Sequence[Conductor], study: Study, folder: Path, workers: Workers) -> None:
    """Runs every job of the conductors on Ray workers, side by side. `folder` must be readable by all of them.

    Raises UserError where the cluster cannot be reached, never has room for a worker, or dies.
    """
    with cluster(workers), tempfile.TemporaryDirectory(prefix="nas-tune-") as scratch:
        resources = {"cpu": 1.0, "gpu": workers.gpus} if workers.gpus else {"cpu": 1.0}
        desk = _Desk.remote(min(workers.count, _room(resources)))  # type: ignore[attr-defined]
        # Workers start side by side; the bridge never has more trials under way than workers.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers.count)
        with _sent_by_value(study):
            device = "cuda" if workers.gpus else workers.device
            trainable = tune.with_parameters(
                _Worker, study=study, folder=str(folder.resolve()), device=device, desk=desk
            )
            bridge = _Bridge(conductors, workers.count, desk)
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    search_alg=bridge, num_samples=-1, reuse_actors=True, trial_dirname_creator=_short_name
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)
                ),
            )
            try:
                tuner.fit()
            except (tune.TuneError, ray.exceptions.RayError) as error:
                if bridge.error is None:
                    raise UserError(f"Ray ended the run ({first_line(error)}); {AGAIN}") from error
    if bridge.error is not None:
        raise bridge.error


def map_on_ray(
    make: Callable[[str], Callable[[T], R]], items: Sequence[T], study: Study, workers: Workers
) -> Iterator[R]:
    """`make(device)(item)` for each item, as they finish; each worker makes its function once. Neighbouring items go to the same
    worker.

    Raises UserError where the cluster cannot be reached or never has room for a worker.
    """
    resources = {"cpu": 1.0, "gpu": workers.gpus} if workers.gpus else {"cpu": 1.0}
    with cluster(workers), _sent_by_value(study):
        count = min(workers.count, _room(resources))
        size = max(1, min(8, len(items) // (4 * count)))
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        options = {"num_cpus": 1, "num_gpus": workers.gpus}
        device = "cuda" if workers.gpus else workers.device
        pool = ActorPool([_Mapper.options(**options).remote(make, device) for _ in range(count)])  # type: ignore[attr-defined]
        try:
            for results in pool.map_unordered(lambda actor, chunk: actor.run.remote(chunk), chunks):
                yield from results
        except ray.exceptions.RayError as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            raise UserError(f"a Ray worker failed ({first_line(cause)}); {AGAIN}") from error


@ray.remote
class _Mapper:
    """Makes its function when it is first needed, so that what goes wrong there is told like what goes wrong later."""

    def __init__(self, make: Callable[[str], Callable[[Any], Any]], device: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._make = partial(make, device)
        self._call: Callable[[Any], Any] | None = None

    def run(self, chunk: Sequence[Any]) -> list[Any]:
        self._call = self._call or self._make()
        return [self._call(item) for item in chunk]


class _Worker(tune.Trainable):  # type: ignore[misc]
    """One warm process. A trial of Tune's is a turn to do one job from the desk; between turns nothing is loaded again."""

    def setup(self, config: dict[str, Any], study: Study, folder: str, device: str, desk: Any) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            self._evaluate: LoadedEvaluator | _Broken = study.load(Path(folder), device)
        except Exception as error:  # a worker that cannot start says why in each trial that it is given
            self._evaluate = _Broken(error)
        self._desk = desk
        self._name = uuid4().hex
        ray.get(desk.arrived.remote(self._name))

    def step(self) -> dict[str, Any]:
        job: _Task = ray.get(self._desk.take.remote(self._name, self.trial_id))
        outcome = attempt(self._evaluate, Schedule.from_json(job.schedule), job.samples, job.seed)
        ray.get(self._desk.passed.remote())
        if isinstance(outcome, str):
            return {"number": json.dumps(job.number), "failure": outcome, "done": True}
        # As text: Tune flattens nested results.
        return {"number": json.dumps(job.number), "score": json.dumps(outcome.to_json()), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep: a worker has no state of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None: ...


@dataclass(frozen=True)
class _Task:
    """A job as it travels: no tensors. `number`: of the trial, and whose it is."""

    number: tuple[int, int]
    schedule: str
    samples: int
    seed: int

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        return Schedule.from_json(self.schedule).steps

    def kinship(self, other: _Task) -> int:
        """How many first steps the two have in common, for the same noise."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.steps, other.steps, strict=False))
        return sum(1 for _ in same) if self.seed == other.seed else 0


PATIENCE = 60.0
"""Seconds that a finished worker waits for others to start."""

REMEMBERED = 64
"""Jobs of each worker that the desk remembers, to send their kin the same way."""


@ray.remote(num_cpus=0)
class _Desk:
    """Where jobs lie until a worker takes one: the one that shares most with what that worker has run, whose states it keeps.

    It also holds a finished worker back while a trial under way still waits for its worker to start. Tune hands a free
    worker to any waiting trial and cancels the start of that trial's own worker: where an evaluation takes less time than a
    start, all but the first worker would be cancelled again and again and never run.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._alive: set[str] = set()
        self._under_way = 0
        self._changed = asyncio.Condition()
        self._waiting: list[_Task] = []
        self._taken: dict[str, tuple[str, tuple[int, int]]] = {}
        self._run: dict[str, deque[_Task]] = {}

    async def put(self, task: _Task) -> None:
        self._waiting.append(task)

    async def take(self, worker: str, turn: str) -> _Task:
        """There is a job for each turn."""
        before = self._run.setdefault(worker, deque(maxlen=REMEMBERED))
        chosen = max(self._waiting, key=lambda task: max((task.kinship(other) for other in before), default=0))
        self._waiting.remove(chosen)
        before.append(chosen)
        self._taken[turn] = worker, chosen.number
        return chosen

    async def lost(self, turn: str) -> tuple[int, int]:
        """The number of the job that a dead worker had taken, or was to take."""
        if turn not in self._taken:
            return self._waiting.pop(0).number
        worker, number = self._taken[turn]
        self._alive.discard(worker)
        return number

    async def arrived(self, worker: str) -> None:
        self._alive.add(worker)
        await self._notify()

    async def under_way(self, trials: int) -> None:
        self._under_way = trials
        await self._notify()

    async def passed(self) -> None:
        """Returns when each trial under way has a worker, as far as the cluster has room. Whoever does not come in time is not
        waited for again: others may use the cluster too."""
        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(lambda: len(self._alive) >= min(self._room, self._under_way))
        except TimeoutError:
            self._room = min(self._room, len(self._alive))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _short_name(trial: Any) -> str:
    return str(trial.trial_id)


class _Broken:
    """Stands where an evaluator could not be loaded."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        raise self._error


class _Bridge(TuneSearcher):  # type: ignore[misc]
    """Ray Tune asks and tells; the conductor answers and books.

    All but one of the workers have a job more on the desk than they can run, so that there is a choice of kin and no waiting.
    """

    def __init__(self, conductors: Sequence[Conductor], workers: int, desk: Any) -> None:
        super().__init__()
        self._conductors = conductors
        self._next = 0
        self._workers = workers
        self._desk = desk
        self._turns: set[str] = set()
        self._jobs: set[tuple[int, int]] = set()
        self._done = False
        self.error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its search algorithm for a restore that is never used."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is None and len(self._turns) >= self._workers:
            return None
        try:
            if self.error is None:
                self._fill_desk()
        except Exception as error:  # Tune would bury it in a report of its own
            self._note(error)
        if self.error is not None:
            return str(TuneSearcher.FINISHED)
        if len(self._turns) == len(self._jobs):
            return str(TuneSearcher.FINISHED) if self._done else None
        self._turns.add(trial_id)
        self._desk.under_way.remote(len(self._turns))
        return {"turn": trial_id}

    def _fill_desk(self) -> None:
        """In turn from each conductor that has a job."""
        without = 0
        done = 0
        while len(self._jobs) < 2 * self._workers - 1 and without < len(self._conductors):
            mine = self._next
            self._next = (mine + 1) % len(self._conductors)
            job = self._conductors[mine].next()
            if isinstance(job, Signal):
                without += 1
                done += job is DONE
                continue
            without = done = 0
            task = _Task((mine, job.trial.number), job.schedule.to_json(), job.samples, job.seed)
            ray.get(self._desk.put.remote(task))
            self._jobs.add(task.number)
        self._done = done == len(self._conductors)

    def _note(self, error: Exception) -> None:
        """What ends the run."""
        if isinstance(error, ray.exceptions.RayError):
            error = UserError(f"a part of the Ray cluster died ({first_line(error)}); {AGAIN}")
        self.error = self.error or error

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        try:
            if trial_id in self._turns and self.error is None:
                self._complete(trial_id, result, error)
        except Exception as reason:
            self._note(reason)

    def _complete(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        self._turns.remove(trial_id)
        self._desk.under_way.remote(len(self._turns))
        if result and "number" in result and not error:
            outcome = Score.from_json(json.loads(result["score"])) if "score" in result else str(result["failure"])
            mine, trial = json.loads(result["number"])
            number = (int(mine), int(trial))
        else:
            number, outcome = ray.get(self._desk.lost.remote(trial_id)), "the worker died before it returned a score"
        self._jobs.remove(number)
        self._conductors[number[0]].settle(number[1], outcome)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the ledger is the only memory."""

    def restore(self, checkpoint_path: str) -> None:
        raise UserError("Ray Tune's restore is not used; run the same `nas run` command again")


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


def _room(resources: dict[str, float]) -> int:
    """How many workers the cluster holds at once. A request that no node can ever meet would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name.upper(), 0) // amount for name, amount in resources.items())) for node in nodes)
    if not room:
        raise UserError(
            f"no node of the Ray cluster has room for a worker with {resources}; lower --gpus-per-worker or add nodes"
        )
    return room


@contextmanager
def _sent_by_value(study: Study) -> Iterator[None]:
    """Workers cannot import the study file: its classes travel inside the pickle."""
    parts = (study, study.space, study.supernet, study.images, study.training, study.evaluator)
    names = {type(part).__module__ for part in parts} | {name for name in sys.modules if name.startswith("nas_study_")}
    modules = [sys.modules[name] for name in names if name in sys.modules and not _importable(name)]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Whether a worker finds the module: it belongs to an installed package, not to a study file or a script."""
    return name.split(".")[0] in ("nas", "search_spaces", "evaluators") or "site-packages" in (
        getattr(sys.modules[name], "__file__", None) or ""
    )
