"""The conductor's verbs under Ray Tune: warm workers keep supernet and features loaded from one trial to the next.

Ray Tune schedules, places and restarts workers; what was tried and what came of it stands in the ledger alone, so Tune's
own results are thrown away and its `restore` is not used.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from nas.base.failures import AGAIN
from nas.base.files import first_line
from nas.contracts import DONE, Schedule, Score, Signal, Step, UserError
from nas.engine.cluster import Workers, cluster, room_for
from nas.engine.runner import Conductor, attempt
from nas.study import Study

if TYPE_CHECKING:
    from nas.contracts import LoadedEvaluator

# Read by Ray Tune when it is imported. No log files per trial, since the ledger is the log; one state file at the end rather than one
# every few seconds.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is the caller's: Tune's own handler would end the run as if it had finished.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

import ray
from ray import tune
from ray.tune.search import Searcher as TuneSearcher
from ray.util import ActorPool

T = TypeVar("T")
R = TypeVar("R")


def run_on_ray(conductors: Sequence[Conductor], study: Study, folder: Path, workers: Workers) -> None:
    """Runs every job of the conductors on Ray workers, side by side. `folder` must be readable by all of them.

    Raises UserError where the cluster cannot be reached, never has room for a worker, or dies.
    """
    _give_back()
    with cluster(workers), tempfile.TemporaryDirectory(prefix="nas-tune-") as scratch:
        resources = {"cpu": 1.0, "gpu": workers.gpus} if workers.gpus else {"cpu": 1.0}
        desk = _Desk.remote(min(workers.count, room_for(resources)))  # type: ignore[attr-defined]
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
        count = min(workers.count, room_for(resources))
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
            if trial_id in self._turns:  # what has ended is booked, whatever ends the run
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


def _give_back() -> None:
    """What this process has freed of a GPU's memory is the workers'."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _sent_by_value(study: Study) -> Iterator[None]:
    """Workers cannot import the study file, nor what lies beside it: their classes travel inside the pickle."""
    parts = (study, study.space, study.supernet, study.images, study.training, study.evaluator)
    names = {type(part).__module__ for part in parts} | {name for name in sys.modules if name.startswith("nas_study_")}
    folders = {Path(file).parent for name in names if name.startswith("nas_study_") and (file := _file_of(name))}
    folders.discard(Path.cwd())  # what lies there a worker imports
    names |= {name for name in [*sys.modules] for folder in folders if _lies_in(folder, name)}
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
    return name.split(".")[0] in ("nas", "search_spaces", "evaluators") or "site-packages" in _file_of(name)


def _lies_in(folder: Path, name: str) -> bool:
    """Whether it is imported from this folder, rather than from an installation somewhere below it."""
    own = folder.joinpath(*name.split("."))
    return _file_of(name) in (f"{own}.py", str(own / "__init__.py"))


def _file_of(name: str) -> str:
    return getattr(sys.modules[name], "__file__", None) or ""
